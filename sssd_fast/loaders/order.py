"""Which images each step uses on each rank, and the parts of a loader that all providers share.

Epoch e visits `permutation(e)`, cut into global batches of world * batch_size; position g of a
global batch belongs to rank g % world. Batches do not depend on earlier ones, so any
(epoch, step) can be produced directly, and a run resumes from these two numbers.

Shapes: R rows of this rank's batch, fewer than B = batch_size at the end of an evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.loaders.augment import rotate_and_jitter
from sssd_fast.loaders.batch import PAD_INDEX, PAD_LABEL, Batch, to_device
from sssd_fast.loaders.crops import FITS, Crops, Ints, evaluation_crops, training_crops


class SampleOrder:
    """Order and crops of the records `ids` of an index.

    Args:
        batch_size: rows per rank.
        image_size: (height, width) in pixels.
        channels: 1 or 3.
        augment: augmentation, shuffled, the incomplete last batch is dropped. None: the evaluation
            crop, in the order of `ids`, the last batch is short.
        fit: evaluation crop, see `crops.center_boxes`.

    Raises ConfigError for settings out of range, DataError for too few images.
    """

    def __init__(
        self,
        index: DataIndex,
        ids: Sequence[int],
        *,
        batch_size: int,
        image_size: tuple[int, int],
        channels: int,
        augment: AugmentConfig | None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        fit: str = "crop",
    ) -> None:
        _check_settings(batch_size, image_size, channels, rank, world, fit)
        self.index = index
        self.ids = np.asarray(ids, dtype=np.int64)
        if len(self.ids) == 0:
            raise DataError("the loader was given no images")
        if self.ids.min() < 0 or self.ids.max() >= len(index):
            raise DataError(
                f"record numbers {self.ids.min()} to {self.ids.max()}; the index holds "
                f"{len(index)} images"
            )
        if augment is not None and len(self.ids) < batch_size * world:
            raise DataError(
                f"{len(self.ids)} training images do not fill one batch of {batch_size} on {world} "
                f"process(es); set the batch size to at most {len(self.ids) // world}"
            )
        self.batch_size = batch_size
        self.size = image_size
        self.channels = channels
        self.augment = augment
        self.seed = seed
        self.rank = rank
        self.world = world
        self.fit = fit
        self.labels: Ints = np.array(index.labels, dtype=np.int64)
        self.shapes: Ints = np.array([(r.height, r.width) for r in index.records], dtype=np.int64)
        # Two epochs: a provider that prefetches needs the next one before the current one ends.
        self._cached_epoch = functools.lru_cache(2)(self._make_epoch)

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.ids), self.batch_size * self.world)
        return whole + (rest > 0 and self.augment is None)

    def permutation(self, epoch: int) -> Ints:
        """Record numbers in the order of this epoch, over all ranks."""
        if self.augment is None:
            return self.ids
        return np.random.default_rng([self.seed, epoch]).permutation(self.ids)

    def crops(self, epoch: int, step: int) -> Crops:
        """This rank's share of a step: R rows, fewer (even none) at the end of an evaluation."""
        order, crops = self._cached_epoch(epoch if self.augment is not None else 0)
        size = self.batch_size * self.world
        return crops[order[step * size : (step + 1) * size][self.rank :: self.world]]

    def _make_epoch(self, epoch: int) -> tuple[Ints, Crops]:
        """The permutation of an epoch, and the crops of all records."""
        if self.augment is None:
            return self.ids, evaluation_crops(self.shapes, self.size, self.fit)
        crops = training_crops(self.shapes, self.augment, self.seed, epoch)
        return self.permutation(epoch), crops

    def next_position(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)


@dataclass(frozen=True)
class LoaderChoice:
    """A provider, the reason for it, and why the preferred ones are not available."""

    provider: str
    reason: str
    unavailable: dict[str, str]
    where: str = ""  # of the resident set: "device" or "host"

    def __str__(self) -> str:
        others = (f"not {name}: {why}" for name, why in self.unavailable.items())
        return "; ".join([f"{self.provider}, because {self.reason}", *others])


class BaseLoader:
    """A `sssd_fast.loaders.Loader` without its pixels: a provider adds `_pixels` and `describe`."""

    name = ""

    def __init__(self, order: SampleOrder, device: torch.device | str) -> None:
        self.order = order
        self.device = torch.device(device)
        self.choice: LoaderChoice | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Crops]]:
        """For each step from `start_step` on: uint8 [R, C, H, W] on the device, and its crops."""
        raise NotImplementedError

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ... of `epoch`. Raises DataError for a file that became
        unreadable.
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
        return Batch(images_RCHW, labels, indices, indices != PAD_INDEX)

    def describe(self) -> str:
        raise NotImplementedError

    def _describe(self, how: str) -> str:
        o = self.order
        share = f", rank {o.rank} of {o.world}" if o.world > 1 else ""
        last = "the last batch is padded"
        if o.augment is not None:
            last = "the incomplete last batch is dropped"
        last = f" ({last})" if len(o.ids) % (o.batch_size * o.world) else ""
        steps = f"{o.steps_per_epoch} steps of {o.batch_size}{last}{share}"
        return f"{self.name}: {len(o.ids)} images, {steps}, {how}"

    def close(self) -> None:
        """Ends threads and processes; the default has none."""


def _check_settings(
    batch_size: int, size: tuple[int, int], channels: int, rank: int, world: int, fit: str
) -> None:
    problems = []
    if batch_size < 1:
        problems.append(f"batch_size is {batch_size}; at least 1 is needed")
    if len(size) != 2 or min(size) < 1:
        problems.append(f"image_size is {size}; (height, width) of at least 1 is needed")
    if channels not in (1, 3):
        problems.append(f"channels is {channels}; 1 or 3 is needed")
    if not 0 <= rank < world:
        problems.append(f"rank is {rank} of {world}; 0 to world - 1 is needed")
    if fit not in FITS:
        problems.append(f"fit is {fit!r}; crop or stretch is needed")
    if problems:
        raise ConfigError("loader: " + "; ".join(problems))
