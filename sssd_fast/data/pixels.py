"""Cache of decoded pixels: all images of an index as uint8 in one memory-mapped file.

The file's name is a hash over the content of every image, so it can never belong to other data. The
file is written next to its final name and renamed when it is complete: a killed process leaves no
partial cache, and the next process that builds removes what is left. Every image has a CRC-32 that
is checked when the file is opened; a damaged cache is reported and built again.

File: magic, length of the header, header (JSON), CRC-32 per image, then at a multiple of 4096 bytes
the pixels, [H, W, C] each. Shapes: N images of the index, T bytes in all.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sssd_fast.data.images import ImageArray, ImageError, decode_bytes, read_file, to_channels
from sssd_fast.data.index import DataIndex, Progress, map_threads
from sssd_fast.errors import ConfigError

Log = Callable[[str], object]

_MAGIC = b"SSSDPIX1"  # change it when images.py decodes by other rules
_ALIGN = 4096
_SUFFIX = ".pixels"


@dataclass(frozen=True)
class PixelStore:
    """N decoded images. Image i is pixels[offsets[i]:] as [heights, widths, channels]."""

    pixels: Tensor  # uint8 [T], memory-mapped if `path` is set; read-only
    offsets: npt.NDArray[np.int64]  # [N]
    shapes: npt.NDArray[np.int64]  # [N, 2] heights and widths
    channels: int
    path: Path | None  # of the cache file
    origin: str  # where the pixels came from, for the log

    @property
    def nbytes(self) -> int:
        return self.pixels.numel()

    def image(self, i: int) -> ImageArray:
        """[H, W] for one channel, else [H, W, C]; a view."""
        shape = self.shapes[i] if self.channels == 1 else (*self.shapes[i], self.channels)
        size = int(self.shapes[i].prod()) * self.channels
        return self.pixels[int(self.offsets[i]) :][:size].numpy().reshape(shape)


def read_record(index: DataIndex, i: int) -> bytes:
    """The file of record i. Raises ImageError if it is unreadable or changed since the check."""
    path = str(index.file(i))
    try:
        data = read_file(path)
        if hashlib.sha256(data).hexdigest() != index.records[i].sha256:
            decode_bytes(data, path)  # a damaged file has a more precise error
            raise ImageError(path, "another image than the one that was checked")
    except ImageError as error:
        raise changed(path, error.reason) from error
    return data


def changed(path: str, reason: str) -> ImageError:
    """The error for a file that was good when the index was made."""
    advice = "it was good when the data were checked: restore it, or run `sssd-fast data check`"
    return ImageError(path, f"{reason}; {advice} again")


def decode_record(index: DataIndex, i: int, channels: int) -> ImageArray:
    """Record i as uint8 [H, W] (channels 1) or [H, W, 3]. Raises ImageError as `read_record`."""
    return to_channels(decode_bytes(read_record(index, i), str(index.file(i))).pixels, channels)


def decoded_bytes(index: DataIndex, channels: int) -> int:
    """Size of all decoded images of the index."""
    return sum(r.height * r.width for r in index.records) * channels


def cache_folder(setting: str) -> Path | None:
    """Folder of data.cache: "none" is no file, "auto" the user's cache folder, else a path.

    Raises ConfigError for "auto" if the user has no home folder.
    """
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        # some containers have neither HOME nor an entry in the list of users
        raise ConfigError(
            f"data.cache is auto, but {error}; set it to a folder or none, or set HOME"
        ) from error
    return Path(base, "sssd_fast", "pixels")


def open_store(
    index: DataIndex,
    channels: int,
    folder: Path | None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    log: Log = lambda text: None,
) -> PixelStore:
    """All images of `index`, from the cache file in `folder`, which is built if necessary.

    Without a folder, or if it cannot hold the file (full, read-only; this is logged), the pixels
    are kept in memory. Of several processes one decodes and the others wait for its file. Raises
    ImageError naming an image that can no longer be read.
    """
    layout = _layout(index, channels)
    if folder is not None:
        path = folder / (store_key(index, channels) + _SUFFIX)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(path, log):
                store = _open(path, layout, threads, log)
                if store is not None:
                    return store
                start = time.perf_counter()
                _decode_to_file(path, index, layout, threads, progress)
                store = _open(path, layout, threads, log, origin=_decoded_in(start))
                if store is not None:
                    return store
            log(f"{path} is damaged right after writing; the decoded images are kept in memory")
        except OSError as error:
            # of the cache: a problem with an image is an ImageError
            log(
                f"no cache in {folder} ({error.strerror or error}); the decoded images are kept in "
                "memory. Set data.cache to a folder"
            )
    start = time.perf_counter()
    pixels = torch.empty(layout.total, dtype=torch.uint8)
    array = pixels.numpy()

    def put(i: int, flat: npt.NDArray[np.uint8]) -> None:
        array[layout.offsets[i] : layout.offsets[i] + len(flat)] = flat

    _decode_all(index, channels, threads, progress, put)
    return layout.store(pixels, None, _decoded_in(start))


def store_key(index: DataIndex, channels: int) -> str:
    """Name of the cache file: a hash of the content of the images in order, and of `channels`."""
    digest = hashlib.sha256(json.dumps([_MAGIC.decode(), channels]).encode())
    for r in index.records:
        digest.update(json.dumps([r.sha256, r.height, r.width]).encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Layout:
    """Where the images are in the pixels, and the bytes of the file before them."""

    key: str
    channels: int
    offsets: npt.NDArray[np.int64]  # [N]
    shapes: npt.NDArray[np.int64]  # [N, 2]
    total: int  # bytes of all pixels

    @property
    def header(self) -> bytes:
        """Magic, length, JSON."""
        values = {"images": len(self.shapes), "channels": self.channels, "bytes": self.total}
        text = json.dumps({**values, "key": self.key}).encode()
        return _MAGIC + struct.pack("<q", len(text)) + text

    @property
    def first(self) -> int:
        """Position of the first pixel in the file."""
        return -(-(len(self.header) + 4 * len(self.shapes)) // _ALIGN) * _ALIGN

    def store(self, pixels: Tensor, path: Path | None, origin: str) -> PixelStore:
        return PixelStore(pixels, self.offsets, self.shapes, self.channels, path, origin)


def _layout(index: DataIndex, channels: int) -> _Layout:
    shapes = np.array([(r.height, r.width) for r in index.records], dtype=np.int64).reshape(-1, 2)
    sizes = shapes.prod(1) * channels
    offsets = np.cumsum(sizes) - sizes
    return _Layout(store_key(index, channels), channels, offsets, shapes, int(sizes.sum()))


def _decode_all(
    index: DataIndex,
    channels: int,
    threads: int,
    progress: Progress | None,
    put: Callable[[int, npt.NDArray[np.uint8]], None],
) -> None:
    """Calls put(i, flat pixels) for every image, from several threads."""

    def decode(i: int) -> None:
        put(i, np.ascontiguousarray(decode_record(index, i, channels)).reshape(-1))

    map_threads(decode, range(len(index)), threads, progress)


def _decoded_in(start: float) -> str:
    return f"decoded in {time.perf_counter() - start:.1f} s"


def _decode_to_file(
    path: Path, index: DataIndex, layout: _Layout, threads: int, progress: Progress | None
) -> None:
    checksums = np.zeros(len(index), dtype="<u4")
    needed = layout.first + layout.total
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    file = os.open(unfinished, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
    try:
        free = os.fstatvfs(file)
        if free.f_bavail * free.f_frsize < needed:
            reason = f"{os.strerror(errno.ENOSPC)}: {needed / 2**20:.0f} MiB are needed"
            raise OSError(errno.ENOSPC, reason)

        def put(i: int, flat: npt.NDArray[np.uint8]) -> None:
            checksums[i] = zlib.crc32(flat.data)
            _write(file, flat.data, layout.first + int(layout.offsets[i]))

        _decode_all(index, layout.channels, threads, progress, put)
        os.ftruncate(file, needed)
        _write(file, memoryview(layout.header + checksums.tobytes()), 0)
        os.fsync(file)
        # The folder is not synced: after a power cut the images are decoded again.
        os.replace(unfinished, path)
    finally:
        os.close(file)
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data = data[written:]
        offset += written


def _open(
    path: Path, layout: _Layout, threads: int, log: Log, origin: str = "read from the cache"
) -> PixelStore | None:
    """The store in a cache file; None if it is absent, or damaged (logged, and removed)."""
    header = layout.header
    count = len(layout.shapes)
    try:
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                raise ValueError("wrong header")
            if os.fstat(file.fileno()).st_size != layout.first + layout.total:
                raise ValueError("wrong length")
            checksums = np.frombuffer(file.read(4 * count), "<u4")
            # torch.from_file rejects file names that are not UTF-8
            pixels = np.memmap(file, np.uint8, "c", layout.first, (layout.total,))
        store = layout.store(torch.from_numpy(pixels), path, origin)
        found = map_threads(lambda i: zlib.crc32(store.image(i).data), range(count), threads)
        wrong = int((np.array(found, dtype="<u4") != checksums).sum())
        if wrong:
            raise ValueError(f"{wrong} images have a wrong checksum")
        return store
    except FileNotFoundError:
        return None
    except ValueError as error:
        log(f"the cache {path} is damaged ({error}); it is built again")
        path.unlink()
        return None


@contextlib.contextmanager
def _lock(path: Path, log: Log) -> Iterator[None]:
    """One process at a time opens or builds `path`; what a killed one left is removed."""
    with open(path.with_suffix(".lock"), "w") as lock:
        # On a file system without locks two processes may build; both rename complete files.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process that builds {path}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in path.parent.glob(f"{path.stem}.*.part"):
                stale.unlink()
        yield
