"""A report as a list of blocks, and its two forms: Markdown with linked pictures, and one HTML file that holds everything.

The HTML needs no network and no script; pictures are embedded. All text is escaped, since file names may hold any character.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from urllib.parse import quote

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Lead:
    """The line under the title."""

    text: str


@dataclass(frozen=True)
class Banner:
    """A warning nobody may overlook."""

    title: str
    text: str


@dataclass(frozen=True)
class Missing:
    """A part that is not there, and what would make it."""

    text: str


@dataclass(frozen=True)
class Cards:
    """Headline figures: (name, value, detail)."""

    cards: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Facts:
    """Name and value; `wide` sets long lists in two columns."""

    rows: Sequence[tuple[str, str]]
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """`numeric`: all columns after the first are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = False


@dataclass(frozen=True)
class Points:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class Pair:
    """Pictures that stand side by side where there is room."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Gallery:
    """(picture or None, title, lines)."""

    entries: Sequence[tuple[Path | None, str, Sequence[str]]]


Block = (
    Heading | Text | Lead | Banner | Missing | Cards | Facts | Table | Points | Code | Picture | Pair | Gallery
)  # fmt: skip


def to_html(title: str, blocks: Sequence[Block], footer: str) -> str:
    """One HTML document. Headings of level 2 get anchors and a contents line under the title."""
    parts, links = [], []
    for place, block in enumerate(blocks):
        anchor = f"part-{place}" if isinstance(block, Heading) and block.level == 2 else ""
        if isinstance(block, Heading) and anchor:
            links.append(f'<a href="#{anchor}">{_html(block.text)}</a>')
        parts.append((block, anchor))
    body = []
    for block, anchor in parts:
        body.append(_block_html(block, anchor))
        if isinstance(block, Lead):
            body.append(f'<nav aria-label="Contents">{" ".join(links)}</nav>')
    body.append(f"<footer>{_html(footer)}</footer>")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=_html(title), body="\n".join(body))


def to_markdown(blocks: Sequence[Block], folder: Path, footer: str) -> str:
    """Markdown whose picture links are relative to `folder`."""
    return (
        "\n\n".join([*(_block_markdown(block, folder) for block in blocks), "---", _md(footer)])
        + "\n"
    )


def _block_html(block: Block, anchor: str) -> str:
    if isinstance(block, Heading):
        mark = f' id="{anchor}"' if anchor else ""
        return f"<h{block.level}{mark}>{_html(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{_html(block.text)}</p>"
    if isinstance(block, Lead):
        return f'<p class="lead">{_html(block.text)}</p>'
    if isinstance(block, Banner):
        return f'<div class="banner" role="note"><strong>{_html(block.title)}</strong>{_html(block.text)}</div>'
    if isinstance(block, Missing):
        return f'<p class="missing">{_html(block.text)}</p>'
    if isinstance(block, Cards):
        cells = "".join(
            f"<div><span>{_html(name)}</span><strong>{_html(value)}</strong><span>{_html(detail)}</span></div>"
            for name, value, detail in block.cards
        )
        return f'<div class="cards">{cells}</div>'
    if isinstance(block, Facts):
        rows = "".join(
            f'<tr><th scope="row">{_html(k)}</th><td>{_html(v)}</td></tr>' for k, v in block.rows
        )
        table = f'<table class="facts"><tbody>{rows}</tbody></table>'
        return f'<div class="{"columns" if block.wide else "scroll"}">{table}</div>'
    if isinstance(block, Table):
        return _table_html(block)
    if isinstance(block, Points):
        return "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre>{_html(block.text)}</pre>"
    if isinstance(block, Picture):
        image = f'<img src="{_data(block.path)}" alt="{_html(block.alt)}">'
        return f"<figure>{image}<figcaption>{_html(block.caption)}</figcaption></figure>"
    if isinstance(block, Pair):
        return (
            '<div class="pair">'
            + "".join(_block_html(picture, "") for picture in block.pictures)
            + "</div>"
        )
    items = []
    for path, title, lines in block.entries:
        shown = (
            f'<img src="{_data(path)}" alt="{_html(title)}">'
            if path
            else '<div class="none">no picture</div>'
        )
        items.append(
            f"<li>{shown}<b>{_html(title)}</b>{''.join(f'<span>{_html(line)}</span>' for line in lines)}</li>"
        )
    return f'<ul class="gallery">{"".join(items)}</ul>'


def _table_html(table: Table) -> str:
    number = ' class="number"' if table.numeric else ""
    head = "".join(
        f'<th scope="col"{number if place else ""}>{_html(name)}</th>'
        for place, name in enumerate(table.header)
    )
    rows = "".join(
        f'<tr><th scope="row">{_html(row[0])}</th>{"".join(f"<td{number}>{_html(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _block_markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_md(block.text)}"
    if isinstance(block, (Text, Lead)):
        return _md(block.text)
    if isinstance(block, Banner):
        return f"> **{_md(block.title.upper())}**\n> {_md(block.text)}"
    if isinstance(block, Missing):
        return f"*{_md(block.text)}*"
    if isinstance(block, Cards):
        return "\n".join(
            f"- {_md(name)}: **{_md(value)}** {_md(detail)}".rstrip()
            for name, value, detail in block.cards
        )
    if isinstance(block, Facts):
        return _table_markdown(["", ""], block.rows, False)
    if isinstance(block, Table):
        return _table_markdown(block.header, block.rows, block.numeric)
    if isinstance(block, Points):
        return "\n".join(f"- {_md(item)}" for item in block.items)
    if isinstance(block, Code):
        fence = "`" * max(
            3, 1 + max((len(run) for run in re.findall(r"`+", block.text)), default=0)
        )
        return f"{fence}\n{_clean(block.text)}\n{fence}"
    if isinstance(block, Picture):
        return f"![{_md(block.alt)}]({_link(block.path, folder)})\n\n{_md(block.caption)}"
    if isinstance(block, Pair):
        return "\n\n".join(_block_markdown(picture, folder) for picture in block.pictures)
    rows = []
    for path, title, lines in block.entries:
        shown = f"![{_md(title)}]({_link(path, folder)})" if path else "no picture"
        rows.append((shown, "<br>".join(_md(text) for text in (title, *lines))))
    return "\n".join(
        ["| Image | |", "| --- | --- |", *(f"| {image} | {text} |" for image, text in rows)]
    )


def _table_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool) -> str:
    rule = ["---", *(["---:" if numeric else "---"] * (len(header) - 1))]
    lines = [[_md(cell) for cell in header], rule, *([_md(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: bytes of a file name that are not UTF-8 become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _html(text: str) -> str:
    return html.escape(_clean(text))


def _md(text: str) -> str:
    """Characters that Markdown or its embedded HTML would act on are escaped; line breaks become blanks."""
    escaped = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(_clean(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
