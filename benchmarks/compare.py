"""`bench compare A.json B.json --fail-over 5%`: two result files of one kind and device.

A row of B is a regression if it costs more than A's by more than the ratio AND by more than an
absolute margin: a call of a few microseconds easily changes by 5 %. The cost is the median time;
for memory the peak (margin 1 MiB), for a loader the time per image. A row that had a result in A
and has none in B fails as well. "within noise": the 20 % to 80 % quantiles of both overlap; this is
information and does not change the verdict.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.tables import NONE, Document, RowDict, percent, significant, size_text, time_text
from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console

MARGIN_US = {"cpu": 5.0, "cuda": 2.0}
MARGIN_BYTES = float(1 << 20)
WORSE, FAILS, BETTER, RUNS = "REGRESSION", "FAILS NOW", "better", "runs now"
VERSIONS = ("torch", "triton", "cuda", "xformers", "transformers", "dali")


class Cost(NamedTuple):
    """Less is better. low, high: quantiles."""

    value: float
    text: str
    low: float = math.nan
    high: float = math.nan


class Line(NamedTuple):
    name: tuple[str, ...]
    a: str
    b: str
    ratio: float | None  # cost of B / cost of A
    verdict: str
    note: str


def compare(
    a: Document, b: Document, fail_over: float, margin_us: float | None = None
) -> list[Line]:
    """The worst first. margin_us: None = MARGIN_US. Raises SssdError for unlike files."""
    for what in ("schema", "kind", "quick"):
        _same(what, a[what], b[what])
    _same("device", a["device"]["name"], b["device"]["name"])
    rows_a, rows_b = ({results.key(row): row for row in one["rows"]} for one in (a, b))
    both = [name for name in rows_a if name in rows_b]
    if not both:
        raise SssdError("cannot compare: A and B have no row in common; measure the same cases")
    margin = _margin(a, margin_us)
    lines = []
    for name in both:
        _same(f"the size of {' '.join(name)}", rows_a[name]["sizes"], rows_b[name]["sizes"])
        lines.append(_line(name, rows_a[name], rows_b[name], a["kind"], fail_over, margin))
    return sorted(lines, key=lambda one: -(one.ratio or math.inf * (one.verdict == FAILS)))


def _same(what: str, in_a: Any, in_b: Any) -> None:
    if in_a != in_b:
        raise SssdError(
            f"cannot compare: {what} is {in_a} in A and {in_b} in B; measure both alike"
        )


def _margin(document: Document, margin_us: float | None) -> float:
    """Microseconds, or bytes."""
    if document["kind"].endswith("memory"):
        return MARGIN_BYTES
    return MARGIN_US[document["device"]["type"]] if margin_us is None else margin_us


def _line(
    name: tuple[str, ...], row_a: RowDict, row_b: RowDict, kind: str, over: float, margin: float
) -> Line:
    a, b = _cost(kind, row_a), _cost(kind, row_b)
    texts = (a.text if a else NONE, b.text if b else NONE)
    if a is None or b is None:
        why = (row_b if b is None else row_a)["reason"] or "no result, and no reason"
        return Line(name, *texts, None, FAILS if a else RUNS if b else "", why)
    verdict = ""
    if b.value > a.value * (1 + over) and b.value - a.value > margin:
        verdict = WORSE
    elif a.value > b.value * (1 + over) and a.value - b.value > margin:
        verdict = BETTER
    note = "within noise" if a.low <= b.high and b.low <= a.high else ""
    return Line(name, *texts, b.value / a.value, verdict, note)


def _cost(kind: str, row: RowDict) -> Cost | None:
    more, time, peak = row["more"], row["time"], row["peak_bytes"]
    if row["reason"]:
        return None
    if kind.endswith("memory"):
        return Cost(peak, size_text(peak)) if peak else None
    if kind == "loader-speed":
        text = f"{significant(more['images_per_s'])} images/s"
        return Cost(1e6 / more["images_per_s"], text, 1e6 / more["p80"], 1e6 / more["p20"])
    if not time:
        return None
    median = time["median_us"]
    return Cost(median, time_text(median), time["p20_us"], time["p80_us"])


def warnings(a: Document, b: Document) -> Iterator[str]:
    """What else differs: versions, clocks, settings, and rows of one file only."""
    clocks = [document["clocks"]["before"] or {} for document in (a, b)]
    pairs = [(name, a["versions"].get(name), b["versions"].get(name)) for name in VERSIONS]
    pairs += [(n, a["device"].get(n), b["device"].get(n)) for n in ("driver", "threads")]
    names = ("clocks.sm", "clocks.max.sm", "power.limit")
    pairs += [(name, clocks[0].get(name), clocks[1].get(name)) for name in names]
    pairs.append(("settings", a["settings"], b["settings"]))
    yield from (f"{name}: {in_a} in A, {in_b} in B" for name, in_a, in_b in pairs if in_a != in_b)
    for letter, document, other in (("A", a, b), ("B", b, a)):
        if not document["finished"]:
            yield f"{letter} is unfinished: its run ended before its last row"
        known = {results.key(row) for row in other["rows"]}
        single = [results.key(row) for row in document["rows"] if results.key(row) not in known]
        yield from (f"only in {letter}: {', '.join(name)}" for name in single)
    if a["quick"]:
        yield "both are quick runs with few samples"


# ---- command line ----


def ratio_of(text: str) -> float:
    """ "5%" or "0.05"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    value = float(found.group(1)) / (100 if found.group(2) else 1) if found else math.nan
    if found is None or (not found.group(2) and value >= 1):
        raise SssdError(f"--fail-over {text!r}: needs a share such as 5% or 0.05")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", metavar="A.json", help="the measurement before")
    add("b", metavar="B.json", help="the measurement after")
    add("--fail-over", default="5%", metavar="SHARE", help="allowed increase (default 5%%)")
    add("--margin", type=float, metavar="US", help="ignored increase (default 5 on a CPU, else 2)")


def main(args: argparse.Namespace) -> int:
    """0 = no regression, 1 = at least one; raises SssdError for files that cannot be compared."""
    fail_over = ratio_of(args.fail_over)
    a, b = results.load(args.a), results.load(args.b)
    lines = compare(a, b, fail_over, args.margin)
    margin = _margin(a, args.margin)
    absolute = size_text(margin) if margin == MARGIN_BYTES else f"{margin:g} us"
    with Console() as console:
        for text in warnings(a, b):
            console.warn(text)
        rows = [
            [*n, in_a, in_b, NONE if ratio is None else f"{ratio:.3f}", verdict, note]
            for n, in_a, in_b, ratio, verdict, note in lines
        ]
        title = f"{a['kind']}, {a['device']['name']}: B against A"
        console.table(title, [*results.KEY, "A", "B", "B / A", "verdict", "note"], rows)
        verdicts = [line.verdict for line in lines]
        worse, fails, better, runs = map(verdicts.count, (WORSE, FAILS, BETTER, RUNS))
        console.info(
            f"{worse} of {len(lines)} rows regressed, {fails} fail now, {better} better, "
            f"{runs} run now (counted: more than {percent(fail_over)} and {absolute})"
        )
    return int(worse + fails > 0)
