"""Atomic writes: readers and crashes see the old content of a file or the new, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sssd_fast.errors import SssdError


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces `path` by `data`: readers and crashes see the old content or the new, never a mixture.

    Raises SssdError naming the path and the free space when the file cannot be written; the old file is then intact.
    """
    path = Path(path)
    try:
        _replace(path, data)
    except OSError as error:
        raise SssdError(_cannot_write(path, error)) from error


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, newlines as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def _replace(path: Path, data: bytes) -> None:
    with _temporary(path) as (temporary, file):
        file.write(data)
        _sync(file)
        os.replace(temporary, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """An open, locked, hidden file beside `path` (a rename is atomic only inside one file system); removed unless
    renamed.

    The lock is how `remove_leftovers` of another process tells a file being written from one whose writer was killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "xb") as file:
            _lock(file)
            yield temporary, file
    finally:
        with contextlib.suppress(
            OSError
        ):  # renamed, or a folder that no longer lets us write: the real error is on its way
            temporary.unlink()


def _lock(file: BinaryIO) -> None:
    with contextlib.suppress(
        OSError
    ):  # a file system without locks: leftovers are then kept, not deleted
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Deletes the temporary files in `folder` whose writers no longer live; returns them."""
    removed = []
    for path in Path(folder).glob(".*.tmp"):
        with (
            contextlib.suppress(OSError),
            open(path, "rb") as file,
        ):  # locked by a living writer, or gone already
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path)
    return removed


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable. Some network file systems cannot sync a folder; they say so with EINVAL or ENOTSUP."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: BaseException) -> str:
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    free_gib = shutil.disk_usage(folder).free / 2**30
    return (
        f"cannot write {path}: {reason} ({free_gib:.2f} GiB free in {folder}); what was there before is intact. "
        "Free some space, check the permissions, or choose another run folder."
    )
