"""Pictures of result files: time relative to ours, roofline, memory, waterfall of a step.

matplotlib is imported when something is drawn. Colours are those of Okabe and Ito, which the common
kinds of colour blindness can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.harness import OURS
from benchmarks.results import slug
from benchmarks.tables import (
    LARGEST,
    WATERFALL,
    Document,
    RowDict,
    device_name,
    rate_text,
    significant,
    wrong_ceilings,
)
from sssd_fast.errors import DependencyError

INK, GREY, LINE = "#1d2733", "#8a939c", "#d5dbe1"
BLUE, GREEN, RED = "#0072b2", "#009e73", "#d55e00"
COLORS = {
    "published": GREY,
    "tuned": "#e69f00",
    "library": "#cc79a7",
    "ours": BLUE,
    "ours compiled": GREEN,
    "ours lean": GREEN,
    "eager": GREY,
    "ViTMAE": "#e69f00",
    "plain": "#56b4e9",
}
DTYPES = ("bf16", "fp16", "fp32")  # of a GPU, most important first; on a CPU the other way round
PHASES = ("forward", "forward+backward")
Group = dict[str, RowDict]  # the rows of one race by provider


@dataclass(frozen=True)
class Plot:
    file: str
    title: str  # also the alternative text
    draw: Callable[[], Any]

    def png(self) -> bytes:
        """Equal bytes for equal results and an equal version of matplotlib."""
        buffer = io.BytesIO()
        figure = self.draw()
        figure.suptitle(self.title, fontsize=10, fontweight="bold", color=INK, x=0.01, ha="left")
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def planned(document: Document) -> Iterator[Plot]:
    """The pictures that this file has results for; needs no matplotlib."""
    kind, place = document["kind"], slug(document["device"]["name"])

    def plot(name: str, title: str, draw: Callable[..., Any], *args: Any) -> Plot:
        return Plot(
            f"{name}-{place}.png", f"{title}, {device_name(document)}", partial(draw, *args)
        )

    if kind in ("ops", "attention"):
        groups = [one for one in representative(document) if one[OURS]["time"]]
        if groups:
            yield plot(f"time-{kind}", f"{kind}: time relative to ours", draw_bars, groups)
        points = roofline(document, groups)
        if points:
            yield plot(f"roofline-{kind}", f"{kind}: roofline", draw_roofline, document, points)
    if panels := memory_panels(document):
        caps = {row["more"].get("cap_gb") for row in document["rows"]} - {None}
        yield plot("memory", "peak memory over the batch", draw_memory, panels, sorted(caps))
    for task, rows in waterfalls(document).items():
        title = f"{task}, {rows[0]['shape']}, {rows[0]['dtype']}: what each change adds"
        yield plot(f"waterfall-{slug(task)}", title, draw_waterfall, rows)


def groups(document: Document, names: Sequence[str]) -> dict[tuple[str, ...], Group]:
    """The rows that agree in `names`, by provider, without those that are shown separately."""
    found: dict[tuple[str, ...], Group] = {}
    for row in document["rows"]:
        if not row["case"].startswith((WATERFALL, LARGEST)):
            found.setdefault(tuple(row[n] for n in names), {})[row["provider"]] = row
    return found


def representative(document: Document) -> list[Group]:
    """One group per op (attention: per site), ViT-B at the largest batch if measured."""
    dtypes = DTYPES if document["device"]["type"] == "cuda" else DTYPES[::-1]
    best: dict[str, tuple[tuple[Any, ...], Group]] = {}
    for group in groups(document, ("case", "shape", "dtype", "phase")).values():
        if OURS not in group:
            continue
        row = group[OURS]
        site = row["shape"].partition(" [")[0] if document["kind"] == "attention" else row["case"]
        rank = (
            any(one["time"] for one in group.values()),
            PHASES.index(row["phase"]) if row["phase"] in PHASES else -1,
            -dtypes.index(row["dtype"]),
            row["shape"].startswith("ViT-B,") and "CT" not in row["shape"],
            row["sizes"].get("batch", 0),
        )
        if site not in best or rank > best[site][0]:
            best[site] = (rank, group)
    return [group for _, group in best.values()]


def fastest_other(group: Group) -> str | None:
    """The fastest provider that is not ours."""
    medians = {
        name: row["time"]["median_us"]
        for name, row in group.items()
        if row["time"] and not name.startswith(OURS)
    }
    return min(medians, key=lambda name: medians[name]) if medians else None


def new_figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    """8 inches wide: letters of 8 points stay readable at 800 pixels."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError('pictures need matplotlib: pip install "sssd-fast[bench]"') from error
    figure = Figure(figsize=(8, height), dpi=130, layout="constrained")
    axes = figure.subplots(1, columns)
    for one in figure.axes:
        one.tick_params(which="both", labelsize=8, colors=INK)
        one.spines[["top", "right"]].set_visible(False)
        one.set_axisbelow(True)
    return figure, axes


