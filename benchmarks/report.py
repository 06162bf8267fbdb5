"""`sssd-fast bench report`: README's tables, docs/benchmarks.md, docs/results.md, pictures and long tables, from the files in
benchmarks/results.

Of each kind and device the newest file counts; quick runs never do. In the README only what stands between `<!-- bench:NAME -->` and
`<!-- /bench:NAME -->` is replaced. `--check` writes nothing and says which texts differ from what the files give; pictures are not
compared, since their bytes depend on the version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sssd_fast.errors import SssdError
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.log import Console

from . import plots, results, tables
from .formats import Document, caption, device_name
from .machine import slug

ROOT = Path(__file__).resolve().parent.parent
README, PAGE, FOLDER = "README.md", "docs/benchmarks.md", "docs/benchmarks"
LONG = "kernels"  # thousands of rows: in a page of its own per device
OVERVIEW, PAPER = "summary", "paper"
NAMES = (OVERVIEW, *tables.SECTIONS, PAPER)
KINDS = ("kernels", "attention", "step", "memory", "loader-speed", "loader-parity", "loader-memory")
TITLES = {
    "kernels": "Ops",
    "attention": "Attention",
    "step": "Training step",
    "memory": "Training memory",
    "loader": "Loading",
}
MARKER = re.compile(r"<!-- (/?)bench:(\S+) -->")
AGAIN = "run `sssd-fast bench report`"


@dataclass(frozen=True)
class Found:
    documents: list[Document]  # the newest of each kind and device: GPUs first
    warnings: list[str]


def find(folder: Path) -> Found:
    """Raises SssdError for a file that is no JSON or no result at all."""
    newest, warnings = dict[tuple[str, str], Document](), list[str]()
    loaded = []
    for path in sorted(folder.glob("*.json")):
        schema = _schema(path)
        if schema is not None and schema != results.SCHEMA:
            warnings.append(
                f"{path.name} is left out: its schema is {schema}, not {results.SCHEMA}"
            )
            continue
        document = {**results.load(path), "file": path.name}
        if document["kind"] not in KINDS:
            raise SssdError(
                f"{path}: its kind is {document['kind']!r}, known are {', '.join(KINDS)}"
            )
        if document["quick"]:
            warnings.append(f"{path.name} is left out: a quick run")
        else:
            loaded.append(document)
    for document in sorted(loaded, key=lambda one: one["started"]):
        newest[document["kind"], document["device"]["name"]] = document
    order = sorted(
        newest.values(),
        key=lambda one: (
            one["device"]["type"] != "cuda",
            one["device"]["name"],
            KINDS.index(one["kind"]),
        ),
    )
    warnings += [
        f"{one['file']} is unfinished; it is shown, and said to be"
        for one in order
        if not one["finished"]
    ]
    return Found(order, warnings)


def _schema(path: Path) -> str | None:
    """None where results.load has more to say."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("schema") if isinstance(document, dict) else None


# ---- texts ----


def texts(found: Found, readme: str) -> dict[str, str]:
    """What README and pages must be, by path from the root of the repository."""
    documents = found.documents
    sections = {name: tables.summary(name, documents) for name in tables.SECTIONS}
    sections[OVERVIEW] = tables.overview(documents)
    sections[PAPER] = "NVIDIA GPU: not measured. Small models on a processor: docs/results.md."
    long = {
        f"{FOLDER}/{long_name(one)}": long_page(one) for one in documents if one["kind"] == LONG
    }
    pages = {PAGE: page(documents)}
    return {README: replace(readme, sections), **pages, **long}


def replace(text: str, sections: dict[str, str]) -> str:
    """`text` with each section between its markers. Raises SssdError where markers are missing, doubled, crossed or unknown."""
    found = list(MARKER.finditer(text))
    for number, marker in enumerate(found):
        name, closes = marker.group(2), marker.group(1) == "/"
        if name not in sections:
            raise SssdError(
                f"{README}: marker {marker.group()} names no section; known are {', '.join(sections)}"
            )
        expected = (
            f"<!-- /bench:{found[number - 1].group(2)} -->" if number % 2 else "an opening marker"
        )
        if closes != bool(number % 2) or (closes and marker.group() != expected):
            raise SssdError(f"{README}: marker {marker.group()} stands where {expected} is needed")
    for name in sections:
        count = sum(marker.group(2) == name for marker in found)
        if count != 2:
            has = (
                "missing" if count == 0 else "not closed" if count == 1 else "there more than once"
            )
            raise SssdError(
                f"{README}: marker <!-- bench:{name} --> is {has}; write it and <!-- /bench:{name} --> on lines of their own, once"
            )
    out, end = [], 0
    for begin, close in zip(found[::2], found[1::2], strict=True):
        out += [text[end : begin.end()], "\n", sections[begin.group(2)].strip(), "\n"]
        end = close.start()
    return "".join([*out, text[end:]])


