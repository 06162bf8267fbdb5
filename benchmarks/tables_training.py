"""The tables of training steps, memory and loaders; those of single ops are in tables.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .formats import (
    NONE,
    Document,
    Row,
    markdown,
    optional,
    percent,
    significant,
    size_text,
    time_text,
)
from .rows import (
    LARGEST,
    WATERFALL,
    Group,
    batch,
    groups,
    ordered,
    peak_ratio,
    representative,
    waterfalls,
)

Name = Callable[[Document, Row], str]  # the provider's name as the table shows it
EPOCHS_SHOWN = (1, 10, 50)


def short(document: Document, name: Name) -> str:
    if document["kind"] == "step":
        return _steps(document, representative(document), name)
    if document["kind"] == "memory":
        return "\n\n".join(
            [_memory(document, representative(document), name), *_largest(document, name)]
        )
    return _loader_speed(document, name)


def full(document: Document, name: Name) -> str:
    kind = document["kind"]
    if kind == "step":
        blocks = [_steps(document, groups(document), name, everything=True)]
        for (case, shape, dtype), rows in waterfalls(document).items():
            title = f"#### {case.removeprefix(WATERFALL)}, {shape}, {dtype}: what each part adds"
            blocks += [title, _waterfall(document, rows, name)]
        return "\n\n".join(blocks)
    if kind == "memory":
        return "\n\n".join([_memory(document, groups(document), name), *_largest(document, name)])
    make = {
        "loader-speed": _loader_speed,
        "loader-parity": _loader_parity,
        "loader-memory": _loader_memory,
    }
    return make[kind](document, name)


# ---- steps ----


def _steps(
    document: Document, chosen: Sequence[Group], name: Name, *, everything: bool = False
) -> str:
    columns = [
        "task",
        "shape",
        "batch",
        "provider",
        "step",
        "images/s",
        "MFU",
        "MB per image",
        "time / ours",
    ]
    columns += (
        ["p20 to p80", "n", "gap", "95 %", "loss, first and last", "first call", "how"]
        if everything
        else []
    )
    lines = []
    for group in chosen:
        for row in (group.rows[provider] for provider in group.providers("step")):
            lines.append(
                [*_step(document, group, row, name), *(_step_more(row) if everything else [])]
            )
    return markdown(
        [*columns, "note"],
        [[*line, row_note] for line, row_note in zip(lines, _notes(chosen), strict=True)],
    )


def _notes(chosen: Sequence[Group], kind: str = "step") -> list[str]:
    return [
        group.rows[provider]["reason"] or ""
        for group in chosen
        for provider in group.providers(kind)
    ]


def _step(document: Document, group: Group, row: Row, name: Name) -> list[str]:
    more, versus = row["more"], row["versus"]
    return [
        group.case,
        f"{group.shape}, {group.dtype}",
        str(batch(row) or NONE),
        name(document, row),
        time_text(row["time"]["median_us"]) if row["time"] else NONE,
        optional(more.get("images_per_s"), significant),
        optional(more.get("mfu"), percent),
        optional(more.get("mb_per_image"), significant),
        NONE if versus is None else f"{significant(versus['ratio'])} ({versus['verdict']})",
    ]


def _step_more(row: Row) -> list[str]:
    time, versus, more = row["time"], row["versus"], row["more"]
    quantiles = [NONE] * 3
    if time:
        ends = f"{time_text(time['p20_us'])} to {time_text(time['p80_us'])}"
        quantiles = [ends, str(time["n"]), optional(time["gap"], "{:+.1%}".format)]
    interval = (
        NONE if versus is None else f"{significant(versus['low'])} to {significant(versus['high'])}"
    )
    losses = [
        optional(more.get(end), lambda loss: significant(loss, 4)) for end in ("loss_start", "loss")
    ]
    first = optional(row["first_call_s"], lambda s: f"{significant(s)} s")
    return [*quantiles, interval, ", ".join(losses), first, str(more.get("how") or "")]


def _waterfall(document: Document, rows: Sequence[Row], name: Name) -> str:
    lines, before, first = [], None, None
    for row in rows:
        rate = row["more"].get("images_per_s")
        gains = [NONE, NONE]
        if rate:
            first = first or rate
            gains = [
                f"{rate / before - 1:+.1%}" if before else NONE,
                f"{significant(rate / first)}×",
            ]
            before = rate
        step = time_text(row["time"]["median_us"]) if row["time"] else NONE
        lines.append(
            [name(document, row), step, optional(rate, significant), *gains, row["reason"] or ""]
        )
    return markdown(
        ["with", "step", "images/s", "on the line above", "on the first line", "note"], lines
    )


# ---- memory ----


def _memory(document: Document, chosen: Sequence[Group], name: Name) -> str:
    columns = [
        "task",
        "shape",
        "batch",
        "provider",
        "peak",
        "MB per image",
        "per further image",
        "peak / ours",
        "note",
    ]
    lines = []
    for group in chosen:
        for provider in group.providers("memory"):
            row = group.rows[provider]
            peak, images = row["peak_bytes"], batch(row)
            lines.append(
                [
                    group.case,
                    f"{group.shape}, {group.dtype}",
                    str(images or NONE),
                    name(document, row),
                    optional(peak, size_text),
                    significant(peak / images / 1e6) if peak and images else NONE,
                    optional(row["more"].get("mb_per_further_image"), significant),
                    optional(peak_ratio(group, provider), significant),
                    row["reason"] or "",
                ]
            )
    return markdown(columns, lines)


def _largest(document: Document, name: Name) -> list[str]:
    """The largest batch that fits, by provider and size of the card; none where it was not measured."""
    rows = [row for row in document["rows"] if row["case"].startswith(LARGEST)]
    caps = sorted({row["more"]["cap_gb"] for row in rows})
    lines: dict[tuple[str, str], dict[float, str]] = {}
    for provider in ordered([row["provider"] for row in rows], "memory"):
        for row in (row for row in rows if row["provider"] == provider):
            shape = f"{row['case'].removeprefix(LARGEST)}, {row['shape']}, {row['dtype']}"
            lines.setdefault((shape, name(document, row)), {})[row["more"]["cap_gb"]] = _fits(row)
    if not lines:
        return []
    cells = [
        [shape, who, *(found.get(cap, NONE) for cap in caps)]
        for (shape, who), found in lines.items()
    ]
    columns = ["largest batch", "provider", *(f"{cap:g} GB" for cap in caps)]
    return [markdown(columns, sorted(cells, key=lambda line: line[0]))]


def _fits(row: Row) -> str:
    found = row["more"].get("largest_batch")
    if found is None:
        return row["reason"] or NONE
    rate = row["more"].get("images_per_s")
    text = f"{found}" if rate is None else f"{found}, {significant(rate)} images/s"
    return text if row["more"].get("verified") else f"{text} (predicted)"


# ---- loaders ----


def _loader_speed(document: Document, name: Name) -> str:
    columns = [
        "images",
        "channels",
        "provider",
        "images/s",
        "p20 to p80",
        "n",
        "gap",
        "x baseline",
        "note",
    ]
    lines = []
    for row in document["rows"]:
        rates, cells = row["figures"], [NONE] * 4
        if rates:
            ends = f"{significant(rates['p20'])} to {significant(rates['p80'])}"
            cells = [
                significant(rates["median"]),
                ends,
                str(rates["n"]),
                optional(rates["gap"], "{:+.1%}".format),
            ]
        lines.append(
            [
                *_loader_head(document, row, name),
                *cells,
                optional(row["ratio"], significant),
                row["reason"] or "",
            ]
        )
    return markdown(columns, lines)


def _loader_parity(document: Document, name: Name) -> str:
    columns = [
        "images",
        "channels",
        "provider",
        "view",
        "mean difference",
        "largest",
        "pixels more than 2 off",
        "note",
    ]
    lines = []
    for row in document["rows"]:
        off = [optional(row.get("mean"), "{:.3f}".format), optional(row.get("max"), str)]
        beyond = optional(row.get("beyond_2"), "{:.4%}".format)
        lines.append(
            [*_loader_head(document, row, name), row["view"], *off, beyond, row.get("reason") or ""]
        )
    return markdown(columns, lines)


def _loader_memory(document: Document, name: Name) -> str:
    columns = [
        "images",
        "channels",
        "provider",
        "before",
        *(f"epoch {n}" for n in EPOCHS_SHOWN),
        "peak",
        "flat",
        "note",
    ]
    lines = []
    for row in document["rows"]:
        epochs = [row["epochs"][n - 1] if n <= len(row["epochs"]) else None for n in EPOCHS_SHOWN]
        mib = [
            optional(size, "{:.0f} MiB".format) for size in (row["before"], *epochs, row["peak"])
        ]
        flat = {True: "yes", False: "no", None: NONE}[row["flat"]]
        lines.append([*_loader_head(document, row, name), *mib, flat, row.get("reason") or ""])
    return markdown(columns, lines)


def _loader_head(document: Document, row: Row, name: Name) -> list[str]:
    return [row["data"], str(row["channels"]), name(document, row)]
