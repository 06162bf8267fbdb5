"""Leakage control: the label of the nearest training image on 32 x 32 grey pixels.

A method must be far better than this, else the split shows it near copies of the test images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_fast.data.images import decode_image, to_channels
from sssd_fast.data.index import DataIndex
from sssd_fast.data.labels import positive_class
from sssd_fast.data.split import Split
from sssd_fast.errors import DataError
from sssd_fast.evaluation.metrics import classification_metrics
from sssd_fast.loaders.crops import evaluation_crop

SIDE = 32


class NearestNeighbour:
    """1-nearest-neighbour by squared distance of pixels; images are decoded once for all splits."""

    def __init__(self) -> None:
        self._pixels = dict[str, NDArray[np.float32]]()

    def rates(self, index: DataIndex, split: Split, name: str) -> dict[str, Any]:
        """Metrics on the split `name`. Known are the splits before it; the score is 0 or 1."""
        known = [*split.train, *(split.val if name == "test" else [])]
        queries = split.ids(name)
        if not queries:
            raise DataError(f"split {split.name} has no {name} images")
        known_KP, query_NP = self._stack(index, known), self._stack(index, queries)
        # |a - k|^2 without |a|^2, which is the same for every k
        distance_NK = (known_KP**2).sum(1)[None, :] - 2 * query_NP @ known_KP.T
        positive_I = np.array(index.labels) == positive_class(index.classes)
        scores_N = positive_I[known][distance_NK.argmin(1)].astype(np.float64)
        return classification_metrics(positive_I[queries].astype(np.int64), scores_N)

    def _stack(self, index: DataIndex, ids: list[int]) -> NDArray[np.float32]:
        """[N, SIDE * SIDE] pixels in [0, 1]."""
        for i in ids:
            key = index.records[i].pixel_hash
            if key not in self._pixels:
                grey = to_channels(decode_image(index.file(i)), 1)
                view = evaluation_crop(grey, (SIDE, SIDE), "stretch")
                self._pixels[key] = view.astype(np.float32).ravel() / np.float32(255)
        return np.stack([self._pixels[index.records[i].pixel_hash] for i in ids])
