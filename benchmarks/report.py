"""`bench report`: docs/benchmarks.md and its pictures from the files in benchmarks/results.

Of each kind and device the newest file is used, quick runs never. `--check` writes nothing and
fails if the page differs from what the files give; pictures are not compared, since their bytes
depend on the version of matplotlib.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, results
from benchmarks.harness import OURS
from benchmarks.results import is_stale
from benchmarks.tables import Document, ceiling_text, device_name, markdown, significant, tables
from sssd_fast.errors import SssdError
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.run.log import Console

ROOT = Path(__file__).resolve().parent.parent
PAGE, FOLDER = "docs/benchmarks.md", "docs/benchmarks"
STALE = "†"
SECTIONS = {
    "Ops": ("ops",),
    "Attention": ("attention",),
    "Training step": ("step",),
    "Training memory": ("memory",),
    "Loading": ("loader-speed", "loader-parity", "loader-memory"),
}
KINDS = [kind for kinds in SECTIONS.values() for kind in kinds]


def find(folder: Path) -> tuple[list[Document], list[str]]:
    """The newest document of each kind and device, GPUs first, and warnings.

    Raises SssdError for a file that is not a result of this version.
    """
    newest, warnings = dict[tuple[str, str], Document](), list[str]()
    loaded = [{**results.load(path), "file": path.name} for path in sorted(folder.glob("*.json"))]
    for document in sorted(loaded, key=lambda one: str(one["started"])):
        if document["kind"] not in KINDS:
            known = ", ".join(KINDS)
            raise SssdError(f"{document['file']}: kind {document['kind']!r}, known are {known}")
        if document["quick"]:
            warnings.append(f"{document['file']} is a quick run and not reported")
            continue
        newest[document["kind"], document["device"]["name"]] = document
        if not document["finished"]:
            warnings.append(f"{document['file']} is unfinished; the page says so")
    order = sorted(newest.values(), key=lambda one: KINDS.index(one["kind"]))
    return sorted(order, key=lambda one: one["device"]["type"] != "cuda"), warnings


# ---- the page ----

INTRODUCTION = f"""\
# Benchmarks

Written by `sssd-fast bench report` from the files in `benchmarks/results`; do not edit it by hand.
[benchmarks/README.md](../benchmarks/README.md) has the rules; each section names its command.

- Times are medians of single calls, with 20 % and 80 % quantiles and the number of calls. Providers
  alternate, the last-level cache is flushed before every call, compilation and warm-up are not
  included. "gap" is a second pass relative to the first. "host time" (GPUs only) is the time
  until the call returns, without waiting for the device.
- "time / ours" is a provider's time divided by ours, with its bootstrapped 95 % interval; above
  1 ours is faster. "same": the interval contains 1, or the difference is below 2 % or below the
  gap of either provider. "slower" and "faster" refer to the provider.
- "error / allowed": largest error against fp64, relative to the largest value, and the limit:
  twice that of eager PyTorch in the same dtype, plus 32 fp32 roundings for sums in another order.
