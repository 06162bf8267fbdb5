"""Pictures of a run as PNG files: reconstructions, attention maps, curves, ROC, confusion matrix.

Drawn by matplotlib without a display, written atomically. Shapes: n images, C channels, L = rows *
cols patches, P patch side, N = prefix + L tokens. Images are uint8 [n, C, H, W].
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd_fast.errors import DependencyError
from sssd_fast.run.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

INK, QUIET, LINE = "#1d2733", "#66727f", "#d5dbe1"
COLORS = ("#1f6f8b", "#c8553d", "#6a8d3f", "#7a5c99", "#b08a2e", "#4d5b6a")
HIDDEN = 128  # grey of a masked patch
MAX_HEADS = 6  # of an attention picture
THUMBNAIL = 192  # longer side, pixels
DPI = 160
TARGET_STATISTICS = (
    "predictions are un-normalised with the mean and standard deviation of the target patches, "
    "as usual for masked autoencoders"
)


def reconstruction_picture(
    images: Any,
    pred: Any,
    mask: Any,
    patch_size: int,
    *,
    norm: str,
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str],
    path: Path,
) -> None:
    """One column per image: input, masked input, visible patches with the predicted masked ones.

    images uint8 [n, C, H, W], pred [n, L, P*P*C], mask [n, L] (True = masked), `names` of the
    images; norm, mean and std as in `unnormalise`.
    """
    images_nCHW, masked_nL = as_array(images), as_array(mask).astype(bool)
    values_nLX = unnormalise(as_array(pred), images_nCHW, patch_size, norm, mean, std)
    predicted_nLX = np.clip(np.rint(values_nLX), 0, 255).astype(np.uint8)
    original_nLX = patchify(images_nCHW, patch_size)
    rows = {"input": images_nCHW.transpose(0, 2, 3, 1)}
    for name, filled in (("masked", np.uint8(HIDDEN)), ("reconstruction", predicted_nLX)):
        patches_nLX = np.where(masked_nL[:, :, None], filled, original_nLX)
        rows[name] = unpatchify(patches_nLX, images_nCHW.shape, patch_size)
    caption = f"{masked_nL.mean():.0%} of patches masked"
    if norm != "none":
        caption += f"; {TARGET_STATISTICS}"
    _sheet(rows, names, caption, path)


def unnormalise(
    pred_nLX: NDArray[Any],
    images_nCHW: Bytes,
    patch_size: int,
    norm: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Floats:
    """Predictions as pixel values 0..255 (not clipped), [n, L, P*P*C], channels last.

    pred [n, L, P*P*C] is in the space of the training target: (x / 255 - mean) / std, then, for
    norm "patch" or "channel", minus the patch's mean, divided by sqrt(unbiased variance + 1e-6)
    (He et al. 2022, section 4.2). Both statistics are those of the target patch.
    """
    n, channels = images_nCHW.shape[:2]
    scale, shift = 255 * np.asarray(std, np.float64), 255 * np.asarray(mean, np.float64)
    shape = (n, -1, patch_size**2, channels)
    pred_nLSC = pred_nLX.astype(np.float64).reshape(shape)
    if norm != "none":
        target_nLSC = (patchify(images_nCHW, patch_size).reshape(shape) - shift) / scale
        axes = (2, 3) if norm == "patch" else 2
        spread = np.sqrt(target_nLSC.var(axis=axes, ddof=1, keepdims=True) + 1e-6)
        pred_nLSC = pred_nLSC * spread + target_nLSC.mean(axis=axes, keepdims=True)
    return np.asarray((pred_nLSC * scale + shift).reshape(pred_nLX.shape))


def patchify(images_nCHW: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """[n, C, H, W] -> [n, L, P*P*C], pixels of a patch in (row, column, channel) order."""
    n, channels, height, width = images_nCHW.shape
    grid = (height // patch_size, patch_size, width // patch_size, patch_size)
    patches = images_nCHW.reshape(n, channels, *grid).transpose(0, 2, 4, 3, 5, 1)
    return patches.reshape(n, grid[0] * grid[2], patch_size**2 * channels)


def unpatchify(patches_nLX: NDArray[Any], shape: Sequence[int], patch_size: int) -> NDArray[Any]:
    """[n, L, P*P*C] -> [n, H, W, C] for images of `shape` [n, C, H, W]; inverse of `patchify`."""
    n, channels, height, width = shape
    grid = (height // patch_size, width // patch_size, patch_size, patch_size)
    cells = patches_nLX.reshape(n, *grid, channels).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(n, height, width, channels)


def attention_picture(
    images: Any,
    attention: Any,
    grid: tuple[int, int],
    num_prefix: int,
    *,
    names: Sequence[str],
    path: Path,
) -> None:
    """One column per image: the image, then the attention of the mean of heads and of each head.

    attention [n, heads, N, N] probabilities, rows = queries. With a prefix the query is token 0
    (cls); without one, the mean over all queries. Each map is scaled to its own maximum.
    """
    images_nHW3 = [_rgb(image.transpose(1, 2, 0)) for image in as_array(images)]
    maps_nhL = attention_maps(attention, num_prefix)
    rows = {"image": images_nHW3}
    shown = {"mean of heads": maps_nhL.mean(axis=1)}
    shown |= {f"head {k + 1}": maps_nhL[:, k] for k in range(min(MAX_HEADS, maps_nhL.shape[1]))}
    for title, maps_nL in shown.items():
        pairs = zip(images_nHW3, maps_nL, strict=True)
        rows[title] = [_overlay(image, map_L.reshape(grid)) for image, map_L in pairs]
    query = "of the class token" if num_prefix else "averaged over all queries"
    caption = f"attention {query} in the last block; each map scaled to its own maximum"
    if maps_nhL.shape[1] > MAX_HEADS:
        caption += f"; the first {MAX_HEADS} of {maps_nhL.shape[1]} heads"
    _sheet(rows, names, caption, path, colorbar="attention / maximum")


def attention_maps(attention: Any, num_prefix: int) -> Floats:
    """[n, heads, N, N] probabilities -> [n, heads, L] of the cls token, or the mean query."""
    attention_nhNN = as_array(attention).astype(np.float64)
    queries = attention_nhNN[:, :, 0] if num_prefix else attention_nhNN.mean(axis=2)
    return np.asarray(queries[:, :, num_prefix:])


def thumbnail(image: Bytes, *, path: Path) -> None:
    """PNG of an [H, W] or [H, W, 3] uint8 image, reduced if larger than THUMBNAIL."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    atomic_write_bytes(path, buffer.getvalue())


