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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, DependencyError

if TYPE_CHECKING:
    from PIL import Image

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Statistics = Literal["visible", "target"]
Norm = Literal["patch", "channel", "none"]

INK, QUIET = "#1d2733", "#66727f"
HIDDEN = 128  # grey of a patch that is not shown
STATISTICS_TEXT = {
    "visible": "brightness and contrast of masked patches estimated from visible patches only",
    "target": "uses target statistics: brightness and contrast of masked patches are taken from the answer",
}


def unnormalise(
    pred: Any,
    images: Any,
    mask: Any,
    patch_size: int,
    statistics: Statistics = "visible",
    *,
    norm: Norm = "patch",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    eps: float = 1e-6,
) -> Floats:
    """Predictions as pixel values 0..255 (not clipped), [n, L, P*P*C] in (row, column, channel) order; visible rows
    are 0.

    pred [n, L, P*P*C] is in the space of the training target: (x / 255 - mean) / std, then, for norm "patch" or
    "channel", minus the patch's mean and divided by its sqrt(unbiased variance + eps) (He et al. 2022, section 4.2). A
    masked patch's own mean and variance are part of the answer. statistics="visible" never reads a masked pixel: both
    are interpolated from the visible patches, weighted by 1 / distance^4 between patch centres. statistics="target"
    shows the answer's contrast and must be asked for. mask [n, L] bool, True = masked. Raises DataError for shapes
    that do not fit, or an image without any visible patch.
    """
    images_nCHW, mask_nL = _uint8_images(images), np.asarray(_array(mask), dtype=bool)
    pred_nLX = _array(pred).astype(np.float64)
    n, channels = images_nCHW.shape[:2]
    rows, cols = _grid(images_nCHW, patch_size)
    if statistics not in STATISTICS_TEXT:
        raise DataError(f"statistics is {statistics!r}; give 'visible', or 'target' to use the answer's own statistics")
    for name, got, need in (
        ("pred", pred_nLX.shape, (n, rows * cols, patch_size**2 * channels)),
        ("mask", mask_nL.shape, (n, rows * cols)),
    ):
        if got != need:
            raise DataError(
                f"{name}: got shape {list(got)}, need {list(need)} for these images and patch size {patch_size}"
            )
    pred_nLSC = pred_nLX.reshape(n, rows * cols, patch_size**2, channels)
    if norm != "none":
        pixels_nLSC = patchify(images_nCHW, patch_size).reshape(pred_nLSC.shape)
        known_nLSC = (pixels_nLSC / 255 - np.asarray(mean)) / np.asarray(std)
        axes = (2, 3) if norm == "patch" else 2
        center = known_nLSC.mean(axis=axes, keepdims=True)
        spread = np.sqrt(known_nLSC.var(axis=axes, ddof=1, keepdims=True) + eps)
        if statistics == "visible":
            weights_nLL = _visible_weights(mask_nL, rows, cols)
            center, spread = (np.einsum("nlm,nmsc->nlsc", weights_nLL, value) for value in (center, spread))
        pred_nLSC = pred_nLSC * spread + center
    values_nLSC = 255 * (pred_nLSC * np.asarray(std) + np.asarray(mean))
    return np.where(mask_nL[:, :, None], values_nLSC.reshape(pred_nLX.shape), 0.0)


