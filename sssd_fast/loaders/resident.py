"""The resident data set: decoded once, kept as uint8, and cropped, resized and mirrored a batch at a time where it lies.

On a GPU that is one launch of mae_kernels.crop_resize per batch. A set too large for its share of the GPU stays in host
memory (the mapped cache file), and the rows that a batch needs travel one batch ahead through pinned memory.

Shapes: R rows of a batch. `places` [R, 8] int64: offset, image height, width, box top, left, height, width, mirror.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from mae_kernels import crop_resize
from sssd_fast.data.index import DataIndex, Progress
from sssd_fast.data.pixels import PixelStore, open_store, store_key
from sssd_fast.loaders.batch import to_device
from sssd_fast.loaders.crops import Ints, Views
from sssd_fast.loaders.order import Schedule, ScheduledLoader
from sssd_fast.run.device import available_memory

GPU_SHARE = 0.1  # of the card's memory; the rest belongs to the training
HOST_SHARE = 0.5  # of the memory that is free


def placement(nbytes: int, device: torch.device, limit_gib: float | None) -> tuple[str | None, str]:
    """Where `nbytes` of decoded images are kept: "device", "host" or None, and the reason, for people.

    limit_gib: at most this much, in both places, instead of the shares above.
    """
    size = f"{nbytes / 2**20:.0f} MiB of decoded images"
    if device.type == "cuda":
        most: float = reserved(device, limit_gib)
        if nbytes <= min(most, torch.cuda.mem_get_info(device)[0]):
            return "device", f"{size} fit on the GPU (at most {most / 2**30:.1f} GiB of it)"
    free_host = available_memory()
    if free_host is None:  # no /proc: all there is
        free_host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = HOST_SHARE * free_host if limit_gib is None else limit_gib * 2**30
    where = "host memory" if device.type == "cuda" else "memory"
    if nbytes <= most:
        return (
            "host" if device.type == "cuda" else "device",
            f"{size} fit in {where} (at most {most / 2**30:.1f} GiB)",
        )
    return None, f"{size} are more than the {most / 2**30:.1f} GiB of {where} that they may take"


def reserved(device: torch.device, limit_gib: float | None) -> int:
    """The most bytes of the GPU that a resident set may take there, for whoever plans with the rest."""
    if device.type != "cuda":
        return 0
    return int(
        GPU_SHARE * torch.cuda.mem_get_info(device)[1] if limit_gib is None else limit_gib * 2**30
    )


class Resident:
    """The decoded images of an index, and where they lie; training, validation and test share one."""

    def __init__(self, store: PixelStore, device: torch.device, where: str) -> None:
        self.store = store
        self.where = where
        self.pixels = (
            store.pixels.to(device) if where == "device" else None
        )  # on the CPU the mapped file itself


_shared: WeakValueDictionary[tuple[str, str, str, str], Resident] = WeakValueDictionary()


def resident_set(
    index: DataIndex,
    channels: int,
    device: torch.device,
    where: str,
    cache: Path | None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Resident:
    """The set as another loader of this process already holds it, or opened now (data.pixels.open_store)."""
    key = (store_key(index, channels), str(device), where, str(cache))
    found = _shared.get(key)
    if found is None:
        store = open_store(index, channels, cache, threads=threads, progress=progress, log=say)
        found = _shared[key] = Resident(store, device, where)
    return found


class ResidentLoader(ScheduledLoader):
    """resident: of the schedule's index, with its number of channels, made for `device`."""

    name = "resident"

    def __init__(self, schedule: Schedule, device: torch.device | str, resident: Resident) -> None:
        super().__init__(schedule, device)
        self._set = resident
        self._slots = itertools.cycle([_Slot(self.device), _Slot(self.device)])

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Views]]:
        steps = range(start_step, self.steps_per_epoch)
        if self._set.pixels is None:
            yield from self._from_host(epoch, steps)
            return
        for step in steps:
            views = self.schedule.views(epoch, step)
            yield self._show(self._set.pixels, self._places(views)), views

    def _show(self, pixels: Tensor, places: Ints) -> Tensor:
        p = to_device(torch.from_numpy(places), self.device)
        s = self.schedule
        return crop_resize(
            pixels, p[:, 0], p[:, 1:3], p[:, 3:7], p[:, 7] != 0, s.size, channels=s.channels
        )

    def _places(self, views: Views) -> Ints:
        offsets = self._set.store.offsets[views.records]
        shapes = self._set.store.shapes[views.records]
        return np.concatenate(
            [offsets[:, None], shapes, views.boxes, views.flips[:, None]], 1, dtype=np.int64
        )

    def _from_host(self, epoch: int, steps: range) -> Iterator[tuple[Tensor, Views]]:
        """While the device works on one batch, a thread copies the rows of the next into pinned memory."""

        def fill(step: int) -> tuple[Views, Ints, _Slot, int]:
            views, slot = self.schedule.views(epoch, step), next(self._slots)
            return views, *slot.fill(self._set.store, self._places(views))

        with ThreadPoolExecutor(1, thread_name_prefix="stage") as thread:
            coming = thread.submit(fill, steps[0])
            for step in steps:
                views, places, slot, used = coming.result()
                if step + 1 in steps:
                    coming = thread.submit(fill, step + 1)
                yield self._show(slot.send(used), places), views

    def describe(self) -> str:
        store, on_gpu = self._set.store, self.device.type == "cuda"
        where = (
            "in host memory"
            if self._set.where == "host"
            else "on the GPU"
            if on_gpu
            else "in memory"
        )
        file = f", cache {store.path}" if store.path else ", no cache file"
        return self._described(
            f"{store.nbytes / 2**20:.0f} MiB decoded images {where} ({store.origin}{file})"
        )


class _Slot:
    """Pinned memory for the rows of one batch, used again when the device has copied them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, store: PixelStore, places: Ints) -> tuple[Ints, _Slot, int]:
        """Copies the rows of every box, whole; returns the places in this memory, and the bytes used."""
        offset, width, top, height = (places[:, i] for i in (0, 2, 3, 5))
        row = width * store.channels
        ends = np.cumsum(row * height)
        starts, used = ends - row * height, int(ends[-1]) if len(ends) else 0
        if self._copied is not None:
            self._copied.synchronize()
        if used > len(self._memory):
            self._memory = torch.empty(
                used + used // 4, dtype=torch.uint8, pin_memory=self._copied is not None
            )
        source, target = store.pixels.numpy(), self._memory.numpy()
        for first, start, end in zip(offset + top * row, starts, ends, strict=True):
            target[start:end] = source[first : first + end - start]
        moved = places.copy()
        moved[:, 0], moved[:, 1], moved[:, 3] = starts, height, 0
        return moved, self, used

    def send(self, used: int) -> Tensor:
        if self._copied is None:
            return self._memory[:used]
        pixels = self._memory[:used].to(self._device, non_blocking=True)
        self._copied.record()
        return pixels