def curves(records: Sequence[Mapping[str, Any]], *, path: Path) -> Path | None:
    """Two panels from metrics.jsonl records over epochs; None if there is nothing to draw.

    Pre-training: reconstruction loss, and distillation loss on a log scale, since its first values
    are far above the rest. Other stages: loss, and accuracy and AUC of the validation images.
    Training losses are drawn as recorded, with their mean per epoch.
    """
    if any("loss_reconstruction" in record for record in records):
        panels = {
            f"{name} loss": _both(f"loss_{name}") for name in ("reconstruction", "distillation")
        }
    else:
        shown = {"accuracy": ("val", "accuracy"), "AUC": ("val", "auc")}
        panels = {"loss": _both("loss"), "validation metric": shown}
    found = {
        title: {label: _series(records, *source) for label, source in lines.items()}
        for title, lines in panels.items()
    }
    drawn = {title: lines for title, lines in found.items() if any(x for x, _ in lines.values())}
    if not drawn:
        return None
    figure = new_figure(3.5 * len(drawn), 2.7)
    all_axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, drawn.items(), strict=True):
        for color, (label, (x, y)) in zip(COLORS, lines.items(), strict=False):
            if label == "training" and len(x) > 20:
                axes.plot(x, y, color=color, lw=0.7, alpha=0.35)
                x, y = _epoch_means(x, y)
            marker = "o" if len(x) < 25 else None
            if x:
                axes.plot(x, y, color=color, lw=1.6, label=label, marker=marker, ms=3)
        if title == "distillation loss" and any(v > 0 for _, y in lines.values() for v in y):
            axes.set_yscale("log", nonpositive="mask")
        style_axes(axes, title=title.capitalize(), xlabel="epoch", ylabel=title)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return save_figure(figure, path)


