"""Pictures of a run as PNG files: reconstructions, attention maps, examples, curves.

Drawn by matplotlib without a display, written atomically. Shapes: n images, C channels, L = rows *
cols patches, S = P * P pixels of a patch, N = prefix + L tokens. Images are uint8 [n, C, H, W].
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sssd_fast.data.images import decode_image
from sssd_fast.data.index import DataIndex
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
MAX_EPOCHS = 4  # in a picture of reconstructions
SAMPLES = 8  # images of a class in the overview of the data
DPI = 160
LAYOUT: Literal["constrained"] | None = "constrained"  # draws twice; tests do without


def reconstruction_picture(
    images: Tensor,
    pred: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    norm: str,
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str],
    folder: Path,
    epoch: int,
    sheet: bool = True,
) -> None:
    """folder/reconstruction-eNNNN.png: one column per image with input, masked input, and at up to
    MAX_EPOCHS epochs the visible patches with the predicted masked ones.

    images uint8 [n, C, H, W], pred [n, L, S*C], mask [n, L] (True = masked), `names` of the images;
    norm, mean and std as in `unnormalise`. The predictions are kept in folder/strips/eNNNN.png for
    later epochs; without `sheet` nothing else is written.
    """
    pixels_nLSC = patchify(images, patch_size)
    mask_nL11 = mask.bool().cpu()[:, :, None, None]
    pred_nLSC = unnormalise(pred, pixels_nLSC, norm, mean, std).round().clamp(0, 255)
    fills = {"input": pixels_nLSC, "masked": torch.tensor(HIDDEN), "reconstruction": pred_nLSC}
    rows, (height, width) = {}, images.shape[2:]
    for name, fill in fills.items():
        columns = torch.where(mask_nL11, fill, pixels_nLSC).permute(0, 3, 2, 1).flatten(1, 2)
        filled = F.fold(columns, (height, width), patch_size, stride=patch_size)
        rows[name] = filled.byte().permute(0, 2, 3, 1).numpy()
    strips = folder / "strips"
    _write_png(np.hstack(list(rows.pop("reconstruction"))), strips / f"e{epoch:04d}.png")
    if not sheet:
        return
    shown: dict[str, Sequence[Bytes] | Bytes] = {**rows, **_strips(strips, epoch, width)}
    caption = f"{mask.float().mean():.0%} of patches masked"
    if norm != "none":
        caption += "; predictions have the mean and standard deviation of the target patches"
    _sheet(shown, names, caption, folder / f"reconstruction-e{epoch:04d}.png")


def _strips(folder: Path, epoch: int, width: int) -> dict[str, list[Bytes]]:
    """Rows of the images kept up to `epoch`, evenly chosen."""
    from PIL import Image

    found = {int(path.stem[1:]): path for path in folder.glob("e*.png")}
    known = sorted(number for number in found if number <= epoch)
    places = np.linspace(0, len(known) - 1, min(MAX_EPOCHS, len(known))).round().astype(int)
    rows = {}
    for number in (known[place] for place in places):
        strip = np.asarray(Image.open(found[number]))
        strip = strip[:, :, None] if strip.ndim == 2 else strip
        rows[f"epoch {number}"] = np.split(strip, strip.shape[1] // width, axis=1)
    return rows


def patchify(images_nCHW: Tensor, patch_size: int) -> Tensor:
    """[n, C, H, W] -> [n, L, S, C] in fp64 on the CPU, pixels of a patch row by row."""
    columns = F.unfold(images_nCHW.cpu().double(), patch_size, stride=patch_size)
    return columns.unflatten(1, (images_nCHW.shape[1], -1)).permute(0, 3, 2, 1)


def unnormalise(
    pred_nLX: Tensor, pixels_nLSC: Tensor, norm: str, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Predictions as pixel values 0..255 (not clipped), [n, L, S, C].

    pred [n, L, S*C] is in the space of the training target: (x / 255 - mean) / std, then, for norm
    "patch" or "channel", minus the patch's mean, divided by sqrt(unbiased variance + 1e-6) (He et
    al. 2022, section 4.2). Both statistics are those of the target patch in `pixels_nLSC`.
    """
    scale, shift = (255 * torch.tensor(value, dtype=torch.float64) for value in (std, mean))
    pred_nLSC = pred_nLX.detach().cpu().double().reshape(pixels_nLSC.shape)
    if norm != "none":
        target_nLSC = (pixels_nLSC - shift) / scale
        axes = (2, 3) if norm == "patch" else (2,)
        spread = (target_nLSC.var(axes, keepdim=True) + 1e-6).sqrt()
        pred_nLSC = pred_nLSC * spread + target_nLSC.mean(axes, keepdim=True)
    return pred_nLSC * scale + shift


