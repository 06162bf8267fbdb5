"""How a profile is shown: a table on the terminal, and a picture of the step as stacked bars."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sssd_fast.errors import DependencyError
from sssd_fast.evaluation.pictures import INK, QUIET, write_picture
from sssd_fast.performance.profile_trace import BACKWARD, PARTS
from sssd_fast.run.log import Console

# After Okabe and Ito's palette, which the common kinds of colour blindness tell apart: blues for the encoder, greens for the decoder,
# each from dark to light, and never by hue alone, since every segment is outlined, ordered and numbered as in the list below it.
COLORS = {
    "data wait": "#d55e00",
    "host-to-device": "#f2a46f",
    "masking + embed": "#c9d6e8",
    "encoder attention": "#0b3c6f",
    "encoder MLP": "#2f7fc1",
    "encoder norms + residual": "#8fc1ea",
    "decoder embed + restore": "#d3eadf",
    "decoder attention": "#00543f",
    "decoder MLP": "#009e73",
    "decoder norms + residual": "#86d3b9",
    "heads + loss": "#cc79a7",
    "backward": "#5b5f66",
    "optimizer": "#f0e442",
    "launch gaps / Python": "#ececec",
    "other": "#b3aaa0",
    "gradient accumulation": "#8a6fb0",
    "forward + backward": "#5b5f66",
}


def show(result: dict[str, Any], console: Console) -> None:
    """The table of parts, that of whole steps, and what to know about both."""
    profiled = result["profiled"]
    plain = result["plain"]
    configured = result["configured"]
    console.table(
        f"Plain (not compiled) step of {result['images_per_step']} images by part, mean of {result['settings']['steps']}, "
        f"{result['precision']} on {hardware(result)}",
        ("part", "ms", "share", "GFLOP", "MB", "GFLOP/s", "matmul", "copy", "nearer"),
        [_cells(row, indent) for row, indent in _lines(profiled["parts"])],
    )
    whole = [("plain, profiled", {"step_s": profiled["step_s"]}), ("plain", plain)]
    whole += [
        ("configured, compiled" + " + CUDA graphs" * configured["cuda_graphs"], configured)
    ] * configured["compiled"]
    console.table(
        "Whole steps",
        ("step", "ms", "data wait", "forward + backward", "update", "images/s", "MFU"),
        [_whole(name, step) for name, step in whole],
    )
    for line in sentences(result):
        console.info(line)


def sentences(result: dict[str, Any]) -> list[str]:
    """What the figures mean and what they do not."""
    flops = result["flops_per_image"]
    ceilings = result["ceilings"]
    spread = result["plain"]["spread_s"]
    gaps = sorted(result["profiled"]["gaps_s"].items(), key=lambda item: -item[1])[:4]
    return [
        "A compiled step has no parts any more: the parts are those of the plain one."
        if result["configured"]["compiled"]
        else "The configured step is the plain one: this configuration does not compile here.",
        f"Without the profiler single plain steps took {_ms(spread['min'])} to {_ms(spread['max'])}.",
        "Gaps, by what the host was at: " + ", ".join(f"{name} {_ms(t)}" for name, t in gaps) + ".",
        f"matmul, copy: share of the ceilings measured here, {_flops(ceilings['matmul_flops'])} matrix product "
        f"({ceilings['dtype']}) and {ceilings['copy_bytes'] / 1e9:,.1f} GB/s copy (read plus written).",
        f"MFU counts {flops['standard'] / 1e9:,.3g} GFLOP per image, the convention for masked autoencoders; this step needs "
        f"{flops['needed'] / 1e9:,.3g}, projection heads included. FLOPs and bytes are by formula (sssd_fast/costs.py).",
    ]


def hardware(result: dict[str, Any]) -> str:
    """The device that ran, by name."""
    environment = result["environment"]
    if result["device"].startswith("cuda"):
        gpu = environment["gpus"][int(result["device"].partition(":")[2] or 0)]
        return f"{gpu['name']} ({gpu['memory_gib']} GiB)"
    cpu = environment["cpu"]
    return f"{cpu['model']}, {result['threads']} of {cpu['cores']} cores"


def draw(result: dict[str, Any], *, path: str | Path) -> Path:
    """Three bars on one axis: the plain step by part, its backward by part, the configured step whole."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError('plots need matplotlib: pip install "sssd-fast[train]"') from error
    rows, configured = result["profiled"]["parts"], result["configured"]
    below = next(row["below"] for row in rows if row["name"] == BACKWARD)
    before = sum(row["seconds"] for row in rows[: PARTS.index(BACKWARD)])
    whole = [
        ("data wait", configured["data_wait_s"]),
        ("forward + backward", configured["forward_backward_s"]),
        ("optimizer", configured["update_s"]),
    ]
    figure = Figure(figsize=(11, 5.6), dpi=160, facecolor="white")
    axes = figure.add_axes((0.135, 0.5, 0.84, 0.36))
    numbers = {name: str(i + 1) for i, name in enumerate(PARTS)}
    numbers["gradient accumulation"] = "+"
    scale = 1.02 * max(sum(row["seconds"] for row in rows), sum(t for _, t in whole)) * 1e3
    _bar(axes, 2, [(row["name"], row["seconds"]) for row in rows], 0.0, numbers, scale)
    _bar(axes, 1, [(row["name"], row["seconds"]) for row in below], before, numbers, scale)
    _bar(
        axes,
        0,
        whole,
        0.0,
        {"data wait": "1", "forward + backward": "forward + backward", "optimizer": "13"},
        scale,
    )
    backward_s = sum(row["seconds"] for row in below)
    for edge in (before, before + backward_s):  # the second bar opens the segment above it
        axes.plot([edge * 1e3] * 2, [1.36, 1.64], color=QUIET, lw=0.8, ls=":")
    kind = (
        "configured step\n(compiled)" if configured["compiled"] else "the same step,\nnot profiled"
    )
    axes.set_yticks([2, 1, 0], ["plain step,\nprofiled", "its backward", kind])
    axes.set(xlim=(0, scale), ylim=(-0.5, 2.5))
    axes.set_xlabel("milliseconds per step", fontsize=9, color=QUIET)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.tick_params(axis="x", labelsize=8, colors=QUIET, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#d5dbe1")
    _list(figure, rows, below, numbers)
    figure.text(
        0.015,
        0.955,
        _title(result),
        fontsize=12,
        fontweight="bold",
        color=INK,
        va="top",
        parse_math=False,
    )
    figure.text(
        0.015,
        0.02,
        caption(result),
        fontsize=7.5,
        color=QUIET,
        va="bottom",
        parse_math=False,
        linespacing=1.5,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return write_picture(buffer.getvalue(), path)


def caption(result: dict[str, Any]) -> str:
    """What was measured, on what, with which versions: two lines."""
    environment = result["environment"]
    torch, python = environment["torch"], environment["python"]["version"]
    cuda = (
        f", CUDA {torch['cuda_build']}, driver {environment['driver']['version']}"
        if torch["cuda_build"]
        else ""
    )
    return "\n".join(
        (
            f"{hardware(result)}; sssd_fast {environment['sssd_fast']['version']}, torch {torch['version']}{cuda}, Python {python}; "
            f"{result['precision']}, means of {result['settings']['steps']} steps after {result['settings']['warmup']}; "
            f"plain step {_ms(result['profiled']['step_s'])} with the profiler, {_ms(result['plain']['step_s'])} without",
            f"Ceilings measured on it: {_flops(result['ceilings']['matmul_flops'])} matrix product, "
            f"{result['ceilings']['copy_bytes'] / 1e9:,.1f} GB/s copy. MFU on {result['flops_per_image']['standard'] / 1e9:,.3g} GFLOP "
            f"per image. On a GPU a segment is time in which the device works, or waits.",
        )
    )


def _title(result: dict[str, Any]) -> str:
    model = result["settings"]["config"]["model"]
    height, width = model["image_size"]
    configured = result["configured"]
    return (
        f"One pre-training step, {result['images_per_step']} images of {height}×{width}: {_ms(configured['step_s'])}, "
        f"{configured['images_per_s']:,.3g} images/s, {configured['mfu']:.0%} of the matrix-product ceiling"
    )


def _bar(
    axes: Any,
    y: float,
    segments: Sequence[tuple[str, float]],
    start: float,
    numbers: dict[str, str],
    scale: float,
) -> None:
    left = start * 1e3
    for name, seconds in segments:
        width = seconds * 1e3
        if width <= 0:
            continue
        hatch = "////" if name == "launch gaps / Python" else None
        axes.barh(
            y, width, 0.68, left, color=COLORS[name], edgecolor="white", linewidth=0.7, hatch=hatch
        )
        label = numbers.get(name, "")
        if width > scale * (0.011 + 0.0085 * len(label)):
            axes.text(
                left + width / 2,
                y,
                label,
                ha="center",
                va="center",
                fontsize=8.5,
                color=_on(COLORS[name]),
            )
        left += width


def _list(
    figure: Any,
    rows: Sequence[dict[str, Any]],
    below: Sequence[dict[str, Any]],
    numbers: dict[str, str],
) -> None:
    """The parts in columns: number, name, milliseconds, share, and the same of the backward."""
    from matplotlib.patches import Rectangle

    behind = {row["name"]: row["seconds"] for row in below}
    entries = [(row["name"], row["seconds"], row["share"]) for row in rows]
    if behind.get("gradient accumulation"):
        entries.append(("gradient accumulation", None, None))
    per_column = -(-len(entries) // 2)
    for column in range(2):
        x = 0.03 + 0.49 * column
        for where, text in ((0.255, "ms"), (0.315, "share"), (0.405, "ms in backward")):
            figure.text(x + where, 0.40, text, fontsize=7.5, color=QUIET, ha="right")
        for place, (name, seconds, share) in enumerate(
            entries[column * per_column : (column + 1) * per_column]
        ):
            y = 0.372 - 0.036 * place
            hatch = "////" if name == "launch gaps / Python" else None
            figure.add_artist(
                Rectangle(
                    (x, y - 0.004),
                    0.018,
                    0.024,
                    facecolor=COLORS[name],
                    edgecolor="white",
                    hatch=hatch,
                )
            )
            figure.text(
                x + 0.009,
                y + 0.0075,
                numbers[name],
                fontsize=7,
                color=_on(COLORS[name]),
                ha="center",
                va="center",
            )
            cells = [(0.025, name, "left")]
            if seconds is not None:
                cells += [
                    (0.255, f"{seconds * 1e3:,.2f}", "right"),
                    (0.315, f"{share:.1%}", "right"),
                ]
            if behind.get(name) and name != "other":
                cells.append((0.405, f"{behind[name] * 1e3:,.2f}", "right"))
            for where, text, side in cells:
                figure.text(
                    x + where,
                    y + 0.0075,
                    text,
                    fontsize=8.5,
                    color=INK,
                    ha=side,
                    va="center",
                    parse_math=False,
                )


def _on(color: str) -> str:
    """Black or white, whichever is read better on `color`."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _lines(parts: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Rows of the table; those of the backward, without the empty ones, below it."""
    lines = []
    for row in parts:
        lines.append((row, ""))
        lines += [(inner, "  ") for inner in row.get("below", []) if inner["seconds"] > 0]
    return lines


def _cells(row: dict[str, Any], indent: str) -> list[str]:
    share = row["share_of"] or {}
    return [
        indent + row["name"],
        f"{row['seconds'] * 1e3:,.2f}" if row["seconds"] < 0.1 else f"{row['seconds'] * 1e3:,.0f}",
        f"{row['share']:.1%}",
        f"{row['flops'] / 1e9:,.3g}" if row["flops"] else "-",
        f"{row['bytes'] / 1e6:,.0f}" if row["bytes"] else "-",
        f"{row['flops_per_s'] / 1e9:,.0f}" if row["flops_per_s"] else "-",
        f"{share['matmul']:.0%}" if share and row["flops"] else "-",
        f"{share['copy']:.0%}" if share else "-",
        row["nearer"] or "-",
    ]


def _whole(name: str, step: dict[str, Any]) -> list[str]:
    times = [step.get(key) for key in ("step_s", "data_wait_s", "forward_backward_s", "update_s")]
    rates = [f"{step['images_per_s']:,.4g}", f"{step['mfu']:.1%}"] if "mfu" in step else ["-", "-"]
    return [name, *("-" if t is None else f"{t * 1e3:,.2f}" for t in times), *rates]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.3g} GFLOP/s"
