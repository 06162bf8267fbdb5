"""Atomic writes: a reader or a crash finds the old or the new content, never a mixture."""

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
    """Replaces `path` by `data` atomically and durably.

    Raises SssdError naming the path and the free space if it cannot be written; the old file is
    then intact.
    """
    path = Path(path)
    try:
        replace_file(path, data)
    except OSError as error:
        raise SssdError(cannot_write(path, error)) from error


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, newlines as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def replace_file(path: Path, data: bytes) -> None:
    """`atomic_write_bytes` that raises OSError."""
    with temporary_file(path) as (temporary, file):
        file.write(data)
        sync_file(file)
        os.replace(temporary, path)
        sync_file(path.parent)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """An open, locked, hidden file in the folder of `path`; removed at the end unless renamed.

    A rename is atomic only within a file system, hence the folder. The lock tells
    `remove_leftovers` of another process that the writer is alive.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "xb") as file:
            # on a file system without locks, leftovers are kept
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield temporary, file
    finally:
        # renamed, or a folder that became read-only: the error that matters is already raised
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary files in `folder` whose writers are dead."""
    for path in folder.glob(".*.tmp"):
        # fails if a living writer holds the lock, or the file is gone
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def sync_file(target: BinaryIO | Path) -> None:
    """Makes the writes to an open file, or the renames in a folder, durable."""
    if not isinstance(target, Path):
        target.flush()
        os.fsync(target.fileno())
        return
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def existing_folder(path: Path) -> Path:
    """`path`, or the closest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def cannot_write(path: Path, error: BaseException) -> str:
    """The message of an error for a failed write to `path`."""
    folder = existing_folder(path.parent)
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    free_gib = shutil.disk_usage(folder).free / 2**30
    return (
        f"cannot write {path}: {reason} ({free_gib:.2f} GiB free in {folder}); existing files are "
        "intact. Free some space, check the permissions, or choose another run folder."
    )
