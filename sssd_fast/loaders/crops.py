"""Which part of each image a batch shows, mirrored or not, and how it is turned and lit: decided here for every provider.

What is drawn for record i in epoch e is a pure function of (seed, e, i): the i-th row of one table of random numbers per
epoch. Boxes are whole pixels, cut out before resizing, so that Pillow, torch, DALI and the Triton op can all do the same.

Shapes: N images of the index, R rows of a batch. A box is (top, left, height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sssd_fast.data.images import ImageArray
from sssd_fast.errors import ConfigError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FITS = ("crop", "stretch")
CROP_TRIES = 10
_DRAWS = (
    4 * CROP_TRIES + 4
)  # per record: area, aspect, top and left of each try; mirror, angle, brightness, contrast


@dataclass(frozen=True)
class AugmentSpec:
    """Training augmentation per image. The defaults are MAE's for pre-training: random resized crop and flip."""

    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop over the area of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    hflip: float = 0.5  # probability
    rotation_deg: float = 0.0  # uniform in +- this; corners become black
    brightness: float = 0.0  # factor uniform in 1 +- this
    contrast: float = 0.0  # factor around the image's mean, uniform in 1 +- this

    def __post_init__(self) -> None:
        # YAML and JSON give lists; the spec is hashed and compared, so keep tuples.
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        object.__setattr__(self, "crop_ratio", tuple(self.crop_ratio))
        problems = []
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            problems.append(f"crop_scale is {list(self.crop_scale)}; needed: 0 < low <= high <= 1")
        if not (len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]):
            problems.append(f"crop_ratio is {list(self.crop_ratio)}; needed: 0 < low <= high")
        if not 0 <= self.hflip <= 1:
            problems.append(f"hflip is {self.hflip}; a probability from 0 to 1 is needed")
        if not 0 <= self.rotation_deg <= 180:
            problems.append(f"rotation_deg is {self.rotation_deg}; 0 to 180 degrees is needed")
        for name, value in (("brightness", self.brightness), ("contrast", self.contrast)):
            if not 0 <= value < 1:
                problems.append(f"{name} is {value}; 0 (off) to below 1 is needed")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def changes_look(self) -> bool:
        """Whether anything is left to do after crop and flip."""
        return bool(self.rotation_deg or self.brightness or self.contrast)


@dataclass(frozen=True)
class Views:
    """R images as they are to be shown. Indexing with an array or slice gives those rows."""

    records: Ints  # [R] record numbers of the index
    boxes: Ints  # [R, 4]
    flips: npt.NDArray[np.bool_]  # [R]
    looks: Floats  # [R, 3] degrees counter-clockwise, brightness - 1, contrast - 1

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, rows: Ints | slice) -> Views:
        return Views(self.records[rows], self.boxes[rows], self.flips[rows], self.looks[rows])


def training_views(shapes: Ints, spec: AugmentSpec, seed: int, epoch: int) -> Views:
    """All N images of the index as epoch `epoch` shows them; shapes [N, 2] are heights and widths.

    Every number is drawn whether a switch is on or off, so turning the rotation on does not move the crops.
    """
    # the third number keeps this table apart from the order of the epoch, which is drawn from (seed, epoch)
    draws = np.random.default_rng([seed, epoch, 1]).random((len(shapes), _DRAWS))
    tries, rest = draws[:, :-4].reshape(-1, CROP_TRIES, 4), draws[:, -4:]
    boxes = random_crop_boxes(shapes, spec.crop_scale, spec.crop_ratio, tries)
    looks = (2 * rest[:, 1:] - 1) * (spec.rotation_deg, spec.brightness, spec.contrast)
    return Views(np.arange(len(shapes)), boxes, rest[:, 0] < spec.hflip, looks)


def evaluation_views(shapes: Ints, size: tuple[int, int], fit: str) -> Views:
    """All N images as evaluation shows them, see `center_boxes`."""
    count = len(shapes)
    return Views(
        np.arange(count),
        center_boxes(shapes, size, fit),
        np.zeros(count, dtype=bool),
        np.zeros((count, 3)),
    )


def random_crop_boxes(
    shapes: Ints, scale: tuple[float, float], ratio: tuple[float, float], draws: Floats
) -> Ints:
    """Inception crop [N, 4]: area uniform in `scale`, log aspect uniform in `ratio`, place uniform over whole pixels.

    draws: [N, CROP_TRIES, 4] uniform in [0, 1). The first try that fits is taken; where none does, the largest centred
    crop of an allowed aspect.
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
    centred = np.concatenate([(height - h_max) // 2, (width - w_max) // 2, h_max, w_max], 1).astype(
        np.int64
    )
    any_fits = fits.any(axis=1, keepdims=True)
    return np.where(any_fits, found, centred)


def center_boxes(shapes: Ints, size: tuple[int, int], fit: str) -> Ints:
    """The evaluation view's boxes [N, 4].

    fit="crop": the largest centred part of the target's aspect, in whole pixels; nothing is stretched by more than half a
    pixel. fit="stretch": the whole image, so that the edges of wide slices stay visible.
    """
    if fit not in FITS:
        raise ConfigError(f"evaluation fit is {fit!r}; 'crop' or 'stretch' is needed")
    if fit == "stretch":
        return np.concatenate([np.zeros_like(shapes), shapes], 1)
    scale = (shapes / np.array(size)).min(1, keepdims=True)
    inside = np.clip(np.rint(scale * np.array(size)), 1, shapes).astype(np.int64)
    return np.concatenate([(shapes - inside) // 2, inside], 1)


def show(image: ImageArray, box: Ints, flip: bool, size: tuple[int, int]) -> ImageArray:
    """One view by Pillow, the reference for every provider: cut, bicubic antialiased resize (a = -0.5), mirror.

    uint8 [H, W] or [H, W, 3] -> the same with `size` (height, width). Rows are resized before columns, in two calls,
    because newer versions of Pillow take the cheaper order first, which changes strong edges by up to 30 grey levels.
    """
    top, left, height, width = (int(n) for n in box)
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    across = Image.fromarray(cut).resize((size[1], height), Image.Resampling.BICUBIC)
    out = np.asarray(across.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(out[:, ::-1]) if flip else out


def evaluation_view(image: ImageArray, size: tuple[int, int], fit: str) -> ImageArray:
    """One image as evaluation shows it, for images that belong to no index."""
    box = center_boxes(np.array([image.shape[:2]], dtype=np.int64), size, fit)[0]
    return show(image, box, False, size)
