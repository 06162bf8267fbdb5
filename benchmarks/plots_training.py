"""Pictures of training: memory over the batch, and what each part adds to a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sssd_fast.evaluation.pictures import INK, QUIET

from .drawing import BASE, GAIN, LINE, LOSS, color_of, label_ends, new_axes, new_figure
from .formats import Document, Row, significant
from .rows import LARGEST, WATERFALL, batch, groups, ordered, waterfalls

PANEL = 3.1  # inches
Series = dict[str, list[tuple[int, float]]]  # provider -> (images, GB), by batch


# ---- memory over the batch ----


def panels(document: Document) -> dict[str, Series]:
    """By task, model and dtype; only what was measured at two batches or more makes a line."""
    if document["kind"] != "memory":
        return {}
    found: dict[str, Series] = {}
    for group in groups(document):
        model = group.shape.partition(f", {group.batch} images")[0]  # the batch is the axis
        for name, row in group.rows.items():
            if row["peak_bytes"] and batch(row):
                panel = found.setdefault(f"{group.case}, {model}, {group.dtype}", {})
                panel.setdefault(name, []).append((batch(row), row["peak_bytes"] / 1e9))
    lines = {
        what: {name: sorted(line) for name, line in panel.items() if len(line) > 1}
        for what, panel in found.items()
    }
    return {what: panel for what, panel in lines.items() if panel}


def caps(document: Document) -> list[float]:
    return sorted(
        {row["more"]["cap_gb"] for row in document["rows"] if row["case"].startswith(LARGEST)}
    )


def draw_memory(title: str, found: dict[str, Series], limits: Sequence[float]) -> Any:
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = new_figure(title, 0.35 + PANEL * len(found))
    for number, (what, panel) in enumerate(found.items()):
        below = PANEL * (len(found) - 1 - number)
        axes = new_axes(figure, 0.7, below + 0.55, 1.7, 0.6 + PANEL * number, ("left", "bottom"))
        names = ordered(panel, "memory")
        for name in names:
            style = "--" if name.endswith("compiled") else "-"
            axes.plot(
                *zip(*panel[name], strict=True),
                style,
                color=color_of(name),
                marker="o",
                ms=3.5,
                lw=1.6,
            )
        top = 1.08 * max(size for line in panel.values() for _, size in line)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({images for line in panel.values() for images, _ in line}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, top)
        for limit in (limit for limit in limits if limit < top):
            axes.axhline(limit, color=INK, lw=0.9, ls=":")
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(f"{limit:g} GB", (0, limit), (3, 2), fontsize=7.5, color=INK, **place)
        axes.grid(color=LINE, lw=0.5)
        axes.set_title(what, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("images per batch", fontsize=8, color=QUIET)
        axes.set_ylabel("peak, GB", fontsize=8, color=QUIET)
        label_ends(
            axes, [(name, *panel[name][-1]) for name in names], [color_of(name) for name in names]
        )
    return figure


# ---- what each part adds ----


def falls(document: Document) -> dict[str, list[Row]]:
    """By task, at the largest batch; only those with two figures or more, the first line among them."""
    if document["kind"] != "step":
        return {}
    found: dict[str, list[Row]] = {}
    for (case, _, _), rows in waterfalls(document).items():
        task = case.removeprefix(WATERFALL)
        drawable = _rate(rows[0]) is not None and sum(_rate(row) is not None for row in rows) > 1
        if drawable and (task not in found or batch(rows[0]) > batch(found[task][0])):
            found[task] = rows
    return found


def _rate(row: Row) -> float | None:
    return row["more"].get("images_per_s") if row["time"] else None


def draw_waterfall(title: str, rows: Sequence[Row]) -> Any:
    figure = new_figure(title, 0.9 + 0.32 * len(rows))
    longest = max(len(row["provider"]) for row in rows)
    axes = new_axes(figure, min(3.4, 0.35 + 0.068 * longest), 0.5, 0.3, 0.3)
    first = before = 0.0
    for place, row in enumerate(rows):
        rate = _rate(row)
        if rate is None:
            reason = str(row["reason"] or "no figure")[:60]
            axes.text(
                0, place, f" {reason}", fontsize=7.5, color=QUIET, va="center", style="italic"
            )
            continue
        first = first or rate
        color = BASE if place == 0 else GAIN if rate >= before else LOSS
        change = "" if place == 0 else f"  {rate / before - 1:+.0%}"
        axes.barh(place, rate - before, 0.62, before, color=color)
        axes.plot(
            [rate, rate], [place - 0.31, min(place + 1.31, len(rows) - 0.69)], color=QUIET, lw=0.7
        )
        where = {"textcoords": "offset points", "va": "center"}
        axes.annotate(
            f"{significant(rate)}{change}",
            (max(rate, before), place),
            (4, 0),
            fontsize=8,
            color=INK,
            **where,
        )
        before = rate
    axes.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * max(rate for row in rows if (rate := _rate(row))))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="x", color=LINE, lw=0.5)
    axes.set_xlabel(
        f"images/s; all together {significant(before / first)}× the first line",
        fontsize=8,
        color=QUIET,
    )
    return figure
