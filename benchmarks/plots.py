"""Pictures of result files: time relative to ours, images per second, memory.

matplotlib is imported when something is drawn. Colours are those of Okabe and Ito, which the common
kinds of colour blindness can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.harness import BOTH, OURS
from benchmarks.results import slug
from benchmarks.tables import Document, RowDict, device_name, significant
from sssd_fast.errors import DependencyError

INK, GREY, LINE, BLUE, GREEN = "#1d2733", "#8a939c", "#d5dbe1", "#0072b2", "#009e73"
COLORS = {
    "published": GREY,
    "tuned": "#e69f00",
    "library": "#cc79a7",
    "ours": BLUE,
    "ours compiled": GREEN,
    "eager": GREY,
    "ViTMAE": "#e69f00",
    "plain": "#56b4e9",
}
OTHERS = "#56b4e9"
DTYPES = ("bf16", "fp16", "fp32")  # of a GPU, most important first; on a CPU the other way round
Group = dict[str, RowDict]  # the rows of one race by provider
Series = dict[str, list[tuple[int, float]]]  # provider -> (images, MB)


@dataclass(frozen=True)
class Plot:
    file: str
    title: str  # also the alternative text
    draw: Callable[[Any], None]  # on matplotlib's axes
    height: float  # inches

    def png(self) -> bytes:
        """Equal bytes for equal results and an equal version of matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            hint = 'pip install "sssd-fast[bench]"'
            raise DependencyError(f"pictures need matplotlib: {hint}") from error
        # 8 inches wide: letters of 8 points stay readable at 800 pixels
        figure = Figure(figsize=(8, self.height), dpi=130, layout="constrained")
        axes = figure.subplots()
        axes.tick_params(which="both", labelsize=8, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        self.draw(axes)
        figure.suptitle(self.title, fontsize=10, fontweight="bold", color=INK, x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def planned(document: Document) -> Iterator[Plot]:
    """The pictures that this file has results for; needs no matplotlib."""
    kind, place = document["kind"], slug(document["device"]["name"])

    def plot(name: str, title: str, height: float, draw: Callable[..., None], *args: Any) -> Plot:
        title = f"{title}, {device_name(document)}"
        return Plot(f"{name}-{place}.png", title, partial(draw, *args), height)

    if kind in ("ops", "attention"):
        groups = [one for one in representative(document) if one[OURS]["time"]]
        if groups:
            height = 1 + 0.17 * sum(len(group) + 1 for group in groups)
            yield plot(f"time-{kind}", f"{kind}: time relative to ours", height, draw_bars, groups)
    if kind == "step" and (rates := step_rates(document)):
        height = 0.9 + 0.22 * sum(len(one) + 1 for one in rates.values())
        yield plot("step", "training step: images per second", height, draw_rates, rates)
    for name, lines in memory_lines(document).items():
        yield plot(f"memory-{slug(name)}", f"{name}: peak memory", 4, draw_memory, lines)


def representative(document: Document) -> list[Group]:
    """One race per op (attention: per site), ViT-B at the largest batch if measured."""
    dtypes = DTYPES if document["device"]["type"] == "cuda" else DTYPES[::-1]
    races: dict[tuple[str, ...], Group] = {}
    for row in document["rows"]:
        name = tuple(row[n] for n in ("case", "shape", "dtype", "phase"))
        races.setdefault(name, {})[row["provider"]] = row
    best: dict[str, tuple[tuple[Any, ...], Group]] = {}
    for group in races.values():
        if OURS not in group:
            continue
        row = group[OURS]
        site = row["shape"].partition(" [")[0] if document["kind"] == "attention" else row["case"]
        rank = (
            any(one["time"] for one in group.values()),
            row["phase"] == BOTH,
            -dtypes.index(row["dtype"]),
            row["shape"].startswith("ViT-B,") and "CT" not in row["shape"],
            row["sizes"].get("batch", 0),
        )
        if site not in best or rank > best[site][0]:
            best[site] = (rank, group)
    return [group for _, group in best.values()]


# ---- time relative to ours ----


def draw_bars(groups: Sequence[Group], axes: Any) -> None:
    y, ticks, largest = 0.0, list[tuple[float, str]](), 1.5

    def write(text: str, x: float) -> None:
        axes.annotate(text, (x, y), (4, -3), textcoords="offset points", fontsize=7)

    for group in groups:
        ours = group[OURS]
        y += 1.5
        head = f"{ours['case']}, {ours['shape']}, {ours['dtype']}, {ours['phase']}"
        ticks.append((y, head))
        for name, row in group.items():
            if name == OURS:
                continue
            y += 1
            ticks.append((y, name))
            if not row["time"]:
                write(str(row["reason"])[:60], 1)
                continue
            ratio = row["time"]["median_us"] / ours["time"]["median_us"]
            largest = max(largest, ratio)
            axes.barh(y, ratio - 1, 0.8, 1, color=COLORS.get(name, OTHERS))
            write(f"{significant(ratio)}×", max(ratio, 1))
    axes.axvline(1, color=BLUE, lw=1.4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("{x:g}×")
    axes.set_xlim(right=largest * 1.6)
    _label(axes, ticks, "time / time of ours (blue line); left of it the provider is faster")


# ---- images per second of a training step ----


def step_rates(document: Document) -> dict[str, dict[str, float]]:
    """Case (task and shape) -> provider -> images per second of the measured providers."""
    rates: dict[str, dict[str, float]] = {}
    for row in document["rows"]:
        if row["time"]:
            rate = row["sizes"]["batch"] / row["time"]["median_us"] * 1e6
            rates.setdefault(f"{row['case']}, {row['shape']}", {})[row["provider"]] = rate
    return {case: one for case, one in rates.items() if OURS in one}


def draw_rates(rates: dict[str, dict[str, float]], axes: Any) -> None:
    y, ticks = 0.0, list[tuple[float, str]]()
    for case, providers in rates.items():
        y += 1
        ticks.append((y, case))
        for name, rate in sorted(providers.items(), key=lambda item: item[1]):
            y += 1
            ticks.append((y, name))
            axes.barh(y, rate, 0.8, color=BLUE if name.startswith(OURS) else GREY)
            axes.annotate(f"{rate:.0f}", (rate, y), (4, -3), textcoords="offset points", fontsize=7)
    _label(axes, ticks, "images per second (ours in blue)")


def _label(axes: Any, ticks: Sequence[tuple[float, str]], x: str) -> None:
    """Names the bars, the first one on top."""
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(ticks[-1][0] + 1, 0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(x, size=8)


# ---- memory over the batch ----


def memory_lines(document: Document) -> dict[str, Series]:
    """By task, model and dtype; a line needs two batches."""
    found: dict[str, Series] = {}
    for row in document["rows"] if document["kind"] == "memory" else []:
        if row["peak_bytes"]:
            batch = row["more"]["batch"]
            model = row["shape"].partition(f", {batch} images")[0]
            series = found.setdefault(f"{row['case']}, {model}, {row['dtype']}", {})
            series.setdefault(row["provider"], []).append((batch, row["peak_bytes"] / 1e6))
    return {
        name: lines
        for name, series in found.items()
        if (lines := {provider: line for provider, line in series.items() if len(line) > 1})
    }


def draw_memory(lines: Series, axes: Any) -> None:
    for provider, line in lines.items():
        color = COLORS.get(provider.removesuffix(" compiled"), OTHERS)
        style = "--" if provider.endswith("compiled") else "-"
        x, y = zip(*sorted(line), strict=True)
        axes.plot(x, y, style, color=color, marker="o", ms=3.5, label=provider)
    axes.set_ylim(bottom=0)
    axes.grid(color=LINE, lw=0.5)
    axes.set_xlabel("images per batch", fontsize=8)
    axes.set_ylabel("peak, MB", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
