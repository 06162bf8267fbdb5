"""Plots of an evaluation as PNG files: ROC, precision and recall, confusion, thresholds, scores,
calibration.

Shapes: N images, K classes, T thresholds. Scores are [N] of the positive class, or [N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sssd_fast.evaluation.metrics import Floats, Ints
from sssd_fast.evaluation.pictures import (
    COLORS,
    INK,
    LINE,
    QUIET,
    new_figure,
    save_figure,
    short_name,
    style_axes,
)

PLOTS = ("roc", "precision_recall", "confusion", "thresholds", "scores", "calibration")
SIZE = 4.4, 3.4  # inches


def write_plots(
    folder: Path,
    labels_N: Ints,
    scores: Floats,
    result: Mapping[str, Any],
) -> None:
    """Writes those of PLOTS that are defined; `result` is the content of metrics.json.

    ROC and precision-recall curves need images of two classes, thresholds a positive class.
    """
    names, image, threshold = result["classes"], result["image"], result["threshold"]
    binary = scores.ndim == 1
    columns = {names[1]: scores} if binary else dict(zip(names, scores.T, strict=True))
    truth = {name: labels_N == names.index(name) for name in columns}
    curves = {name: (truth[name], column) for name, column in columns.items()}
    confusion_plot(image["confusion"], names, folder / "confusion.png")
    if image["auc"] is not None:
        roc_plot(curves, folder / "roc.png", image if binary else None)
        precision_recall_plot(curves, folder / "precision_recall.png", image if binary else None)
        if binary:
            threshold_plot(labels_N == 1, scores, threshold, folder / "thresholds.png")
    if binary:
        groups = {name: scores[labels_N == k] for k, name in enumerate(names)}
        label = f"score of {short_name(names[1])}"
    else:
        right_N, best_N = scores.argmax(1) == labels_N, scores.max(1)
        groups = {"correct": best_N[right_N], "wrong": best_N[~right_N]}
        label = "highest score of an image"
    score_plot(groups, threshold, label, folder / "scores.png")
    calibration_plot(result["calibration"], label, folder / "calibration.png")


def roc_plot(
    curves: Mapping[str, tuple[ArrayLike, Floats]],
    path: Path,
    chosen: Mapping[str, Any] | None = None,
) -> None:
    """Class -> (is of the class [N], score [N]); `chosen`: metrics at the threshold in use."""
    from sklearn.metrics import auc, roc_curve

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
        for name, (truth_N, score_N) in curves.items():
            x, y, _ = roc_curve(truth_N, score_N, drop_intermediate=False)
            axes.plot(x, y, lw=1.8, label=f"{short_name(name)}, AUC {auc(x, y):.3f}")
        if chosen is not None:
            _mark(axes, 1 - chosen["specificity"], chosen["sensitivity"], chosen["threshold"])

    _plot(path, "ROC", "1 - specificity", "sensitivity", draw, "lower right")


def precision_recall_plot(
    curves: Mapping[str, tuple[ArrayLike, Floats]],
    path: Path,
    chosen: Mapping[str, Any] | None = None,
) -> None:
    """Arguments as of `roc_plot`. The number is the average precision; the dashed line is the
    precision of a random score (the prevalence)."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    def draw(axes: Any) -> None:
        for color, (name, (truth_N, score_N)) in zip(COLORS * 20, curves.items(), strict=False):
            precision, recall, _ = precision_recall_curve(truth_N, score_N)
            mean = average_precision_score(truth_N, score_N)
            axes.axhline(np.asarray(truth_N).mean(), color=color, lw=1, ls="--", alpha=0.5)
            label = f"{short_name(name)}, average {mean:.3f}"
            axes.plot(recall, precision, color=color, lw=1.8, label=label)
        if chosen is not None and chosen["precision"] is not None:
            _mark(axes, chosen["sensitivity"], chosen["precision"], chosen["threshold"])

    title = "Precision and recall"
    _plot(path, title, "recall (sensitivity)", "precision", draw, "lower left")


