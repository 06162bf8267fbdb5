"""Result files as Markdown: a short table per kind for the README, all rows for docs/benchmarks.md.

No row is dropped for what it says: providers that lose, fail or run out of memory stand there like the others. Where there is no file
of a GPU the text says "not measured"; where the sources have changed since a figure was measured it carries a †.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import tables_training
from .bench import OURS
from .formats import (
    NONE,
    Document,
    Row,
    caption,
    device_name,
    markdown,
    optional,
    percent,
    rate_text,
    significant,
    size_text,
    time_text,
)
from .rows import (
    Group,
    fullest,
    groups,
    is_ours,
    is_stale,
    ordered,
    peak_ratio,
    representative,
    share_of_ceiling,
    sites,
)

SECTIONS = ("kernels", "attention", "step", "memory", "loader")
SHOWN = {
    "loader": "loader-speed"
}  # the kind of a section that the README shows, where it has several
MARK, STALE = "†", "† measured before the kernels changed."
SAME = "same"


def summary(section: str, documents: Sequence[Document]) -> str:
    """The README's tables of a section: one per device, and what has not been measured."""
    mine = [one for one in documents if one["kind"] == SHOWN.get(section, section)]
    blocks = []
    for document in mine:
        blocks += [
            f"**{device_name(document)}**",
            short(document),
            with_note(document, caption(document)),
        ]
    return "\n\n".join([*blocks, *not_measured(mine)])


def full(document: Document) -> str:
    """Every row of a file."""
    if document["kind"] in ("kernels", "attention"):
        return _full_ops(document)
    return tables_training.full(document, _provider)


def short(document: Document) -> str:
    make: dict[str, Callable[[Document], str]] = {
        "kernels": _short_kernels,
        "attention": _short_attention,
    }
    if document["kind"] in make:
        return make[document["kind"]](document)
    return tables_training.short(document, _provider)


def section_of(document: Document) -> str:
    return str(document["kind"]).partition("-")[0]


def not_measured(documents: Sequence[Document]) -> list[str]:
    """A line for each type of device that no file is of."""
    have = {document["device"]["type"] for document in documents}
    return [
        f"{name}: not measured."
        for kind, name in (("cuda", "NVIDIA GPU"), ("cpu", "CPU"))
        if kind not in have
    ]


def with_note(document: Document, text: str) -> str:
    """With the footnote where any row of the file is older than the sources."""
    return f"{text} {STALE}" if any(is_stale(document, row) for row in document["rows"]) else text


def _provider(document: Document, row: Row) -> str:
    return row["provider"] + MARK * is_stale(document, row)


# ---- short tables ----


def _short_kernels(document: Document) -> str:
    chosen = representative(document)
    providers = ordered([name for group in chosen for name in group.rows], "kernels")
    columns = ["op", "shape", "pass", *providers, "ours against the best other"]
    lines = [
        [
            f"`{group.case}`{_mark(document, group)}",
            f"{group.shape}, {group.dtype}",
            group.phase,
            *(median(group, name) for name in providers),
            against(group, group.best_other()),
        ]
        for group in chosen
    ]
    return markdown(columns, lines)


def _short_attention(document: Document) -> str:
    """Every site at its largest batch, in its fullest pass; of the backends of SDPA the best, by name."""
    columns = [
        "site [batch, tokens, heads x width]",
        "pass",
        "eager",
        "eager compiled",
        "best of SDPA",
        "xformers",
    ]
    lines = []
    for group in sites(document):
        times = {
            name: time
            for name in group.rows
            if name.startswith("sdpa") and (time := group.time(name))
        }
        best = min(times, key=lambda name: times[name]) if times else None
        sdpa = NONE if best is None else f"{median(group, best)} ({best.removeprefix('sdpa ')})"
        cells = [median(group, name) for name in ("eager", "eager compiled")]
        lines.append(
            [f"{group.shape}, {group.dtype}{_mark(document, group)}", group.phase, *cells, sdpa]
            + [median(group, name) for name in ("xformers", OURS, "ours compiled")]
            + [against(group, group.best_other())]
        )
    return markdown([*columns, OURS, "ours compiled", "ours against the best other"], lines)


def _mark(document: Document, group: Group) -> str:
    return MARK * any(is_stale(document, row) for row in group.rows.values())


def median(group: Group, provider: str) -> str:
    """The time; else why there is none, in a few letters; the full table has the reason."""
    row = group.rows.get(provider)
    if row is None:
        return NONE
    if row["time"]:
        return time_text(row["time"]["median_us"])
    reason = str(row["reason"] or "no figure")
    return (
        reason
        if reason == "out of memory"
        else "fails"
        if reason.startswith("fails")
        else "no time"
    )


def against(group: Group, other: str | None) -> str:
    """How ours stands to another provider, by the verdict of the race."""
    versus = group.rows[other]["versus"] if other else None
    if versus is None:
        return NONE
    ratio = versus["ratio"]
    if versus["verdict"] == SAME:
        return f"same as {other} ({ratio:.2f}×)"
    how, ratio = ("faster", ratio) if versus["verdict"] == "slower" else ("slower", 1 / ratio)
    return f"{significant(ratio)}× {how} than {other}"


# ---- all rows of an op ----

