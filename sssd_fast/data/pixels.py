"""Cache of decoded pixels: all images of an index as uint8 in one memory-mapped file.

The file's name is a hash over the content of every image, so it can never belong to other data. The
file is renamed to it when it is complete: a killed process leaves no partial cache, and the next
process that builds removes what is left. Every image has a CRC-32 that is checked when the file is
opened; a damaged cache is reported and built again.

File: the pixels of each image [H, W, C], then a CRC-32 per image. Shapes: N images of the index, T
bytes of pixels in all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sssd_fast.data.images import ImageArray, ImageError, decode_bytes, read_file, to_channels
from sssd_fast.data.index import DataIndex, Progress, map_threads
from sssd_fast.errors import ConfigError
from sssd_fast.run.files import user_cache

Log = Callable[[str], object]

_VERSION = 2  # raise it when images.py decodes by other rules


class PixelStore:
    """N images. Image i is pixels[offsets[i]:] as [heights, widths, channels]."""

    pixels: Tensor  # uint8 [T]; memory-mapped if `path` is set
    path: Path | None = None  # of the cache file
    origin = ""  # where the pixels came from, for the log

    def __init__(self, index: DataIndex, channels: int) -> None:
        """The layout of the images; `open_store` sets the pixels."""
        self.channels = channels
        shapes = np.array([(r.height, r.width) for r in index.records], dtype=np.int64)
        self.shapes: npt.NDArray[np.int64] = shapes  # [N, 2] heights and widths
        self.sizes: npt.NDArray[np.int64] = shapes.prod(1) * channels  # [N] bytes
        self.offsets: npt.NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes  # [N]
        self.nbytes = int(self.sizes.sum())  # T

    def image(self, i: int) -> ImageArray:
        """[H, W] for one channel, else [H, W, C]; a view."""
        shape = self.shapes[i] if self.channels == 1 else (*self.shapes[i], self.channels)
        return self.pixels[int(self.offsets[i]) :][: int(self.sizes[i])].numpy().reshape(shape)

    def checksums(self, pixels: ImageArray, threads: int) -> npt.NDArray[np.uint32]:
        """CRC-32 of every image, [N]; pixels [T]."""
        images = np.split(pixels, self.offsets[1:])
        return np.array(
            map_threads(lambda image: zlib.crc32(image.data), images, threads), dtype="<u4"
        )


def read_record(index: DataIndex, i: int) -> bytes:
    """The file of record i. Raises ImageError if it is unreadable or changed since the check."""
    path = str(index.file(i))
    try:
        data = read_file(path)
        if hashlib.sha256(data).hexdigest() != index.records[i].sha256:
            decode_bytes(data, path)  # a damaged file has a more precise error
            raise ImageError(path, "another image than the one that was checked")
    except ImageError as error:
        advice = "it was good when the data were checked: restore it, or run `sssd-fast data check`"
        raise ImageError(path, f"{error.reason}; {advice} again") from error
    return data


def decode_record(index: DataIndex, i: int, channels: int) -> ImageArray:
    """Record i as uint8 [H, W] (channels 1) or [H, W, 3]. Raises ImageError as `read_record`."""
    decoded = decode_bytes(read_record(index, i), str(index.file(i)), index.grey_range)
    return to_channels(decoded.pixels, channels)


def cache_folder(setting: str) -> Path | None:
    """Folder of data.cache: "none" is no file, "auto" the user's cache folder, else a path.

    Raises ConfigError for "auto" if the user has no home folder.
    """
    if setting != "auto":
        return None if setting == "none" else Path(setting)
    try:
        return user_cache() / "pixels"
    except ConfigError as error:
        raise ConfigError(f"data.cache is auto: {error}, or data.cache to a folder") from error


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
    store = PixelStore(index, channels)

    def decode() -> None:
        start = time.perf_counter()
        store.pixels = torch.empty(store.nbytes, dtype=torch.uint8)

        def fill(i: int) -> None:
            store.image(i)[...] = decode_record(index, i, channels)

        map_threads(fill, range(len(index)), threads, progress)
        store.origin = f"decoded in {time.perf_counter() - start:.1f} s"

    if folder is None:
        decode()
        return store
    path = folder / f"{store_key(index, channels)}.pixels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(path, log):
            if _map_file(store, path, threads, log):
                store.origin = "read from the cache"
                return store
            decode()
            _write_file(store, path, threads)
            if not _map_file(store, path, threads, log):
                log(f"{path} is damaged right after writing; the images are kept in memory")
    except OSError as error:
        # of the cache: a problem with an image is an ImageError
        log(
            f"no cache in {folder} ({error.strerror or error}); the decoded images are kept in "
            "memory. Set data.cache to a folder"
        )
        if not store.origin:
            decode()
    return store


def store_key(index: DataIndex, channels: int) -> str:
    """Name of the cache file: a hash of the content of the images in order, their grey range, and
    `channels`.
    """
    range_ = [] if index.grey_range is None else [index.grey_range]
    digest = hashlib.sha256(json.dumps([_VERSION, channels, *range_]).encode())
    for r in index.records:
        digest.update(json.dumps([r.sha256, r.height, r.width]).encode())
    return digest.hexdigest()[:32]


def _write_file(store: PixelStore, path: Path, threads: int) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    pixels = store.pixels.numpy()
    try:
        with open(unfinished, "wb") as file:
            file.write(pixels.data)
            file.write(store.checksums(pixels, threads).data)
            file.flush()
            os.fsync(file.fileno())
        # The folder is not synced: after a power cut the images are decoded again.
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _map_file(store: PixelStore, path: Path, threads: int, log: Log) -> bool:
    """Map the pixels of a cache file; False if it is absent, or damaged (logged, and removed)."""
    try:
        # torch.from_file rejects file names that are not UTF-8
        mapped = np.memmap(path, np.uint8, "c")
        if len(mapped) != store.nbytes + 4 * len(store.sizes):
            raise ValueError("wrong length")
        pixels, stored = mapped[: store.nbytes], mapped[store.nbytes :].view("<u4")
        wrong = int((stored != store.checksums(pixels, threads)).sum())
        if wrong:
            raise ValueError(f"{wrong} images have a wrong checksum")
    except FileNotFoundError:
        return False
    except ValueError as error:
        log(f"the cache {path} is damaged ({error}); it is built again")
        path.unlink()
        return False
    store.pixels = torch.from_numpy(pixels)
    store.path = path
    return True


@contextlib.contextmanager
def _lock(path: Path, log: Log) -> Iterator[None]:
    """One process at a time opens or builds `path`; what a killed one left is removed."""
    with open(path.with_suffix(".lock"), "w") as lock:
        # On a file system without locks two processes may build; both rename complete files.
        with contextlib.suppress(OSError):
            # the other processes of a run hold it for the moment that opening takes
            for _ in range(20):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
            else:
                log(f"waiting for another process that builds {path}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in path.parent.glob(f"{path.stem}.*.part"):
                stale.unlink()
        yield
