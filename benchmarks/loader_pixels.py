"""The providers as the benchmark sets them up, and how far the pixels of each are from Pillow's.

    sssd-fast bench loader DATA --parity

Two kinds of crops are compared: one epoch of training crops (epoch 0) and the evaluation view, of all images. Differences
are grey levels (of 255), over all pixels and channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.errors import SssdError
from sssd_fast.loaders import Loader, SampleOrder, build_loader


@dataclass(frozen=True)
class Way:
    """A provider as it is set up."""

    name: str
    provider: str
    workers: int


def ways(threads: int) -> list[Way]:
    """The reference first, then the baseline."""
    return [
        Way("torch, 0 workers", "torch", 0),
        Way(f"torch, {threads} workers", "torch", threads),
        Way("dali", "dali", threads),
        Way("resident", "resident", threads),
    ]


@dataclass(frozen=True)
class Case:
    """One data set at one number of channels."""

    data: str
    index: DataIndex
    channels: int
    size: int
    batch: int
    threads: int
    device: torch.device

    def arguments(self, way: Way) -> dict[str, Any]:
        """Of build_loader, besides the images and their augmentation; JSON-serialisable."""
        return {
            "batch_size": self.batch,
            "image_size": (self.size, self.size),
            "channels": self.channels,
            "workers": way.workers,
            "provider": way.provider,
            "cache": "none",
            "device": str(self.device),
        }

    def loader(self, way: Way, train: AugmentConfig | None) -> Loader:
        return loader_of(self.index, train, self.arguments(way))

    def reference(self, train: AugmentConfig | None) -> Loader:
        """Pillow, in this process."""
        return replace(self, device=torch.device("cpu")).loader(ways(self.threads)[0], train)


def loader_of(
    index: Any, augment: AugmentConfig | None, arguments: dict[str, Any], seed: int = 0
) -> Loader:
    shown = {name: arguments[name] for name in ("batch_size", "image_size", "channels")}
    order = SampleOrder(index, range(len(index)), augment=augment, seed=seed, **shown)
    rest = {name: value for name, value in arguments.items() if name not in shown}
    return build_loader(order, **rest)


@dataclass(frozen=True)
class Difference:
    """Grey levels between the pixels of two loaders."""

    mean: float
    max: int
    images: int
    images_differing: int
    beyond_2: float  # share of the pixels that differ by more than 2 levels


def difference(loader: Loader, reference: Loader, epoch: int = 0) -> Difference | str:
    """Over one epoch; a text where the batches are not those of the reference."""
    if loader.steps_per_epoch != reference.steps_per_epoch:
        return f"{loader.steps_per_epoch} batches in place of {reference.steps_per_epoch}"
    total, most, images, differing, beyond, pixels = 0, 0, 0, 0, 0, 0
    for step, (batch, wanted) in enumerate(
        zip(loader.epoch(epoch), reference.epoch(epoch), strict=True)
    ):
        for name in ("indices", "labels", "valid"):
            if not torch.equal(getattr(batch, name).cpu(), getattr(wanted, name)):
                return f"batch {step} has other {name} than the torch loader"
        off_RCHW = (batch.images.cpu().short() - wanted.images.short()).abs()[wanted.valid]
        total, most = total + int(off_RCHW.sum()), max(most, int(off_RCHW.max()))
        images = images + len(off_RCHW)
        differing = differing + int((off_RCHW.amax((1, 2, 3)) > 0).sum())
        beyond, pixels = beyond + int((off_RCHW > 2).sum()), pixels + off_RCHW.numel()
    return Difference(total / pixels, most, images, differing, beyond / pixels)


def parity(case: Case) -> list[dict[str, Any]]:
    """A row per provider and kind of view; `reason` in place of the figures where there are none."""
    rows = []
    for view, train in (("training", AugmentConfig()), ("evaluation", None)):
        for way in ways(case.threads)[1:]:
            row = {"data": case.data, "channels": case.channels, "provider": way.name, "view": view}
            try:
                loader = case.loader(way, train)
            except SssdError as error:
                rows.append({**row, "reason": str(error)})
                continue
            found = difference(loader, case.reference(train))
            loader.close()
            rows.append(
                {**row, "reason": found} if isinstance(found, str) else {**row, **asdict(found)}
            )
    return rows
