"""Rows as tables, the same on the terminal and in docs/benchmarks.md: one table per piece of work.

Numbers have three significant digits and no exponent. Sizes are decimal (1 MB = 1e6 bytes). No
row is dropped: providers that are slower, fail or run out of memory are listed. A dagger marks
what was measured before the sources that it depends on changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import OURS
from benchmarks.race import Time, doubt
from benchmarks.results import is_stale

Document = dict[str, Any]
RowDict = dict[str, Any]
Cell = Callable[[Document, RowDict], str]
NONE = "-"
STALE = "†"
WATERFALL, LARGEST = "waterfall ", "largest batch "  # first words of cases shown separately
EXCEEDED = 1.02  # of a ceiling, beyond which it is wrong; noise of its measurement is allowed
EPOCHS_SHOWN = (1, 10, 50)
OPS_ORDER = ("published", "tuned", "tuned compiled", "library", OURS, "ours compiled")


def significant(value: float, digits: int = 3) -> str:
    """1234.5 -> "1,230", 0.04567 -> "0.0457", 2 -> "2.00"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def time_text(us: float) -> str:
    return _scaled(us, ("µs", "ms", "s"))


def size_text(size: float) -> str:
    return _scaled(size / 1e3, ("kB", "MB", "GB"))


def rate_text(per_s: float, unit: str) -> str:
    """("B/s" or "FLOP/s") with a prefix."""
    return _scaled(per_s / 1e6, (f"M{unit}", f"G{unit}", f"T{unit}"))


def _scaled(value: float, units: Sequence[str]) -> str:
    """In the first of `units`, each 1000 times the previous, with a value below 1000."""
    place = 0
    while place + 1 < len(units) and abs(float(f"{value:.2e}")) >= 1000:
        value, place = value / 1000, place + 1
    return f"{significant(value)} {units[place]}"


def percent(share: float, digits: int = 2) -> str:
    """0.634 -> "63 %", 0.0042 -> "0.42 %", 1.27 -> "127 %"."""
    return f"{significant(share * 100, digits if abs(share) < 0.995 else 3)} %"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def device_name(document: Document) -> str:
    """ "NVIDIA H100 80GB HBM3", or "AMD EPYC, 2 cores, 2 threads"."""
    device = document["device"]
    threads = "" if device["type"] == "cuda" else f", {device['threads']} threads"
    return f"{device['name']}{threads}"


# ---- ceilings ----


class Share(NamedTuple):
    """What a row reaches of a ceiling: bytes/s of "copy" or FLOP/s of "matmul"."""

    per_s: float
    share: float
    ceiling: str


def shares(document: Document, row: RowDict) -> list[Share]:
    """Of the ceilings that were measured, the largest share first."""
    if not row["time"]:
        return []
    seconds, ceilings = row["time"]["median_us"] / 1e6, document["ceilings"]
    found = []
    for amount, ceiling, name in (
        (row["bytes"], ceilings.get("copy_bytes_per_s"), "copy"),
        (row["flops"], ceilings.get("matmul_flops_per_s", {}).get(row["dtype"]), "matmul"),
    ):
        if amount and ceiling:
            found.append(Share(amount / seconds, amount / seconds / ceiling, name))
    return sorted(found, key=lambda one: -one.share)


def wrong_ceilings(document: Document) -> dict[str, float]:
    """Ceilings that a provider exceeds, with the largest share: their measurement was disturbed.

    By name ("copy", or "matmul fp32"); nothing is reported relative to them.
    """
    found: dict[str, float] = {}
    for row in document["rows"]:
        for one in shares(document, row):
            name = one.ceiling if one.ceiling == "copy" else f"matmul {row['dtype']}"
            if one.share > EXCEEDED:
                found[name] = max(found.get(name, 0.0), one.share)
    return found


def share_of_ceiling(document: Document, row: RowDict, wrong: Iterable[str] = ()) -> Share | None:
    """Of the ceiling that the row is nearest to. None if unknown, or if a ceiling is in `wrong`."""
    bad = {"copy", f"matmul {row['dtype']}"} & set(wrong)
    found = shares(document, row)
    return found[0] if found and not bad else None


def ceiling_text(document: Document) -> str:
    found, wrong = document["ceilings"], wrong_ceilings(document)
    if not found:
        return ""
    parts = [f"copy {rate_text(found['copy_bytes_per_s'], 'B/s')} (read plus written)"]
    products = found["matmul_flops_per_s"].items()
    parts += [f"matrix product {rate_text(flops, 'FLOP/s')} ({dtype})" for dtype, flops in products]
    text = f"Ceilings measured on this device in the same run: {', '.join(parts)}."
    for name, share in wrong.items():
        text += (
            f" The ceiling of {name} is not used: a provider reached {percent(share)} of it, so "
            "its measurement was disturbed."
        )
    return text


# ---- columns ----


def _time(name: str) -> Cell:
    return lambda document, row: time_text(row["time"][name]) if row["time"] else NONE


def _more(name: str, text: Callable[[Any], str]) -> Cell:
    return lambda document, row: NONE if row["more"].get(name) is None else text(row["more"][name])


def _value(name: str, text: Callable[[Any], str]) -> Cell:
    return lambda document, row: NONE if row[name] is None else text(row[name])


def _provider(document: Document, row: RowDict) -> str:
    return row["provider"] + STALE * is_stale(document, row)


def _quantiles(document: Document, row: RowDict) -> str:
    time, more = row["time"], row["more"]
    if time:
        return f"{time_text(time['p20_us'])} to {time_text(time['p80_us'])}"
    if "p20" in more:
        return f"{significant(more['p20'])} to {significant(more['p80'])} images/s"
    return NONE


