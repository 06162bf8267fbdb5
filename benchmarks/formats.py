"""Numbers, devices and tables as text, the same in every table, plot and message.

Three significant digits and no exponent: 12.3 µs, 1.23 ms, 0.45 s. Sizes are decimal (1 MB = 1e6 bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Document = dict[str, Any]
Row = dict[str, Any]
NONE = "-"  # a cell without a figure


def significant(value: float, digits: int = 3) -> str:
    """1234.5 -> "1,230", 0.04567 -> "0.0457", 2 -> "2.00"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def time_text(us: float) -> str:
    return _scaled(us, ("µs", "ms", "s"))


def size_text(size: float) -> str:
    return _scaled(size / 1e3, ("kB", "MB", "GB"))


def rate_text(per_s: float, unit: str) -> str:
    """("B/s" or "FLOP/s") with the prefix that fits."""
    return _scaled(per_s / 1e6, (f"M{unit}", f"G{unit}", f"T{unit}"))


def _scaled(value: float, units: Sequence[str]) -> str:
    """Value in the first of `units`, each a thousand times the one before; decided after rounding, so that 999.6 µs is 1.00 ms."""
    place = 0
    while place + 1 < len(units) and abs(float(f"{value:.2e}")) >= 1000:
        value, place = value / 1000, place + 1
    return f"{significant(value)} {units[place]}"


def percent(share: float, digits: int = 2) -> str:
    """0.634 -> "63 %", 0.0042 -> "0.42 %", 1.27 -> "127 %"."""
    return f"{significant(share * 100, digits if abs(share) < 0.995 else 3)} %"


def optional(value: float | None, text: Any) -> str:
    """`text(value)`, or the sign for no figure."""
    return NONE if value is None else str(text(value))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---- devices ----


def device_name(document: Document) -> str:
    """ "NVIDIA H100 80GB HBM3", or "AMD EPYC, 2 cores, 2 threads"."""
    device = document["device"]
    return (
        str(device["name"])
        if device["type"] == "cuda"
        else f"{device['name']}, {device['threads']} threads"
    )


def caption(document: Document) -> str:
    """One paragraph: what ran where, with which versions, from which sources, and how to do it again."""
    device, versions = document["device"], document["versions"]
    parts = [device_name(document)]
    if device["type"] == "cuda":
        parts.append(f"{device['memory_gib']} GiB, driver {device.get('driver') or 'unknown'}")
        parts += _clocks(document["clocks"])
    software = [
        f"{name} {versions[name]}"
        for name in ("torch", "triton", "cuda", "python")
        if versions.get(name)
    ]
    commit = str(document["commit"] or "unknown")[:10] + "+changes" * bool(document["modified"])
    parts += [*software, f"commit {commit}", f"`{document['command']}`", document["started"][:10]]
    text = "; ".join(parts) + "."
    ops = list(document["ops"].values())
    if (
        ops
        and all(op is not None and not str(op).startswith("triton") for op in ops)
        and not document["kind"].startswith("loader")
    ):
        text += " Here the ops are their references in plain PyTorch: the kernels need a GPU."
    if not document["finished"]:
        text += " **Unfinished: the run ended before its last row.**"
    if document["left_out"]:
        text += f" Left out because time was up: {', '.join(document['left_out'])}."
    if document["missing"]:
        text += (
            " Missing: "
            + "; ".join(f"{name} ({why})" for name, why in sorted(document["missing"].items()))
            + "."
        )
    return text


def _clocks(clocks: dict[str, Any]) -> list[str]:
    before, after = clocks.get("before") or {}, clocks.get("after") or {}
    found = []
    if before.get("power.limit"):
        found.append(f"power limit {before['power.limit']}")
    ends = [told["clocks.sm"] for told in (before, after) if told.get("clocks.sm")]
    if ends:
        most = f" of at most {before['clocks.max.sm']}" if before.get("clocks.max.sm") else ""
        found.append(f"SM clock {' before, '.join(ends)}{' after' if len(ends) == 2 else ''}{most}")
    return found