def attention_picture(
    images: Tensor,
    maps_nhL: Tensor,
    grid: tuple[int, int],
    num_prefix: int,
    *,
    names: Sequence[str],
    path: Path,
) -> None:
    """One column per image: the image, then the attention of the mean of heads and of each head.

    maps [n, heads, L] are those of Encoder.attention_maps. Each is scaled to its own maximum.
    """
    shown = {"mean of heads": maps_nhL.mean(1)}
    shown |= {f"head {k + 1}": maps_nhL[:, k] for k in range(min(MAX_HEADS, maps_nhL.shape[1]))}
    rows = {"image": _pixels(images)}
    rows |= {title: overlays(images, maps_nL, grid) for title, maps_nL in shown.items()}
    query = "of the class token" if num_prefix else "averaged over all queries"
    caption = f"attention {query} in the last block; each map scaled to its own maximum"
    _sheet(rows, names, caption, path)


def overlays(images: Tensor, maps_nL: Tensor, grid: tuple[int, int]) -> list[Bytes]:
    """Each image [H, W, 3] under its map [L]; each map is scaled to its own maximum."""
    pairs = zip(_pixels(images), maps_nL.cpu().double().unflatten(1, grid), strict=True)
    return [_overlay(image, map_hw.numpy()) for image, map_hw in pairs]


def thumbnail(image: Bytes, *others: Bytes, path: Path) -> None:
    """PNG of an [H, W] or [H, W, 3] uint8 image, reduced if larger than THUMBNAIL, with `others`
    next to it in the same height.
    """
    from PIL import Image

    first = Image.fromarray(np.ascontiguousarray(image))
    first.thumbnail((THUMBNAIL, THUMBNAIL))
    found = [first]
    for picture in map(Image.fromarray, others):
        width = round(picture.width * first.height / picture.height)
        found.append(picture.resize((width, first.height)))
    if others:
        gap, mode = 2, "RGB"
        width = sum(picture.width + gap for picture in found) - gap
        sheet, left = Image.new(mode, (width, first.height), "white"), 0
        for picture in found:
            sheet.paste(picture, (left, 0))
            left += picture.width + gap
        first = sheet
    _write_png(np.asarray(first), path)


