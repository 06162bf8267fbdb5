"""The table at the end of a run. Everything else that was found stands in the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    return NONE if row["error"] is None else f"{row['error']:.0e} of {row['allowed']:.0e}"


def _more(name: str, form: str) -> Cell:
    return lambda head, row: NONE if row["more"].get(name) is None else format(row["more"][name], form)


def _size(row: dict[str, Any], name: str) -> str:
    return NONE if row[name] is None else size_text(row[name])


def _ceiling(head: dict[str, Any], row: dict[str, Any]) -> str:
    found = share_of_ceiling({**head, "rows": []}, row)
    return NONE if found is None else f"{percent(found.share)} {found.ceiling}"


NAMES: dict[str, Cell] = {
    "what": lambda head, row: row["case"],
    "shape": lambda head, row: row["shape"] if row["dtype"] in row["shape"] else f"{row['shape']}, {row['dtype']}",
    "pass": lambda head, row: row["phase"],
    "provider": lambda head, row: row["provider"],
}
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
    "note": lambda head, row: row["reason"] or "",
}
OPS: dict[str, Cell] = {**NAMES, **TIMES, "of the ceiling": _ceiling, **REST}
STEP: dict[str, Cell] = {
    **NAMES, **TIMES, "images/s": _more("images_per_s", ".4g"), "MFU": _more("mfu", ".1%"), "loss": _more("loss", ".4f"), **REST,
}  # fmt: skip
MEMORY: dict[str, Cell] = {
    **NAMES, "images": lambda head, row: str(row["sizes"].get("batch", NONE)), "memory": REST["memory"], "cap, GB": _more("cap_gb", "g"),
    "largest batch": _more("largest_batch", "d"), "note": REST["note"],
}  # fmt: skip
COLUMNS = {"kernels": OPS, "attention": OPS, "step": STEP, "memory": MEMORY}


def table(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells; a column in which nothing stands is left out."""
    columns = COLUMNS[head["kind"]]
    cells = [[cell(head, row) for cell in columns.values()] for row in rows]
    used = [i for i, _ in enumerate(columns) if any(row[i] not in ("", NONE) for row in cells)]
    return [list(columns)[i] for i in used], [[row[i] for i in used] for row in cells]
