"""Batches of images for training and evaluation: one contract, three providers.

Images are uint8 on the training device and go into the patch and loss ops unchanged. Order and
augmentation are a pure function of (seed, epoch, record number), so a run continues exactly from
(epoch, step). Each rank gets its share; the union over the ranks does not depend on their number.

Providers: `resident` (decoded once, kept in memory), `dali` (NVIDIA DALI), `torch` (Pillow).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sssd_fast.data.index import DataIndex, Progress
from sssd_fast.data.pixels import PixelStore, cache_folder
from sssd_fast.errors import ConfigError
from sssd_fast.loaders import dali, resident
from sssd_fast.loaders.order import PAD_INDEX, PAD_LABEL, Batch, Loader, SampleOrder
from sssd_fast.loaders.pillow import TorchLoader

__all__ = [
    "PAD_INDEX",
    "PAD_LABEL",
    "PROVIDERS",
    "Batch",
    "Loader",
    "SampleOrder",
    "build_loader",
    "choose",
]

PROVIDERS = ("resident", "dali", "torch")


def choose(
    provider: str,
    index: DataIndex,
    channels: int,
    device: torch.device,
    limit_gib: float | None = None,
) -> tuple[str, str, str]:
    """The named provider, or for "auto" the first of PROVIDERS that is available.

    limit_gib: most GiB for decoded images; None = the shares of `resident.placement`.
    Returns the provider, where a resident set is kept ("device" or "host"), and the reason. Raises
    ConfigError, with the reason, for a named provider that is not available.
    """
    if provider not in ("auto", *PROVIDERS):
        raise ConfigError(f"data.loader is {provider!r}; auto, {', '.join(PROVIDERS)} is needed")
    problems: dict[str, str] = {}

    def chosen(name: str, reason: str, where: str = "") -> tuple[str, str, str]:
        others = [f"not {other}: {why}" for other, why in problems.items()]
        return name, where, "; ".join([f"{name}, because {reason}", *others])

    if provider in ("auto", "resident"):
        nbytes = PixelStore(index, channels).nbytes
        where, reason = resident.placement(nbytes, device, limit_gib)
        if where is not None:
            return chosen("resident", reason, where)
        problems["resident"] = reason
    if provider in ("auto", "dali"):
        problem = dali.unavailable(device)
        if problem is None:
            return chosen("dali", "it decodes while the model trains")
        problems["dali"] = problem
    if provider in problems:
        raise ConfigError(
            f"data.loader is {provider!r}, but {problems[provider]}; set it to auto or another "
            "provider"
        )
    return chosen("torch", "it runs everywhere")


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
        workers: threads; `resident` and `dali` use at least as many as torch has.
        cache: of decoded images, see `data.pixels.cache_folder`.
        limit_gib: see `choose`.
        progress: called with (done, total) while images are decoded once.
        warn: called with problems of the cache.

    Raises ConfigError, DataError.
    """
    device = torch.device(device)
    name, where, reason = choose(provider, order.index, order.channels, device, limit_gib)
    threads = max(workers, torch.get_num_threads())
    loader: Loader
    if name == "resident":
        folder = cache_folder(cache)
        loader = resident.ResidentLoader(order, device, where, folder, threads, progress, warn)
    elif name == "dali":
        loader = dali.DaliLoader(order, device, threads=threads)
    else:
        loader = TorchLoader(order, device, workers=workers)
    loader.reason = reason
    return loader
