"""`bench compare A.json B.json --fail-over 5%`: two result files of one kind and device.

A row of B is a regression if it costs more than A's by more than the ratio AND by more than an
absolute margin. The cost is the median time; for memory the peak, for a loader the time per image.
A row that had a result in A and has none in B fails as well.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

from benchmarks import results
from benchmarks.tables import NONE, Document, RowDict, size_text, time_text
from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console

MARGIN_US = {"cpu": 5.0, "cuda": 2.0}
MARGIN_BYTES = float(1 << 20)
WORSE, FAILS, BETTER, RUNS = "REGRESSION", "FAILS NOW", "better", "runs now"


class Line(NamedTuple):
    name: tuple[str, ...]
    a: float | None  # microseconds, or bytes
    b: float | None
    verdict: str

    @property
    def ratio(self) -> float:
        return self.b / self.a if self.a and self.b else math.inf if self.a else 0.0


def compare(a: Document, b: Document, over: float) -> list[Line]:
    """The worst first. Raises SssdError for unlike files."""
    rows_a, rows_b = ({results.key(row): row for row in one["rows"]} for one in (a, b))
    both = [name for name in rows_a if name in rows_b]
    pairs = [(name, a[name], b[name]) for name in ("kind", "quick")]
    pairs.append(("device", a["device"]["name"], b["device"]["name"]))
    pairs += [(f"the size of {n}", rows_a[n]["sizes"], rows_b[n]["sizes"]) for n in both]
    for what, in_a, in_b in pairs:
        if in_a != in_b:
            differ = f"{what} is {in_a} in A and {in_b} in B"
            raise SssdError(f"cannot compare: {differ}; measure both alike")
    if not both:
        raise SssdError("cannot compare: A and B have no row in common; measure the same cases")
    margin = MARGIN_BYTES if a["kind"] == "memory" else MARGIN_US[a["device"]["type"]]
    lines = []
    for name in both:
        before, after = cost(rows_a[name]), cost(rows_b[name])
        if before is None or after is None:
            verdict = FAILS if before else RUNS if after else ""
        elif abs(after - before) <= margin or 1 / (1 + over) <= after / before <= 1 + over:
            verdict = ""
        else:
            verdict = WORSE if after > before else BETTER
        lines.append(Line(name, before, after, verdict))
    return sorted(lines, key=lambda one: -one.ratio)


def cost(row: RowDict) -> float | None:
    rate, time = row["more"].get("images_per_s"), row["time"]
    found = time["median_us"] if time else 1e6 / rate if rate else row["peak_bytes"]
    return None if row["reason"] else found


def ratio_of(text: str) -> float:
    """ "5%" or "0.05"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < (math.inf if text.endswith("%") else 1):
        raise SssdError(f"--fail-over {text!r}: needs a share such as 5% or 0.05")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A.json", help="the measurement before")
    parser.add_argument("b", metavar="B.json", help="the measurement after")
    help_ = "allowed increase (default 5%%)"
    parser.add_argument("--fail-over", default="5%", metavar="SHARE", help=help_)


def main(args: argparse.Namespace) -> int:
    """0 = no regression, 1 = at least one; raises SssdError for files that cannot be compared."""
    over, a, b = ratio_of(args.fail_over), results.load(args.a), results.load(args.b)
    lines = compare(a, b, over)
    form = size_text if a["kind"] == "memory" else time_text
    with Console() as console:
        cells = []
        for line in lines:
            costs = [NONE if cost is None else form(cost) for cost in (line.a, line.b)]
            cells.append([*line.name, *costs, f"{line.ratio:.3f}", line.verdict])
        title = f"{a['kind']}, {a['device']['name']}: B against A"
        console.table(title, [*results.KEY, "A", "B", "B / A", "verdict"], cells)
        verdicts = [line.verdict for line in lines]
        worse, fails, better, runs = map(verdicts.count, (WORSE, FAILS, BETTER, RUNS))
        changed = f"{fails} fail now, {better} better, {runs} run now"
        console.info(f"{worse} of {len(lines)} rows regressed, {changed}")
    return int(worse + fails > 0)
