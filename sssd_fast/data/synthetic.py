"""SYNTHETIC chest-CT-like slices: made-up pictures for the demo and the tests, with no medical value.

An axial slice in a lung window: body, ribs, spine, heart or trachea, two lungs with vessel trees, hazy patches, noise,
and a scanner's own zoom, gain and offset. Both classes carry the same kind and amount of haze; only its place differs:

synthetic_covid    patches hug the pleura, mostly lateral and posterior: ground glass, some with a denser core
synthetic_normal   distractors of the same area, brightness and texture lie around the hilum, away from the pleura

So mean, variance and histogram say nothing about the class (the hazy share of the lung is drawn before the class is
looked at, and met exactly): a classifier must find out where the haze is. Anatomy, noise and scanner of image i depend
on (seed, i) alone: the two labels of one i are twins.

Units: x from -1 (left) to 1 (right) and y from -1 (front) to 1 (back) span the slice; brightness 0 air to 1 bone.
Letters: H, W pixels; coordinates, masks and brightness are float [H, W].
Equal bit for bit on one machine; other processors may round a pixel to the neighbouring grey level.
"""

from __future__ import annotations

import csv
import math
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sssd_fast.data.images import ImageArray
from sssd_fast.errors import DataError

Plane = npt.NDArray[np.floating[Any]]  # [H, W]

CLASSES = (
    "synthetic_covid",
    "synthetic_normal",
)  # sorted, so a label is the same number as in a DataIndex
COVID, NORMAL = 0, 1

_README = """# SYNTHETIC images

{n} made-up chest-CT-like slices of {height} x {width} pixels, drawn by sssd_fast (data/synthetic.py, seed {seed}).
They show no person, carry no medical information and must not be used to judge anything but software.

synthetic_covid: hazy patches along the pleura. synthetic_normal: as much haze, but around the hilum.
"""


def make_synthetic_slice(seed: int, index: int, label: int, size: tuple[int, int]) -> ImageArray:
    """Draw synthetic slice `index` -> uint8 [H, W]. label: COVID (0) or NORMAL (1). size: (H, W), each at least 32."""
    if label not in (COVID, NORMAL):
        raise DataError(
            f"synthetic slice: label is {label}; 0 ({CLASSES[COVID]}) or 1 ({CLASSES[NORMAL]}) is needed"
        )
    if min(size) < 32:
        raise DataError(
            f"synthetic slice: size is {size}; at least 32 x 32 pixels are needed to draw a slice"
        )
    anatomy, haze, scanner = (np.random.default_rng([seed, index, part]) for part in range(3))
    x, y, pixel = _coordinates(anatomy, size)
    level = anatomy.uniform()  # 0: upper slice with trachea and arch; 1: lower slice with the heart
    picture = _body(anatomy, x, y, pixel)
    lung, depth, side = _lungs(anatomy, x, y, pixel, level)
    air = (
        0.2
        + 0.05 * anatomy.uniform()
        + 0.05 * y
        + 0.025 * _cloud(anatomy, size, 6)
        + 0.02 * _cloud(anatomy, size, 20)
    )
    hila = [(sign * anatomy.uniform(0.17, 0.22), anatomy.uniform(0.02, 0.12)) for sign in (-1, 1)]
    inside = np.maximum(air, _haze(haze, x, y, lung, depth, side, hila, label, size))
    inside = np.maximum(inside, _vessels(anatomy, x, y, pixel, hila))
    picture += lung * (inside - picture)
    picture = _mediastinum(anatomy, picture, x, y, pixel, level)
    return _scan(scanner, picture, size)


