"""Which images each step uses on each rank, and the loader without its pixels, for all providers.

Epoch e visits `permutation(e)`, cut into global batches of world * batch_size; position g of a
global batch belongs to rank g % world. Batches do not depend on earlier ones, so any
(epoch, step) can be produced directly, and a run resumes from these two numbers.

Shapes: R rows of this rank's batch, fewer than B = batch_size at the end of an evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.loaders.augment import rotate_and_jitter, to_device
from sssd_fast.loaders.crops import Crops, Ints, evaluation_crops, training_crops

PAD_INDEX = -1
PAD_LABEL = -100  # the label that torch's cross_entropy ignores


@dataclass
class Batch:
    """B rows: `count` images, then (evaluation only) padding of zero pixels, index -1, label
    -100.
    """

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], record numbers of the DataIndex
    count: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(eq=False)
class SampleOrder:
    """Order and crops of the records `ids` of an index. Raises DataError for too few images."""

    index: DataIndex
    ids: Sequence[int]
    _: KW_ONLY
    batch_size: int  # rows per rank
    image_size: tuple[int, int]  # height, width
    channels: int  # 1 or 3
    # With augmentation, images are shuffled and the incomplete last batch is dropped. None: the
    # evaluation crop, in the order of `ids`, the last batch is padded.
    augment: AugmentConfig | None
    seed: int = 0
    rank: int = 0
    world: int = 1
    fit: str = "crop"  # of the evaluation crop, see `crops.center_boxes`

    def __post_init__(self) -> None:
        count = len(self.ids)
        if count == 0:
            raise DataError("the loader was given no images")
        if self.augment is not None and count < self.batch_size * self.world:
            raise DataError(
                f"{count} training images do not fill one batch of {self.batch_size} on "
                f"{self.world} process(es); set the batch size to at most {count // self.world}"
            )
        records = self.index.records
        self.labels: Ints = np.array(self.index.labels, dtype=np.int64)
        self.shapes: Ints = np.array([(r.height, r.width) for r in records], dtype=np.int64)
        # Two epochs: a provider that prefetches needs the next one before the current one ends.
        self._cached_epoch = functools.lru_cache(2)(self._make_epoch)

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.ids), self.batch_size * self.world)
        return whole + (rest > 0 and self.augment is None)

    def crops(self, epoch: int, step: int) -> Crops:
        """This rank's share of a step: R rows, fewer (even none) at the end of an evaluation."""
        order, crops = self._cached_epoch(epoch if self.augment is not None else 0)
        size = self.batch_size * self.world
        return crops[order[step * size : (step + 1) * size][self.rank :: self.world]]

    def _make_epoch(self, epoch: int) -> tuple[Ints, Crops]:
        """Record numbers in order, over all ranks, and the crops of all records."""
        ids = np.asarray(self.ids, dtype=np.int64)
        if self.augment is None:
            return ids, evaluation_crops(self.shapes, self.image_size, self.fit)
        crops = training_crops(self.shapes, self.augment, self.seed, epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(ids), crops


class Loader:
    """Batches of an order on `device`. A provider adds `_pixels` and `describe`."""

    name = ""
    reason = ""  # why this provider was chosen

    def __init__(self, order: SampleOrder, device: torch.device | str) -> None:
        self.order = order
        self.device = torch.device(device)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Crops]]:
        """For each step from `start_step` on: uint8 [R, C, H, W] on the device, and its crops."""
        raise NotImplementedError

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ... of `epoch`; they do not depend on earlier epochs.

        Raises DataError for a file that became unreadable.
        """
        steps = self.steps_per_epoch
        if not 0 <= start_step <= steps:
            raise ConfigError(f"start_step is {start_step}; an epoch has {steps} steps")
        if start_step < steps:
            for images, crops in self._pixels(epoch, start_step):
                yield self._batch(images, crops)

    def _batch(self, images_RCHW: Tensor, crops: Crops) -> Batch:
        order, rows = self.order, len(crops)
        meta = np.full((2, order.batch_size), PAD_INDEX, dtype=np.int64)
        meta[1] = PAD_LABEL
        meta[0, :rows] = crops.records
        meta[1, :rows] = order.labels[crops.records]
        # One copy for both rows: each transfer to a GPU costs a launch.
        indices, labels = to_device(torch.from_numpy(meta), self.device)
        a = order.augment
        if a is not None and rows and (a.rotation_deg or a.brightness or a.contrast):
            jitter_R3 = to_device(torch.from_numpy(crops.jitter.astype(np.float32)), self.device)
            images_RCHW = rotate_and_jitter(images_RCHW, jitter_R3)
        if missing := order.batch_size - rows:
            padding = images_RCHW.new_zeros(missing, *images_RCHW.shape[1:])
            images_RCHW = torch.cat([images_RCHW, padding])
        return Batch(images_RCHW, labels, indices, rows)

    def describe(self) -> str:
        """One line: provider, images, batch, what happens to the last batch, memory."""
        raise NotImplementedError

    def _describe(self, how: str) -> str:
        o = self.order
        share = f", rank {o.rank} of {o.world}" if o.world > 1 else ""
        steps = f"{o.steps_per_epoch} steps of {o.batch_size}{share}"
        return f"{self.name}: {len(o.ids)} images, {steps}, {how}"

    def close(self) -> None:
        """Ends threads and frees what they hold; the default has none."""
