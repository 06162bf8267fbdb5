"""Batches of images for training and evaluation: one contract, the provider chosen by name or by rule.

The contract: images are uint8 on the training device and go into the patch and loss ops as they are; order and
augmentation are a pure function of (seed, epoch, record number), so a run continues exactly from (epoch, step); each
rank gets its own share, and the union over the ranks does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from sssd_fast.data.index import DataIndex, Progress
from sssd_fast.data.pixels import cache_folder, decoded_bytes
from sssd_fast.errors import ConfigError
from sssd_fast.loaders import dali as dali_loader
from sssd_fast.loaders import resident
from sssd_fast.loaders.batch import PAD_INDEX, PAD_LABEL, Batch
from sssd_fast.loaders.crops import AugmentSpec
from sssd_fast.loaders.order import Choice, Schedule, ScheduledLoader
from sssd_fast.loaders.pillow import TorchLoader

__all__ = [
    "PAD_INDEX",
    "PAD_LABEL",
    "PROVIDERS",
    "AugmentSpec",
    "Batch",
    "Choice",
    "Loader",
    "build_loader",
    "choose",
]

PROVIDERS = ("resident", "dali", "torch")


class Loader(Protocol):
    choice: Choice | None  # why it is this provider

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
        """One line: provider, images, batch, what is done with the last one, memory."""
        ...

    def close(self) -> None:
        """End worker processes and threads, and free what they hold."""
        ...


def choose(
    provider: str, index: DataIndex, channels: int, device: torch.device, limit_gib: float | None = None
) -> Choice:  # fmt: skip
    """The provider named, or for "auto" the first of PROVIDERS that can run: resident where the images fit, DALI, torch.

    limit_gib: most GiB that decoded images may take (None: resident.placement's shares). Raises ConfigError, with the
    reason, for a named provider that cannot run, and for an unknown name.
    """
    if provider not in ("auto", *PROVIDERS):
        raise ConfigError(f"data.loader is {provider!r}; auto, {', '.join(PROVIDERS)} is needed")
    refused: dict[str, str] = {}
    if provider in ("auto", "resident"):
        where, reason = resident.placement(decoded_bytes(index, channels), device, limit_gib)
        if where is not None:
            return Choice("resident", reason, refused, where)
        refused["resident"] = reason
    if provider in ("auto", "dali"):
        why = dali_loader.refusal(device)
        if why is None:
            return Choice(
                "dali", "decodes while the model trains" if refused else "as asked", refused
            )
        refused["dali"] = why
    if provider in refused:
        raise ConfigError(
            f"data.loader is {provider!r}, but {refused[provider]}; set it to auto or another provider"
        )
    return Choice("torch", "runs everywhere" if refused else "as asked", refused)


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
    limit_gib: float | None = None,
    device: torch.device | str = "cpu",
    fit: str = "crop",
    progress: Progress | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Loader:
    """The loader for the records `ids`. train: augmentation, shuffled, incomplete last batch dropped; None: the
    evaluation view, in order, last batch padded and marked. batch_size is per rank.

    workers: processes of the torch loader; threads, at least as many as torch has, of the others.
    cache: of decoded images, see `data.pixels.cache_folder`. limit_gib: see `choose`. say: gets what went wrong with the
    cache. progress: (done, all) while images are decoded once. Raises ConfigError, DataError.
    """
    device = torch.device(device)
    schedule = Schedule(
        index,
        ids,
        batch_size=batch_size,
        image_size=image_size,
        channels=channels,
        train=train,
        seed=seed,
        rank=rank,
        world=world,
        fit=fit,
    )
    choice = choose(provider, index, channels, device, limit_gib)
    threads = max(workers, torch.get_num_threads())
    loader: ScheduledLoader
    if choice.provider == "resident":
        folder = cache_folder(cache)
        images = resident.resident_set(
            index,
            channels,
            device,
            choice.where,
            folder,
            threads=threads,
            progress=progress,
            say=say,
        )
        loader = resident.ResidentLoader(schedule, device, images)
    elif choice.provider == "dali":
        loader = dali_loader.DaliLoader(schedule, device, threads=threads)
    else:
        loader = TorchLoader(schedule, device, workers=workers)
    loader.choice = choice
    return loader
