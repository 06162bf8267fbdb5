"""Two result files of one kind and one device against each other: `sssd-fast bench compare A.json B.json --fail-over 5%`.

A row of B is a regression where it costs more than A's by more than the ratio AND by more than an absolute margin: a call of a few
microseconds changes by 5 % on its own. Cost is the median time; of a row of memory its peak (margin 1 MiB), of a largest batch its
inverse, of a loader the time per image. A row that had a figure in A and has none in B fails as well. "within noise" says that the
20 % to 80 % quantiles of both overlap; it is information and changes no verdict.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console

from . import results
from .formats import NONE, Document, Row, percent, significant, size_text, time_text
from .rows import LARGEST

MARGIN_US = {"cpu": 5.0, "cuda": 2.0}
MARGIN_BYTES = float(1 << 20)
LOADER_KEY = ("data", "channels", "provider")
WORSE, FAILS, BETTER, RUNS = "REGRESSION", "FAILS NOW", "better", "runs now"
CLOCK_DRIFT = 0.05  # of the SM clock between the two runs, from which on it is worth a word
VERSIONS = ("torch", "triton", "cuda", "xformers", "transformers", "dali")


@dataclass(frozen=True)
class Cost:
    """Less is better. low to high: the 20 % and 80 % quantiles; margin: a smaller difference never counts."""

    value: float
    text: str
    margin: float
    low: float | None = None
    high: float | None = None


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
    columns: tuple[str, ...]
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
    """margin_us: None = 5 on a CPU, 2 on a GPU. Raises SssdError where the two cannot be compared."""
    _refuse(a, b)
    margin = MARGIN_US[a["device"]["type"]] if margin_us is None else margin_us
    rows_a, rows_b = _by_name(a), _by_name(b)
    both = [name for name in rows_a if name in rows_b]
    _refuse_rows(a, rows_a, rows_b, both)
    found = Comparison(LOADER_KEY if a["kind"].startswith("loader") else results.KEY)
    found.only_a = [name for name in rows_a if name not in rows_b]
    found.only_b = [name for name in rows_b if name not in rows_a]
    found.warnings = list(_warnings(a, b))
    for name in both:
        costs = (_cost(a["kind"], rows_a[name], margin), _cost(b["kind"], rows_b[name], margin))
        found.lines.append(
            _line(name, *costs, fail_over, rows_a[name].get("reason"), rows_b[name].get("reason"))
        )
    found.lines.sort(key=lambda line: -(line.ratio or (math.inf if line.verdict == FAILS else 0.0)))
    return found


def _line(
    name: tuple[str, ...],
    a: Cost | None,
    b: Cost | None,
    fail_over: float,
    why_a: str | None,
    why_b: str | None,
) -> Line:
    if a is None or b is None:
        verdict = (
            FAILS if b is None and a is not None else RUNS if a is None and b is not None else ""
        )
        why = why_b if b is None else why_a
        return Line(
            name,
            a.text if a else NONE,
            b.text if b else NONE,
            None,
            verdict,
            why or "no figure, and no reason",
        )
    ratio, verdict = b.value / a.value, ""
    if ratio > 1 + fail_over and b.value - a.value > b.margin:
        verdict = WORSE
    elif ratio < 1 / (1 + fail_over) and a.value - b.value > b.margin:
        verdict = BETTER
    note = ""
    if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
        note = "within noise" if a.low <= b.high and b.low <= a.high else ""
    return Line(name, a.text, b.text, ratio, verdict, note)


def _cost(kind: str, row: Row, margin_us: float) -> Cost | None:
    if kind == "loader-speed":
        rates = row["figures"]
        if not rates:
            return None
        text = f"{significant(rates['median'])} images/s"
        return Cost(1e6 / rates["median"], text, margin_us, 1e6 / rates["p80"], 1e6 / rates["p20"])
    if kind == "loader-memory":
        peak = row["peak"]
        return None if peak is None else Cost(peak * 2**20, size_text(peak * 2**20), MARGIN_BYTES)
    if kind == "memory":
        batch, peak = row["more"].get("largest_batch"), row["peak_bytes"]
        if batch:
            return Cost(1 / batch, f"batch {batch}", 0.0)
        return None if not peak or row["reason"] else Cost(peak, size_text(peak), MARGIN_BYTES)
    time = row["time"]
    if not time:
        return None
    return Cost(
        time["median_us"], time_text(time["median_us"]), margin_us, time["p20_us"], time["p80_us"]
    )


def _by_name(document: Document) -> dict[tuple[str, ...], Row]:
    if document["kind"].startswith("loader"):
        return {tuple(str(row[part]) for part in LOADER_KEY): row for row in document["rows"]}
    return {results.key(row): row for row in document["rows"]}


# ---- what cannot be compared, and what should be known ----


def _refuse(a: Document, b: Document) -> None:
    told = {
        "schema": (a["schema"], b["schema"], "measure both with the same version"),
        "kind": (a["kind"], b["kind"], "give two files of one benchmark"),
        "device": (a["device"]["name"], b["device"]["name"], "measure both on the same device"),
        "--quick": (a["quick"], b["quick"], "measure both with --quick, or both without"),
    }
    for what, (in_a, in_b, remedy) in told.items():
        if in_a != in_b:
            raise SssdError(f"cannot compare: {what} is {in_a} in A and {in_b} in B; {remedy}")
    if a["kind"] == "loader-parity":
        raise SssdError(
            "cannot compare: loader-parity holds differences of pixels, no cost; give loader-speed files"
        )


def _refuse_rows(
    a: Document, rows_a: dict[Any, Row], rows_b: dict[Any, Row], both: list[tuple[str, ...]]
) -> None:
    if not a["kind"].startswith("loader"):
        kinds = _dtypes(rows_a), _dtypes(rows_b)
        for work in kinds[0]:
            in_a, in_b = (", ".join(sorted(found.get(work, ()))) for found in kinds)
            if in_b and in_a != in_b:
                what = " ".join(work)
                raise SssdError(
                    f"cannot compare: {what} has {in_a} in A and {in_b} in B; measure both in the same dtypes"
                )
        for name in both:
            works = _work(rows_a[name]), _work(rows_b[name])
            if works[0] != works[1]:
                raise SssdError(
                    f"cannot compare: {' '.join(name)} stands for {works[0]} in A and {works[1]} in B; measure both with one version"
                )
    if not both:
        raise SssdError("cannot compare: A and B have no row in common; measure the same cases")


def _work(row: Row) -> dict[str, Any]:
    """The sizes of a row; of a largest batch without the batch, which is the result."""
    found = row["case"].startswith(LARGEST)
    return {name: size for name, size in row["sizes"].items() if not (found and name == "batch")}


def _dtypes(rows: dict[Any, Row]) -> dict[tuple[str, ...], set[str]]:
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in rows.values():
        found[row["case"], row["shape"], row["phase"], row["provider"]].add(row["dtype"])
    return found


def _warnings(a: Document, b: Document) -> Iterator[str]:
    pairs = [(name, a["versions"].get(name), b["versions"].get(name)) for name in VERSIONS]
    pairs += [
        (name, a["device"].get(name), b["device"].get(name)) for name in ("driver", "threads")
    ]
    before = [document["clocks"]["before"] or {} for document in (a, b)]
    pairs += [
        (name, before[0].get(name), before[1].get(name))
        for name in ("clocks.max.sm", "power.limit")
    ]
    pairs.append(("settings", a["settings"], b["settings"]))
    yield from (f"{name}: {in_a} in A, {in_b} in B" for name, in_a, in_b in pairs if in_a != in_b)
    clocks = [re.match(r"[\d.]+", told.get("clocks.sm", "")) for told in before]
    if clocks[0] and clocks[1]:
        rates = [float(clock.group()) for clock in clocks if clock]
        if abs(math.log(rates[1] / rates[0])) > math.log1p(CLOCK_DRIFT):
            yield f"clocks.sm: {rates[0]:g} MHz before A, {rates[1]:g} MHz before B"
    for letter, document in (("A", a), ("B", b)):
        if not document["finished"]:
            yield f"{letter} is unfinished: its run ended before its last row"
    if a["quick"]:
        yield "both are quick runs, of few samples"


# ---- command line ----


def ratio_of(text: str) -> float:
    """ "5%" or "0.05"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    value = float(found.group(1)) / (100 if found.group(2) else 1) if found else math.nan
    if found is None or (not found.group(2) and value >= 1):
        raise SssdError(f"--fail-over {text!r}: needs a share such as 5% or 0.05")
    return value


