"""What a split gives away for nothing: the nearest training image on 32 x 32 grey pixels decides. A method must beat it by far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_fast.data.images import ImageArray, decode_image, to_channels
from sssd_fast.data.index import DataIndex
from sssd_fast.data.labels import positive_class
from sssd_fast.data.split import Split
from sssd_fast.errors import DataError
from sssd_fast.evaluation.metrics import binary_metrics
from sssd_fast.loaders.crops import evaluation_crop

SIDE = 32
Picture = NDArray[np.float32]  # [SIDE * SIDE]


class NearestNeighbour:
    """1-nearest-neighbour by squared distance of pixels; pictures are decoded once, whatever the split."""

    def __init__(self, decode: Callable[[Any], ImageArray] = decode_image) -> None:
        self._decode = decode
        self._pictures = dict[str, Picture]()

    def rates(self, index: DataIndex, split: Split, part: str) -> dict[str, Any]:
        """Rates on `part` (metrics.Metrics as a dict); every image before it in train, val, test is known. The score is 0 or 1."""
        known = [*split.train, *(split.val if part == "test" else [])]
        asked = split.ids(part)
        if not asked:
            raise DataError(f"split {split.name} has no {part} images")
        known_KP, asked_NP = self._stack(index, known), self._stack(index, asked)
        # |a - k|^2 without |a|^2, which is the same for every k
        distance_NK = (known_KP**2).sum(1)[None, :] - 2 * asked_NP @ known_KP.T
        labels = np.array(index.labels)
        positive = positive_class(index.classes)
        said_N = labels[known][distance_NK.argmin(1)] == positive
        return binary_metrics(
            (labels[asked] == positive).astype(np.int64), said_N.astype(np.float64)
        ).as_dict()

    def _stack(self, index: DataIndex, ids: list[int]) -> Picture:
        return np.stack([self._picture(index, i) for i in ids])

    def _picture(self, index: DataIndex, i: int) -> Picture:
        key = index.records[i].pixel_hash
        if key not in self._pictures:
            grey = to_channels(self._decode(index.file(i)), 1)
            self._pictures[key] = evaluation_crop(grey, (SIDE, SIDE), "stretch").astype(
                np.float32
            ).ravel() / np.float32(255)
        return self._pictures[key]
