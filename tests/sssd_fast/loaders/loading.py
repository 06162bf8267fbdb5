"""Loaders for tests, from settings of the order and of the provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.loaders import Loader, SampleOrder, build_loader, resident

PROVIDER_SETTINGS = ("provider", "workers", "cache", "limit_gib", "device")
PLAIN = AugmentConfig()
JITTER = AugmentConfig(rotation_deg=10, brightness=0.1, contrast=0.1)
Make = Callable[..., Loader]


def order_of(index: DataIndex, ids: Iterable[int] | None = None, **settings: Any) -> SampleOrder:
    """Batches of 4 crops of 24 x 32 pixels, grey, without augmentation unless `augment` is
    given.
    """
    defaults = {"batch_size": 4, "image_size": (24, 32), "channels": 1, "augment": None}
    chosen = range(len(index)) if ids is None else ids
    return SampleOrder(index, list(chosen), **{**defaults, **settings})


def loader_of(index: DataIndex, ids: Iterable[int] | None = None, **settings: Any) -> Loader:
    """The decoded images are not cached in a file unless `cache` is given. The provider "staged" is
    the resident set in host memory, as for a GPU that is too small.
    """
    provider = {key: settings.pop(key) for key in PROVIDER_SETTINGS if key in settings}
    order = order_of(index, ids, **settings)
    if provider.get("provider") == "staged":
        place = torch.device(provider.get("device", "cpu"))
        return resident.ResidentLoader(order, place, "host", None)
    return build_loader(order, **{"cache": "none", **provider})


def assert_near(got: torch.Tensor, expected: torch.Tensor, largest: float, mean: float) -> None:
    """Largest and mean difference of levels."""
    assert (got.shape, got.dtype) == (expected.shape, torch.uint8)
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= largest
    assert difference.float().mean() <= mean
