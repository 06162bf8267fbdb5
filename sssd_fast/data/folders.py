"""Folders of data files: read without gaps, written completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sssd_fast.data.images import printable
from sssd_fast.errors import DataError


def walk_files(root: Path) -> Iterator[Path]:
    """Every file below `root`, sorted within its folder, without hidden names and linked folders.

    Raises DataError if a folder cannot be listed: its files would be missing without a message.
    """

    def refuse(error: OSError) -> None:
        where = printable(str(error.filename))
        raise DataError(f"{where}: folder cannot be read ({error.strerror})") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, renamed to it at the end; on any error it is removed.

    Raises DataError if `target` exists and is not an empty folder, or if it cannot be written.
    """
    name = printable(str(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{name} exists and is not empty; name another folder or delete it")
    absolute = target.absolute()
    unfinished = None
    try:
        absolute.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=absolute.parent, prefix=f".{absolute.name}."))
        yield unfinished
        # mkdtemp makes the folder private
        unfinished.chmod(0o755)
        os.replace(unfinished, absolute)
    except OSError as error:
        parent = next(folder for folder in absolute.parents if folder.exists())
        free_gib = shutil.disk_usage(parent).free / 2**30
        raise DataError(
            f"cannot write {name}: {error.strerror or error} ({free_gib:.2f} GiB free); nothing "
            "was kept. Free some space, check the permissions, or name another folder."
        ) from None
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
