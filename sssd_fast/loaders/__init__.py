"""Batches of images for training and evaluation: one contract, the provider chosen by name.

The contract: images are uint8 on the training device and go into the patch and loss ops as they are; order and
augmentation are a pure function of (seed, epoch, record number), so a run continues exactly from (epoch, step); each
rank gets its own share, and the union over the ranks does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sssd_fast.data.index import DataIndex
from sssd_fast.errors import ConfigError
from sssd_fast.loaders.augment import AugmentSpec

PROVIDERS = ("auto", "torch")
PAD_INDEX = -1
PAD_LABEL = -100  # what torch's cross_entropy ignores


@dataclass
class Batch:
    """B images. A padded row (evaluation only) has valid False, zero pixels, index -1 and label -100."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], record numbers of the DataIndex
    valid: Tensor  # bool [B]

    def __len__(self) -> int:
        return len(self.labels)


class Loader(Protocol):
    @property
    def steps_per_epoch(self) -> int: ...

    def __len__(self) -> int:
        """Steps per epoch."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_step` on; the same whatever ran before."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, and what the data were."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """(epoch, start_step) to continue with; refuses a state of other data or settings."""
        ...

    def describe(self) -> str:
        """One line: provider, images, batch, memory, and why."""
        ...

    def close(self) -> None:
        """End worker processes and free the cache."""
        ...


def build_loader(
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
    provider: str = "auto",
    cache: str = "auto",
    cache_limit_bytes: int = 4 * 2**30,
    device: torch.device | str = "cpu",
    fit: str = "crop",
) -> Loader:
    """The loader for the records `ids`. train: augmentation, shuffled, incomplete last batch dropped; None: the
    evaluation view, in order, last batch padded and marked. batch_size is per rank. Raises ConfigError, DataError."""
    from sssd_fast.loaders.torch_loader import TorchLoader

    if provider not in PROVIDERS:
        raise ConfigError(f"loader provider is {provider!r}; one of {', '.join(PROVIDERS)} is needed")
    return TorchLoader(
        index,
        ids,
        batch_size=batch_size,
        image_size=image_size,
        channels=channels,
        train=train,
        seed=seed,
        rank=rank,
        world=world,
        workers=workers,
        cache=cache,
        cache_limit_bytes=cache_limit_bytes,
        device=device,
        drop_last=train is not None,
        shuffle=train is not None,
        fit=fit,
    )