# ---- time relative to ours ----


def draw_bars(groups: Sequence[Group]) -> Any:
    figure, axes = new_figure(1 + 0.17 * sum(len(group) + 1 for group in groups))
    y, ticks, largest = 0.0, list[tuple[float, str]](), 1.5
    for group in groups:
        row = group[OURS]
        y += 1.5
        head = f"{row['case']}, {row['shape']}, {row['dtype']}, {row['phase']}"
        ticks.append((y, head))
        for name in (name for name in group if name != OURS):
            y += 1
            ticks.append((y, name))
            time, ours = group[name]["time"], row["time"]["median_us"]
            if not time:
                reason = str(group[name]["reason"])[:60]
                axes.annotate(reason, (1, y), (4, -3), textcoords="offset points", fontsize=7)
                continue
            ratio = time["median_us"] / ours
            largest = max(largest, ratio)
            axes.barh(y, ratio - 1, 0.8, 1, color=COLORS.get(name, "#56b4e9"))
            label = f"{significant(ratio)}×"
            axes.annotate(
                label, (max(ratio, 1), y), (4, -3), textcoords="offset points", fontsize=7
            )
    axes.axvline(1, color=BLUE, lw=1.4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("{x:g}×")
    axes.set_xlim(right=largest * 1.6)
    axes.set_ylim(y + 1, 0.5)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "time / time of ours (blue line); left of it the provider is faster", fontsize=8
    )
    return figure


# ---- roofline ----


@dataclass(frozen=True)
class Point:
    label: str
    intensity: float  # FLOP per byte
    rate: float  # FLOP/s
    dtype: str
    ours: bool


def roofline(document: Document, groups: Sequence[Group]) -> list[Point]:
    """Ours and the fastest other provider of each group with matrix products.

    Empty if a provider exceeds a ceiling: then the ceiling is wrong and no picture is drawn.
    """
    products = document["ceilings"].get("matmul_flops_per_s", {})
    if wrong_ceilings(document):
        return []
    found = []
    for group in groups:
        for name in (OURS, fastest_other(group)):
            row = group.get(name or "")
            if row and row["time"] and row["flops"] and row["bytes"] and row["dtype"] in products:
                label = row["shape"] if document["kind"] == "attention" else row["case"]
                rate = row["flops"] / row["time"]["median_us"] * 1e6
                intensity = row["flops"] / row["bytes"]
                found.append(Point(label, intensity, rate, row["dtype"], name == OURS))
    return found