def roc_picture(
    curves: Mapping[str, tuple[Ints, Floats]],
    *,
    path: Path,
    operating_point: tuple[float, float, float] | None = None,
) -> None:
    """ROC curves, label -> (is positive [N], score [N]).

    `operating_point` (false positive rate, true positive rate, threshold) is marked.
    """
    from sklearn.metrics import roc_curve

    figure = new_figure(4.4, 4.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
    for i, (label, (truth_N, score_N)) in enumerate(curves.items()):
        false_rate, true_rate, _ = roc_curve(truth_N, score_N, drop_intermediate=False)
        axes.plot(false_rate, true_rate, color=COLORS[i % len(COLORS)], lw=1.8, label=label)
    if operating_point is not None:
        x, y, threshold = operating_point
        axes.plot(x, y, "o", color=INK, ms=6, label=f"threshold {threshold:g}")
    style_axes(axes, title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    legend = axes.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def confusion_picture(confusion: ArrayLike, classes: Sequence[str], *, path: Path) -> None:
    """Confusion matrix [K, K] (rows true, columns predicted): counts, and the share of each row."""
    from matplotlib.colors import LinearSegmentedColormap

    counts = np.asarray(confusion)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = max(3.9, 0.9 * len(classes) + 1.8)
    figure = new_figure(side, side * 0.92)
    axes = figure.subplots()
    blues = LinearSegmentedColormap.from_list("counts", ["#f4f7f9", COLORS[0]])
    axes.imshow(share, cmap=blues, vmin=0, vmax=1)
    for row, col in np.ndindex(*counts.shape):
        color = "white" if share[row, col] > 0.55 else INK
        text = f"{counts[row, col]}\n{share[row, col]:.1%}" if totals[row, 0] else "0\nno images"
        axes.text(col, row, text, ha="center", va="center", color=color, fontsize=11)
    style_axes(axes, title="Confusion", xlabel="predicted", ylabel="true", grid=False)
    names, ticks = [_short(name) for name in classes], range(len(classes))
    axes.set_xticks(ticks, names, rotation=0 if len(classes) < 4 else 45, parse_math=False)
    axes.set_yticks(ticks, names, rotation=90, va="center", parse_math=False)
    save_figure(figure, path)


# ---- shared with the pictures of reproduce and of the profile ----


def new_figure(width: float, height: float) -> Figure:
    """Empty matplotlib figure of width x height inches without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError('pictures need matplotlib: pip install "sssd-fast[train]"') from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def style_axes(axes: Any, *, title: str, xlabel: str, ylabel: str = "", grid: bool = True) -> None:
    """The title, labels, ticks and grid that all plots share."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9, color=QUIET)
    axes.set_ylabel(ylabel, fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8, colors=QUIET, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    if grid:
        axes.grid(color=LINE, lw=0.5, alpha=0.7)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Atomic write of a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue())
    return Path(path)


def as_array(value: Any) -> NDArray[Any]:
    """numpy array of an array or of a torch tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _rgb(image_HWC: Bytes) -> Bytes:
    return np.repeat(image_HWC, 3, axis=2) if image_HWC.shape[2] == 1 else image_HWC


def _overlay(image_HW3: Bytes, map_rows_cols: Floats) -> Bytes:
    """The image under a colour scale; stronger attention is brighter and more opaque."""
    from matplotlib import colormaps
    from PIL import Image

    height, width = image_HW3.shape[:2]
    scaled = (map_rows_cols / max(float(map_rows_cols.max()), 1e-12)).astype(np.float32)
    smooth = Image.fromarray(scaled).resize((width, height), resample=Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(smooth), 0.0, 1.0)[:, :, None]
    color = 255 * colormaps["inferno"](strength[:, :, 0])[:, :, :3]
    opacity = 0.25 + 0.5 * strength
    return np.asarray(np.rint((1 - opacity) * image_HW3 + opacity * color), dtype=np.uint8)


def _sheet(
    rows: Mapping[str, Sequence[Bytes] | Bytes],
    names: Sequence[str],
    caption: str,
    path: Path,
    colorbar: str = "",
) -> None:
    """Equal pictures as a table: row titles at the left, image names above, a caption below.

    One mosaic in one axes: dozens of subplots would take seconds.
    """
    from matplotlib.cm import ScalarMappable

    first = next(iter(rows.values()))
    count, (height, width) = len(first), first[0].shape[:2]
    gap = max(1, round(0.04 * width))
    pad = ((0, gap), (0, gap), (0, 0))
    lines = [
        np.hstack([np.pad(_rgb(cell), pad, constant_values=255) for cell in row])
        for row in rows.values()
    ]
    mosaic = np.vstack(lines)[:-gap, :-gap]
    # inches: a column is wide enough for a name, a sheet of few columns for its caption
    cell = max(1.15, 4.6 / count)
    margin = 1.6 if colorbar else 0.8
    sheet_w = cell * count + margin
    figure = new_figure(sheet_w, cell * count * mosaic.shape[0] / mosaic.shape[1] + 0.8)
    axes = figure.subplots()
    axes.imshow(mosaic, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=7, colors=QUIET)
    axes.xaxis.tick_top()
    titles = [_short(PurePath(name).name, 18) for name in names]
    columns = [(i + 0.5) * (width + gap) - gap / 2 for i in range(len(titles))]
    axes.set_xticks(columns, titles, parse_math=False)
    axes.set_yticks([(i + 0.5) * (height + gap) - gap / 2 for i in range(len(rows))], list(rows))
    axes.set_xlabel(textwrap.fill(caption, int(16 * sheet_w)), fontsize=7.5, color=QUIET)
    if colorbar:
        bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=axes, fraction=0.025, pad=0.01)
        bar.set_label(colorbar, fontsize=7.5, color=QUIET)
        bar.ax.tick_params(labelsize=7, colors=QUIET)
    save_figure(figure, path)


def _both(key: str) -> dict[str, tuple[str, str]]:
    return {"training": ("train", key), "validation": ("val", key)}


def _series(
    records: Sequence[Mapping[str, Any]], kind: str, key: str
) -> tuple[list[float], list[float]]:
    """(epochs, values) of the records of a kind that have both."""
    known = [r for r in records if r.get("kind") == kind and {"epoch", key} <= r.keys()]
    rows = [(r["epoch"], r[key]) for r in known if None not in (r["epoch"], r[key])]
    return [float(epoch) for epoch, _ in rows], [float(value) for _, value in rows]


def _epoch_means(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Mean of y per epoch, placed at the end of the epoch (the last one may be unfinished)."""
    epochs = np.ceil(np.asarray(x) - 1e-9).astype(int)
    ends = np.unique(epochs)
    means = [float(np.mean(np.asarray(y)[epochs == end])) for end in ends]
    return [min(float(end), max(x)) for end in ends], means


def _short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
