"""`bench report`: docs/benchmarks.md and its pictures from the files in benchmarks/results.

Of each kind and device the newest rows of each case, shape and dtype are used, quick runs never:
a benchmark can be measured in several runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.tables import Document, ceiling_text, device_name, markdown, significant, tables
from sssd_fast.errors import SssdError
from sssd_fast.evaluation.pictures import new_figure, save_figure, style_axes
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.log import Console

ROOT = Path(__file__).resolve().parent.parent
PAGE, FOLDER = "docs/benchmarks.md", "docs/benchmarks"
SECTIONS = {
    "step": "Training step",
    "attention": "Attention",
    "ops": "Ops",
    "memory": "Training memory",
    "loader": "Loading",
}
# of Okabe and Ito, which the common kinds of colour blindness can tell apart
COLORS = {"ours": "#0072b2", "plain": "#56b4e9", "published": "#8a939c"}
OTHERS = "#e69f00"


def find(folder: Path) -> tuple[list[Document], list[str]]:
    """Documents with the rows that are reported, GPUs first, by kind and time; and warnings.

    Raises SssdError for a file that is not a result of this version.
    """
    documents, warnings = list[Document](), list[str]()
    loaded = [{**results.load(path), "file": path.name} for path in sorted(folder.glob("*.json"))]
    measured: set[tuple[str, ...]] = set()
    for document in sorted(loaded, key=lambda one: str(one["started"]), reverse=True):
        if document["kind"] not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise SssdError(f"{document['file']}: kind {document['kind']!r}, known are {known}")
        if document["quick"]:
            warnings.append(f"{document['file']} is a quick run and not reported")
            continue
        what = document["kind"], device_name(document)
        keys = [(*what, row["case"], row["shape"], row["dtype"]) for row in document["rows"]]
        rows = [row for row, key in zip(document["rows"], keys, strict=True) if key not in measured]
        if not rows:
            warnings.append(f"{document['file']}: later runs measured all of it; delete it")
            continue
        measured.update(keys)
        documents.insert(0, {**document, "rows": rows})
        if not document["finished"]:
            warnings.append(f"{document['file']} is unfinished; the page says so")
    documents.sort(key=lambda d: (d["device"]["type"] != "cuda", [*SECTIONS].index(d["kind"])))
    return documents, warnings


def by_device(documents: Sequence[Document], kind: str) -> list[list[Document]]:
    """The documents of a kind, those of one device together."""
    mine = [one for one in documents if one["kind"] == kind]
    names = dict.fromkeys(map(device_name, mine))
    return [[one for one in mine if device_name(one) == name] for name in names]


# ---- the page ----

INTRODUCTION = """\
# Benchmarks

Written by `sssd-fast bench report` from the files in `benchmarks/results`; do not edit it by hand.
[benchmarks/README.md](../benchmarks/README.md) has the rules; each section names its command and
the commit that it measured.

- Times are medians of single calls, without compilation and warm-up ("first call" includes them).
  "gap" is the second half of the calls relative to the first.
- "time / ours" is a provider's time divided by ours, with its bootstrapped 95 % interval; above
  1 ours is faster. "slower", "faster" and "same" refer to the provider.
- "error / allowed": largest error against fp64, relative to the largest value, and the limit.
- "MFU" is the share of the matrix product rate in the provider's dtype."""


def page(documents: Sequence[Document]) -> str:
    blocks = [INTRODUCTION, *overview(documents)]
    for kind, title in SECTIONS.items():
        devices = by_device(documents, kind)
        have = {runs[0]["device"]["type"] for runs in devices}
        missing = [n for t, n in (("cuda", "NVIDIA GPU"), ("cpu", "CPU")) if t not in have]
        blocks += [f"## {title}", *(f"{name}: not measured." for name in missing)]
        for runs in devices:
            blocks += section(runs)
    return "\n\n".join(blocks) + "\n"


def section(runs: Sequence[Document]) -> list[str]:
    """A device's picture; per run caption, ceilings and tables, of ops those of the first shape."""
    name = device_name(runs[0])
    blocks = [f"### {name}"]
    if pictured(runs):
        text = f"Images per second of a training step, {name}"
        blocks.append(f"![{text}](benchmarks/{picture_name(runs)})")
    for document in runs:
        kind, rows = document["kind"], document["rows"]
        blocks.append(caption(document))
        if kind in ("ops", "attention", "step") and document["ceilings"]:
            blocks.append(ceiling_text(document))
        if kind == "ops":
            rows = [row for row in rows if row["shape"] == rows[0]["shape"]]
            count = len(document["rows"])
            blocks.append(f"{len(rows)} of the {count} rows; the file has all shapes.")
        for table in tables({**document, "rows": rows}):
            blocks += [f"#### {table.title}", markdown(table.columns, table.cells)]
            if table.doubts:
                lines = "\n".join(f"- {text}" for text in table.doubts)
                blocks.append(f"The verdicts of these races are doubtful:\n\n{lines}")
    return blocks


