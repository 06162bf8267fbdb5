"""Batches of images for training and evaluation: one contract, three providers.

Images are uint8 on the training device and go into the patch and loss ops unchanged. Order and
augmentation are a pure function of (seed, epoch, record number), so a run continues exactly from
(epoch, step). Each rank gets its share; the union over the ranks does not depend on their number.

Providers: `resident` (decoded once, kept in memory), `dali` (NVIDIA DALI), `torch` (Pillow in
    workers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from sssd_fast.data.index import DataIndex, Progress
from sssd_fast.data.pixels import cache_folder, decoded_bytes
from sssd_fast.errors import ConfigError
from sssd_fast.loaders import dali, resident
from sssd_fast.loaders.batch import PAD_INDEX, PAD_LABEL, Batch
from sssd_fast.loaders.order import BaseLoader, LoaderChoice, SampleOrder
from sssd_fast.loaders.pillow import TorchLoader

__all__ = [
    "PAD_INDEX",
    "PAD_LABEL",
    "PROVIDERS",
    "Batch",
    "Loader",
    "LoaderChoice",
    "SampleOrder",
    "build_loader",
    "choose",
]

PROVIDERS = ("resident", "dali", "torch")


class Loader(Protocol):
    choice: LoaderChoice | None  # why this provider was chosen

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on; they do not depend on earlier epochs."""
        ...

    def describe(self) -> str:
        """One line: provider, images, batch, what happens to the last batch, memory."""
        ...

    def close(self) -> None:
        """Ends worker processes and threads, and frees what they hold."""
        ...


def choose(
    provider: str,
    index: DataIndex,
    channels: int,
    device: torch.device,
    limit_gib: float | None = None,
) -> LoaderChoice:
    """The named provider, or for "auto" the first of PROVIDERS that is available.

    limit_gib: most GiB for decoded images; None = the shares of `resident.placement`.
    Raises ConfigError, with the reason, for a named provider that is not available.
    """
    if provider not in ("auto", *PROVIDERS):
        raise ConfigError(f"data.loader is {provider!r}; auto, {', '.join(PROVIDERS)} is needed")
    unavailable: dict[str, str] = {}
    if provider in ("auto", "resident"):
        where, reason = resident.placement(decoded_bytes(index, channels), device, limit_gib)
        if where is not None:
            return LoaderChoice("resident", reason, unavailable, where)
        unavailable["resident"] = reason
    if provider in ("auto", "dali"):
        problem = dali.unavailable(device)
        if problem is None:
            reason = "decodes while the model trains" if unavailable else "data.loader names it"
            return LoaderChoice("dali", reason, unavailable)
        unavailable["dali"] = problem
    if provider in unavailable:
        raise ConfigError(
            f"data.loader is {provider!r}, but {unavailable[provider]}; set it to auto or another "
            "provider"
        )
    reason = "runs everywhere" if unavailable else "data.loader names it"
    return LoaderChoice("torch", reason, unavailable)


def build_loader(
    order: SampleOrder,
    device: torch.device | str = "cpu",
    *,
    provider: str = "auto",
    workers: int = 0,
    cache: str = "auto",
    limit_gib: float | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], object] = lambda text: None,
) -> Loader:
    """A loader for `order` on the training device.

    Args:
        provider: "auto" or one of PROVIDERS.
        workers: processes of the torch loader; threads of the others, at least as many as torch
            has.
        cache: of decoded images, see `data.pixels.cache_folder`.
        limit_gib: see `choose`.
        progress: called with (done, total) while images are decoded once.
        warn: called with problems of the cache.

    Raises ConfigError, DataError.
    """
    device = torch.device(device)
    index, channels = order.index, order.channels
    choice = choose(provider, index, channels, device, limit_gib)
    threads = max(workers, torch.get_num_threads())
    loader: BaseLoader
    if choice.provider == "resident":
        folder = cache_folder(cache)
        images = resident.resident_set(
            index, channels, device, choice.where, folder, threads, progress, warn
        )
        loader = resident.ResidentLoader(order, device, images)
    elif choice.provider == "dali":
        loader = dali.DaliLoader(order, device, threads=threads)
    else:
        loader = TorchLoader(order, device, workers=workers)
    loader.choice = choice
    return loader
