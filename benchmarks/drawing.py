"""What all pictures of benchmarks share: figure, axes, colours, labels that do not overlap, and a small PNG.

Colours are Okabe and Ito's, which the common kinds of colour blindness tell apart; lines and points are labelled where they end, never
by colour alone. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from sssd_fast.errors import DependencyError
from sssd_fast.evaluation.pictures import INK, QUIET

LINE, GAIN, LOSS, BASE = "#d5dbe1", "#009e73", "#d55e00", "#8a939c"
COLORS = {
    "published": "#8a939c", "tuned": "#e69f00", "library": "#cc79a7", "ours": "#0072b2", "ours lean": "#009e73",
    "eager": "#8a939c", "sdpa auto": "#e69f00", "sdpa flash": "#d55e00", "sdpa cudnn": "#b8a400", "sdpa efficient": "#cc79a7",
    "sdpa math": "#5b5f66", "xformers": "#7a5c99", "ViTMAE": "#e69f00", "plain": "#56b4e9",
}  # fmt: skip
COMPILED = {
    "published compiled": "#5b5f66", "tuned compiled": "#56b4e9", "eager compiled": "#56b4e9", "ViTMAE compiled": "#b37700",
    "plain compiled": "#2f7fc1", "ours compiled": "#009e73",
}  # fmt: skip
COLORS_KEPT = 96  # of a picture
WIDTH, DPI = (
    8.0,
    130,
)  # inches; letters of 8 points stay readable where the picture is shown 800 pixels wide


def new_figure(title: str, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError('plots need matplotlib: pip install "sssd-fast[train]"') from error
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.text(
        0.02,
        1 - 0.1 / height,
        title,
        fontsize=10,
        fontweight="bold",
        color=INK,
        va="top",
        parse_math=False,
    )
    return figure


def new_axes(
    figure: Any,
    left: float,
    bottom: float,
    right: float,
    top: float,
    sides: Sequence[str] = ("bottom",),
) -> Any:
    """Axes whose borders are inches from those of the figure."""
    width, height = figure.get_size_inches()
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    axes = figure.add_axes(box)
    axes.tick_params(labelsize=8, colors=QUIET, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in sides)
        spine.set_color(LINE)
    axes.set_axisbelow(True)
    return axes


def color_of(provider: str) -> str:
    return COMPILED.get(provider) or COLORS.get(provider.removesuffix(" compiled"), BASE)


def png(figure: Any) -> bytes:
    """In a palette: a third of the bytes. Without a date."""
    from PIL import Image  # matplotlib needs it, too

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", metadata={"Software": None})
    Image.open(full).convert("RGB").quantize(COLORS_KEPT, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    return small.getvalue()


def label_ends(
    axes: Any, ends: Sequence[tuple[str, float, float]], colors: Sequence[str] | None = None
) -> None:
    """Names in a column on the right, each with a thin line to its point and room for its own letters."""
    height = axes.get_window_extent().height / DPI * 72  # points
    places = [
        axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] for _, x, y in ends
    ]
    step = 10.5 / height
    order = sorted(range(len(ends)), key=lambda i: places[i])
    floor, ceiling = -math.inf, 1 + step
    for i in order:
        places[i] = floor = max(places[i], floor + step)
    for i in reversed(
        order
    ):  # what the first pass pushed above the frame comes down, and pushes what is below it
        places[i] = ceiling = min(places[i], ceiling - step)
    for i, (text, x, y) in enumerate(ends):
        color = colors[i] if colors else INK
        axes.annotate(
            text, (x, y), (1.04, places[i]), xycoords="data", textcoords="axes fraction", fontsize=8, color=color, va="center",
            arrowprops={"arrowstyle": "-", "color": color if colors else LINE, "lw": 0.7, "shrinkA": 1, "shrinkB": 3},
            annotation_clip=False, parse_math=False,
        )  # fmt: skip
