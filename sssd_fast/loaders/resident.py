"""The resident data set: decoded once, kept as uint8, and cropped, resized and flipped one batch at
a time.

On a GPU a batch is one launch of mae_kernels.crop_resize. A set that exceeds its share of the GPU
stays in host memory (the mapped cache file); the rows of each batch are copied one batch ahead
through pinned memory.

Shapes: R rows of a batch. `places` [R, 8] int64: offset, image height, width, box top, left,
    height, width, flip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from mae_kernels import crop_resize
from sssd_fast.data.index import Progress
from sssd_fast.data.pixels import PixelStore, open_store, store_key
from sssd_fast.loaders.augment import to_device
from sssd_fast.loaders.crops import Crops, Ints
from sssd_fast.loaders.order import Loader, SampleOrder
from sssd_fast.run.device import available_memory

GPU_SHARE = 0.1  # of the GPU's memory; the rest is for training
HOST_SHARE = 0.5  # of the free host memory


def placement(nbytes: int, device: torch.device, limit_gib: float | None) -> tuple[str | None, str]:
    """Where `nbytes` of decoded images are kept ("device", "host" or None), and the reason.

    limit_gib: the limit for both places, instead of the shares above.
    """
    size = f"{nbytes / 2**20:.0f} MiB of decoded images"
    if device.type == "cuda":
        most: float = reserved(device, limit_gib)
        if nbytes <= min(most, torch.cuda.mem_get_info(device)[0]):
            return "device", f"{size} fit on the GPU (at most {most / 2**30:.1f} GiB of it)"
    free_host = available_memory()
    if free_host is None:  # unknown without /proc: assume all memory
        free_host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = HOST_SHARE * free_host if limit_gib is None else limit_gib * 2**30
    name, place = ("host memory", "host") if device.type == "cuda" else ("memory", "device")
    if nbytes <= most:
        return place, f"{size} fit in {name} (at most {most / 2**30:.1f} GiB)"
    return None, f"{size} are more than the {most / 2**30:.1f} GiB of {name} that they may take"


def reserved(device: torch.device, limit_gib: float | None) -> int:
    """The most bytes that a resident set may take on this GPU; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    if limit_gib is not None:
        return int(limit_gib * 2**30)
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[1])


class Resident:
    """The decoded images of an index; training, validation and test loaders share one."""

    def __init__(self, store: PixelStore, device: torch.device, where: str) -> None:
        self.store = store
        self.where = where
        # On a CPU this is the mapped file itself; None: rows are copied to the GPU batch by batch.
        self.pixels = store.pixels.to(device) if where == "device" else None


_shared: WeakValueDictionary[tuple[str, str, str, str], Resident] = WeakValueDictionary()


class ResidentLoader(Loader):
    """where: from `placement`. The other arguments are those of data.pixels.open_store."""

    name = "resident"

    def __init__(
        self,
        order: SampleOrder,
        device: torch.device,
        where: str,
        cache: Path | None,
        threads: int = 1,
        progress: Progress | None = None,
        warn: Callable[[str], object] = lambda text: None,
    ) -> None:
        super().__init__(order, device)
        index, channels = order.index, order.channels
        key = (store_key(index, channels), str(device), where, str(cache))
        found = _shared.get(key)
        if found is None:
            store = open_store(index, channels, cache, threads=threads, progress=progress, log=warn)
            found = _shared[key] = Resident(store, device, where)
        self._set = found

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Crops]]:
        steps = range(start_step, self.steps_per_epoch)
        if self._set.pixels is None:
            yield from self._from_host(epoch, steps)
            return
        for step in steps:
            crops = self.order.crops(epoch, step)
            yield self._show(self._set.pixels, self._places(crops)), crops

    def _show(self, pixels: Tensor, places: Ints) -> Tensor:
        p = to_device(torch.from_numpy(places), self.device)
        size, channels = self.order.image_size, self.order.channels
        flips = p[:, 7] != 0
        return crop_resize(pixels, p[:, 0], p[:, 1:3], p[:, 3:7], flips, size, channels=channels)

    def _places(self, crops: Crops) -> Ints:
        store, rows = self._set.store, crops.records
        columns = store.offsets[rows, None], store.shapes[rows], crops.boxes, crops.flips[:, None]
        return np.concatenate(columns, 1, dtype=np.int64)

    def _from_host(self, epoch: int, steps: range) -> Iterator[tuple[Tensor, Crops]]:
        """A thread copies the rows of the next batch into pinned memory while the GPU computes."""

        # pinning makes a context on the thread's device, which is 0 in a new one; -1: no change
        here = torch.cuda.device(self.device if self.device.type == "cuda" else -1)

        def fill(step: int) -> tuple[Crops, Tensor, Ints]:
            crops = self.order.crops(epoch, step)
            with here:
                return crops, *self._rows(self._places(crops))

        with ThreadPoolExecutor(1, thread_name_prefix="stage") as thread:
            coming = thread.submit(fill, steps[0])
            for step in steps:
                crops, rows, places = coming.result()
                if step + 1 in steps:
                    coming = thread.submit(fill, step + 1)
                # torch reuses the pinned memory only after the copy
                yield self._show(rows.to(self.device, non_blocking=True), places), crops

    def _rows(self, places: Ints) -> tuple[Tensor, Ints]:
        """A copy of whole rows of every box, pinned for a GPU, and the places in it."""
        store = self._set.store
        offset, width, top, height = (places[:, i] for i in (0, 2, 3, 5))
        row = width * store.channels
        ends = np.cumsum(row * height)
        starts = ends - row * height
        used = int(ends[-1]) if len(ends) else 0
        rows = torch.empty(used, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        source, target = store.pixels.numpy(), rows.numpy()
        for first, start, end in zip(offset + top * row, starts, ends, strict=True):
            target[start:end] = source[first : first + end - start]
        moved = places.copy()
        moved[:, 0] = starts
        moved[:, 1] = height
        moved[:, 3] = 0
        return rows, moved

    def describe(self) -> str:
        store, place = self._set.store, "in memory"
        if self.device.type == "cuda":
            place = "in host memory" if self._set.where == "host" else "on the GPU"
        file = f"cache {store.path}" if store.path else "no cache file"
        size = f"{store.nbytes / 2**20:.0f} MiB decoded images"
        return self._describe(f"{size} {place} ({store.origin}, {file})")
