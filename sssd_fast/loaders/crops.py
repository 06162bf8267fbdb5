"""Crop, flip and jitter of each image, sampled here for every provider.

The values for record i in epoch e are a pure function of (seed, e, i): row i of one table of random
numbers per epoch. Boxes are whole pixels, cut out before resizing, so that Pillow, torch, DALI and
the Triton op can compute the same crop.

Shapes: N images of the index, R rows of a batch. A box is (top, left, height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sssd_fast.config import AugmentConfig
from sssd_fast.data.images import ImageArray

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a training crop, as in MAE
CROP_TRIES = 10
# Random numbers per record: area, aspect, top and left of each try; then flip, angle, brightness,
# contrast.
_DRAWS = 4 * CROP_TRIES + 4


@dataclass(frozen=True)
class Crops:
    """Crop, flip and jitter of R images. Indexing with an array or slice selects rows."""

    records: Ints  # [R] record numbers of the index
    boxes: Ints  # [R, 4]
    flips: npt.NDArray[np.bool_]  # [R]
    jitter: Floats  # [R, 3] degrees counter-clockwise, brightness - 1, contrast - 1

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, rows: Ints | slice) -> Crops:
        return Crops(self.records[rows], self.boxes[rows], self.flips[rows], self.jitter[rows])


def training_crops(shapes: Ints, spec: AugmentConfig, seed: int, epoch: int) -> Crops:
    """Crops of all N images of the index in epoch `epoch`; shapes [N, 2] are heights and widths.

    Every number is drawn whether a setting is on or off, so enabling the rotation does not move the
    crops.
    """
    # The third number separates this table from the permutation, which is drawn from (seed, epoch).
    draws = np.random.default_rng([seed, epoch, 1]).random((len(shapes), _DRAWS))
    tries, rest = draws[:, :-4].reshape(-1, CROP_TRIES, 4), draws[:, -4:]
    boxes = random_crop_boxes(shapes, spec.crop_scale, CROP_RATIO, tries)
    jitter = (2 * rest[:, 1:] - 1) * (spec.rotation_deg, spec.brightness, spec.contrast)
    return Crops(np.arange(len(shapes)), boxes, rest[:, 0] < spec.hflip, jitter)


def evaluation_crops(shapes: Ints, size: tuple[int, int], fit: str) -> Crops:
    """Evaluation crops of all N images, see `center_boxes`."""
    n = len(shapes)
    boxes = center_boxes(shapes, size, fit)
    return Crops(np.arange(n), boxes, np.zeros(n, dtype=bool), np.zeros((n, 3)))


def random_crop_boxes(
    shapes: Ints, scale: tuple[float, float], ratio: tuple[float, float], draws: Floats
) -> Ints:
    """Inception crop [N, 4]: area uniform in `scale`, log aspect uniform in `ratio`, uniform
    position.

    draws: [N, CROP_TRIES, 4] uniform in [0, 1). The first try that fits is used; if none fits, the
    largest centred crop of an allowed aspect.
    """
    height, width = shapes[:, :1], shapes[:, 1:]
    area = height * width * (scale[0] + draws[:, :, 0] * (scale[1] - scale[0]))
    aspect = np.exp(math.log(ratio[0]) + draws[:, :, 1] * math.log(ratio[1] / ratio[0]))
    w = np.maximum(1, np.rint(np.sqrt(area * aspect)))
    h = np.maximum(1, np.rint(np.sqrt(area / aspect)))
    fits = (w <= width) & (h <= height)
    top = np.floor(draws[:, :, 2] * (height - h + 1))
    left = np.floor(draws[:, :, 3] * (width - w + 1))
    first = fits.argmax(1)[:, None, None]
    found = np.take_along_axis(np.stack([top, left, h, w], 2), first, 1)[:, 0].astype(np.int64)
    clipped = np.clip(width / height, *ratio)
    w_max = np.maximum(1, np.minimum(width, np.rint(height * clipped)))
    h_max = np.maximum(1, np.minimum(height, np.rint(width / clipped)))
    centred = np.concatenate([(height - h_max) // 2, (width - w_max) // 2, h_max, w_max], 1)
    return np.where(fits.any(axis=1, keepdims=True), found, centred.astype(np.int64))


def center_boxes(shapes: Ints, size: tuple[int, int], fit: str) -> Ints:
    """Boxes [N, 4] of the evaluation crop.

    fit="crop": the largest centred crop with the target's aspect, in whole pixels; nothing is
    stretched by more than half a pixel. fit="stretch": the whole image, so that the edges of wide
    slices stay visible.
    """
    if fit == "stretch":
        return np.concatenate([np.zeros_like(shapes), shapes], 1)
    scale = (shapes / np.array(size)).min(1, keepdims=True)
    inside = np.clip(np.rint(scale * np.array(size)), 1, shapes).astype(np.int64)
    return np.concatenate([(shapes - inside) // 2, inside], 1)


def crop_and_resize(image: ImageArray, box: Ints, flip: bool, size: tuple[int, int]) -> ImageArray:
    """One crop by Pillow, the reference for every provider: cut, bicubic antialiased resize (a =
    -0.5), flip.

    uint8 [H, W] or [H, W, 3] -> the same with `size` (height, width). Rows are resized before
    columns, in two calls, because newer versions of Pillow choose the cheaper order, which changes
    strong edges by up to 30 grey levels.
    """
    top, left, height, width = (int(n) for n in box)
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    across = Image.fromarray(cut).resize((size[1], height), Image.Resampling.BICUBIC)
    out = np.asarray(across.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(out[:, ::-1]) if flip else out


def evaluation_crop(image: ImageArray, size: tuple[int, int], fit: str) -> ImageArray:
    """The evaluation crop of an image that is not in an index."""
    box = center_boxes(np.array([image.shape[:2]], dtype=np.int64), size, fit)[0]
    return crop_and_resize(image, box, False, size)
