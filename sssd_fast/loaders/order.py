"""Which images each step takes on each rank, and how they are shown: the part that all providers share.

Epoch e visits order(e), cut into global batches of world * batch_size; position g of a global batch belongs to rank
g % world. Nothing depends on what ran before, so any (epoch, step) can be produced directly, and a position is two numbers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sssd_fast.data.index import DataIndex
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.loaders.augment import turn_and_light
from sssd_fast.loaders.batch import PAD_INDEX, PAD_LABEL, Batch, to_device
from sssd_fast.loaders.crops import FITS, AugmentSpec, Ints, Views, evaluation_views, training_views


class Schedule:
    """Order and views of the records `ids` of an index.

    train: augmentation, shuffled, the incomplete last batch dropped; None: the evaluation view, in order, the last batch
    short. batch_size is per rank. Raises ConfigError for settings out of range, DataError for too few images.
    """

    def __init__(
        self,
        index: DataIndex,
        ids: Sequence[int],
        *,
        batch_size: int,
        image_size: tuple[int, int],
        channels: int,
        train: AugmentSpec | None,
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
                f"record numbers {self.ids.min()} to {self.ids.max()}; the index holds {len(index)} images"
            )
        if train is not None and len(self.ids) < batch_size * world:
            raise DataError(
                f"{len(self.ids)} training images do not fill one batch of {batch_size} on {world} process(es); "
                f"set the batch size to at most {len(self.ids) // world}"
            )
        self.batch_size = batch_size
        self.size = (image_size[0], image_size[1])
        self.channels = channels
        self.rank = rank
        self.world = world
        self.train = train
        self.seed = seed
        self.fit = fit
        self.labels: Ints = np.array(index.labels, dtype=np.int64)
        self.shapes: Ints = np.array([(r.height, r.width) for r in index.records], dtype=np.int64)
        # of two epochs, because a provider that works ahead stands in two at the turn
        self._views = functools.lru_cache(2)(self._make_views)

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.ids), self.batch_size * self.world)
        return whole + (rest > 0 and self.train is None)

    def order(self, epoch: int) -> Ints:
        """Record numbers in the order of this epoch, over all ranks."""
        return (
            self.ids
            if self.train is None
            else np.random.default_rng([self.seed, epoch]).permutation(self.ids)
        )

    def views(self, epoch: int, step: int) -> Views:
        """This rank's share of a step: batch_size rows, fewer (even none) at the end of an evaluation."""
        order, views = self._views(epoch if self.train is not None else 0)
        size = self.batch_size * self.world
        return views[order[step * size : (step + 1) * size][self.rank :: self.world]]

    def _make_views(self, epoch: int) -> tuple[Ints, Views]:
        if self.train is None:
            return self.order(epoch), evaluation_views(self.shapes, self.size, self.fit)
        return self.order(epoch), training_views(self.shapes, self.train, self.seed, epoch)

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """The position behind a step."""
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for the same images, order, views and global batches, on any number of ranks and by any provider."""
        settings = [
            self.seed,
            self.batch_size * self.world,
            list(self.size),
            self.channels,
            self.fit,
        ]
        augmentation = asdict(self.train) if self.train else None
        described = json.dumps([self.index.fingerprint(self.ids.tolist()), settings, augmentation])
        return hashlib.sha256(described.encode()).hexdigest()


@dataclass(frozen=True)
class Choice:
    """A provider, why it was taken, and why those that come before it were not."""

    provider: str
    reason: str
    refused: dict[str, str]
    where: str = ""  # of the resident set: "device" or "host"

    def __str__(self) -> str:
        refused = (f"not {name}: {why}" for name, why in self.refused.items())
        return "; ".join([f"{self.provider}, because {self.reason}", *refused])


class ScheduledLoader:
    """A `sssd_fast.loaders.Loader` without its pixels: a provider implements `_pixels` and `describe`."""

    name = ""

    def __init__(self, schedule: Schedule, device: torch.device | str) -> None:
        self.schedule = schedule
        self.device = torch.device(device)
        self._position = (0, 0)
        self.choice: Choice | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps_per_epoch

    def __len__(self) -> int:
        return self.steps_per_epoch

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Views]]:
        """For each step from `start_step` to the end of the epoch, uint8 [R, C, H, W] on the device and its views."""
        raise NotImplementedError

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ... of `epoch`. Raises DataError naming a file that can no longer be read."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ConfigError(
                f"start_step is {start_step}; an epoch has {self.steps_per_epoch} steps"
            )
        position = self._position = (epoch, start_step)
        if start_step == self.steps_per_epoch:
            return
        for images, views in self._pixels(epoch, start_step):
            position = self._position = self.schedule.after(*position)
            yield self._batch(images, views)

    def _batch(self, images_RCHW: Tensor, views: Views) -> Batch:
        rows, missing = len(views), self.schedule.batch_size - len(views)
        meta = np.full((2, self.schedule.batch_size), PAD_INDEX, dtype=np.int64)
        meta[1] = PAD_LABEL
        meta[0, :rows] = views.records
        meta[1, :rows] = self.schedule.labels[views.records]
        indices, labels = to_device(torch.from_numpy(meta), self.device)
        train = self.schedule.train
        if train is not None and train.changes_look and rows:
            looks_R3 = to_device(torch.from_numpy(views.looks.astype(np.float32)), self.device)
            images_RCHW = turn_and_light(images_RCHW, looks_R3)
        if missing:
            images_RCHW = torch.cat(
                [images_RCHW, images_RCHW.new_zeros(missing, *images_RCHW.shape[1:])]
            )
        return Batch(images_RCHW, labels, indices, indices != PAD_INDEX)

    def state_dict(self) -> dict[str, Any]:
        epoch, step = self._position
        return {"epoch": epoch, "step": step, "fingerprint": self.schedule.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        if state["fingerprint"] != self.schedule.fingerprint:
            raise DataError(
                "the saved loader position belongs to other data or settings (images, order, global batch size, image "
                "size, seed or augmentation changed): resume with the same ones, or start a new run from the weights"
            )
        self._position = (int(state["epoch"]), int(state["step"]))
        return self._position

    def describe(self) -> str:
        raise NotImplementedError

    def _described(self, how: str) -> str:
        s = self.schedule
        share = f", rank {s.rank} of {s.world}" if s.world > 1 else ""
        last = (
            "the incomplete last batch is dropped"
            if s.train is not None
            else "the last batch is padded"
        )
        padding = f" ({last})" if len(s.ids) % (s.batch_size * s.world) else ""
        return f"{self.name}: {len(s.ids)} images, {s.steps_per_epoch} steps of {s.batch_size}{padding}{share}, {how}"

    def close(self) -> None:
        """Nothing is held by default."""


def _check_settings(
    batch_size: int, size: tuple[int, int], channels: int, rank: int, world: int, fit: str
) -> None:  # fmt: skip
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
