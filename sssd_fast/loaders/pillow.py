"""The loader that runs everywhere: Pillow in this process or in torch DataLoader workers, from
the files in every epoch.
"""

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
from sssd_fast.loaders.crops import Crops, crop_and_resize
from sssd_fast.loaders.order import BaseLoader, SampleOrder
from sssd_fast.run.signals import ignore_signals_in_worker


class TorchLoader(BaseLoader):
    """workers: 0 decodes in this process, N in N processes that run until `close`."""

    name = "torch"

    def __init__(
        self, order: SampleOrder, device: torch.device | str = "cpu", *, workers: int = 0
    ) -> None:
        super().__init__(order, device)
        if workers < 0:
            raise ConfigError(f"workers is {workers}; 0 or more is needed")
        self._workers = workers
        self._sampler = _Sampler()
        if workers:
            _open_loaders.add(self)
        self._batches = DataLoader(
            _Images(order.index, order.size, order.channels),
            batch_sampler=self._sampler,
            collate_fn=_take,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=self.device.type == "cuda",
        )

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Crops]]:
        steps = range(start_step, self.steps_per_epoch)
        crops = [self.order.crops(epoch, step) for step in steps]
        self._sampler.batches = [[c] for c in crops]
        try:
            for crop, images in zip(crops, self._batches, strict=True):
                if isinstance(images, str):
                    raise DataError(images)
                yield images.to(self.device, non_blocking=True), crop
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a loader process died ({error}), usually from lack of memory: use fewer workers, "
                "or workers=0"
            ) from error

    def describe(self) -> str:
        where = f"in {self._workers} worker processes" if self._workers else "in this process"
        return self._describe(f"decoded by Pillow in each epoch {where}")

    def close(self) -> None:
        # The only way to end persistent workers while references to their iterator exist.
        iterator: Any = self._batches._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._batches._iterator = None


# Workers ignore SIGTERM, which multiprocessing sends at exit before it joins them: a loader that an
# error left open would block the exit for ever. Registered after multiprocessing's hook, so it runs
# before it.
_open_loaders: WeakSet[TorchLoader] = WeakSet()


@atexit.register
def _close_all() -> None:
    for loader in list(_open_loaders):
        loader.close()


class _Sampler(Sampler[list[Crops]]):
    """The batches of the next epoch. Each holds its own crops, so workers can outlive an epoch."""

    def __init__(self) -> None:
        self.batches: list[list[Crops]] = []

    def __iter__(self) -> Iterator[list[Crops]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Images(Dataset[Any]):
    """Decodes one batch at a time: uint8 [R, C, H, W], or the message of a DataError."""

    def __init__(self, index: DataIndex, size: tuple[int, int], channels: int) -> None:
        self._index = index
        self._size = size
        self._channels = channels

    def __getitems__(self, batch: list[Crops]) -> Tensor | str:
        (crops,) = batch
        images = np.empty((len(crops), *self._size, self._channels), dtype=np.uint8)
        try:
            rows = zip(crops.records, crops.boxes, crops.flips, strict=True)
            for row, (record, box, flip) in enumerate(rows):
                image = decode_record(self._index, int(record), self._channels)
                images[row] = crop_and_resize(image, box, bool(flip), self._size).reshape(
                    images.shape[1:]
                )
        except DataError as error:
            return str(error)  # as a value: DataLoader would wrap an exception in traceback text
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _take(collated: Any) -> Any:
    return collated  # stacked by _Images.__getitems__