INTRODUCTION = """\
# Benchmarks

Written by `sssd-fast bench report` from the files in `benchmarks/results`; do not edit it by hand.
[benchmarks/README.md](../benchmarks/README.md) has the rules that all measurements follow.

- A figure is the median of single calls; 20 % and 80 % quantiles and the number of calls stand beside it. Providers take turns, the last
  cache is emptied before every call, and compiling and warming up enter no figure. "gap" is a second pass against the first.
- "time / ours" is a provider's time divided by ours, with its bootstrapped 95 % interval; above 1 ours is faster. "same": the interval
  holds 1, or the two are closer than 2 % or than the gap between their own passes. "slower" and "faster" speak of the provider.
- "error / allowed": largest error against fp64, relative to the largest value, and the most that gets a time: twice that of plain eager
  PyTorch in the same dtype, and 32 fp32 roundings for sums in another order.
- "peak" is the largest memory of a call beyond its inputs.
- A † marks what was measured before the sources that it depends on changed."""
AGAIN_TEXT = """\
## How to measure again

Each table names the command it came from. `sssd-fast bench kernels`, `attention`, `step`, `memory` and `loader` write one file each to
`benchmarks/results`, with every row as soon as it is there. `sssd-fast bench compare A.json B.json --fail-over 5%` holds two files of one
device against each other. `sssd-fast bench report` writes this page, its pictures and the README's tables."""


def page(documents: Sequence[Document]) -> str:
    blocks = [INTRODUCTION, "## In short", tables.overview(documents)]
    pictures = plots.planned(documents)
    blocks[2] = blocks[2].replace("(docs/benchmarks.md)", "(benchmarks.md)")
    for section in tables.SECTIONS:
        mine = [document for document in documents if tables.section_of(document) == section]
        blocks += [f"## {TITLES[section]}", *tables.not_measured(mine)]
        for document in mine:
            rest = document["kind"].partition("-")[2]
            blocks += [f"### {device_name(document)}{': ' * bool(rest)}{rest}"]
            blocks += [
                tables.with_note(document, caption(document)) + f" File: `{document['file']}`."
            ]
            blocks += [
                f"![{plot.title}](benchmarks/{plot.file})"
                for plot in pictures
                if plot.document is document
            ]
            if document["kind"] == LONG:
                blocks += [
                    tables.short(document),
                    f"[All {len(document['rows'])} rows](benchmarks/{long_name(document)})",
                ]
            else:
                blocks += [tables.full(document)]
    return "\n\n".join([*blocks, AGAIN_TEXT]) + "\n"


def long_name(document: Document) -> str:
    return f"{document['kind']}-{slug(document['device']['name'])}.md"


def long_page(document: Document) -> str:
    title = f"# {TITLES[document['kind']]}, all rows: {device_name(document)}"
    source = f"Written by `sssd-fast bench report` from `{document['file']}`; [what the columns mean](../benchmarks.md)."
    return (
        "\n\n".join(
            [title, source, tables.with_note(document, caption(document)), tables.full(document)]
        )
        + "\n"
    )


# ---- command line ----


def differing(root: Path, folder: Path) -> list[str]:
    """The texts that are not what the files in `folder` give, by path from the root."""
    wanted = texts(find(folder), _read(root / README))
    return [
        name
        for name, text in wanted.items()
        if not (root / name).is_file() or _read(root / name) != text
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SssdError(
            f"{path}: {error.strerror}; `sssd-fast bench report` runs in a checkout of the repository"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 where README or docs are not up to date",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        metavar="DIR",
        help="in place of benchmarks/results",
    )


def main(args: argparse.Namespace, root: Path = ROOT) -> int:
    folder = Path(args.results)
    if not folder.is_dir():
        raise SssdError(
            f"--results {folder}: no such folder; give one with files that `sssd-fast bench` wrote"
        )
    with Console() as console:
        found = find(folder)
        for text in found.warnings:
            console.warn(text)
        if args.check:
            stale = differing(root, folder)
            for name in stale:
                console.error(f"{name} is not what the files in {folder.name} give; {AGAIN}")
            return int(bool(stale))
        written = texts(found, _read(root / README))
        pictures = plots.write(found.documents, root / FOLDER)
        for name, text in written.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(root / name, text)
        count = len(found.documents)
        console.info(f"wrote {', '.join(written)} and {len(pictures)} pictures from {count} files")
        current = {*pictures, *(root / name for name in written)}
        for place in (FOLDER,):
            for path in sorted(set((root / place).glob("*.*")) - current):
                console.warn(f"{path.name} in {place} belongs to no file any more; delete it")
    return 0