def confusion_plot(confusion: ArrayLike, classes: Sequence[str], path: Path) -> None:
    """Confusion matrix [K, K] (rows true, columns predicted) of counts."""
    from sklearn.metrics import ConfusionMatrixDisplay

    side = max(SIZE[1], 0.9 * len(classes) + 1.8)
    figure = new_figure(side * SIZE[0] / SIZE[1], side)
    axes = figure.subplots()
    names = [short_name(name) for name in classes]
    display = ConfusionMatrixDisplay(np.asarray(confusion), display_labels=names)
    display.plot(ax=axes, cmap="Blues", colorbar=False)
    style_axes(axes, title="Confusion", xlabel="predicted", ylabel="true", grid=False)
    axes.set_aspect("auto")
    axes.tick_params(axis="y", rotation=90)
    for label in axes.get_yticklabels():
        label.set_verticalalignment("center")
    save_figure(figure, path)


def threshold_plot(truth_N: ArrayLike, score_N: Floats, threshold: float, path: Path) -> None:
    """Sensitivity, specificity and F1 over the threshold."""
    grid_T, rates = rates_over_thresholds(truth_N, score_N)

    def draw(axes: Any) -> None:
        for name, values_T in rates.items():
            axes.plot(grid_T, values_T, lw=1.6, label=name)
        _line(axes, threshold)

    _plot(path, "Metrics over the threshold", "threshold", "", draw, "lower center")


def rates_over_thresholds(truth_N: ArrayLike, score_N: Floats) -> tuple[Floats, dict[str, Floats]]:
    """(thresholds [T], rates [T]); an image is positive if its score is at least the threshold."""
    truth_N = np.asarray(truth_N, dtype=bool)
    grid_T = np.linspace(0, 1, 201)
    positive, negative = np.sort(score_N[truth_N]), np.sort(score_N[~truth_N])
    found_T = len(positive) - np.searchsorted(positive, grid_T)
    false_T = len(negative) - np.searchsorted(negative, grid_T)
    missed_T = len(positive) - found_T
    return grid_T, {
        "sensitivity": found_T / len(positive),
        "specificity": 1 - false_T / len(negative),
        "F1": 2 * found_T / (2 * found_T + false_T + missed_T),
    }


def score_plot(
    groups: Mapping[str, Floats], threshold: float | None, xlabel: str, path: Path
) -> None:
    """Histogram of the scores of each group of images."""

    def draw(axes: Any) -> None:
        bins = np.linspace(0, 1, 21)
        for name, scores_N in groups.items():
            label = f"{short_name(name)} ({len(scores_N)})"
            axes.hist(scores_N, bins, alpha=0.55, label=label)
        _line(axes, threshold)

    _plot(path, "Scores by class", xlabel, "images", draw, "upper center", unit_y=False)


def calibration_plot(calibration: Mapping[str, Any], xlabel: str, path: Path) -> None:
    """Reliability curve of `metrics.calibration`; the area of a point is its number of images."""
    bins = [entry for entry in calibration["bins"] if entry["n"]]
    total = max(1, sum(entry["n"] for entry in bins))

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
        x = [entry["score"] for entry in bins]
        y = [entry["frequency"] for entry in bins]
        label = f"ECE {calibration['ece']:.3f}, Brier {calibration['brier']:.3f}"
        axes.plot(x, y, lw=1.4, label=label)
        axes.scatter(x, y, s=[20 + 300 * entry["n"] / total for entry in bins], alpha=0.6)

    ylabel = "frequency of the class"
    _plot(path, "Calibration", xlabel, ylabel, draw, "upper left")


def _plot(
    path: Path,
    title: str,
    xlabel: str,
    ylabel: str,
    draw: Callable[[Any], None],
    legend: str,
    unit_y: bool = True,
) -> None:
    """A plot over 0 to 1 with the colours of all plots."""
    figure = new_figure(*SIZE)
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLORS)
    draw(axes)
    style_axes(axes, title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set_xlim(-0.02, 1.02)
    if unit_y:
        axes.set_ylim(-0.02, 1.02)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(edgecolor="none", framealpha=0.8, fontsize=8, loc=legend, labelcolor=INK)
    save_figure(figure, path)


def _mark(axes: Any, x: float, y: float, threshold: float) -> None:
    axes.plot(x, y, "o", color=INK, ms=6, label=f"threshold {threshold:g}")


def _line(axes: Any, threshold: float | None) -> None:
    if threshold is not None:
        axes.axvline(threshold, color=QUIET, lw=1.2, ls=":", label=f"threshold {threshold:g}")
