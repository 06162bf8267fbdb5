"""The tables at the end of a run. Everything else that was found stands in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sssd_fast.run.log import Console

from .formats import NONE, percent, size_text, time_text
from .rows import share_of_ceiling

Cell = Callable[[dict[str, Any], dict[str, Any]], str]  # (head of the file, row)


def _time(row: dict[str, Any], name: str) -> str:
    return time_text(row["time"][name]) if row["time"] else NONE


def _gap(row: dict[str, Any]) -> str:
    gap = row["time"] and row["time"]["gap"]
    return NONE if gap is None else f"{gap:+.1%}"


def _versus(row: dict[str, Any]) -> str:
    found = row["versus"]
    return NONE if found is None else f"{found['ratio']:.2f} {found['verdict']}"


def _error(row: dict[str, Any]) -> str:
    return NONE if row["error"] is None else f"{row['error']:.0e}"


def _more(name: str, form: str) -> Cell:
    return lambda head, row: (
        NONE if row["more"].get(name) is None else format(row["more"][name], form)
    )


def _size(row: dict[str, Any], name: str) -> str:
    return NONE if row[name] is None else size_text(row[name])


def _ceiling(head: dict[str, Any], row: dict[str, Any]) -> str:
    found = share_of_ceiling({**head, "rows": []}, row)
    return NONE if found is None else f"{percent(found.share)} {found.ceiling}"


PROVIDER: dict[str, Cell] = {"provider": lambda head, row: row["provider"]}
TIMES: dict[str, Cell] = {
    "median": lambda head, row: _time(row, "median_us"),
    "p20": lambda head, row: _time(row, "p20_us"),
    "p80": lambda head, row: _time(row, "p80_us"),
    "gap": lambda head, row: _gap(row),
    "against ours": lambda head, row: _versus(row),
}
REST: dict[str, Cell] = {
    "error": lambda head, row: _error(row),
    "memory": lambda head, row: _size(row, "peak_bytes"),
}
OPS: dict[str, Cell] = {**PROVIDER, **TIMES, "ceiling": _ceiling, **REST}
STEP: dict[str, Cell] = {
    **PROVIDER, **TIMES, "images/s": _more("images_per_s", ".4g"), "MFU": _more("mfu", ".1%"), "loss": _more("loss", ".4f"), **REST,
}  # fmt: skip
MEMORY: dict[str, Cell] = {
    **PROVIDER, "images": lambda head, row: str(row["sizes"].get("batch", NONE)), "memory": REST["memory"],
    "cap, GB": _more("cap_gb", "g"), "largest batch": _more("largest_batch", "d"),
}  # fmt: skip
COLUMNS = {"kernels": OPS, "attention": OPS, "step": STEP, "memory": MEMORY}
# rows with these in common stand in one table
GROUP = {"memory": ("case", "dtype")}
USUAL_GROUP = ("case", "shape", "dtype", "phase")


def show(console: Console, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """A table for each piece of work, so that none is wider than a terminal; below it who has no figure, and why."""
    console.rule(f"{head['kind']}: {head['device']['name']}, torch {head['versions']['torch']}")
    for title, columns, cells, reasons in tables(head, rows):
        if cells:
            console.table(title, columns, cells)
        for why in reasons:
            console.info(why if cells else f"{title}: {why}")


def tables(
    head: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """(title, columns, cells, reasons) of each piece of work; a column in which nothing stands is left out."""
    columns, names = COLUMNS[head["kind"]], GROUP.get(head["kind"], USUAL_GROUP)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    for key, members in groups.items():
        cells = [
            [cell(head, row) for cell in columns.values()]
            for row in members
            if row["reason"] is None
        ]
        used = [i for i, _ in enumerate(columns) if any(row[i] not in ("", NONE) for row in cells)]
        reasons = [
            f"  {row['provider']}: {row['reason']}" for row in members if row["reason"] is not None
        ]
        yield (
            ", ".join(key),
            [list(columns)[i] for i in used],
            [[row[i] for i in used] for row in cells],
            reasons,
        )
