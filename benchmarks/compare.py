"""`bench compare A.json B.json --fail-over 5%`: two result files of one kind and device.

A row of B is a regression if it costs more than A's by more than the ratio AND by more than an
absolute margin: a call of a few microseconds easily changes by 5 %. The cost is the median time;
for memory the peak (margin 1 MiB), for a loader the time per image. A row that had a result in A
and has none in B fails as well.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.tables import NONE, Document, RowDict, size_text, time_text
from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console

MARGIN_US = {"cpu": 5.0, "cuda": 2.0}
MARGIN_BYTES = float(1 << 20)
WORSE, FAILS, BETTER, RUNS = "REGRESSION", "FAILS NOW", "better", "runs now"
VERSIONS = ("torch", "triton", "cuda", "xformers", "transformers", "dali")


class Line(NamedTuple):
    name: tuple[str, ...]
    a: float | None  # microseconds, or bytes
    b: float | None
    verdict: str
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a and self.b else None


def compare(a: Document, b: Document, fail_over: float) -> list[Line]:
    """The worst first. Raises SssdError for unlike files."""
    for what in ("schema", "kind", "quick"):
        _same(what, a[what], b[what])
    _same("device", a["device"]["name"], b["device"]["name"])
    rows_a, rows_b = ({results.key(row): row for row in one["rows"]} for one in (a, b))
    both = [name for name in rows_a if name in rows_b]
    if not both:
        raise SssdError("cannot compare: A and B have no row in common; measure the same cases")
    memory = a["kind"].endswith("memory")
    margin = MARGIN_BYTES if memory else MARGIN_US[a["device"]["type"]]
    lines = []
    for name in both:
        row_a, row_b = rows_a[name], rows_b[name]
        _same(f"the size of {' '.join(name)}", row_a["sizes"], row_b["sizes"])
        lines.append(_line(name, row_a, row_b, memory, fail_over, margin))
    return sorted(lines, key=lambda one: -(one.ratio or math.inf * (one.verdict == FAILS)))


def _same(what: str, in_a: Any, in_b: Any) -> None:
    if in_a != in_b:
        raise SssdError(
            f"cannot compare: {what} is {in_a} in A and {in_b} in B; measure both alike"
        )


def _line(
    name: tuple[str, ...], row_a: RowDict, row_b: RowDict, memory: bool, over: float, margin: float
) -> Line:
    a, b = _cost(row_a, memory), _cost(row_b, memory)
    if a is None or b is None:
        why = (row_b if b is None else row_a)["reason"] or "no result, and no reason"
        return Line(name, a, b, FAILS if a else RUNS if b else "", why)
    verdict = ""
    if b > a * (1 + over) and b - a > margin:
        verdict = WORSE
    elif a > b * (1 + over) and a - b > margin:
        verdict = BETTER
    return Line(name, a, b, verdict)


def _cost(row: RowDict, memory: bool) -> float | None:
    found: float | None = None
    if row["reason"]:
        return None
    if memory:
        found = row["peak_bytes"]
    elif row["time"]:
        found = row["time"]["median_us"]
    elif "images_per_s" in row["more"]:
        found = 1e6 / row["more"]["images_per_s"]
    return found


def warnings(a: Document, b: Document) -> Iterator[str]:
    """What else differs: versions, settings, and rows of one file only."""
    pairs = [(name, a["versions"].get(name), b["versions"].get(name)) for name in VERSIONS]
    pairs += [(n, a["device"].get(n), b["device"].get(n)) for n in ("driver", "threads")]
    pairs.append(("settings", a["settings"], b["settings"]))
    yield from (f"{name}: {in_a} in A, {in_b} in B" for name, in_a, in_b in pairs if in_a != in_b)
    for letter, document, other in (("A", a, b), ("B", b, a)):
        if not document["finished"]:
            yield f"{letter} is unfinished: its run ended before its last row"
        known = {results.key(row) for row in other["rows"]}
        single = [results.key(row) for row in document["rows"] if results.key(row) not in known]
        yield from (f"only in {letter}: {', '.join(name)}" for name in single)


# ---- command line ----


def ratio_of(text: str) -> float:
    """ "5%" or "0.05"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    value = float(found.group(1)) / (100 if found.group(2) else 1) if found else math.nan
    if found is None or (not found.group(2) and value >= 1):
        raise SssdError(f"--fail-over {text!r}: needs a share such as 5% or 0.05")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A.json", help="the measurement before")
    parser.add_argument("b", metavar="B.json", help="the measurement after")
    help_ = "allowed increase (default 5%%)"
    parser.add_argument("--fail-over", default="5%", metavar="SHARE", help=help_)


def main(args: argparse.Namespace) -> int:
    """0 = no regression, 1 = at least one; raises SssdError for files that cannot be compared."""
    fail_over = ratio_of(args.fail_over)
    a, b = results.load(args.a), results.load(args.b)
    lines = compare(a, b, fail_over)
    form = size_text if a["kind"].endswith("memory") else time_text
    with Console() as console:
        for text in warnings(a, b):
            console.warn(text)
        rows = []
        for line in lines:
            costs = [NONE if cost is None else form(cost) for cost in (line.a, line.b)]
            ratio = NONE if line.ratio is None else f"{line.ratio:.3f}"
            rows.append([*line.name, *costs, ratio, line.verdict, line.note])
        title = f"{a['kind']}, {a['device']['name']}: B against A"
        console.table(title, [*results.KEY, "A", "B", "B / A", "verdict", "note"], rows)
        verdicts = [line.verdict for line in lines]
        worse, fails, better, runs = map(verdicts.count, (WORSE, FAILS, BETTER, RUNS))
        console.info(
            f"{worse} of {len(lines)} rows regressed, {fails} fail now, {better} better, "
            f"{runs} run now"
        )
    return int(worse + fails > 0)
