"""Plots of a run: training curves, ROC, confusion matrix. PNG files drawn by matplotlib without a display, written
atomically.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd_fast.errors import DependencyError
from sssd_fast.evaluation.visualize import INK, QUIET, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

LINE = "#d5dbe1"
COLORS = ("#1f6f8b", "#c8553d", "#6a8d3f", "#7a5c99", "#b08a2e", "#4d5b6a")


def curves(records: Iterable[Mapping[str, Any]], *, path: str | Path) -> Path | None:
    """Loss, learning rate and validation panels from metrics.jsonl records, over optimizer steps; None where there is
    nothing to draw.

    Training records may be many: lines are drawn as they are, without smoothing.
    """
    records = list(records)
    train = [record for record in records if record.get("kind") == "train"]
    val = [record for record in records if record.get("kind") == "val"]
    losses = {
        "loss": "total",
        "loss_reconstruction": "reconstruction",
        "loss_distillation": "distillation",
    }
    panels = [
        (
            "Loss",
            [*((train, key, label) for key, label in losses.items()), (val, "loss", "validation")],
        ),
        ("Learning rate", [(train, "lr", "learning rate")]),
        ("Validation", [(val, "accuracy", "accuracy"), (val, "auc", "AUC")]),
    ]
    drawn = []
    for title, lines in panels:
        series = [(label, *_series(source, key)) for source, key, label in lines]
        series = [(label, x, y) for label, x, y in series if len(x)]
        if series:
            drawn.append((title, series))
    if not drawn:
        return None
    figure = _figure(4.1 * len(drawn), 2.9)
    for place, (title, series) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), place + 1)
        for color, (label, x, y) in zip(COLORS, series, strict=False):
            axes.plot(
                x, y, color=color, lw=1.4, label=label, marker="o" if len(x) < 25 else None, ms=3
            )
        _style(axes, title=title, xlabel="step")
        if title == "Validation":
            axes.set_ylim(top=1.02)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _save(figure, path)


def roc_picture(
    lines: Mapping[str, tuple[Floats, Floats]],
    *,
    path: str | Path,
    operating_point: tuple[float, float] | None = None,
    threshold: float | None = None,
) -> Path:
    """ROC curves, label -> (false positive rates, true positive rates); `operating_point` marks the threshold in use."""
    figure = _figure(4.4, 4.2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
    for color, (label, (false_rate, true_rate)) in zip(
        _cycle(len(lines)), lines.items(), strict=True
    ):
        axes.plot(false_rate, true_rate, color=color, lw=1.8, label=label)
    if operating_point is not None:
        axes.plot(*operating_point, "o", color=INK, ms=6, label=f"threshold {threshold:g}")
    _style(axes, title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    legend = axes.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save(figure, path)


def confusion_picture(confusion: ArrayLike, classes: Sequence[str], *, path: str | Path) -> Path:
    """Confusion matrix [K, K] (rows true, columns predicted): counts, and the share of each row."""
    counts = np.asarray(confusion)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = max(3.9, 0.9 * len(classes) + 1.8)
    figure = _figure(side, side * 0.92)
    axes = figure.add_subplot()
    axes.imshow(share, cmap=_blues(), vmin=0, vmax=1)
    for row, col in np.ndindex(*counts.shape):
        color = "white" if share[row, col] > 0.55 else INK
        text = f"{counts[row, col]}\n{share[row, col]:.1%}" if totals[row, 0] else "0\nno images"
        axes.text(col, row, text, ha="center", va="center", color=color, fontsize=11)
    _style(axes, title="Confusion", xlabel="predicted", ylabel="true", grid=False)
    ticks = range(len(classes))
    axes.set_xticks(
        ticks,
        [_short(name) for name in classes],
        rotation=0 if len(classes) < 4 else 45,
        parse_math=False,
    )
    axes.set_yticks(
        ticks, [_short(name) for name in classes], rotation=90, va="center", parse_math=False
    )
    return _save(figure, path)


def _series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [
        (record["step"], record[key])
        for record in records
        if record.get(key) is not None and "step" in record
    ]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError('plots need matplotlib: pip install "sssd-fast[train]"') from error
    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def _style(axes: Any, *, title: str, xlabel: str, ylabel: str = "", grid: bool = True) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9, color=QUIET)
    axes.set_ylabel(ylabel, fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8, colors=QUIET, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    if grid:
        axes.grid(color=LINE, lw=0.5, alpha=0.7)


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _blues() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("counts", ["#f4f7f9", COLORS[0]])


def _short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _save(figure: Figure, path: str | Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return write_picture(buffer.getvalue(), path)
