"""Pictures of a run: reconstructions, attention maps, thumbnails. All are PNG files, composed pixel for pixel, written
atomically.

Shapes: n images, C channels, L = rows * cols patches, P patch side, N = prefix + L tokens. Images are uint8 [n, C, H,
W].
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sssd_fast.errors import DataError, DependencyError
from sssd_fast.evaluation.reconstruct import (
    STATISTICS_TEXT,
    Bytes,
    Floats,
    Statistics,
    as_array,
    patchify,
    uint8_images,
    unnormalise,
    unpatchify,
)

if TYPE_CHECKING:
    from PIL import Image

INK, QUIET = "#1d2733", "#66727f"
HIDDEN = 128  # grey of a patch that is not shown


def reconstruction_columns(
    images: Any,
    pred: Any,
    mask: Any,
    patch_size: int,
    *,
    norm_statistics: Statistics = "visible",
    **target: Any,
) -> dict[str, Bytes]:
    """The four columns of the figure, each uint8 [n, H, W, C]; only "original" depends on masked pixels with "visible"
    statistics.

    `target` are norm, mean, std and eps of `unnormalise`.
    """
    images_nCHW = uint8_images(images)
    masked_nL1 = np.asarray(as_array(mask), dtype=bool)[:, :, None]
    values = unnormalise(
        pred, images_nCHW, masked_nL1[:, :, 0], patch_size, norm_statistics, **target
    )
    predicted = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    original = patchify(images_nCHW, patch_size)
    shape = images_nCHW.shape
    return {
        "original": images_nCHW.transpose(0, 2, 3, 1),
        "masked input": unpatchify(
            np.where(masked_nL1, np.uint8(HIDDEN), original), shape, patch_size
        ),
        "prediction": unpatchify(
            np.where(masked_nL1, predicted, np.uint8(HIDDEN)), shape, patch_size
        ),
        "prediction + visible": unpatchify(
            np.where(masked_nL1, predicted, original), shape, patch_size
        ),
    }


def reconstruction_grid(
    images: Any,
    pred: Any,
    mask: Any,
    patch_size: int,
    *,
    path: str | Path,
    norm_statistics: Statistics = "visible",
    **target: Any,
) -> Path:
    """One row per image: original, masked input, prediction of the masked patches, prediction with the visible
    patches.

    The caption says which statistics un-normalised the prediction (`unnormalise`); `target` are its norm, mean, std
    and eps.
    """
    columns = reconstruction_columns(
        images, pred, mask, patch_size, norm_statistics=norm_statistics, **target
    )
    share = np.asarray(as_array(mask), dtype=bool).mean()
    caption = f"{share:.0%} of patches masked"
    if target.get("norm", "patch") != "none":
        caption += f"; {STATISTICS_TEXT[norm_statistics]}"
    rows = [
        [_rgb(column[row]) for column in columns.values()]
        for row in range(len(columns["original"]))
    ]
    return _compose(rows, list(columns), caption, path)


def attention_grid(
    images: Any,
    attention: Any,
    grid: tuple[int, int],
    num_prefix: int,
    *,
    path: str | Path,
    max_heads: int = 12,
) -> Path:
    """Attention over the patches, one row per image: the image, the mean over heads, then each head, laid over the
    image.

    attention [n, heads, N, N] probabilities, rows = queries. With a prefix the query is token 0 (cls); without one,
    the mean over all queries. Each map is scaled to its own maximum. Raises DataError where N is not num_prefix + rows
    * cols.
    """
    images_nCHW = uint8_images(images)
    maps_nhL = attention_maps(attention, grid, num_prefix)
    shown = maps_nhL[:, :max_heads]
    titles = ["image", "mean of heads", *(f"head {head + 1}" for head in range(shown.shape[1]))]
    rows = []
    for image_CHW, maps_hL in zip(
        images_nCHW,
        np.concatenate([maps_nhL.mean(axis=1, keepdims=True), shown], axis=1),
        strict=True,
    ):
        image = _rgb(image_CHW.transpose(1, 2, 0))
        rows.append([image, *(_overlay(image, map_L.reshape(grid)) for map_L in maps_hL)])
    query = "of the class token" if num_prefix else "averaged over all queries"
    caption = f"attention {query} in the last block; each map scaled to its own maximum"
    if shown.shape[1] < maps_nhL.shape[1]:
        caption += f"; the first {max_heads} of {maps_nhL.shape[1]} heads"
    return _compose(rows, titles, caption, path)


def attention_maps(attention: Any, grid: tuple[int, int], num_prefix: int) -> Floats:
    """[n, heads, N, N] probabilities -> [n, heads, L]: attention of the cls token, or the mean over queries without
    prefix.
    """
    attention_nhNN = as_array(attention).astype(np.float64)
    need = num_prefix + grid[0] * grid[1]
    if attention_nhNN.ndim != 4 or attention_nhNN.shape[2:] != (need, need):
        raise DataError(
            f"attention: got shape {list(attention_nhNN.shape)}, need [n, heads, {need}, {need}] "
            f"for a grid of {grid[0]} x {grid[1]} patches and {num_prefix} prefix tokens"
        )
    queries = attention_nhNN[:, :, 0] if num_prefix else attention_nhNN.mean(axis=2)
    return queries[:, :, num_prefix:]


def thumbnail(image: Bytes, *, path: str | Path, side: int = 192) -> Path:
    """PNG of an [H, W] or [H, W, 3] uint8 picture with its longer side at most `side` pixels."""
    picture = _pillow().fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side))
    return _write_png(picture, path)


def _rgb(image_HWC: Bytes) -> Bytes:
    return np.repeat(image_HWC, 3, axis=2) if image_HWC.shape[2] == 1 else image_HWC


def _overlay(image_HW3: Bytes, map_rows_cols: Floats) -> Bytes:
    """The image in grey under a colour scale; stronger attention is brighter and more opaque."""
    from matplotlib import colormaps

    height, width = image_HW3.shape[:2]
    scaled = (map_rows_cols / max(float(map_rows_cols.max()), 1e-12)).astype(np.float32)
    smooth = np.asarray(
        _pillow().fromarray(scaled).resize((width, height), resample=2)
    )  # 2 = bilinear
    strength = np.clip(smooth, 0.0, 1.0)[:, :, None]
    color = 255 * colormaps["inferno"](strength[:, :, 0])[:, :, :3]
    opacity = 0.25 + 0.5 * strength
    return np.asarray(np.rint((1 - opacity) * image_HW3 + opacity * color), dtype=np.uint8)


def _compose(
    rows: Sequence[Sequence[Bytes]], titles: Sequence[str], caption: str, path: str | Path
) -> Path:
    """White sheet with column titles, rows of equal pictures and a caption; small pictures are enlarged by a whole
    factor.
    """
    from PIL import ImageDraw, ImageFont

    pillow = _pillow()
    height, width = rows[0][0].shape[:2]
    zoom = max(1, math.ceil(150 / width)) if len(titles) <= 6 else max(1, math.ceil(100 / width))
    cell_w, cell_h, gap = width * zoom, height * zoom, 6
    sheet_w = len(titles) * (cell_w + gap) + gap
    unit = max(1.0, sheet_w / 1000)  # a wide sheet is shown reduced, so its text is larger
    small, line_h, top = round(13 * unit), round(17 * unit), round(26 * unit)
    title_size = next(
        size
        for size in range(round(14 * unit), 0, -1)
        if _widest(titles, size) <= cell_w or size == 8
    )
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = (
            [*lines[:-1], longer]
            if _widest([longer], small) <= sheet_w - 2 * gap
            else [*lines, word]
        )
    bottom = top + len(rows) * (cell_h + gap)
    sheet = pillow.new("RGB", (sheet_w, bottom + line_h * len(lines) + 2 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    for col, title in enumerate(titles):
        font = ImageFont.load_default(title_size)
        draw.text((gap + col * (cell_w + gap), top / 2), title, fill=INK, font=font, anchor="lm")
    for row, cells in enumerate(rows):
        for col, cell in enumerate(cells):
            picture = pillow.fromarray(np.ascontiguousarray(cell)).resize(
                (cell_w, cell_h), resample=0
            )  # 0 = nearest
            sheet.paste(picture, (gap + col * (cell_w + gap), top + row * (cell_h + gap)))
    for row, line in enumerate(lines):
        draw.text(
            (gap, bottom + row * line_h), line, fill=QUIET, font=ImageFont.load_default(small)
        )
    return _write_png(sheet, path)


def _write_png(picture: Image.Image, path: str | Path) -> Path:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return write_picture(buffer.getvalue(), path)


def _widest(texts: Sequence[str], size: int) -> float:
    from PIL import ImageFont

    return max(ImageFont.load_default(size).getlength(text) for text in texts)


def write_picture(data: bytes, path: str | Path) -> Path:
    """Atomic write of an encoded picture; makes the folder."""
    from sssd_fast.run.files import atomic_write_bytes

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, data)
    return path


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError('pictures need Pillow: pip install "sssd-fast[train]"') from error
    return Image
