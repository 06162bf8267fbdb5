"""Unpack a downloaded data set without letting it write anywhere else.

Only regular files and folders come out: absolute paths, `..`, links, devices, duplicate names, encrypted members and
bombs (total size, or far more than the archive itself holds) are refused before the first byte is written. The target
appears complete or not at all.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from sssd_fast.data.images import shown
from sssd_fast.data.manifest import first_lines
from sssd_fast.errors import DataError

MAX_BYTES = 64 * 2**30
MAX_RATIO = 200  # unpacked over packed; images hardly compress, and text stays below 20
_RATIO_FREE = 16 * 2**20  # bytes up to which the ratio does not matter
_CHUNK = 2**20


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_folder: bool
    problem: str | None
    open: Callable[[], IO[bytes]]


def extract_archive(
    archive: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_BYTES,
    max_ratio: float = MAX_RATIO,
) -> Path:
    """Unpack a .zip, .tar, .tar.gz (.tgz), .tar.bz2 or .tar.xz into the new folder `out` and return it.

    Raises DataError: `out` exists, not an archive, damaged, or anything unsafe inside (every unsafe member is listed).
    """
    source, target = Path(archive), Path(out)
    if target.exists():
        raise DataError(f"{target} exists; name a new folder or delete it")
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with _members(
            source, min(max_bytes, max(_RATIO_FREE, max_ratio * source.stat().st_size))
        ) as members:
            total = _refuse_unsafe(source, members, max_bytes, max_ratio)
            _write(part, members, total)
        part.chmod(0o755)  # mkdtemp makes it private
        os.replace(part, target)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        OSError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise DataError(
            f"{source}: cannot be unpacked ({type(error).__name__}: {error})"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


@contextmanager
def _members(source: Path, limit: float) -> Iterator[list[_Member]]:
    """The table of contents, cut where the sizes pass `limit`: the next header of a tar bomb lies behind its zeros."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as pack:
            yield [_zip_member(pack, info) for info in pack.infolist()]
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            members, total = [], 0
            for info in tar:
                members.append(_tar_member(tar, info))
                total += info.size
                if total > limit:
                    break
            yield members
    else:
        raise DataError(f"{source}: neither a zip nor a tar archive")


def _zip_member(pack: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = (
        info.external_attr >> 16
    ) & 0o170000  # Unix file type, 0 where the archive was made elsewhere
    problem = None
    if kind not in (0, 0o100000, 0o040000):
        problem = "is a link or device"
    elif info.flag_bits & 1:
        problem = "is encrypted"
    # orig_filename: before zipfile cut it at a NUL byte
    return _Member(
        info.orig_filename, info.file_size, info.is_dir(), problem, lambda: pack.open(info)
    )


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    def read() -> IO[bytes]:
        stream = tar.extractfile(info)
        assert stream is not None  # only links and devices have none, and those were refused
        return stream

    problem = None if info.isfile() or info.isdir() else "is a link or device"
    return _Member(info.name, info.size, info.isdir(), problem, read)


def _refuse_unsafe(source: Path, members: list[_Member], max_bytes: int, max_ratio: float) -> int:
    problems = []
    seen: set[str] = set()
    for member in members:
        path = PurePosixPath(member.name)
        problem = member.problem
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
            problem = "leaves the folder, or holds a backslash or NUL"
        elif not path.parts and not member.is_folder:
            problem = "has no name"
        elif path.as_posix().casefold() in seen and not member.is_folder:
            problem = "comes twice (names that differ only in case count as the same)"
        seen.add(path.as_posix().casefold())
        if problem:
            problems.append(f"{shown(member.name)} {problem}")
    total = sum(member.size for member in members)
    if total > max_bytes:
        problems.append(f"{total} bytes unpacked, over the limit of {max_bytes} (max_bytes)")
    packed = source.stat().st_size
    if total > _RATIO_FREE and total > max_ratio * packed:
        problems.append(
            f"{total} bytes out of {packed}, over {max_ratio:g} times (max_ratio): a decompression bomb?"
        )
    if problems:
        listed = "\n".join(first_lines(problems))
        raise DataError(f"{source}: refused, nothing was unpacked\n{listed}")
    return total


def _write(part: Path, members: list[_Member], total: int) -> None:
    left = total
    for member in members:
        place = part.joinpath(*PurePosixPath(member.name).parts)
        if member.is_folder:
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as stream, open(place, "xb") as file:
            while chunk := stream.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise DataError(
                        f"{shown(member.name)} holds more bytes than the archive announces: refused"
                    )
                file.write(chunk)
