"""One JSON file per run, written anew after every row, so that a run that is stopped loses nothing.

Head: schema, kind (kernels, attention, step, memory, loader-...), command, quick, started, seconds, finished, commit, modified,
kernel_sources, device, clocks (before, after), versions, ceilings, missing (provider -> why it could not take part), left_out (what
was not measured because time was up), settings, rows.

A row of kernels, attention, step and memory:

    case          the op, or the task of the step ("MAE", "SSSD")
    shape         in words; `sizes` has the numbers
    dtype         "fp32", "bf16", "fp16"
    phase         "forward", "backward", "forward+backward", "step"
    provider      who computed it
    reason        why there is no time; null where there is one
    error, allowed   against fp64, relative to the largest value; null where nothing can be compared
    time          median_us, p20_us, p80_us, n, again_us, gap; null without a time
    versus        this provider's time against ours: ratio, low, high, verdict; null for ours
    first_call_s  compilation and allocation included
    peak_bytes    above inputs
    bytes, flops  what the call must move and compute, by formula
    sources       hash of the sources that the figure depends on
    more          what else the kind has: images_per_s, mfu, loss, batch, cap_gb ...

Those of the loaders are in images per second and stand in loader.py.
"""

from __future__ import annotations

import datetime
import json
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sssd_fast.errors import SssdError
from sssd_fast.run.files import atomic_write_text

from . import machine
from .measure import Time, Versus

SCHEMA = "sssd_fast.benchmarks/2"
FOLDER = Path(__file__).resolve().parent / "results"
KEY = ("case", "shape", "dtype", "phase", "provider")


@dataclass
class Row:
    case: str
    shape: str
    dtype: str
    phase: str
    provider: str
    sizes: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    error: float | None = None
    allowed: float | None = None
    time: Time | None = None
    versus: Versus | None = None
    first_call_s: float | None = None
    peak_bytes: int | None = None
    bytes: float | None = None
    flops: float | None = None
    sources: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Results:
    """The file of one run while it grows. Use as a context: leaving it without an error marks the run as finished."""

    def __init__(
        self,
        kind: str,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        *,
        words: Sequence[str],
        path: Path | None = None,
        quick: bool = False,
        settings: dict[str, Any] | None = None,
        ceilings: dict[str, Any] | None = None,
    ) -> None:
        self.device = device
        self.rows = list[dict[str, Any]]()
        self._drafts = list[dict[str, Any]]()
        self._started = time.perf_counter()
        now = datetime.datetime.now(datetime.timezone.utc)
        self.head: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "command": shlex.join(["sssd-fast", "bench", *_without_folders(words)]),
            "quick": quick,
            "started": now.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "finished": False,
            **machine.describe(device),
            "clocks": {"before": machine.clocks(device), "after": None},
            "ceilings": machine.ceilings(device, dtypes) if ceilings is None else ceilings,
            "missing": {},
            "left_out": [],
            "settings": settings or {},
        }
        name = f"{kind}-{machine.slug(self.head['device']['name'])}-{now:%Y%m%d-%H%M%S}.json"
        # quick runs are never reported, and lie where git does not see them
        self.path = (
            path if path is not None else FOLDER / "quick" / name if quick else FOLDER / name
        )

    def add(self, *rows: Row | dict[str, Any]) -> None:
        """Rows of a form of their own (loader) come as they are to stand in the file."""
        self.rows += [asdict(row) if isinstance(row, Row) else row for row in rows]
        self._drafts = []
        self.save()

    def draft(self, rows: Iterable[Row]) -> None:
        """Rows as far as they are known: they stand in the file until `add` brings the final ones, or for good if that never happens."""
        self._drafts = [asdict(row) for row in rows]
        self.save()

    def save(self) -> None:
        self.head["seconds"] = round(time.perf_counter() - self._started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, dumps({**self.head, "rows": [*self.rows, *self._drafts]}))

    def __enter__(self) -> Results:
        self.save()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.head["clocks"]["after"] = machine.clocks(self.device)
        self.head["finished"] = kind is None
        self.save()


def _without_folders(words: Sequence[str]) -> Iterator[str]:
    """A path of this machine says nothing to others: its last part stays."""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        yield f"{option}{equals}{Path(value).name or value}" if "/" in value else word


def dumps(document: dict[str, Any]) -> str:
    """JSON with one line per row and five significant digits: small files, readable differences."""
    head = {name: value for name, value in document.items() if name != "rows"}
    rows = ",\n  ".join(json.dumps(_rounded(row)) for row in document["rows"])
    text = json.dumps(_rounded(head), indent=1)
    return f'{text[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def load(path: str | Path) -> dict[str, Any]:
    """A result file. Raises SssdError naming it where it is missing, unreadable, or no result of this project."""
    try:
        document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SssdError(
            f"{path}: no such file; `sssd-fast bench kernels` and the like write one"
        ) from None
    except (OSError, ValueError) as error:
        raise SssdError(
            f"{path}: cannot be read as JSON ({error}); give a file that `sssd-fast bench` wrote"
        ) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise SssdError(
            f"{path}: its schema is {schema!r}, needs {SCHEMA!r}; measure again with this version"
        )
    return document


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What names a row in its file."""
    return tuple(row[name] for name in KEY)
