"""Loaders for tests, from settings of the order and of the provider."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.loaders import Loader, SampleOrder, build_loader

PROVIDER_SETTINGS = ("provider", "workers", "cache", "limit_gib", "device")


def order_of(index: DataIndex, ids: Iterable[int] | None = None, **settings: Any) -> SampleOrder:
    """Batches of 4 crops of 24 x 32 pixels, grey, without augmentation unless `augment` is
    given.
    """
    defaults = {"batch_size": 4, "image_size": (24, 32), "channels": 1, "augment": None}
    chosen = range(len(index)) if ids is None else ids
    return SampleOrder(index, list(chosen), **{**defaults, **settings})


def loader_of(index: DataIndex, ids: Iterable[int] | None = None, **settings: Any) -> Loader:
    """The decoded images are not cached in a file unless `cache` is given."""
    provider = {key: settings.pop(key) for key in PROVIDER_SETTINGS if key in settings}
    return build_loader(order_of(index, ids, **settings), **{"cache": "none", **provider})


PLAIN = AugmentConfig()