COLUMNS = (
    "shape", "pass", "provider", "median", "p20 to p80", "n", "gap", "time / ours (95 %)", "error / allowed", "rate, of ceiling",
    "peak", "first call", "note",
)  # fmt: skip


def _full_ops(document: Document) -> str:
    blocks = [_ceilings(document)]
    cases = dict.fromkeys(group.case for group in groups(document))
    for case in cases:
        lines = [
            _line(document, group, group.rows[name])
            for group in groups(document)
            if group.case == case
            for name in group.providers(document["kind"])
        ]
        blocks += [f"#### `{case}`", markdown(COLUMNS, lines)]
    return "\n\n".join(blocks)


def _line(document: Document, group: Group, row: Row) -> list[str]:
    share = share_of_ceiling(document, row)
    unit = "B/s" if share and share.ceiling == "copy" else "FLOP/s"
    error = (
        NONE
        if row["error"] is None
        else f"{row['error']:.1e} / {optional(row['allowed'], '{:.1e}'.format)}"
    )
    return [
        f"{group.shape}, {group.dtype}",
        group.phase,
        _provider(document, row),
        *time_cells(row),
        versus_cell(row),
        error,
        NONE
        if share is None
        else f"{rate_text(share.per_s, unit)}, {percent(share.share)} {share.ceiling}",
        optional(row["peak_bytes"], size_text),
        optional(row["first_call_s"], lambda s: f"{significant(s)} s"),
        row["reason"] or "",
    ]


def time_cells(row: Row) -> list[str]:
    """Median, quantiles, number of samples, and the second pass against the first."""
    time = row["time"]
    if not time:
        return [NONE] * 4
    quantiles = f"{time_text(time['p20_us'])} to {time_text(time['p80_us'])}"
    return [
        time_text(time["median_us"]),
        quantiles,
        str(time["n"]),
        optional(time["gap"], "{:+.1%}".format),
    ]


def versus_cell(row: Row) -> str:
    versus = row["versus"]
    if versus is None:
        return NONE
    low, high = significant(versus["low"]), significant(versus["high"])
    return f"{significant(versus['ratio'])} ({low} to {high}) {versus['verdict']}"


def _ceilings(document: Document) -> str:
    found = document["ceilings"]
    products = [
        f"{rate_text(flops, 'FLOP/s')} ({dtype})"
        for dtype, flops in found["matmul_flops_per_s"].items()
    ]
    return (
        f"Ceilings measured on this device in the same run: copy {rate_text(found['copy_bytes_per_s'], 'B/s')} (read plus written), "
        f"matrix product {', '.join(products)}. A row is held against the one that it comes nearer to. Bytes and FLOPs are what the "
        "operation needs, by formula, whatever a provider moves."
    )


# ---- all kinds in a few lines ----

# kind -> the providers that ours is held against in the overview; None = the fastest other provider
OVERVIEW: dict[str, Sequence[str | None]] = {
    "kernels": ("published", "tuned compiled", "library", None),
    "attention": ("eager compiled", "sdpa auto", None),
    "step": ("published", "ViTMAE", "plain compiled", None),
    "memory": ("published", "plain compiled"),
}


def overview(documents: Sequence[Document]) -> str:
    """By kind, device and opponent: the geometric mean of ratios, the ends of their range, and how often ours loses."""
    lines = []
    for document in documents:
        name = document["kind"]
        for other in OVERVIEW.get(name, ()):
            lines += _overview_line(document, other)
    columns = [
        "what",
        "hardware",
        "against",
        "ours is better by",
        "worst to best",
        "rows",
        "ours slower or larger in",
    ]
    kinds = [section for section in SECTIONS if not _has_gpu(documents, section)]
    text = [markdown(columns, lines)] if lines else []
    if lines:
        text.append(
            "Time (memory: peak) of the other divided by ours, geometric mean over all shapes and dtypes measured, forward with backward "
            "where an op has one. Losses count only where they are certain: see the verdicts in [docs/benchmarks.md](docs/benchmarks.md)."
        )
    if kinds:
        text.append(f"NVIDIA GPU: not measured ({', '.join(kinds)}).")
    return "\n\n".join(text)


def _has_gpu(documents: Iterable[Document], section: str) -> bool:
    return any(section_of(one) == section and one["device"]["type"] == "cuda" for one in documents)


def _overview_line(document: Document, other: str | None) -> list[list[str]]:
    ratios, lost, old, kind = list[float](), 0, False, document["kind"]
    for group in fullest(document):
        name = group.best_other() if other is None else other
        row = group.rows.get(name) if name and not is_ours(name) else None
        ratio: float | None = None
        if row and kind == "memory":
            ratio = peak_ratio(group, row["provider"])
            lost += ratio is not None and ratio < 1
        elif row and row["versus"]:
            ratio = row["versus"]["ratio"]
            lost += row["versus"]["verdict"] == "faster"
        if row and ratio is not None:
            ratios.append(ratio)
            old = old or is_stale(document, row) or is_stale(document, group.rows[OURS])
    if not ratios:
        return []
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    ends = f"{significant(min(ratios))} to {significant(max(ratios))}"
    cells: list[Any] = [kind + MARK * old, device_name(document), other or "the fastest other"]
    return [[*cells, f"{significant(mean)}×", ends, str(len(ratios)), str(lost)]]