def caption(document: Document) -> str:
    """What ran where, with which versions, from which commit, and how to repeat it."""
    device, versions = document["device"], document["versions"]
    parts = [device_name(document)]
    if device["type"] == "cuda":
        parts.append(f"{device['memory_gib']} GiB, driver {device['driver'] or 'unknown'}")
    names = ("torch", "triton", "transformers", "cuda", "python")
    parts += [f"{name} {versions[name]}" for name in names if versions.get(name)]
    commit = str(document["commit"] or "unknown")[:10] + "+changes" * bool(document["modified"])
    parts += [f"commit {commit}", f"`{document['command']}`", document["started"][:10]]
    texts = [f"{'; '.join(parts)}. File: `{document['file']}`."]
    if not document["finished"]:
        texts.append("**Unfinished: the run ended before its last row.**")
    if document["skipped"]:
        texts.append(f"Skipped because the time was up: {'; '.join(document['skipped'])}.")
    if document["missing"]:
        reasons = [f"{name} ({why})" for name, why in sorted(document["missing"].items())]
        texts.append(f"Not available: {'; '.join(reasons)}.")
    return " ".join(texts)


def overview(documents: Sequence[Document]) -> list[str]:
    """Geometric mean of time / time of ours per provider, and in how many rows ours is slower."""
    ratios: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for document in documents:
        for row in document["rows"]:
            if row["versus"]:
                name = document["kind"], device_name(document), row["provider"], row["dtype"]
                ratios.setdefault(name, []).append(row["versus"])
    lines = []
    for words, found in ratios.items():
        mean = math.exp(sum(math.log(one["ratio"]) for one in found) / len(found))
        slower = sum(one["verdict"] == "faster" for one in found)
        lines.append([*words, f"{significant(mean)}×", f"{slower} of {len(found)}"])
    columns = ["what", "hardware", "relative to", "dtype", "time / ours", "rows with ours slower"]
    text = "Geometric mean over all rows of the device: shapes and passes."
    return ["## Overview", markdown(columns, lines), text] if lines else ["Nothing is measured."]


# ---- the picture ----


def pictured(runs: Sequence[Document]) -> dict[str, dict[str, float]]:
    """Shape -> provider -> images per second: of a step the first two cases of "MAE"."""
    cases: dict[str, dict[str, float]] = {}
    for row in [row for run in runs if run["kind"] == "step" for row in run["rows"]]:
        if row["time"] and row["case"] == "MAE":
            rate = row["more"]["images_per_s"]
            cases.setdefault(row["shape"], {})[f"{row['provider']}, {row['dtype']}"] = rate
    return dict(list(cases.items())[:2])


def picture_name(runs: Sequence[Document]) -> str:
    return f"step-{results.slug(runs[0]['device']['name'])}.png"


def draw(runs: Sequence[Document], path: Path) -> None:
    """Writes a PNG; equal bytes for equal results and an equal version of matplotlib."""
    cases = pictured(runs)
    # 9 inches wide: letters of 8 points stay readable at 900 pixels
    figure = new_figure(9, 1.1 + 0.2 * max(map(len, cases.values())))
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, (shape, rates) in zip(panels, cases.items(), strict=True):
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            axes.barh(name, rate, 0.75, color=COLORS.get(name.split(",")[0].split()[0], OTHERS))
            axes.annotate(f" {rate:.0f}", (rate, name), va="center", fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        style_axes(axes, title=shape, xlabel="images per second", grid=False)
    figure.suptitle(f"MAE pre-training, {device_name(runs[0])}", fontsize=10, x=0.01, ha="left")
    save_figure(figure, path)


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
        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        atomic_write_text(target, text)
        drawn = {picture_name(d): d for d in by_device(documents, "step") if pictured(d)}
        for name, runs in drawn.items():
            draw(runs, root / FOLDER / name)
        console.info(f"wrote {PAGE} and {len(drawn)} pictures")
        for path in sorted((root / FOLDER).glob("*.*")):
            if path.name not in drawn:
                console.warn(f"{FOLDER}/{path.name} is not part of the report any more; delete it")
    return 0