def reconstruction_columns(
    images: Any, pred: Any, mask: Any, patch_size: int, *, norm_statistics: Statistics = "visible", **target: Any
) -> dict[str, Bytes]:
    """The four columns of the figure, each uint8 [n, H, W, C]; only "original" depends on masked pixels with "visible"
    statistics.

    `target` are norm, mean, std and eps of `unnormalise`.
    """
    images_nCHW, masked_nL1 = _uint8_images(images), np.asarray(_array(mask), dtype=bool)[:, :, None]
    values = unnormalise(pred, images_nCHW, masked_nL1[:, :, 0], patch_size, norm_statistics, **target)
    predicted = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    original = patchify(images_nCHW, patch_size)
    shape = images_nCHW.shape
    return {
        "original": images_nCHW.transpose(0, 2, 3, 1),
        "masked input": unpatchify(np.where(masked_nL1, np.uint8(HIDDEN), original), shape, patch_size),
        "prediction": unpatchify(np.where(masked_nL1, predicted, np.uint8(HIDDEN)), shape, patch_size),
        "prediction + visible": unpatchify(np.where(masked_nL1, predicted, original), shape, patch_size),
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
    columns = reconstruction_columns(images, pred, mask, patch_size, norm_statistics=norm_statistics, **target)
    share = np.asarray(_array(mask), dtype=bool).mean()
    caption = f"{share:.0%} of patches masked"
    if target.get("norm", "patch") != "none":
        caption += f"; {STATISTICS_TEXT[norm_statistics]}"
    rows = [[_rgb(column[row]) for column in columns.values()] for row in range(len(columns["original"]))]
    return _compose(rows, list(columns), caption, path)


def attention_grid(
    images: Any, attention: Any, grid: tuple[int, int], num_prefix: int, *, path: str | Path, max_heads: int = 12
) -> Path:
    """Attention over the patches, one row per image: the image, the mean over heads, then each head, laid over the
    image.

    attention [n, heads, N, N] probabilities, rows = queries. With a prefix the query is token 0 (cls); without one,
    the mean over all queries. Each map is scaled to its own maximum. Raises DataError where N is not num_prefix + rows
    * cols.
    """
    images_nCHW, maps_nhL = _uint8_images(images), attention_maps(attention, grid, num_prefix)
    shown = maps_nhL[:, :max_heads]
    titles = ["image", "mean of heads", *(f"head {head + 1}" for head in range(shown.shape[1]))]
    rows = []
    for image_CHW, maps_hL in zip(
        images_nCHW, np.concatenate([maps_nhL.mean(axis=1, keepdims=True), shown], axis=1), strict=True
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
    attention_nhNN = _array(attention).astype(np.float64)
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


def patchify(images_nCHW: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """[n, C, H, W] -> [n, L, P*P*C], pixels of a patch in (row, column, channel) order."""
    n, channels = images_nCHW.shape[:2]
    rows, cols = _grid(images_nCHW, patch_size)
    cells = images_nCHW.reshape(n, channels, rows, patch_size, cols, patch_size)
    return cells.transpose(0, 2, 4, 3, 5, 1).reshape(n, rows * cols, patch_size**2 * channels)


def unpatchify(patches_nLX: NDArray[Any], shape: tuple[int, ...], patch_size: int) -> NDArray[Any]:
    """Inverse of `patchify` for images of `shape` [n, C, H, W], as [n, H, W, C]."""
    n, channels, height, width = shape
    cells = patches_nLX.reshape(n, height // patch_size, width // patch_size, patch_size, patch_size, channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, channels)


def _visible_weights(mask_nL: NDArray[np.bool_], rows: int, cols: int) -> Floats:
    """[n, L, L] rows that sum to 1 over visible patches and are exactly 0 at masked ones."""
    if mask_nL.all(axis=1).any():
        raise DataError(
            "mask: an image has no visible patch, so its statistics cannot be estimated; mask fewer patches"
        )
    place_L2 = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
    distance_LL = ((place_L2[:, None] - place_L2[None]) ** 2).sum(axis=2).astype(np.float64)
    np.fill_diagonal(distance_LL, 1.0)
    weights_nLL = np.where(mask_nL[:, None], 0.0, distance_LL**-2)
    return np.asarray(weights_nLL / weights_nLL.sum(axis=2, keepdims=True))


def _array(value: Any) -> NDArray[Any]:
    """numpy array of an array or of a torch tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _uint8_images(images: Any) -> Bytes:
    array = _array(images)
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[1] not in (1, 3):
        raise DataError(
            f"images: got {array.dtype} of shape {list(array.shape)}, need uint8 [n, C, H, W] with C = 1 or 3"
        )
    return array


def _grid(images_nCHW: NDArray[Any], patch_size: int) -> tuple[int, int]:
    height, width = images_nCHW.shape[2:]
    if height % patch_size or width % patch_size:
        raise DataError(f"images of {height} x {width} pixels cannot be cut into patches of {patch_size}")
    return height // patch_size, width // patch_size


def _rgb(image_HWC: Bytes) -> Bytes:
    return np.repeat(image_HWC, 3, axis=2) if image_HWC.shape[2] == 1 else image_HWC


def _overlay(image_HW3: Bytes, map_rows_cols: Floats) -> Bytes:
    """The image in grey under a colour scale; stronger attention is brighter and more opaque."""
    from matplotlib import colormaps

    height, width = image_HW3.shape[:2]
    scaled = (map_rows_cols / max(float(map_rows_cols.max()), 1e-12)).astype(np.float32)
    smooth = np.asarray(_pillow().fromarray(scaled).resize((width, height), resample=2))  # 2 = bilinear
    strength = np.clip(smooth, 0.0, 1.0)[:, :, None]
    color = 255 * colormaps["inferno"](strength[:, :, 0])[:, :, :3]
    opacity = 0.25 + 0.5 * strength
    return np.asarray(np.rint((1 - opacity) * image_HW3 + opacity * color), dtype=np.uint8)


def _compose(rows: Sequence[Sequence[Bytes]], titles: Sequence[str], caption: str, path: str | Path) -> Path:
    """White sheet with column titles, rows of equal pictures and a caption; small pictures are enlarged by a whole
    factor.
    """
    from PIL import ImageDraw, ImageFont

    pillow = _pillow()
    height, width = rows[0][0].shape[:2]
    zoom = max(1, math.ceil(150 / width)) if len(titles) <= 6 else max(1, math.ceil(100 / width))
    cell_w, cell_h, gap, top, foot = width * zoom, height * zoom, 6, 26, 30
    small_font = ImageFont.load_default(13)
    title_size = next(size for size in range(14, 0, -1) if _widest(titles, size) <= cell_w or size == 8)
    words, lines, limit = caption.split(), [""], len(titles) * (cell_w + gap) - 2 * gap
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if small_font.getlength(longer) <= limit else [*lines, word]
    size = (len(titles) * (cell_w + gap) + gap, top + len(rows) * (cell_h + gap) + foot + 16 * (len(lines) - 1))
    sheet = pillow.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for col, title in enumerate(titles):
        place = (gap + col * (cell_w + gap), top / 2)
        draw.text(place, title, fill=INK, font=ImageFont.load_default(title_size), anchor="lm")
    for row, cells in enumerate(rows):
        for col, cell in enumerate(cells):
            picture = pillow.fromarray(np.ascontiguousarray(cell)).resize((cell_w, cell_h), resample=0)  # 0 = nearest
            sheet.paste(picture, (gap + col * (cell_w + gap), top + row * (cell_h + gap)))
    draw.text((gap, top + len(rows) * (cell_h + gap) + 6), "\n".join(lines), fill=QUIET, font=small_font)
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
    from .checkpoint import atomic_write_bytes

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