def margin_of(text: str) -> float:
    """Microseconds: "5us", "5", "0.1ms"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|µs|ms|s|)\s*", text)
    if found is None:
        raise SssdError(f"--margin {text!r}: needs a time such as 5us or 0.1ms")
    return float(found.group(1)) * {"ms": 1e3, "s": 1e6}.get(found.group(2), 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A.json", help="the measurement before")
    parser.add_argument("b", metavar="B.json", help="the measurement after")
    parser.add_argument(
        "--fail-over",
        default="5%",
        metavar="SHARE",
        help="how much more B may cost than A: 5%% or 0.05 (default 5%%)",
    )
    parser.add_argument(
        "--margin",
        metavar="TIME",
        help="what B must take longer, too, to count: 5us, 0.1ms (default 5us on a CPU, 2us on a GPU; memory: 1 MiB)",
    )


def main(args: argparse.Namespace) -> int:
    """0 = no regression, 1 = at least one; raises SssdError (exit code 2) for files that cannot be compared."""
    fail_over = ratio_of(args.fail_over)
    margin = None if args.margin is None else margin_of(args.margin)
    a, b = results.load(args.a), results.load(args.b)
    found = compare(a, b, fail_over, margin)
    margin = MARGIN_US[a["device"]["type"]] if margin is None else margin
    with Console() as console:
        show(found, f"{a['kind']}, {a['device']['name']}: B against A", console)
        counts = [
            f"{found.count(WORSE)} of {len(found.lines)} rows regressed",
            f"{found.count(FAILS)} fail now",
        ]
        counts += [f"{found.count(BETTER)} better", f"{found.count(RUNS)} run now"]
        allowed = f"more than {percent(fail_over)} and {margin:g} us"
        if a["kind"].endswith("memory"):
            allowed = f"more than {percent(fail_over)} and 1 MiB"
        console.info(f"{', '.join(counts)} (counted: {allowed})")
    return int(found.failed)


def show(found: Comparison, title: str, console: Console) -> None:
    for text in found.warnings:
        console.warn(text)
    rows = [
        [
            *line.name,
            line.a,
            line.b,
            NONE if line.ratio is None else f"{line.ratio:.3f}",
            line.verdict,
            line.note,
        ]
        for line in found.lines
    ]
    console.table(title, [*found.columns, "A", "B", "B / A", "verdict", "note"], rows)
    for letter, names in (("A", found.only_a), ("B", found.only_b)):
        for name in names:
            console.info(f"only in {letter}: {', '.join(name)}")
