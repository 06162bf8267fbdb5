"""Rows as tables, the same on the terminal and in docs/benchmarks.md.

Numbers have three significant digits. Sizes are decimal (1 MB = 1e6 bytes). Providers that are
slower, fail or run out of memory are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.race import doubt

Document = dict[str, Any]
RowDict = dict[str, Any]
NONE = "-"


def significant(value: float) -> str:
    """1234.5 -> "1,234", 0.04567 -> "0.0457", 2 -> "2.00"."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _scaled(value: float, *units: str) -> str:
    """In the first of `units`, each 1000 times the previous, with a value below 1000."""
    place = 0
    while place + 1 < len(units) and abs(float(f"{value:.2e}")) >= 1000:
        value /= 1000
        place += 1
    return f"{significant(value)} {units[place]}"


def time_text(us: float) -> str:
    return _scaled(us, "µs", "ms", "s")


def size_text(size: float) -> str:
    return _scaled(size / 1e3, "kB", "MB", "GB")


def percent(share: float) -> str:
    """0.634 -> "63.4 %"."""
    return f"{significant(share * 100)} %"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line]
        for line in (columns, ["---"] * len(columns), *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def device_name(document: Document) -> str:
    """ "NVIDIA H100 80GB HBM3", or "AMD EPYC, 2 cores, 2 threads"."""
    device = document["device"]
    threads = "" if device["type"] == "cuda" else f", {device['threads']} threads"
    return f"{device['name']}{threads}"


def share_text(document: Document, row: RowDict) -> str:
    """The larger share of a ceiling: bytes/s of a copy, or FLOP/s of a matrix product."""
    ceilings, products = document["ceilings"], document["ceilings"].get("matmul_flops_per_s", {})
    found = []
    for amount, ceiling, unit, name in (
        (row["bytes"], ceilings.get("copy_bytes_per_s"), "B/s", "copy"),
        (row["flops"], products.get(row["dtype"]), "FLOP/s", "matmul"),
    ):
        if row["time"] and amount and ceiling:
            per_s = amount / row["time"]["median_us"] * 1e6
            text = f"{_scaled(per_s / 1e9, f'G{unit}')}, {percent(per_s / ceiling)} {name}"
            found.append((per_s / ceiling, text))
    return max(found, key=lambda one: one[0])[1] if found else NONE


def ceiling_text(document: Document) -> str:
    found = document["ceilings"]
    parts = [f"copy {_scaled(found['copy_bytes_per_s'] / 1e9, 'GB/s')} (read plus written)"]
    products = found["matmul_flops_per_s"].items()
    parts += [
        f"matrix product {_scaled(flops / 1e9, 'GFLOP/s')} ({dtype})" for dtype, flops in products
    ]
    return f"Ceilings measured on this device in the same run: {', '.join(parts)}."


# ---- tables ----


def cells(document: Document, row: RowDict) -> dict[str, str]:
    """All columns of a row, in their order."""
    time, more, versus = row["time"] or {}, row["more"], row["versus"]

    def text(value: Any, form: Callable[[Any], str] = significant) -> str:
        return NONE if value is None else form(value)

    def seconds(value: float) -> str:
        return f"{significant(value)} s"

    quantiles = error = compared = NONE
    if time and "images_per_s" not in more:
        quantiles = f"{time_text(time['p20_us'])} to {time_text(time['p80_us'])}"
    elif "p20" in more:
        quantiles = f"{significant(more['p20'])} to {significant(more['p80'])} images/s"
    if versus:
        low, high = significant(versus["low"]), significant(versus["high"])
        compared = f"{significant(versus['ratio'])} ({low} to {high}) {versus['verdict']}"
    if row["error"] is not None:
        error = f"{row['error']:.1e} / {row['allowed']:.1e}"
    on_gpu = document["device"]["type"] == "cuda"
    return {
        "shape": row["shape"],
        "dtype": row["dtype"],
        "pass": row["phase"],
        "provider": row["provider"],
        "images/s": text(more.get("images_per_s")),
        "median": text(time.get("median_us"), time_text),
        "p20 to p80": quantiles,
        "n": text((time or more).get("n"), str),
        "gap": text((time or more).get("gap"), "{:+.1%}".format),
        # on a CPU it is the same as the time
        "host time": text(time.get("host_us") if on_gpu else None, time_text),
        "timed as": text(time.get("how") if on_gpu else None, str),
        "time / ours (95 %)": compared,
        "x baseline": text(more.get("x_baseline")),
        "error / allowed": error,
        "rate, of ceiling": NONE if "mfu" in more else share_text(document, row),
        "MFU": text(more.get("mfu"), percent),
        "peak": text(row["peak_bytes"], size_text),
        "per further image": text(more.get("mb_per_further_image")),
        "mean difference": text(more.get("mean"), "{:.3f}".format),
        "largest": text(more.get("max"), str),
        "start": text(more.get("start_s"), seconds),
        "first call": text(row["first_call_s"], seconds),
        "note": row["reason"] or "",
    }


class Table(NamedTuple):
    title: str
    columns: list[str]
    cells: list[list[str]]
    doubts: list[str]


def tables(document: Document) -> Iterator[Table]:
    """One table per case and, of a step, shape; columns without content are omitted."""
    cases: dict[tuple[str, ...], list[RowDict]] = {}
    for row in document["rows"]:
        shape = row["shape"] if row["phase"] == "step" else ""
        cases.setdefault((row["case"], shape), []).append(row)
    for (case, _), members in cases.items():
        lines = [cells(document, row) for row in members]
        columns = [n for n in lines[0] if any(line[n] not in ("", NONE) for line in lines)]
        title = [case]
        for name in ("shape", "dtype", "pass"):  # in the title if all rows agree
            if len({line[name] for line in lines}) == 1:
                title.append(lines[0][name])
                columns.remove(name)
        content = [[line[name] for name in columns] for line in lines]
        yield Table(", ".join(title), columns, content, doubts(members))


def doubts(rows: Sequence[RowDict]) -> list[str]:
    """Why the verdicts of these rows are doubtful, per race."""
    races: dict[str, list[RowDict]] = {}
    for row in rows:
        if row["time"]:
            dtype = "" if row["phase"] == "step" else f", {row['dtype']}"
            races.setdefault(f"{row['shape']}{dtype}, {row['phase']}", []).append(row)
    found = []
    for name, members in races.items():
        load = max((row["load"] for row in members if row["load"] is not None), default=None)
        why = doubt(load, [row["time"] for row in members])
        found += [f"{name}: {why}"] if why else []
    return found
