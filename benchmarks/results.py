"""One JSON file per run, rewritten after every row, so that a run that is stopped loses nothing.

Head: schema, kind (ops, attention, step, memory, loader), command, quick, started, seconds,
finished, commit, modified, device, versions, ops (op -> why its kernel does not run; null if it
runs), ceilings, missing (provider -> why it is not available), skipped (cases not measured because
the time was up), settings, rows.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import mae_kernels
from benchmarks.race import Time, Versus
from sssd_fast.errors import SssdError
from sssd_fast.performance.ceilings import measure_ceilings
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_text

SCHEMA = "sssd_fast.benchmarks/3"
_OWN = Path(__file__).resolve().parent / "results"
FOLDER = _OWN if _OWN.is_dir() else Path("benchmarks", "results")  # of an installed package
KEY = ("case", "shape", "dtype", "phase", "provider")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass
class Row:
    case: str  # the op, the task of the step ("MAE", "finetune"), or the data set of a loader
    shape: str  # in words; `sizes` has the numbers
    dtype: str  # "fp32", "bf16", "fp16"; of loaders "uint8"
    phase: str  # "forward", "forward+backward", "step", "memory", "epoch"
    provider: str
    sizes: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None  # why there is no result
    error: float | None = None  # against fp64, relative to the largest value
    allowed: float | None = None
    time: Time | None = None
    versus: Versus | None = None  # relative to ours; None for ours
    load: float | None = None  # share of the CPUs used by other processes during the race
    first_call_s: float | None = None  # including compilation and allocation
    peak_bytes: int | None = None  # beyond the inputs
    bytes: float | None = None  # that the operation must move
    flops: float | None = None
    # further results of the kind: images_per_s, mfu, ...
    more: dict[str, Any] = field(default_factory=dict)


class Results:
    """The file of a run; leaving its `with` block without an exception marks it as finished."""

    def __init__(
        self,
        kind: str,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        words: Sequence[str],
        out: Path = FOLDER,
        *,
        quick: bool = False,
        ceilings: dict[str, Any] | None = None,
    ) -> None:
        """out: a folder, or FILE.json. ceilings: None = measure them."""
        if ceilings is None:
            found = {NAMES[dtype]: measure_ceilings(device, dtype) for dtype in dtypes}
            ceilings = {
                "copy_bytes_per_s": max(one.copy_bytes for one in found.values()),
                "matmul_flops_per_s": {name: one.matmul_flops for name, one in found.items()},
            }
        self.rows = list[dict[str, Any]]()
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
            **describe(device),
            "ceilings": ceilings,
            "missing": {},
            "skipped": [],
            "settings": {},
        }
        name = f"{kind}-{slug(self.head['device']['name'])}-{now:%Y%m%d-%H%M%S}.json"
        # quick runs are not reported: they go into a subfolder that git ignores
        folder = out / "quick" if quick else out
        self.path = out if out.suffix == ".json" else folder / name

    def add(self, *rows: Row) -> None:
        self.rows += [asdict(row) for row in rows]
        self.save()

    def save(self) -> None:
        self.head["seconds"] = round(time.perf_counter() - self._started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, dumps({**self.head, "rows": self.rows}))

    def __enter__(self) -> Results:
        self.save()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.head["finished"] = kind is None
        self.save()


def _without_folders(words: Sequence[str]) -> Iterator[str]:
    """Paths of this machine are reduced to their last component."""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        yield f"{option}{equals}{Path(value).name or value}" if "/" in value else word


def dumps(document: dict[str, Any]) -> str:
    """JSON with one line per row and five significant digits."""
    head = _rounded({**document, "rows": []})
    rows = ",\n  ".join(json.dumps(_rounded(row)) for row in document["rows"])
    return json.dumps(head, indent=1).replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def load(path: str | Path) -> dict[str, Any]:
    """A result file. Raises SssdError if it is missing, unreadable or of another schema."""
    try:
        document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = document["schema"]
    except FileNotFoundError:
        raise SssdError(f"{path}: no such file; give a result of `sssd-fast bench`") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SssdError(f"{path}: not a result of `sssd-fast bench` ({error!r})") from error
    if schema != SCHEMA:
        raise SssdError(
            f"{path}: its schema is {schema!r}, needs {SCHEMA!r}; measure again with this version"
        )
    return document


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """Identifies a row within its file."""
    return tuple(row[name] for name in KEY)


def describe(device: torch.device) -> dict[str, Any]:
    """Commit, device, versions and ops; no path and no host name."""
    env = collect_environment()
    versions = {name: version for name, version in env["packages"].items() if version}
    versions |= {name: p["version"] for name, p in env["providers"].items() if p["version"]}
    versions |= {"python": env["python"]["version"], "cuda": torch.version.cuda}
    cpu = f"{env['cpu']['model']}, {env['cpu']['cores_usable']} cores"
    found: dict[str, Any] = {"type": device.type, "name": cpu, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "host": cpu, "driver": env["driver"]["version"]}
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return {
        "commit": env["sssd_fast"]["commit"],
        "modified": env["sssd_fast"]["modified"],
        "device": found,
        "versions": versions,
        "ops": mae_kernels.info(),
    }


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3", for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
