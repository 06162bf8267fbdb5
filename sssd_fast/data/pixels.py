"""Decode once: all images of an index as uint8, back to back in one memory-mapped file that later runs open at once.

The file's name is a hash over the content of every image, so it can never belong to other data. It is written beside its
final name and renamed when it is whole: a process that is killed leaves no half cache, and what it left is removed by the
next one that builds. Every image carries a CRC-32, looked at on opening; a damaged cache is said so and made anew.

File: magic, length of the header, header (JSON), CRC-32 per image, then at a multiple of 4096 the pixels, [H, W, C] each.
Shapes: N images of the index, T bytes in all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sssd_fast.data.images import ImageArray, ImageError, decode_bytes, read_file, to_channels
from sssd_fast.data.index import DataIndex, Progress
from sssd_fast.errors import ConfigError

_MAGIC = b"SSSDPIX1"  # to be changed when images.py decodes by other rules
_ALIGN = 4096
_SUFFIX = ".pixels"


@dataclass(frozen=True)
class PixelStore:
    """N decoded images. Image i is pixels[offsets[i]:] as [heights, widths, channels] of shapes[i]."""

    pixels: Tensor  # uint8 [T], memory-mapped where `path` is set; not to be written to
    offsets: npt.NDArray[np.int64]  # [N]
    shapes: npt.NDArray[np.int64]  # [N, 2] heights and widths
    channels: int
    path: Path | None  # of the cache file
    origin: str  # where the pixels came from, for people

    @property
    def nbytes(self) -> int:
        return self.pixels.numel()

    def image(self, i: int) -> ImageArray:
        """[H, W] for one channel, else [H, W, C]; a view."""
        height, width = (int(n) for n in self.shapes[i])
        flat = self.pixels[int(self.offsets[i]) :][: height * width * self.channels].numpy()
        return flat.reshape(
            (height, width) if self.channels == 1 else (height, width, self.channels)
        )


def read_record(index: DataIndex, i: int) -> bytes:
    """The file of record i. Raises ImageError when it cannot be read, or is not the file that was checked."""
    record, path = index.records[i], str(index.file(i))
    try:
        data = read_file(path)
    except ImageError as error:
        raise changed(path, error.reason) from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        try:
            decode_bytes(data, path)
        except ImageError as error:
            raise changed(path, error.reason) from error
        raise changed(path, "another picture than the one that was checked")
    return data


def changed(path: str, reason: str) -> ImageError:
    return ImageError(
        path,
        f"{reason}; it was good when the data were checked: restore it, or run `sssd-fast data check` again",
    )


def decode_record(index: DataIndex, i: int, channels: int) -> ImageArray:
    """Record i as uint8 [H, W] (channels 1) or [H, W, 3]. Raises ImageError as `read_record` does."""
    return to_channels(decode_bytes(read_record(index, i), str(index.file(i))).pixels, channels)


def decoded_bytes(index: DataIndex, channels: int) -> int:
    """What all images of the index take when they are decoded."""
    return sum(r.height * r.width for r in index.records) * channels


def cache_folder(setting: str) -> Path | None:
    """data.cache: "none" = no file, "auto" = the user's cache folder, else a folder. Raises ConfigError without a home."""
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting)
    try:
        return Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sssd_fast", "pixels"
        )
    except (
        RuntimeError
    ) as error:  # some containers give a process neither HOME nor an entry in the list of users
        raise ConfigError(
            f"data.cache is auto, but {error}; set it to a folder or none, or set HOME"
        ) from error


def open_store(
    index: DataIndex,
    channels: int,
    folder: Path | None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    log: Callable[[str], object] = lambda text: None,
) -> PixelStore:
    """All images of `index`, from the cache file in `folder`, or decoded and written there; None keeps them in memory.

    A folder that cannot hold the file (full, read-only) is told through `log` and the pixels stay in memory. Of several
    processes one decodes and the others wait for its file. Raises ImageError naming a file that can no longer be read.
    """
    if folder is None:
        return _decode_to_memory(index, channels, threads, progress)
    path = folder / (store_key(index, channels) + _SUFFIX)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(path, log):
            store = _open(path, index, channels, threads, log)
            if store is None:
                start = time.perf_counter()
                _decode_to_file(path, index, channels, threads, progress)
                store = _open(path, index, channels, threads, log)
                if store is not None:
                    store = replace(store, origin=_decoded_in(start))
            if store is not None:
                return store
            log(
                f"{path} reads back damaged right after it was written; the decoded images are kept in memory instead"
            )
    except OSError as error:  # of the cache: what is wrong with an image is an ImageError
        log(
            f"no cache in {folder} ({error.strerror or error}); the decoded images are kept in memory. Set data.cache to a folder"
        )
    return _decode_to_memory(index, channels, threads, progress)


def store_key(index: DataIndex, channels: int) -> str:
    digest = hashlib.sha256(json.dumps([_MAGIC.decode(), channels]).encode())
    for r in index.records:
        digest.update(json.dumps([r.sha256, r.height, r.width]).encode())
    return digest.hexdigest()[:32]


