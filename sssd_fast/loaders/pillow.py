"""The loader that runs everywhere: Pillow in this process or in torch DataLoader workers, from the files in every epoch."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sssd_fast.data.index import DataIndex
from sssd_fast.data.pixels import decode_record
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.loaders.crops import Views, show
from sssd_fast.loaders.order import Schedule, ScheduledLoader
from sssd_fast.run.signals import ignore_signals_in_worker


class TorchLoader(ScheduledLoader):
    """workers: 0 decodes in this process, N in N processes that stay until `close`. Raises ConfigError for fewer than 0."""

    name = "torch"

    def __init__(
        self, schedule: Schedule, device: torch.device | str = "cpu", *, workers: int = 0
    ) -> None:
        super().__init__(schedule, device)
        if workers < 0:
            raise ConfigError(f"workers is {workers}; 0 or more is needed")
        self._workers = workers
        self._coming = _Coming()
        if workers:
            _with_workers.add(self)
        self._batches = DataLoader(
            _Images(schedule.index, schedule.size, schedule.channels),
            batch_sampler=self._coming,
            collate_fn=_take,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=self.device.type == "cuda",
        )

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Views]]:
        views = [
            self.schedule.views(epoch, step) for step in range(start_step, self.steps_per_epoch)
        ]
        self._coming.batches = [[v] for v in views]
        try:
            for view, images in zip(views, self._batches, strict=True):
                if isinstance(images, str):
                    raise DataError(images)
                yield images.to(self.device, non_blocking=True), view
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a loader process died ({error}); this is mostly a lack of memory: use fewer workers, or workers=0"
            ) from error

    def describe(self) -> str:
        where = f"in {self._workers} worker processes" if self._workers else "in this process"
        return self._described(f"decoded by Pillow anew each epoch {where}")

    def close(self) -> None:
        # the only way to end persistent workers before every reference to their iterator is gone
        iterator: Any = self._batches._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._batches._iterator = None


# Workers ignore SIGTERM, by which multiprocessing ends and then joins those that are left when the program does: a loader that
# an error left open would keep it for ever. Registered after multiprocessing's own hook, so it runs before.
_with_workers: WeakSet[TorchLoader] = WeakSet()


@atexit.register
def _close_all() -> None:
    for loader in list(_with_workers):
        loader.close()


class _Coming(Sampler[list[Views]]):
    """The batches of the coming epoch; what they show travels with them, so that workers outlive it."""

    def __init__(self) -> None:
        self.batches: list[list[Views]] = []

    def __iter__(self) -> Iterator[list[Views]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Images(Dataset[Any]):
    """Decodes and shows one batch at a time: uint8 [R, C, H, W], or the message of a DataError."""

    def __init__(self, index: DataIndex, size: tuple[int, int], channels: int) -> None:
        self._index = index
        self._size = size
        self._channels = channels

    def __getitems__(self, batch: list[Views]) -> Tensor | str:
        (views,) = batch
        images = np.empty((len(views), *self._size, self._channels), dtype=np.uint8)
        try:
            for row, (record, box, flip) in enumerate(
                zip(views.records, views.boxes, views.flips, strict=True)
            ):
                image = decode_record(self._index, int(record), self._channels)
                images[row] = show(image, box, bool(flip), self._size).reshape(images.shape[1:])
        except DataError as error:  # as a value: DataLoader would wrap it in its own traceback text
            return str(error)
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _take(collated: Any) -> Any:
    return collated  # _Images.__getitems__ has stacked the batch already
