"""Pictures of result files: time against ours, roofline, memory over the batch, what each part adds to a step.

Each is drawn only where a file has its figures; those of training are in plots_training.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sssd_fast.evaluation.pictures import INK, QUIET, write_picture

from . import plots_training
from .bench import OURS
from .drawing import BASE, COLORS, LINE, color_of, label_ends, new_axes, new_figure, png
from .formats import Document, device_name, rate_text, significant
from .machine import slug
from .rows import Group, is_ours, representative, sites


@dataclass(frozen=True)
class Plot:
    file: str
    document: Document
    title: str  # also the text for those who do not see the picture
    draw: Callable[[], Any]


def planned(documents: Sequence[Document]) -> list[Plot]:
    """What can be drawn of these files; needs no matplotlib."""
    return [plot for document in documents for plot in _plots(document)]


def _plots(document: Document) -> Iterator[Plot]:
    kind, hardware = document["kind"], device_name(document)

    def plot(name: str, title: str, draw: Callable[..., Any], *args: Any) -> Plot:
        title = f"{title}, {hardware}"
        return Plot(
            f"{name}-{slug(document['device']['name'])}.png",
            document,
            title,
            partial(draw, title, *args),
        )

    if bars := [group for group in _bars(document) if group.time(OURS)]:
        yield plot(
            f"time-{kind}",
            f"{kind.capitalize()}: time of each provider / ours",
            _draw_bars,
            bars,
            kind,
        )
    if points := _roofline(document):
        yield plot(
            f"roofline-{kind}", f"{kind.capitalize()}: roofline", _draw_roofline, document, points
        )
    if panels := plots_training.panels(document):
        caps = plots_training.caps(document)
        yield plot("memory", "Peak memory over the batch", plots_training.draw_memory, panels, caps)
    for task, rows in plots_training.falls(document).items():
        title = f"{task}, {rows[0]['shape']}, {rows[0]['dtype']}: what each part adds"
        yield plot(f"waterfall-{slug(task)}", title, plots_training.draw_waterfall, rows)


def write(documents: Sequence[Document], folder: Path) -> list[Path]:
    """Draws all into `folder`; the same files give the same bytes with the same matplotlib. Raises DependencyError without it."""
    return [write_picture(png(plot.draw()), folder / plot.file) for plot in planned(documents)]


# ---- time of each provider / ours ----


def _bars(document: Document) -> list[Group]:
    if document["kind"] == "kernels":
        return representative(document)
    return sites(document) if document["kind"] == "attention" else []


def _draw_bars(title: str, chosen: Sequence[Group], kind: str) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names = [[name for name in group.providers(kind) if name != OURS] for group in chosen]
    figure = new_figure(title, 0.9 + 0.155 * (sum(map(len, names)) + 1.7 * len(chosen)))
    axes = new_axes(figure, 1.4, 0.5, 0.55, 0.3)
    axes.set_xscale("log")
    y, ticks, ratios = 0.0, list[tuple[float, str]](), [0.9, 1.5]
    for group, providers in zip(chosen, names, strict=True):
        y += 1.1
        head = f"{group.case}, {group.shape}, {group.dtype}, {group.phase}"
        inches = axes.get_yaxis_transform()
        axes.text(
            -0.2,
            y - 0.1,
            head,
            fontsize=8,
            fontweight="bold",
            color=INK,
            va="center",
            transform=inches,
        )
        axes.plot([1, 1], [y + 0.5, y + 0.5 + len(providers)], color=COLORS[OURS], lw=1.4)
        for name in providers:
            y += 1.0
            ticks.append((y, name))
            ratios += _bar(axes, y, group, name)
        y += 0.6
    axes.set_xlim(min(ratios) / 1.15, max(ratios) * 1.15)
    axes.set_ylim(y + 0.4, 0.2)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0, labelsize=7.5, labelcolor=INK)
    axes.xaxis.set_major_locator(
        LogLocator(10, (1, 2, 5) if max(ratios) / min(ratios) > 10 else (1, 1.5, 2, 3, 5, 7))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel(
        "time / time of ours (blue line); left of it a provider is faster than ours",
        fontsize=8,
        color=QUIET,
    )
    return figure


def _bar(axes: Any, y: float, group: Group, name: str) -> list[float]:
    """The ratio that was drawn; none where the reason stands in place of a bar."""
    time, ours = group.time(name), group.time(OURS)
    if time is None or ours is None:
        reason = str(group.rows[name]["reason"] or "no figure")
        text = reason if len(reason) < 60 else reason[:59] + "…"
        axes.text(
            1.03, y, text, fontsize=7, color=QUIET, va="center", style="italic", parse_math=False
        )
        return []
    ratio = time / ours
    axes.barh(y, ratio - 1, 0.8, 1, color=color_of(name))
    label = f"{ratio:.2f}×" if ratio < 10 else f"{significant(ratio)}×"
    place = {"textcoords": "offset points", "va": "center_baseline"}
    axes.annotate(label, (max(ratio, 1), y), (4, 0), fontsize=7, color=INK, **place)
    return [ratio]


# ---- roofline ----


@dataclass(frozen=True)
class Point:
    label: str
    intensity: float  # FLOP per byte
    rate: float  # FLOP/s
    dtype: str
    ours: bool


def _roofline(document: Document) -> list[Point]:
    """Ours and the fastest other provider of each shown group that has matrix products."""
    ceilings, found = document["ceilings"], []
    for group in _bars(document):
        label = group.shape if document["kind"] == "attention" else group.case
        for name in (OURS, group.best_other()):
            row = group.rows.get(name) if name else None
            if (
                row
                and row["time"]
                and row["flops"]
                and row["bytes"]
                and group.dtype in ceilings["matmul_flops_per_s"]
            ):
                rate = row["flops"] / row["time"]["median_us"] * 1e6
                found.append(
                    Point(
                        label,
                        row["flops"] / row["bytes"],
                        rate,
                        group.dtype,
                        is_ours(row["provider"]),
                    )
                )
    return found if any(point.ours for point in found) else []


def _draw_roofline(title: str, document: Document, points: Sequence[Point]) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    copy = document["ceilings"]["copy_bytes_per_s"]
    products = document["ceilings"]["matmul_flops_per_s"]
    products = {dtype: products[dtype] for dtype in sorted({point.dtype for point in points})}
    figure = new_figure(title, 4.6)
    axes = new_axes(figure, 1.0, 0.75, 2.35, 0.4, ("left", "bottom"))
    ridges = [flops / copy for flops in products.values()]
    low = min(min(point.intensity for point in points) / 2, min(ridges) / 20)
    high = max(max(point.intensity for point in points), *ridges) * 4
    lines = [f"sloping: copy, {rate_text(copy, 'B/s')}"]
    for dtype, flops in products.items():
        axes.plot([low, flops / copy, high], [low * copy, flops, flops], color=QUIET, lw=1.3)
        lines.append(f"flat: matrix product, {dtype}, {rate_text(flops, 'FLOP/s')}")
    lines.append("● ours   ○ fastest other")
    bottom = min(min(point.rate for point in points) / 2, max(products.values()) / 100)
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, max(products.values()) * 4)
    )
    for point in points:
        look = (
            {"color": COLORS[OURS], "zorder": 3}
            if point.ours
            else {"color": BASE, "mfc": "white", "zorder": 2}
        )
        axes.plot(point.intensity, point.rate, "o", ms=6, **look)
    axes.text(
        0.02, 0.98, "\n".join(lines), transform=axes.transAxes, fontsize=7.5, color=QUIET, va="top"
    )
    for axis, tick in (
        (axes.xaxis, "{:g}".format),
        (axes.yaxis, lambda rate: rate_text(rate, "FLOP/s")),
    ):
        axis.set_major_locator(LogLocator(10))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, tick=tick: tick(value)))
    axes.grid(color=LINE, lw=0.5)
    axes.set_xlabel("FLOP per byte that the operation needs", fontsize=8, color=QUIET)
    label_ends(axes, [(point.label, point.intensity, point.rate) for point in points if point.ours])
    shown = {point.label for point in points}
    absent = [
        group.case
        for group in _bars(document)
        if group.case not in shown and document["kind"] == "kernels"
    ]
    if absent:
        text = f"Not here, being without matrix products or without a time: {', '.join(absent)}."
        figure.text(0.02, 0.02, text, fontsize=7, color=QUIET, wrap=True)
    return figure