def draw_roofline(document: Document, points: Sequence[Point]) -> Any:
    figure, axes = new_figure(4.6)
    copy = document["ceilings"]["copy_bytes_per_s"]
    products = document["ceilings"]["matmul_flops_per_s"]
    low = min(point.intensity for point in points) / 2
    high = max(point.intensity for point in points) * 4
    for dtype in sorted({point.dtype for point in points}):
        flops = products[dtype]
        label = f"copy {rate_text(copy, 'B/s')}, {dtype} product {rate_text(flops, 'FLOP/s')}"
        edge = flops / copy
        ends = [min(low, edge / 4), edge, max(high, edge * 4)]
        axes.plot(ends, [ends[0] * copy, flops, flops], color=INK, lw=1.3, label=label)
    markers = iter("os^Dv<>pPX*hd" * 3)
    for point in points:
        if point.ours:
            style = {"color": BLUE, "label": f"ours: {point.label}", "marker": next(markers)}
        else:
            style = {"color": GREY, "mfc": "white", "marker": "o"}
        axes.plot(point.intensity, point.rate, ls="", ms=6, **style)
    axes.plot([], [], "o", color=GREY, mfc="white", label="fastest other provider")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_minor_formatter("")
    axes.grid(color=LINE, lw=0.5)
    axes.set_xlabel("FLOP per byte that the operation needs", fontsize=8)
    axes.set_ylabel("FLOP/s", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return figure


# ---- memory over the batch ----

Series = dict[str, list[tuple[int, float]]]  # provider -> (images, MB)


def memory_panels(document: Document) -> dict[str, Series]:
    """By task, model and dtype; a line needs two batches."""
    found: dict[str, Series] = {}
    for row in document["rows"] if document["kind"] == "memory" else []:
        if row["peak_bytes"] and row["phase"] == "memory":
            batch = row["more"]["batch"]
            model = row["shape"].partition(f", {batch} images")[0]
            panel = found.setdefault(f"{row['case']}, {model}, {row['dtype']}", {})
            panel.setdefault(row["provider"], []).append((batch, row["peak_bytes"] / 1e6))
    lines = {
        name: {provider: line for provider, line in panel.items() if len(line) > 1}
        for name, panel in found.items()
    }
    return {name: panel for name, panel in lines.items() if panel}


def draw_memory(panels: dict[str, Series], caps: Sequence[float]) -> Any:
    figure, _ = new_figure(4, len(panels))
    for axes, (name, panel) in zip(figure.axes, panels.items(), strict=True):
        for provider, line in panel.items():
            color = COLORS.get(provider.removesuffix(" compiled"), GREY)
            style = "--" if provider.endswith("compiled") else "-"
            x, y = zip(*sorted(line), strict=True)
            axes.plot(x, y, style, color=color, marker="o", ms=3.5, label=provider)
        top = axes.get_ylim()[1]
        for cap in (cap for cap in caps if cap * 1e3 < top):
            axes.axhline(cap * 1e3, color=INK, lw=0.9, ls=":")
        axes.set_ylim(0, top)
        axes.set_title(name, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("images per batch", fontsize=8)
        axes.set_ylabel("peak, MB", fontsize=8)
        axes.grid(color=LINE, lw=0.5)
        axes.legend(fontsize=7, frameon=False)
    return figure


# ---- what each change adds ----


def waterfalls(document: Document) -> dict[str, list[RowDict]]:
    """By task, at the largest batch, in order; only with a first and another result."""
    found: dict[tuple[str, str, str], list[RowDict]] = {}
    for row in document["rows"]:
        if row["case"].startswith(WATERFALL):
            found.setdefault((row["case"], row["shape"], row["dtype"]), []).append(row)
    best: dict[str, list[RowDict]] = {}
    for (case, _, _), rows in found.items():
        rows = sorted(rows, key=lambda row: row["more"]["order"])
        task = case.removeprefix(WATERFALL)
        timed = [row for row in rows if row["time"]]
        larger = task not in best or rows[0]["more"]["batch"] > best[task][0]["more"]["batch"]
        if rows[0]["time"] and len(timed) > 1 and larger:
            best[task] = rows
    return best


def draw_waterfall(rows: Sequence[RowDict]) -> Any:
    figure, axes = new_figure(0.9 + 0.32 * len(rows))
    before = 0.0
    for place, row in enumerate(rows):
        if not row["time"]:
            axes.text(0, place, f" {str(row['reason'])[:60]}", fontsize=7.5, va="center")
            continue
        rate = row["more"]["images_per_s"]
        color = GREY if place == 0 else GREEN if rate >= before else RED
        change = f"  {rate / before - 1:+.0%}" if before else ""
        axes.barh(place, rate - before, 0.62, before, color=color)
        text = f" {significant(rate)}{change}"
        axes.text(max(rate, before), place, text, fontsize=8, va="center")
        before = rate
    axes.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=LINE, lw=0.5)
    axes.set_xlabel("images/s", fontsize=8)
    return figure
