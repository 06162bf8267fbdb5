"""Leakage control: the label of the nearest training image on 32 x 32 grey pixels.

A method must be far better than this, else the split shows it near copies of the test images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_fast.data.images import decode_image, to_channels
from sssd_fast.data.index import DataIndex, positive_class
from sssd_fast.data.split import Split
from sssd_fast.evaluation.metrics import classification_metrics
from sssd_fast.loaders.crops import evaluation_crop

SIDE = 32


def nearest_rates(
    index: DataIndex, split: Split, name: str, pixels: dict[str, NDArray[np.float32]]
) -> dict[str, Any]:
    """Metrics on the split `name` by squared distance to the splits before it; scores are 0 or 1.

    `pixels` keeps the decoded images for further splits.
    """
    known = [*split.train, *(split.val if name == "test" else [])]
    queries = split.ids(name)
    for i in (*known, *queries):
        key = index.records[i].pixel_hash
        if key not in pixels:
            grey = to_channels(decode_image(index.file(i)), 1)
            view = evaluation_crop(grey, (SIDE, SIDE), "stretch")
            pixels[key] = view.astype(np.float32).ravel() / np.float32(255)
    known_KP = np.stack([pixels[index.records[i].pixel_hash] for i in known])
    query_NP = np.stack([pixels[index.records[i].pixel_hash] for i in queries])
    # |a - k|^2 without |a|^2, which is the same for every k
    distance_NK = (known_KP**2).sum(1)[None, :] - 2 * query_NP @ known_KP.T
    positive_I = np.array(index.labels) == positive_class(index.classes)
    scores_N = positive_I[known][distance_NK.argmin(1)].astype(np.float64)
    return classification_metrics(positive_I[queries], scores_N)