def _from_time(name: str, text: Callable[[Any], str]) -> Cell:
    """Of the time, or of `more` (loaders)."""

    def cell(document: Document, row: RowDict) -> str:
        value = (row["time"] or row["more"]).get(name)
        return NONE if value is None else text(value)

    return cell


def _host(document: Document, row: RowDict) -> str:
    """On a CPU it is the same as the time and not shown."""
    if document["device"]["type"] != "cuda" or not row["time"]:
        return NONE
    host = row["time"]["host_us"]
    return NONE if host is None else time_text(host)


def _versus(document: Document, row: RowDict) -> str:
    one = row["versus"]
    if one is None:
        return NONE
    low, high = significant(one["low"]), significant(one["high"])
    return f"{significant(one['ratio'])} ({low} to {high}) {one['verdict']}"


def _error(document: Document, row: RowDict) -> str:
    if row["error"] is None:
        return NONE
    return f"{row['error']:.1e} / {row['allowed']:.1e}"


def _ceiling(document: Document, row: RowDict) -> str:
    found = share_of_ceiling(document, row, document["wrong"])
    if found is None or document["kind"] in ("step", "memory"):
        return NONE
    unit = "B/s" if found.ceiling == "copy" else "FLOP/s"
    return f"{rate_text(found.per_s, unit)}, {percent(found.share)} {found.ceiling}"


def _mfu(document: Document, row: RowDict) -> str:
    known = row["more"].get("mfu") and f"matmul {row['dtype']}" not in document["wrong"]
    return percent(row["more"]["mfu"]) if known else NONE


def _losses(document: Document, row: RowDict) -> str:
    ends = [row["more"].get(name) for name in ("loss_start", "loss")]
    return NONE if None in ends else ", ".join(significant(loss, 4) for loss in ends)


def _epochs(document: Document, row: RowDict) -> str:
    found = row["more"].get("epochs", [])
    return ", ".join(f"{found[n - 1]:.0f}" for n in EPOCHS_SHOWN if n <= len(found)) or NONE


COLUMNS: dict[str, Cell] = {
    "shape": lambda document, row: f"{row['shape']}, {row['dtype']}",
    "pass": lambda document, row: row["phase"],
    "provider": _provider,
    "median": _time("median_us"),
    "p20 to p80": _quantiles,
    "images/s": _more("images_per_s", significant),
    "n": _from_time("n", str),
    "gap": _from_time("gap", "{:+.1%}".format),
    "host time": _host,
    "time / ours (95 %)": _versus,
    "x baseline": _more("x_baseline", significant),
    "error / allowed": _error,
    "rate, of ceiling": _ceiling,
    "MFU": _mfu,
    "peak": _value("peak_bytes", size_text),
    "MB per image": _more("mb_per_image", significant),
    "per further image": _more("mb_per_further_image", significant),
    "cap, GB": _more("cap_gb", "{:g}".format),
    "largest batch": _more("largest_batch", str),
    "loss, first and last": _losses,
    "mean difference": _more("mean", "{:.3f}".format),
    "largest": _more("max", str),
    "pixels more than 2 off": _more("beyond_2", "{:.4%}".format),
    "before, MiB": _more("before", "{:.0f}".format),
    f"after epochs {', '.join(map(str, EPOCHS_SHOWN))}, MiB": _epochs,
    "flat": _more("flat", lambda flat: "yes" if flat else "no"),
    "start": _more("start_s", lambda s: f"{significant(s)} s"),
    "first call": _value("first_call_s", lambda s: f"{significant(s)} s"),
    "how": _more("how", str),
    "note": lambda document, row: row["reason"] or "",
}
SAME_FOR_ALL = ("shape", "pass")  # columns that move into the title if all rows agree


class Table(NamedTuple):
    title: str
    columns: list[str]
    cells: list[list[str]]
    doubts: list[str]


def tables(
    document: Document, names: Sequence[str] = ("case",), skip: Iterable[str] = ()
) -> Iterator[Table]:
    """One table for the rows that agree in `names`; columns without content are omitted."""
    document = {**document, "wrong": wrong_ceilings(document)}
    columns = {name: cell for name, cell in COLUMNS.items() if name not in skip}
    groups: dict[tuple[str, ...], list[RowDict]] = {}
    for row in document["rows"]:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    for key, rows in groups.items():
        cells = [[cell(document, row) for cell in columns.values()] for row in rows]
        used = [i for i in range(len(columns)) if any(line[i] not in ("", NONE) for line in cells)]
        title = list(key)
        for i in [i for i in used if list(columns)[i] in SAME_FOR_ALL]:
            if len({line[i] for line in cells}) == 1:
                title += [cells[0][i]] if len(names) == 1 else []
                used.remove(i)
        head = [list(columns)[i] for i in used]
        yield Table(
            ", ".join(title), head, [[line[i] for i in used] for line in cells], doubts(rows)
        )


def doubts(rows: Sequence[RowDict]) -> list[str]:
    """Why the verdicts of these rows are doubtful, per race."""
    races: dict[tuple[str, ...], list[RowDict]] = {}
    for row in rows:
        if row["time"] and not row["case"].startswith(WATERFALL):
            races.setdefault((row["shape"], row["dtype"], row["phase"]), []).append(row)
    found = []
    for name, members in races.items():
        load = max((row["load"] for row in members if row["load"] is not None), default=None)
        why = doubt(load, [Time(**row["time"]) for row in members])
        found += [f"{', '.join(name)}: {why}"] if why else []
    return found
