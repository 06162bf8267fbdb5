"""`bench compare A.json B.json --fail-over 5%`: two result files of one kind and device.

A row of B is a regression if it costs more than A's by more than the ratio AND by more than an
absolute margin: a call of a few microseconds easily changes by 5 %. The cost is the median time;
for memory the peak (margin 1 MiB), for a largest batch its inverse, for a loader the time per
image. A row that had a result in A and has none in B fails as well. "within noise": the 20 % to
80 % quantiles of both overlap; this is information and does not change the verdict.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks import results
from benchmarks.tables import NONE, Document, RowDict, percent, significant, size_text, time_text
from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console

MARGIN_US = {"cpu": 5.0, "cuda": 2.0}
MARGIN_BYTES = float(1 << 20)
WORSE, FAILS, BETTER, RUNS = "REGRESSION", "FAILS NOW", "better", "runs now"
VERSIONS = ("torch", "triton", "cuda", "xformers", "transformers", "dali")


@dataclass(frozen=True)
class Cost:
    """Less is better. low, high: quantiles; margin: a smaller difference is ignored."""

    value: float
    text: str
    margin: float
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Line:
    name: tuple[str, ...]
    a: str
    b: str
    ratio: float | None  # cost of B / cost of A
    verdict: str
    note: str = ""


@dataclass
class Comparison:
    lines: list[Line] = field(default_factory=list)  # the worst first
    only_a: list[tuple[str, ...]] = field(default_factory=list)
    only_b: list[tuple[str, ...]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        return sum(line.verdict == verdict for line in self.lines)

    @property
    def failed(self) -> bool:
        return self.count(WORSE) + self.count(FAILS) > 0


def compare(
    a: Document, b: Document, fail_over: float, margin_us: float | None = None
) -> Comparison:
    """margin_us: None = 5 on a CPU, 2 on a GPU. Raises SssdError for unlike files."""
    for what in ("schema", "kind", "quick"):
        _same(what, a[what], b[what])
    _same("device", a["device"]["name"], b["device"]["name"])
    margin = MARGIN_US[a["device"]["type"]] if margin_us is None else margin_us
    rows_a, rows_b = ({results.key(row): row for row in one["rows"]} for one in (a, b))
    both = [name for name in rows_a if name in rows_b]
    if not both:
        raise SssdError("cannot compare: A and B have no row in common; measure the same cases")
    found = Comparison()
    found.only_a = [name for name in rows_a if name not in rows_b]
    found.only_b = [name for name in rows_b if name not in rows_a]
    found.warnings = list(_warnings(a, b))
    for name in both:
        _same(f"the size of {' '.join(name)}", _work(rows_a[name]), _work(rows_b[name]))
        found.lines.append(_line(name, rows_a[name], rows_b[name], a["kind"], fail_over, margin))
    found.lines.sort(key=lambda line: -(line.ratio or (math.inf if line.verdict == FAILS else 0.0)))
    return found


def _same(what: str, in_a: Any, in_b: Any) -> None:
    if in_a != in_b:
        raise SssdError(
            f"cannot compare: {what} is {in_a} in A and {in_b} in B; measure both alike"
        )


def _work(row: RowDict) -> dict[str, Any]:
    """The sizes of a row; without the batch if that is the result."""
    search = "largest_batch" in row["more"]
    return {name: size for name, size in row["sizes"].items() if not (search and name == "batch")}


def _line(
    name: tuple[str, ...],
    row_a: RowDict,
    row_b: RowDict,
    kind: str,
    fail_over: float,
    margin: float,
) -> Line:
    a, b = (_cost(kind, row, margin) for row in (row_a, row_b))
    texts = (a.text if a else NONE, b.text if b else NONE)
    if a is None or b is None:
        verdict = FAILS if a else RUNS if b else ""
        why = (row_b if b is None else row_a)["reason"] or "no result, and no reason"
        return Line(name, *texts, None, verdict, why)
    ratio, verdict = b.value / a.value, ""
    if ratio > 1 + fail_over and b.value - a.value > b.margin:
        verdict = WORSE
    elif ratio < 1 / (1 + fail_over) and a.value - b.value > b.margin:
        verdict = BETTER
    known = math.isfinite(a.low) and math.isfinite(b.low)
    note = "within noise" if known and a.low <= b.high and b.low <= a.high else ""
    return Line(name, *texts, ratio, verdict, note)


def _cost(kind: str, row: RowDict, margin_us: float) -> Cost | None:
    more, time, peak = row["more"], row["time"], row["peak_bytes"]
    if row["reason"]:
        return None
    if kind.endswith("memory"):
        if more.get("largest_batch"):
            return Cost(1 / more["largest_batch"], f"batch {more['largest_batch']}", 0.0)
        return Cost(peak, size_text(peak), MARGIN_BYTES) if peak else None
    if kind == "loader-speed":
        rate = more["images_per_s"]
        ends = (1e6 / more["p80"], 1e6 / more["p20"])
        return Cost(1e6 / rate, f"{significant(rate)} images/s", margin_us, *ends)
    if not time:
        return None
    text = time_text(time["median_us"])
    return Cost(time["median_us"], text, margin_us, time["p20_us"], time["p80_us"])


def _warnings(a: Document, b: Document) -> Iterator[str]:
    clocks = [document["clocks"]["before"] or {} for document in (a, b)]
    pairs = [(name, a["versions"].get(name), b["versions"].get(name)) for name in VERSIONS]
    pairs += [(n, a["device"].get(n), b["device"].get(n)) for n in ("driver", "threads")]
    names = ("clocks.sm", "clocks.max.sm", "power.limit")
    pairs += [(name, clocks[0].get(name), clocks[1].get(name)) for name in names]
    pairs.append(("settings", a["settings"], b["settings"]))
    yield from (f"{name}: {in_a} in A, {in_b} in B" for name, in_a, in_b in pairs if in_a != in_b)
    for letter, document in (("A", a), ("B", b)):
        if not document["finished"]:
            yield f"{letter} is unfinished: its run ended before its last row"
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
    found = compare(a, b, fail_over, args.margin)
    margin = MARGIN_US[a["device"]["type"]] if args.margin is None else args.margin
    absolute = "1 MiB" if a["kind"].endswith("memory") else f"{margin:g} us"
    with Console() as console:
        for text in found.warnings:
            console.warn(text)
        rows = [
            [*line.name, line.a, line.b, _ratio(line.ratio), line.verdict, line.note]
            for line in found.lines
        ]
        title = f"{a['kind']}, {a['device']['name']}: B against A"
        console.table(title, [*results.KEY, "A", "B", "B / A", "verdict", "note"], rows)
        for letter, names in (("A", found.only_a), ("B", found.only_b)):
            for name in names:
                console.info(f"only in {letter}: {', '.join(name)}")
        console.info(
            f"{found.count(WORSE)} of {len(found.lines)} rows regressed, {found.count(FAILS)} fail "
            f"now, {found.count(BETTER)} better, {found.count(RUNS)} run now "
            f"(counted: more than {percent(fail_over)} and {absolute})"
        )
    return int(found.failed)


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.3f}"
