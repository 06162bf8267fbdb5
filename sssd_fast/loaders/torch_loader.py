"""The loader that runs everywhere: Pillow in this process or in torch DataLoader workers.

Epoch e visits order(seed, e), cut into global batches of world * batch_size; position g of a global batch belongs to
rank g % world. Image i of epoch e is augmented with numpy's default_rng([seed, e, i]). Nothing else is random, so any
(epoch, step) can be produced without what came before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sssd_fast.data.images import ImageArray, decode_image, to_channels
from sssd_fast.data.index import DataIndex
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.guards import ignore_signals_in_worker
from sssd_fast.loaders import PAD_INDEX, PAD_LABEL, Batch
from sssd_fast.loaders.augment import AugmentSpec, augment, resize_center_crop

Key = tuple[int, int]  # (epoch, record number or PAD_INDEX)
Collated = tuple[Tensor, Tensor, Tensor] | str  # images, labels, record numbers; or the message of a DataError


class TorchLoader:
    """A `sssd_fast.loaders.Loader`. Images are decoded at full size, converted to `channels`, cropped and resized.

    train: augmentation, or None for the evaluation view (`fit`: resize_center_crop). workers: 0 decodes in this
    process, and keeps decoded images where `cache` says so: "ram", "none", or "auto" = "ram" if they fit in
    cache_limit_bytes; with workers each process decodes for itself, without a cache. drop_last False pads the last
    batch (`Batch.valid`). Raises ConfigError for settings out of range, DataError for too few images.
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
        workers: int = 0,
        cache: str = "auto",
        cache_limit_bytes: int = 4 * 2**30,
        device: torch.device | str = "cpu",
        drop_last: bool,
        shuffle: bool,
        fit: str = "crop",
    ) -> None:
        _check_settings(batch_size, image_size, channels, rank, world, workers, cache, fit)
        self._ids = np.asarray(ids, dtype=np.int64)
        if len(self._ids) == 0:
            raise DataError("the loader was given no images")
        if self._ids.min() < 0 or self._ids.max() >= len(index):
            raise DataError(
                f"record numbers {self._ids.min()} to {self._ids.max()}; the index holds {len(index)} images"
            )
        if drop_last and len(self._ids) < batch_size * world:
            raise DataError(
                f"{len(self._ids)} training images do not fill one batch of {batch_size} on {world} process(es); "
                f"set the batch size to at most {len(self._ids) // world}"
            )
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self._seed, self._shuffle, self._drop_last = seed, shuffle, drop_last
        self._device = torch.device(device)
        self._workers = workers
        sizes = [index.records[i].height * index.records[i].width * channels for i in self._ids]
        self._decoded_bytes = sum(sizes)
        self._cache_limit = cache_limit_bytes
        self._cached = cache == "ram" or (cache == "auto" and workers == 0 and self._decoded_bytes <= cache_limit_bytes)
        self._images = _Images(index, image_size, channels, train, seed, fit, cached=self._cached)
        self._keys = _Keys()
        self._batches = DataLoader(
            self._images,
            batch_sampler=self._keys,
            collate_fn=_take,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=self._device.type == "cuda",
        )
        self._position = (0, 0)
        settings = [seed, batch_size * world, list(image_size), channels, shuffle, drop_last, fit]
        augmentation = asdict(train) if train else None
        described = json.dumps([index.fingerprint(self._ids.tolist()), settings, augmentation])
        self._fingerprint = hashlib.sha256(described.encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self._ids), self.batch_size * self.world)
        return whole + (rest > 0 and not self._drop_last)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ... of `epoch`. Raises DataError naming a file that can no longer be read."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ConfigError(f"start_step is {start_step}; an epoch has {self.steps_per_epoch} steps")
        order = self.order(epoch)
        self._keys.batches = [
            [(epoch, i) for i in self._share(order, step)] for step in range(start_step, self.steps_per_epoch)
        ]
        self._position = (epoch, start_step)
        try:
            for collated in self._batches:
                if isinstance(collated, str):
                    raise DataError(collated)
                self._advance(epoch)
                yield self._to_device(*collated)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a loader process died ({error}); this is mostly a lack of memory: use fewer workers, or workers=0"
            ) from error

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Record numbers in the order of this epoch, over all ranks."""
        return np.random.default_rng([self._seed, epoch]).permutation(self._ids) if self._shuffle else self._ids

    def _share(self, order: npt.NDArray[np.int64], step: int) -> list[int]:
        size = self.batch_size * self.world
        mine = order[step * size : (step + 1) * size][self.rank :: self.world].tolist()
        return [*mine, *[PAD_INDEX] * (self.batch_size - len(mine))]

    def _advance(self, epoch: int) -> None:
        step = self._position[1] + 1
        self._position = (epoch, step) if step < self.steps_per_epoch else (epoch + 1, 0)

    def _to_device(self, images: Tensor, labels: Tensor, indices: Tensor) -> Batch:
        moved = [t.to(self._device, non_blocking=True) for t in (images, labels, indices, indices != PAD_INDEX)]
        return Batch(*moved)

    def state_dict(self) -> dict[str, Any]:
        epoch, step = self._position
        return {"epoch": epoch, "step": step, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                "the saved loader position belongs to other data or settings (images, order, global batch size, image "
                "size, seed or augmentation changed): resume with the same ones, or start a new run from the weights"
            )
        self._position = (int(state["epoch"]), int(state["step"]))
        return self._position

    def describe(self) -> str:
        size = f"{self._decoded_bytes / 2**20:.0f} MiB"
        if self._cached:
            cache = f"decoded images kept in memory ({size})"
        elif self._workers:
            cache = f"decoded anew each epoch in {self._workers} worker processes"
        else:
            cache = f"decoded anew each epoch ({size}; the cache limit is {self._cache_limit / 2**20:.0f} MiB)"
        share = f", rank {self.rank} of {self.world}" if self.world > 1 else ""
        return (
            f"torch loader: {len(self._ids)} images, {self.steps_per_epoch} steps of {self.batch_size}{share}, {cache}"
        )

    def close(self) -> None:
        self._batches._iterator = None  # the only way to end persistent workers before the loader is collected
        self._images.clear()


class _Keys(Sampler[list[Key]]):
    """The batches of the coming epoch; the keys carry the epoch, so that workers outlive it."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Images(Dataset[Any]):
    """Decodes, augments and stacks one batch of keys at a time."""

    def __init__(
        self,
        index: DataIndex,
        size: tuple[int, int],
        channels: int,
        train: AugmentSpec | None,
        seed: int,
        fit: str,
        *,
        cached: bool,
    ) -> None:
        self._index, self._size, self._channels = index, size, channels
        self._train, self._seed, self._fit, self._cached = train, seed, fit, cached
        self._store: dict[int, ImageArray] = {}

    def __getitems__(self, keys: list[Key]) -> Collated:
        images = np.zeros((len(keys), *self._size, self._channels), dtype=np.uint8)
        labels = np.full(len(keys), PAD_LABEL, dtype=np.int64)
        try:
            for row, (epoch, i) in enumerate(keys):
                if i != PAD_INDEX:
                    images[row] = self._view(epoch, i).reshape(images.shape[1:])
                    labels[row] = self._index.records[i].label
        except DataError as error:  # as a value: DataLoader would wrap it in its own traceback text
            return (
                f"{error}; it was readable when the data were checked: restore it, or run `sssd-fast data check` again"
            )
        indices = torch.tensor([i for _, i in keys])
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels), indices

    def _view(self, epoch: int, i: int) -> ImageArray:
        image = self._decoded(i)
        if self._train is None:
            return resize_center_crop(image, self._size, fit=self._fit)
        return augment(image, self._train, self._size, np.random.default_rng([self._seed, epoch, i]))

    def _decoded(self, i: int) -> ImageArray:
        if i in self._store:
            return self._store[i]
        record = self._index.records[i]
        image = to_channels(decode_image(self._index.file(i)), self._channels)
        if image.shape[:2] != (record.height, record.width):
            raise DataError(
                f"{self._index.file(i)}: {image.shape[1]} x {image.shape[0]} pixels, the index says "
                f"{record.width} x {record.height}: the file changed"
            )
        if self._cached:
            self._store[i] = image
        return image

    def clear(self) -> None:
        self._store.clear()


def _take(collated: Any) -> Any:
    return collated  # _Images.__getitems__ has stacked the batch already


def _check_settings(
    batch_size: int, size: tuple[int, int], channels: int, rank: int, world: int, workers: int, cache: str, fit: str
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
    if workers < 0:
        problems.append(f"workers is {workers}; 0 or more is needed")
    if cache not in ("auto", "ram", "none"):
        problems.append(f"cache is {cache!r}; auto, ram or none is needed")
    if cache == "ram" and workers > 0:
        problems.append(f"cache 'ram' with {workers} workers would hold a copy in each; use workers=0 or cache='none'")
    if fit not in ("crop", "stretch"):
        problems.append(f"fit is {fit!r}; crop or stretch is needed")
    if problems:
        raise ConfigError("loader: " + "; ".join(problems))
