"""On what was measured: device, clocks as found, versions, commit, hashes of the sources, and what the device can reach."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import mae_kernels
from sssd_fast.performance.ceilings import measure_ceilings
from sssd_fast.run.environment import collect_environment

KERNELS = Path(mae_kernels.__file__).parent
TRAINER = KERNELS.parent.parent / "sssd_fast"
STEP_FILES = (
    "attention",
    "compute",
    "model",
    "objective",
    "optim",
    "step",
)  # what a training step is made of, beside the ops
CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def describe(device: torch.device) -> dict[str, Any]:
    """What the head of a result file says of the machine; without any path and without the name of the host."""
    env = collect_environment()
    versions = {
        "python": env["python"]["version"],
        **{name: v for name, v in env["packages"].items() if v},
    }
    for name, state in env["providers"].items():
        if state["version"]:
            versions[name] = state["version"]
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
        "kernel_sources": sources_hash(),
        "device": found,
        "versions": versions,
        "ops": mae_kernels.info(),
    }


def clocks(device: torch.device) -> dict[str, str] | None:
    """As nvidia-smi tells them now; None on the CPU and where it is missing."""
    if device.type != "cuda":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    which = f"--id=GPU-{uuid}" if uuid else f"--id={index}"
    command = ["nvidia-smi", which, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(CLOCKS, (value.strip() for value in told.strip().split(",")), strict=False))


def ceilings(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """Bytes per second of a large copy (read plus written), FLOP/s of a large product by dtype, measured here."""
    found = [asdict(measure_ceilings(device, dtype)) for dtype in dtypes]
    products = {NAMES[getattr(torch, one["dtype"])]: one["matmul_flops"] for one in found}
    return {
        "copy_bytes_per_s": max(one["copy_bytes"] for one in found),
        "matmul_flops_per_s": products,
    }


# ---- sources ----


def sources_hash(what: str | None = None) -> str:
    """sha256 of the sources that a figure depends on.

    what: None = all of mae_kernels; the name of an op = its file and what that imports from the package; "step" = all of
    mae_kernels and the trainer's files that a step is made of.
    """
    if what is None or what == "step":
        files = sorted(KERNELS.glob("*.py"))
        files += [TRAINER / f"{name}.py" for name in STEP_FILES] if what == "step" else []
    else:
        module = str(getattr(mae_kernels, what).__module__).rpartition(".")[2]
        files = sorted(KERNELS / f"{name}.py" for name in _closure(module))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _closure(module: str) -> set[str]:
    """The module and, transitively, what it imports relatively."""
    found, left = set[str](), [module]
    while left:
        name = left.pop()
        if name in found or not (KERNELS / f"{name}.py").is_file():
            continue
        found.add(name)
        for node in ast.walk(ast.parse((KERNELS / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                left += [node.module] if node.module else [alias.name for alias in node.names]
    return found


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3": for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
