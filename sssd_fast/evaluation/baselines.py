"""What a model must beat on a split: the nearest neighbour, and the most frequent class.

The nearest neighbour gives each image the label of the most similar training image, on 32 x 32 grey
pixels. If a method is not far better than this, the split has near copies of the test images.

Shapes: N images, K classes, I images to choose from, P pixels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd_fast.data.images import GreyRange, decode_image, to_channels
from sssd_fast.data.index import DataIndex
from sssd_fast.data.split import Split
from sssd_fast.evaluation.metrics import Floats
from sssd_fast.loaders.crops import evaluation_crop

NEAREST = "nearest neighbour"
MAJORITY = "most frequent class"
# decoding more would take minutes
MAX_IMAGES = 20_000
_ROWS = 1000  # of the distance matrix at once


def baseline_scores(index: DataIndex, split: Split, name: str) -> dict[str, Floats]:
    """Baseline -> scores [N, K], 0 or 1, of the images of split `name`.

    Known images are those of training, and for the test split those of validation too. The training
    split has no baselines. The nearest neighbour is skipped for more than MAX_IMAGES images.
    """
    if name == "train":
        return {}
    known, queries = [*split.train, *(split.val if name == "test" else [])], split.ids(name)
    labels_I = np.array(index.labels)[known]
    one_hot_KK = np.eye(len(index.classes))
    majority = np.bincount(labels_I, minlength=len(index.classes)).argmax()
    found = {MAJORITY: one_hot_KK[np.full(len(queries), majority)]}
    if len(known) + len(queries) <= MAX_IMAGES:
        found = {NEAREST: one_hot_KK[labels_I[_nearest(index, known, queries)]], **found}
    return found


def _nearest(index: DataIndex, known: list[int], queries: list[int]) -> NDArray[np.int64]:
    """Position in `known` of the image with the smallest squared distance to each of `queries`."""
    with ThreadPoolExecutor() as pool:
        files = [index.file(i) for i in (*known, *queries)]
        pixels = np.stack(list(pool.map(lambda file: _pixels(file, index.grey_range), files)))
    known_IP, query_NP = pixels[: len(known)], pixels[len(known) :]
    # |a - k|^2 without |a|^2, which is the same for every k
    norms_I = (known_IP**2).sum(1)
    chunks = [query_NP[start : start + _ROWS] for start in range(0, len(query_NP), _ROWS)]
    return np.concatenate([(norms_I - 2 * chunk @ known_IP.T).argmin(1) for chunk in chunks])


@lru_cache(maxsize=MAX_IMAGES)
def _pixels(path: Path, grey_range: GreyRange | None) -> NDArray[np.float32]:
    view = evaluation_crop(to_channels(decode_image(path, grey_range), 1), (32, 32), "stretch")
    return view.astype(np.float32).ravel() / np.float32(255)