- A share of a ceiling above 100 % means that other processes disturbed the ceiling's measurement.
- {STALE}: mae_kernels or the benchmarks have changed since the measurement."""


def page(documents: Sequence[Document]) -> str:
    blocks = [INTRODUCTION, "## Overview", *overview(documents)]
    for title, kinds in SECTIONS.items():
        mine = [one for one in documents if one["kind"] in kinds]
        have = {document["device"]["type"] for document in mine}
        missing = [n for t, n in (("cuda", "NVIDIA GPU"), ("cpu", "CPU")) if t not in have]
        blocks += [f"## {title}", *(f"{name}: not measured." for name in missing)]
        for document in mine:
            blocks += section(document)
    return "\n\n".join(blocks) + "\n"


def section(document: Document) -> list[str]:
    """Pictures, caption, ceilings and tables; of the ops those of one shape."""
    kind = document["kind"]
    rest = kind.partition("-")[2]
    stale = f" {STALE}" * is_stale(document)
    blocks = [f"### {device_name(document)}{': ' * bool(rest)}{rest}{stale}"]
    blocks += [f"![{plot.title}](benchmarks/{plot.file})" for plot in plots.planned(document)]
    blocks.append(caption(document))
    if kind in ("ops", "attention", "step") and document["ceilings"]:
        blocks.append(ceiling_text(document))
    rows = document["rows"]
    if kind == "ops":
        chosen = [group[OURS] for group in plots.representative(document)]
        shown = {(row["case"], row["shape"], row["dtype"]) for row in chosen}
        rows = [row for row in rows if (row["case"], row["shape"], row["dtype"]) in shown]
        blocks.append(f"{len(rows)} of the {len(document['rows'])} rows; the file has all shapes.")
    for table in tables({**document, "rows": rows}):
        blocks += [f"#### {table.title}", markdown(table.columns, table.cells)]
        if table.doubts:
            lines = "\n".join(f"- {text}" for text in table.doubts)
            blocks.append(f"The verdicts of these races are doubtful:\n\n{lines}")
    return blocks


def caption(document: Document) -> str:
    """What ran where, with which versions, from which sources, and how to repeat it."""
    device, versions = document["device"], document["versions"]
    parts = [device_name(document)]
    if device["type"] == "cuda":
        parts.append(f"{device['memory_gib']} GiB, driver {device.get('driver') or 'unknown'}")
        clocks = document["clocks"]["before"] or {}
        known = ("power.limit", "clocks.sm", "clocks.max.sm")
        parts += [f"{name} {clocks[name]}" for name in known if clocks.get(name)]
    names = ("torch", "triton", "cuda", "python")
    parts += [f"{name} {versions[name]}" for name in names if versions.get(name)]
    commit = str(document["commit"] or "unknown")[:10] + "+changes" * bool(document["modified"])
    parts += [f"commit {commit}", f"`{document['command']}`", document["started"][:10]]
    texts = [f"{'; '.join(parts)}. File: `{document['file']}`."]
    if all(document["ops"].values()) and not document["kind"].startswith("loader"):
        texts.append("The ops are their references in plain PyTorch here: the kernels need a GPU.")
    if not document["finished"]:
        texts.append("**Unfinished: the run ended before its last row.**")
    if document["skipped"]:
        texts.append(f"Skipped because the time was up: {', '.join(document['skipped'])}.")
    if document["missing"]:
        reasons = [f"{name} ({why})" for name, why in sorted(document["missing"].items())]
        texts.append(f"Not available: {'; '.join(reasons)}.")
    return " ".join(texts)


def overview(documents: Sequence[Document]) -> list[str]:
    """Geometric mean of time / time of ours per provider, and in how many rows ours is slower."""
    lines = []
    for document in documents:
        providers: dict[str, list[dict[str, Any]]] = {}
        for row in document["rows"]:
            if row["versus"]:
                providers.setdefault(row["provider"], []).append(row["versus"])
        for provider, found in providers.items():
            ratios = [one["ratio"] for one in found]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            ends = f"{significant(min(ratios))} to {significant(max(ratios))}"
            slower = sum(one["verdict"] == "faster" for one in found)
            head = [document["kind"], device_name(document), provider, f"{significant(mean)}×"]
            lines.append([*head, ends, str(len(found)), str(slower)])
    if not lines:
        return ["Nothing is measured."]
    columns = ["what", "hardware", "relative to", "time / ours", "range", "rows"]
    text = "Geometric mean over all rows of the file: shapes, dtypes and passes."
    return [markdown([*columns, "ours slower in"], lines), text]


# ---- command line ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing; exit with 1 if the page is outdated")
    help_ = "instead of benchmarks/results"
    add("--results", type=Path, default=results.FOLDER, metavar="DIR", help=help_)


def main(args: argparse.Namespace, root: Path = ROOT) -> int:
    folder, target = Path(args.results), root / PAGE
    if not folder.is_dir():
        raise SssdError(f"--results {folder}: not a folder; give one with result files")
    with Console() as console:
        documents, warnings = find(folder)
        text = page(documents)
        for warning in warnings:
            console.warn(warning)
        if args.check:
            if target.is_file() and target.read_text(encoding="utf-8") == text:
                return 0
            console.error(f"{PAGE} is out of date; run `sssd-fast bench report`")
            return 1
        drawn = [plot for document in documents for plot in plots.planned(document)]
        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        atomic_write_text(target, text)
        for plot in drawn:
            atomic_write_bytes(root / FOLDER / plot.file, plot.png())
        console.info(f"wrote {PAGE} and {len(drawn)} pictures")
        for path in sorted((root / FOLDER).glob("*.*")):
            if path.name not in {plot.file for plot in drawn}:
                console.warn(f"{FOLDER}/{path.name} is not part of the report any more; delete it")
    return 0
