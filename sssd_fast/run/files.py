"""Atomic writes: a reader or a crash finds the old or the new content, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sssd_fast.errors import ConfigError, SssdError


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """An open, hidden file that replaces `path` durably at the end; an exception removes it.

    Raises SssdError with the path and the free space; an old file is then intact.
    """
    path = Path(path)
    # in the same folder: a rename is atomic only within a file system
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save turns an OSError into a RuntimeError about positions
        raise SssdError(cannot_write(path, error)) from error
    finally:
        # renamed, or a folder that became read-only: the error that matters is already raised
        with contextlib.suppress(OSError):
            temporary.unlink()


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces `path` by `data`; errors as in `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, newlines as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def _sync_folder(folder: Path) -> None:
    """Makes the renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def user_cache() -> Path:
    """Folder of everything that this package keeps between runs; it can be emptied at any time.

    Raises ConfigError if the user has no home folder.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        # some containers have neither HOME nor an entry in the list of users
        raise ConfigError(f"no cache folder: {error}; set HOME or XDG_CACHE_HOME") from error
    return Path(base, "sssd_fast")


# errno of files and folders that cannot be used as they are
UNUSABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EMFILE, errno.ESTALE),
)


def unusable_file(error: OSError) -> str | None:
    """The message for an OSError that a full, read-only, protected or damaged place causes, else
    None.
    """
    if error.errno not in UNUSABLE:
        return None
    if error.filename is None:
        return f"{error.strerror}: free some space, check the permissions, or use another folder"
    path = Path(os.fsdecode(error.filename))
    folder = existing_folder(path)
    free_gib = shutil.disk_usage(folder).free / 2**30
    return (
        f"{path}: {error.strerror} ({free_gib:.2f} GiB free in {folder}). Free some space, check "
        "the permissions, or use another folder"
    )


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