def _layout(
    index: DataIndex, channels: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Offsets [N] and shapes [N, 2] of the images, and T."""
    shapes = np.array([(r.height, r.width) for r in index.records], dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum(shapes.prod(1) * channels)
    return ends - shapes.prod(1) * channels, shapes, int(ends[-1]) if len(ends) else 0


def _decode_all(
    index: DataIndex,
    channels: int,
    threads: int,
    progress: Progress | None,
    put: Callable[[int, npt.NDArray[np.uint8]], object],
) -> None:
    """Calls put(i, flat pixels) for every image, from several threads: Pillow and hashlib release the interpreter lock."""

    def one(i: int) -> None:
        put(i, np.ascontiguousarray(decode_record(index, i, channels)).reshape(-1))

    pool = ThreadPoolExecutor(max(1, threads))
    try:
        for done, _ in enumerate(pool.map(one, range(len(index))), 1):
            if progress is not None:
                progress(done, len(index))
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_to_memory(
    index: DataIndex, channels: int, threads: int, progress: Progress | None
) -> PixelStore:
    offsets, shapes, total = _layout(index, channels)
    pixels, start = torch.empty(total, dtype=torch.uint8), time.perf_counter()
    array = pixels.numpy()

    def put(i: int, flat: npt.NDArray[np.uint8]) -> None:
        array[offsets[i] : offsets[i] + len(flat)] = flat

    _decode_all(index, channels, threads, progress, put)
    return PixelStore(pixels, offsets, shapes, channels, None, _decoded_in(start))


def _decoded_in(start: float) -> str:
    return f"decoded in {time.perf_counter() - start:.1f} s"


def _decode_to_file(
    path: Path, index: DataIndex, channels: int, threads: int, progress: Progress | None
) -> None:
    offsets, _, total = _layout(index, channels)
    checksums = np.zeros(len(index), dtype="<u4")
    header = json.dumps(
        {"images": len(index), "channels": channels, "bytes": total, "key": path.stem}
    ).encode()
    table = len(_MAGIC) + 8 + len(header)
    first = -(-(table + checksums.nbytes) // _ALIGN) * _ALIGN
    part = path.with_suffix(f".{os.getpid()}.part")
    file = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
    try:
        free = os.fstatvfs(file)
        if free.f_bavail * free.f_frsize < first + total:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {(first + total) / 2**20:.0f} MiB are needed",
            )

        def put(i: int, flat: npt.NDArray[np.uint8]) -> None:
            checksums[i] = zlib.crc32(flat.data)
            _write(file, flat, first + int(offsets[i]))

        _decode_all(index, channels, threads, progress, put)
        os.ftruncate(file, first + total)
        _write(file, np.frombuffer(_MAGIC + struct.pack("<q", len(header)) + header, np.uint8), 0)
        _write(file, checksums.view(np.uint8), table)
        os.fsync(file)
        os.replace(
            part, path
        )  # not made durable: after a power cut the images are decoded once more
    finally:
        os.close(file)
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _write(file: int, data: npt.NDArray[np.uint8], offset: int) -> None:
    left = data.data
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def _open(
    path: Path, index: DataIndex, channels: int, threads: int, log: Callable[[str], object]
) -> PixelStore | None:  # fmt: skip
    """The store in a cache file; None where there is none, or a damaged one, which is told and removed."""
    offsets, shapes, total = _layout(index, channels)
    try:
        with open(path, "rb") as file:
            magic, length = struct.unpack("<8sq", file.read(16))
            if magic != _MAGIC or not 0 < length < 2**16:
                raise ValueError("its first bytes are not those of a cache")
            header = json.loads(file.read(length))
            checksums = np.frombuffer(file.read(4 * len(index)), "<u4")
            first = -(-(16 + length + checksums.nbytes) // _ALIGN) * _ALIGN
            expected = {
                "images": len(index),
                "channels": channels,
                "bytes": total,
                "key": path.stem,
            }
            if (
                header != expected
                or len(checksums) != len(index)
                or os.fstat(file.fileno()).st_size != first + total
            ):
                raise ValueError("its header or its length is wrong")
            # not torch.from_file, which takes no name that is not UTF-8, and fails with a RuntimeError
            mapped = torch.from_numpy(np.memmap(file, np.uint8, "c", first, (total,)))
        store = PixelStore(mapped, offsets, shapes, channels, path, "read from the cache")
        with ThreadPoolExecutor(max(1, threads)) as pool:
            found = list(pool.map(lambda i: zlib.crc32(store.image(i).data), range(len(index))))
        wrong = np.flatnonzero(np.array(found, dtype="<u4") != checksums)
        if len(wrong):
            raise ValueError(f"{len(wrong)} images have a wrong checksum")
        return store
    except FileNotFoundError:
        return None
    except (ValueError, struct.error) as error:
        log(f"the cache {path} is damaged ({error}); it is made again")
        path.unlink()
        return None


@contextlib.contextmanager
def _only_one(path: Path, log: Callable[[str], object]) -> Iterator[None]:
    """One process at a time builds or opens `path`; what a killed one left beside it is removed."""
    with open(path.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(
            OSError
        ):  # a file system without locks: two may build, and both rename whole files
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process that prepares {path}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in path.parent.glob(f"{path.stem}.*.part"):
                stale.unlink()
        yield
