"""The loader that runs everywhere: Pillow reads and decodes the files in every epoch, in threads
(Pillow and hashlib release the interpreter's lock).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from sssd_fast.data.images import ImageArray
from sssd_fast.data.pixels import decode_record
from sssd_fast.loaders.augment import to_device
from sssd_fast.loaders.crops import Crops, crop_and_resize
from sssd_fast.loaders.order import Loader, SampleOrder

READ_AHEAD = 2  # batches that are decoded before they are needed


class _Started(NamedTuple):
    images: Tensor  # uint8 [R, C, H, W], complete when all rows are done
    crops: Crops
    rows: list[Future[None]]


class TorchLoader(Loader):
    """workers: number of threads, at least 1."""

    name = "torch"

    def __init__(
        self, order: SampleOrder, device: torch.device | str = "cpu", *, workers: int = 0
    ) -> None:
        super().__init__(order, device)
        self._workers = max(1, workers)

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Crops]]:
        crops = (self.order.crops(epoch, step) for step in range(start_step, self.steps_per_epoch))
        threads = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            batches = (self._start(threads, c) for c in crops)
            coming = deque(itertools.islice(batches, READ_AHEAD))
            while coming:
                coming.extend(itertools.islice(batches, 1))
                images, its_crops, rows = coming.popleft()
                for row in rows:
                    row.result()
                yield to_device(images, self.device), its_crops
        finally:
            threads.shutdown(cancel_futures=True)

    def _start(self, threads: ThreadPoolExecutor, crops: Crops) -> _Started:
        shape = (len(crops), self.order.channels, *self.order.image_size)
        images = torch.empty(shape, dtype=torch.uint8)
        out = images.numpy()
        rows = [threads.submit(self._decode, crops, row, out[row]) for row in range(len(crops))]
        return _Started(images, crops, rows)

    def _decode(self, crops: Crops, row: int, out_CHW: ImageArray) -> None:
        order, flip = self.order, bool(crops.flips[row])
        image = decode_record(order.index, int(crops.records[row]), order.channels)
        cut = crop_and_resize(image, crops.boxes[row], flip, order.image_size)
        out_CHW[...] = cut.reshape(*order.image_size, order.channels).transpose(2, 0, 1)

    def describe(self) -> str:
        return self._describe(f"decoded by Pillow in each epoch, {self._workers} threads")
