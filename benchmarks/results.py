"""One JSON file per run, rewritten after every row, so that a run that is stopped loses nothing.

Head: schema, kind (ops, attention, step, memory, loader, loader-parity, loader-memory), command,
quick, started, seconds, finished, commit, modified, sources, device, clocks (before, after),
versions, ops (op -> why its kernel does not run; null if it runs), ceilings, missing
(provider -> why it is not available), skipped (cases not measured because the time was up),
settings, rows.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
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
FOLDER = Path(__file__).resolve().parent / "results"
KEY = ("case", "shape", "dtype", "phase", "provider")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
KERNELS = Path(mae_kernels.__file__).parent
CLOCKS = ["clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit"]
CLOCKS.append("temperature.gpu")


@dataclass
class Row:
    case: str  # the op, the task of the step ("MAE", "SSSD"), or the data set of a loader
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
    # further results of the kind: images_per_s, mfu, loss, batch, ...
    more: dict[str, Any] = field(default_factory=dict)


class Results:
    """The file of a run; leaving its `with` block without an exception marks it as finished."""

    def __init__(
        self,
        kind: str,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        words: Sequence[str],
        path: Path | None = None,
        folder: Path = FOLDER,
        quick: bool = False,
        settings: dict[str, Any] | None = None,
        ceilings: dict[str, Any] | None = None,
    ) -> None:
        """path: of the file; None = a new name in `folder`. ceilings: None = measure them."""
        self.device = device
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
            "clocks": {"before": clocks(device), "after": None},
            "ceilings": measured_ceilings(device, dtypes) if ceilings is None else ceilings,
            "missing": {},
            "skipped": [],
            "settings": settings or {},
        }
        name = f"{kind}-{slug(self.head['device']['name'])}-{now:%Y%m%d-%H%M%S}.json"
        # quick runs are not reported: they go into a subfolder that git ignores
        self.path = path or (folder / "quick" / name if quick else folder / name)

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
        self.head["clocks"]["after"] = clocks(self.device)
        self.head["finished"] = kind is None
        self.save()


def _without_folders(words: Sequence[str]) -> Iterator[str]:
    """Paths of this machine are reduced to their last component."""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        yield f"{option}{equals}{Path(value).name or value}" if "/" in value else word


def dumps(document: dict[str, Any]) -> str:
    """JSON with one line per row and five significant digits."""
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
    """A result file. Raises SssdError if it is missing, unreadable or of another schema."""
    hint = "give a file that `sssd-fast bench` wrote"
    try:
        document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SssdError(f"{path}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise SssdError(f"{path}: cannot be read as JSON ({error}); {hint}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise SssdError(
            f"{path}: its schema is {schema!r}, needs {SCHEMA!r}; measure again with this version"
        )
    return document


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """Identifies a row within its file."""
    return tuple(row[name] for name in KEY)


# ---- the machine ----


def describe(device: torch.device) -> dict[str, Any]:
    """Commit, device, versions and ops; no path and no host name."""
    env = collect_environment()
    versions = {name: version for name, version in env["packages"].items() if version}
    versions |= {name: p["version"] for name, p in env["providers"].items() if p["version"]}
    versions["python"] = env["python"]["version"]
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    cpu = f"{env['cpu']['model']}, {env['cpu']['cores_usable']} cores"
    found: dict[str, Any] = {"type": device.type, "name": cpu, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "type": "cuda",
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": env["driver"]["version"],
            "host": cpu,
        }
    return {
        "commit": env["sssd_fast"]["commit"],
        "modified": env["sssd_fast"]["modified"],
        "sources": sources_hash(),
        "device": found,
        "versions": versions,
        "ops": mae_kernels.info(),
    }


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and temperature by nvidia-smi; None on a CPU or without nvidia-smi."""
    if device.type != "cuda":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    which = f"--id=GPU-{uuid}" if uuid else f"--id={index}"
    command = ["nvidia-smi", which, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = (value.strip() for value in done.stdout.strip().split(","))
    return dict(zip(CLOCKS, values, strict=False))


def measured_ceilings(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """bytes/s of a large copy (read plus written) and FLOP/s of a large product by dtype."""
    found = {NAMES[dtype]: measure_ceilings(device, dtype) for dtype in dtypes}
    return {
        "copy_bytes_per_s": max(one.copy_bytes for one in found.values()),
        "matmul_flops_per_s": {name: one.matmul_flops for name, one in found.items()},
    }


@cache
def sources_hash() -> str:
    """SHA-256 of mae_kernels and of the benchmarks."""
    digest = hashlib.sha256()
    for folder in (KERNELS, FOLDER.parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def is_stale(document: dict[str, Any]) -> bool:
    """Whether mae_kernels or the benchmarks have changed since the run."""
    return bool(document.get("sources") != sources_hash())


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3", for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