def write_synthetic_dataset(
    out: str | os.PathLike[str],
    n: int,
    size: tuple[int, int],
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write n synthetic slices (half per class) as out/<class>/slice_00000.png, manifest.csv and README.md.

    The folder appears complete or not at all. Raises DataError when it exists with anything in it.
    """
    folder = Path(out)
    if n < 2:
        raise DataError(f"{n} synthetic images; at least 2, one per class, are needed")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not empty; name another folder or delete it")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        for name in CLASSES:
            (part / name).mkdir(parents=True)
        rows = []
        for i in range(n):
            label = i % len(CLASSES)
            path = f"{CLASSES[label]}/slice_{i:05d}.png"
            Image.fromarray(make_synthetic_slice(seed, i, label, size)).save(part / path)
            rows.append((path, CLASSES[label]))
            if progress is not None:
                progress(i + 1, n)
        with open(part / "manifest.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("path", "label"), *rows])
        text = _README.format(n=n, height=size[0], width=size[1], seed=seed)
        (part / "README.md").write_text(text, encoding="utf-8")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _coordinates(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Plane, Plane, float]:
    """x, y of every pixel under a random zoom, stretch, tilt and shift, and the size of a pixel in these units."""
    zoom = rng.uniform(0.84, 1.06)
    stretch = rng.uniform(0.94, 1.06)
    tilt = rng.uniform(-0.09, 0.09)
    shift = rng.uniform(-0.05, 0.05, 2)
    rows = np.linspace(-1, 1, size[0])[:, None] * zoom * 0.86 * stretch + shift[0]
    cols = np.linspace(-1, 1, size[1])[None, :] * zoom / stretch + shift[1]
    x = math.cos(tilt) * cols + math.sin(tilt) * rows
    y = math.cos(tilt) * rows - math.sin(tilt) * cols
    return x.astype(np.float32), y.astype(np.float32), 2 * zoom / min(size)


def _body(rng: np.random.Generator, x: Plane, y: Plane, pixel: float) -> Plane:
    """Air, skin, fat, muscle, ribs, sternum, spine, scapulae, table."""
    width, height = rng.uniform(0.9, 1.0), rng.uniform(0.7, 0.78)
    fat = rng.uniform(0.03, 0.09)
    radius = _oval(x, y, 0, 0, width, height, 2.4)
    picture = 0.66 * _soft((1 - radius) * height, pixel)  # fat
    muscle = 0.8 + 0.03 * _cloud(rng, x.shape, 10)
    picture += (muscle - picture) * _soft((1 - fat - radius) * height, pixel)
    angle = np.arctan2(y, x)
    ring = np.exp(
        -(((radius - (0.9 - fat)) / 0.022) ** 2)
    )  # ribs cut obliquely: dashes along the chest wall
    dashes = _soft(np.cos(rng.integers(7, 11) * angle + rng.uniform(0, 6.3)) - 0.1, 0.5)
    picture = np.maximum(picture, ring * dashes)
    back = rng.uniform(0.44, 0.5)
    bones = [
        (0.0, back, 0.12, 0.1),  # vertebral body
        (0.0, back + 0.17, 0.03, 0.1),  # spinous process
        (-0.13, back + 0.1, 0.08, 0.025),
        (0.13, back + 0.1, 0.08, 0.025),
        (0.0, -height + 0.1 + fat, rng.uniform(0.06, 0.1), 0.035),  # sternum
    ]
    for cx, cy, a, b in bones:
        picture = _paint(picture, x, y, pixel, cx, cy, a, b, 0.98)
    picture = _paint(picture, x, y, pixel, 0.0, back + 0.115, 0.045, 0.03, 0.74)  # spinal canal
    if rng.uniform() < 0.5:
        table = np.abs(y - (height + 0.06 + 0.12 * (1 - x**2)))
        picture = np.maximum(picture, 0.5 * _soft(0.012 - table, pixel))
    return picture


def _lungs(
    rng: np.random.Generator, x: Plane, y: Plane, pixel: float, level: float
) -> tuple[Plane, Plane, Plane]:
    """Mask of both lungs, depth below the pleura (0 at the edge), and -1 / 1 for the side a pixel belongs to."""
    mask, depth = np.zeros_like(x), np.full_like(x, -1)
    for sign in (-1, 1):
        a, b = rng.uniform(0.33, 0.37), rng.uniform(0.5, 0.56) * (0.86 + 0.14 * level)
        cx, cy = sign * rng.uniform(0.41, 0.44), rng.uniform(-0.03, 0.03)
        v = (y - cy) / b
        u = (x - cx + sign * rng.uniform(0.04, 0.1) * (1 - v)) / (
            a * (0.86 + 0.12 * v)
        )  # narrow in front, wide behind
        theta = np.arctan2(v, u)
        wobble = sum(
            rng.normal(0, 0.025) * np.cos(k * theta + rng.uniform(0, 6.3)) for k in range(2, 6)
        )
        radius = (np.abs(u) ** 2.2 + np.abs(v) ** 2.2) ** (1 / 2.2) * (1 + wobble)
        inner = (1 - radius) * a
        heart = (
            _oval(x, y, 0.06, -0.12, 0.19 + 0.2 * level, 0.24 + 0.1 * level, 2)
            if sign == 1
            else None
        )
        hole = _oval(x, y, 0.0, 0.1, 0.13, 0.5, 2)
        inner = np.minimum(inner, (hole - 1) * 0.13)
        if heart is not None:
            inner = np.minimum(inner, (heart - 1) * 0.3)
        mask = np.maximum(mask, _soft(inner, pixel))
        depth = np.maximum(depth, inner)
    return mask, depth, np.sign(x)


def _haze(
    rng: np.random.Generator,
    x: Plane,
    y: Plane,
    lung: Plane,
    depth: Plane,
    side: Plane,
    hila: list[tuple[float, float]],
    label: int,
    size: tuple[int, int],
) -> Plane:
    """Brightness of the hazy patches, 0 elsewhere. Their share of the lung is drawn before the label matters."""
    share = rng.uniform(0.1, 0.26)
    bright = rng.uniform(0.4, 0.56)
    core = rng.uniform(0.66, 0.76) if rng.uniform() < 0.5 else bright
    ragged = 0.35 * _cloud(rng, size, 9) + 0.2 * _cloud(rng, size, 22)
    mottle = 0.06 * _cloud(rng, size, 24)
    edge = depth / 0.32  # 0 at the pleura, about 1 in the middle of a lung
    field = np.full_like(x, -9)
    for lobe in range(4):
        sign = -1 if lobe % 2 else 1
        angle = rng.uniform(-0.5, 1.35)  # 0 lateral, pi/2 posterior
        spread, weight = rng.uniform(0.2, 0.34), rng.uniform(-0.5, 0.5)
        if label == COVID:
            cx, cy = sign * (0.42 + 0.33 * math.cos(angle)), 0.02 + 0.5 * math.sin(angle)
        else:
            hx, hy = hila[(sign + 1) // 2]
            cx = hx + sign * 0.16 + 0.08 * math.cos(angle) * sign
            cy = hy + 0.2 * math.sin(2 * angle)
        blob = weight - ((x - cx) ** 2 + (y - cy) ** 2) / spread**2
        field = np.maximum(field, np.where(side == sign, blob, -9))
    field += ragged
    field -= 2.2 * np.abs(edge) if label == COVID else 5 * np.maximum(0.5 - edge, 0)
    inside = lung > 0.5
    values = field[inside]
    cut, dense = np.quantile(values, [1 - share, 1 - 0.3 * share])
    patch = _soft(field - cut, 0.8)
    level = bright + (core - bright) * _soft(field - dense, 0.4) + mottle
    return patch * level


def _vessels(
    rng: np.random.Generator, x: Plane, y: Plane, pixel: float, hila: list[tuple[float, float]]
) -> Plane:
    """Two branching trees from the hila, as brightness; thinner and fainter outwards."""
    points = []
    for (hx, hy), sign in zip(hila, (-1, 1), strict=True):
        start = np.tile(np.array([[hx, hy]]), (9, 1))
        angle = np.linspace(-1.9, 1.9, 9) + rng.normal(0, 0.15, 9)
        radius, length = np.full(9, 0.021), 0.16
        for _ in range(4):
            reach = length * rng.uniform(0.6, 1.2, len(start))
            end = start + reach[:, None] * np.stack([sign * np.cos(angle), np.sin(angle)], 1)
            steps = np.linspace(0, 1, max(8, int(1.2 * length / pixel)))[:, None, None]
            track = start + steps * (end - start)
            # A slice cuts most vessels: a random stretch of each lies in its plane, a short one shows as a dot.
            middle, half = rng.uniform(0, 1, len(start)), rng.uniform(0, 0.5, len(start))
            near = np.broadcast_to(
                radius * (np.abs(steps[:, :, 0] - middle) < half), track.shape[:2]
            )
            points.append(np.concatenate([track, near[:, :, None]], 2)[near > 0])
            fork = rng.uniform(0.2, 0.6, len(start))
            start = np.repeat(end, 2, 0)
            radius = np.repeat(radius * rng.uniform(0.6, 0.85, len(end)), 2)
            angle = np.stack([angle - fork, angle + fork], 1).reshape(-1) + rng.normal(
                0, 0.12, 2 * len(fork)
            )
            keep = rng.uniform(size=len(start)) < 0.8
            start = start[keep]
            radius = radius[keep]
            angle = angle[keep]
            length = length * 0.8
    return _stamp(np.concatenate(points), x, y, pixel)


def _stamp(points: npt.NDArray[np.float64], x: Plane, y: Plane, pixel: float) -> Plane:
    """Discs (x, y, radius) as brightness: the strongest wins; discs below a pixel in size are fainter, not wider."""
    height, width = x.shape
    # x, y is a rotated, scaled grid: invert it from its corner and its two steps.
    step = np.array(
        [[x[0, 1] - x[0, 0], x[1, 0] - x[0, 0]], [y[0, 1] - y[0, 0], y[1, 0] - y[0, 0]]],
        dtype=np.float64,
    )
    grid = np.linalg.solve(step, points[:, :2].T - np.array([[x[0, 0]], [y[0, 0]]]))  # column, row
    radius = points[:, 2] / pixel
    reach = math.ceil(float(radius.max()) + 0.5)
    offset = np.arange(-reach, reach + 1)
    col = np.rint(grid[0])[:, None, None] + offset
    row = np.rint(grid[1])[:, None, None] + offset[:, None]
    away = np.hypot(col - grid[0][:, None, None], row - grid[1][:, None, None])
    value = (
        0.85
        * np.clip(radius[:, None, None] + 0.5 - away, 0, 1)
        * np.clip(1.3 * radius, 0.3, 1)[:, None, None]
    )
    col, row = np.broadcast_arrays(col, row)
    seen = (value > 0) & (col >= 0) & (col < width) & (row >= 0) & (row < height)
    out = np.zeros(height * width, dtype=np.float32)
    np.maximum.at(
        out, (row[seen] * width + col[seen]).astype(np.int64), value[seen].astype(np.float32)
    )
    return out.reshape(height, width)


def _mediastinum(
    rng: np.random.Generator, picture: Plane, x: Plane, y: Plane, pixel: float, level: float
) -> Plane:
    """Contrast of the great vessels, descending aorta, and the airway: trachea above, two main bronchi below."""
    blood = rng.uniform(0.8, 0.92)
    picture = _paint(picture, x, y, pixel, 0.1, 0.31, 0.055, 0.055, blood)  # descending aorta
    if level > 0.5:
        picture = _paint(picture, x, y, pixel, 0.1, -0.1, 0.2, 0.18, blood)  # heart chambers
    else:
        picture = _paint(picture, x, y, pixel, 0.05, -0.14, 0.1, 0.08, blood)  # aortic arch
    if level < 0.4:
        return _paint(
            picture, x, y, pixel, 0.0, 0.1, rng.uniform(0.04, 0.06), rng.uniform(0.05, 0.08), 0.04
        )
    for sign in (-1, 1):
        picture = _paint(picture, x, y, pixel, sign * 0.08, 0.12, 0.035, 0.03, 0.05)
    return picture


def _scan(rng: np.random.Generator, picture: Plane, size: tuple[int, int]) -> ImageArray:
    """Reconstruction noise (fine and blotchy), window, gain and offset of one scanner; rounded to 8 bits."""
    fine, blotchy = rng.uniform(0.005, 0.03), rng.uniform(0.005, 0.02)
    noise = rng.standard_normal(size, dtype=np.float32)
    noise = (
        noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))
    ) * 0.5
    picture = picture + fine * noise + blotchy * _cloud(rng, size, max(8, min(size) // 5))
    shading = 0.03 * _cloud(rng, size, 3)
    gamma = rng.uniform(0.85, 1.2)
    gain = rng.uniform(0.88, 1.08)
    offset = rng.uniform(-0.03, 0.06)
    scaled = gain * np.clip(picture + shading, 0, 1.2) ** np.float32(gamma) + offset
    grey: ImageArray = np.clip(np.rint(255 * scaled), 0, 255).astype(np.uint8)
    return grey


def _oval(x: Plane, y: Plane, cx: float, cy: float, a: float, b: float, power: float) -> Plane:
    """Superellipse radius: below 1 inside."""
    u, v = (x - cx) / a, (y - cy) / b
    radius: Plane = (
        np.hypot(u, v) if power == 2 else (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
    )
    return radius


def _soft(inside: Plane, width: float) -> Plane:
    """0 to 1 across `width` around inside = 0: an edge of one pixel, or a soft border."""
    return np.asarray(np.clip(inside / width + 0.5, 0, 1))


def _paint(
    picture: Plane,
    x: Plane,
    y: Plane,
    pixel: float,
    cx: float,
    cy: float,
    a: float,
    b: float,
    value: float,
) -> Plane:
    return picture + (value - picture) * _soft(
        (1 - _oval(x, y, cx, cy, a, b, 2)) * min(a, b), pixel
    )


def _cloud(rng: np.random.Generator, size: tuple[int, ...], cells: int) -> Plane:
    """Smooth noise of unit deviation at the knots, `cells` knots a side."""
    knots = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(_hats(size[0], cells) @ knots @ _hats(size[1], cells).T)


@lru_cache(maxsize=64)
def _hats(length: int, cells: int) -> npt.NDArray[np.float32]:
    """Interpolation weights [length, cells], smoothstep between neighbouring knots."""
    place = np.linspace(0, cells - 1, length, dtype=np.float32)[:, None]
    near = np.clip(1 - np.abs(place - np.arange(cells, dtype=np.float32)), 0, 1)
    return np.asarray(near * near * (3 - 2 * near), dtype=np.float32)