def curves(records: Sequence[Mapping[str, Any]], *, path: Path) -> Path | None:
    """Panels from metrics.jsonl records over epochs; None if there is nothing to draw.

    Pre-training: reconstruction loss; distillation loss on a log scale, since its first values are
    far above the rest; and the monitor of collapse (collapse.py). Other stages: loss, and accuracy
    and AUC of the validation images.
    """
    if any("loss_reconstruction" in record for record in records):
        panels = {
            f"{name} loss": _both(f"loss_{name}") for name in ("reconstruction", "distillation")
        }
        sides, uses = ("student", "teacher"), ("entropy", "information")
        panels["effective rank (1 = collapsed)"] = {n: ("val", f"rank_{n}") for n in sides}
        panels["use of prototypes (0 = collapsed)"] = {n: ("val", n) for n in uses}
    else:
        shown = {"accuracy": ("val", "accuracy"), "AUC": ("val", "auc")}
        panels = {"loss": _both("loss"), "validation metric": shown}
    found = {
        title: {label: _series(records, *source) for label, source in lines.items()}
        for title, lines in panels.items()
    }
    drawn = {title: lines for title, lines in found.items() if any(map(len, lines.values()))}
    if not drawn:
        return None
    lines_of_two, columns = -(-len(drawn) // 2), min(2, len(drawn))
    figure = new_figure(3.5 * columns, 2.5 * lines_of_two)
    all_axes = figure.subplots(lines_of_two, columns, squeeze=False).ravel()
    for axes in all_axes[len(drawn) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(all_axes, drawn.items(), strict=False):
        for color, (label, points) in zip(COLORS, lines.items(), strict=False):
            if len(points):
                marker = "o" if len(points) < 25 else None
                axes.plot(*points.T, color=color, lw=1.4, label=label, marker=marker, ms=3)
        # less than a decade has no readable labels on a logarithmic scale
        wide = axes.dataLim.ymax > 10 * axes.dataLim.ymin
        if wide and title.partition(" ")[0] in ("distillation", "effective"):
            axes.set_yscale("log", nonpositive="mask")
        if title.startswith("use"):
            axes.set_ylim(-0.02, 1.02)
        ylabel = title.partition(" (")[0]
        style_axes(axes, title=title.capitalize(), xlabel="epoch", ylabel=ylabel)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return save_figure(figure, path)


def data_pictures(index: DataIndex, folder: Path) -> list[Path]:
    """samples.png: images of each class, evenly spaced in the index; sizes.png: width and height of
    every image, by class. Raises DataError for an image that cannot be read.
    """
    from PIL import Image, ImageOps

    rows, figure = {}, new_figure(3.4, 2.9)
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLORS)
    for label, name in enumerate(index.classes):
        own = [i for i, record in enumerate(index.records) if record.label == label]
        if not own:
            continue
        shown = [own[len(own) * k // SAMPLES] for k in range(SAMPLES)]
        images = [
            Image.fromarray(decode_image(index.file(i), index.grey_range)).convert("RGB")
            for i in shown
        ]
        rows[name] = [np.asarray(ImageOps.pad(image, (128, 128))) for image in images]
        widths = [index.records[i].width for i in own]
        heights = [index.records[i].height for i in own]
        axes.scatter(widths, heights, s=10, alpha=0.5, label=f"{short_name(name)} ({len(own)})")
    paths = [folder / "samples.png", folder / "sizes.png"]
    _sheet(rows, [""] * SAMPLES, "", paths[0])
    style_axes(axes, title="Image sizes in pixels", xlabel="width", ylabel="height")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(edgecolor="none", framealpha=0.8, fontsize=8, labelcolor=INK)
    save_figure(figure, paths[1])
    return paths


# ---- shared with the other plots ----


def new_figure(width: float, height: float) -> Figure:
    """Empty matplotlib figure of width x height inches without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError('pictures need matplotlib: pip install "sssd-fast[train]"') from error
    return Figure(figsize=(width, height), dpi=DPI, layout=LAYOUT, facecolor="white")


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


def _write_png(image: Bytes, path: Path) -> None:
    """Of [H, W], [H, W, 1] or [H, W, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    image = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    atomic_write_bytes(path, buffer.getvalue())


def _pixels(images_nCHW: Tensor) -> list[Bytes]:
    return [_rgb(image.permute(1, 2, 0).cpu().numpy()) for image in images_nCHW]


def _rgb(image_HWC: Bytes) -> Bytes:
    return np.repeat(image_HWC, 3, axis=2) if image_HWC.shape[2] == 1 else image_HWC


def _overlay(image_HW3: Bytes, map_hw: Floats) -> Bytes:
    """The image under a colour scale; stronger attention is brighter and more opaque."""
    from matplotlib import colormaps
    from PIL import Image

    height, width = image_HW3.shape[:2]
    scaled = (map_hw / max(float(map_hw.max()), 1e-12)).astype(np.float32)
    smooth = Image.fromarray(scaled).resize((width, height), resample=Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(smooth), 0.0, 1.0)[:, :, None]
    color = 255 * colormaps["inferno"](strength[:, :, 0])[:, :, :3]
    opacity = 0.25 + 0.5 * strength
    return np.asarray(np.rint((1 - opacity) * image_HW3 + opacity * color), dtype=np.uint8)


def _sheet(
    rows: Mapping[str, Sequence[Bytes] | Bytes], names: Sequence[str], caption: str, path: Path
) -> None:
    """Equal pictures as a table: row titles at the left, image names above, a caption below.

    One mosaic in one axes: dozens of subplots would take seconds.
    """
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
    sheet_w = cell * count + 0.8
    figure = new_figure(sheet_w, cell * count * mosaic.shape[0] / mosaic.shape[1] + 0.8)
    axes = figure.subplots()
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_frame_on(False)
    axes.tick_params(length=0, labelsize=7, colors=QUIET)
    axes.xaxis.tick_top()
    titles = [short_name(PurePath(name).name, 18) for name in names]
    columns = [(i + 0.5) * (width + gap) - gap / 2 for i in range(len(titles))]
    axes.set_xticks(columns, titles)
    axes.set_yticks(
        [(i + 0.5) * (height + gap) - gap / 2 for i in range(len(rows))],
        list(map(short_name, rows)),
    )
    axes.set_xlabel(textwrap.fill(caption, int(16 * sheet_w)), fontsize=7.5, color=QUIET)
    save_figure(figure, path)


def _both(key: str) -> dict[str, tuple[str, str]]:
    return {"training": ("train", key), "validation": ("val", key)}


def _series(records: Sequence[Mapping[str, Any]], kind: str, key: str) -> Floats:
    """(epoch, value) [n, 2] of the records of a kind that have both."""
    rows = [(r.get("epoch"), r.get(key)) for r in records if r.get("kind") == kind]
    return np.array([row for row in rows if None not in row], dtype=np.float64)


def short_name(name: str, limit: int = 24) -> str:
    """A name that fits into a picture. A dollar sign would begin a formula."""
    name = name.replace("$", r"\$")
    return name if len(name) <= limit else name[: limit - 1] + "…"
