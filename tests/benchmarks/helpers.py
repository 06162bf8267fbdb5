"""Benches and result files for tests; the numbers are made up and never committed as results."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.harness import Bench
from benchmarks.race import Cache, Time, Versus
from benchmarks.results import Results, Row
from sssd_fast.config import Config, from_dict
from sssd_fast.run.log import Console

CPU = torch.device("cpu")
PEAK = 1e12  # FLOP/s of the ceiling
CEILINGS = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": {"fp32": PEAK, "bf16": PEAK}}


def make_bench(kind: str, folder: Path, only: tuple[str, ...] = (), **more: Any) -> Bench:
    out = folder / f"{kind}.json"
    found = Results(kind, CPU, [], [kind], out, ceilings=dict(CEILINGS))
    console = Console(stream=io.StringIO())
    return Bench(CPU, console, found, Cache(CPU, 0), samples=4, only=only, **more)


def tiny_config() -> Config:
    model = {"image_size": 32, "patch_size": 8, "in_channels": 3, "width": 32, "heads": 2}
    model |= {"depth": 1, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
    objective = {"head_hidden": 20, "head_bottleneck": 12, "prototypes": 24}
    rates = {task: {"base_lr": 0.1} for task in ("pretrain", "finetune")}
    return from_dict({"model": model, "objective": objective, **rates})


def row(case: str, provider: str, us: float | None, ours: float | None = None, **more: Any) -> Any:
    """A row as in a file; `ours`: the time of ours, which gives it a comparison."""
    fields: dict[str, Any] = {"shape": "ViT-B, 8 images", "dtype": "fp32", "phase": "forward"}
    fields |= {"sizes": {"batch": 8}, "error": 1e-7, "allowed": 3e-6, "load": 0.0, **more}
    if us is not None:
        fields["time"] = Time(us, 0.96 * us, 1.04 * us, 50, 0.01, us)
    if us and ours:
        ratio = us / ours
        verdict = "same" if abs(ratio - 1) < 0.02 else "slower" if ratio > 1 else "faster"
        fields["versus"] = Versus(ratio, 0.97 * ratio, 1.03 * ratio, verdict)
    return asdict(Row(case, provider=provider, **fields))


def document(kind: str, rows: list[Any], device: str = "cpu", **more: Any) -> dict[str, Any]:
    gpu = {"type": "cuda", "name": "Made-up GPU", "memory_gib": 79.1, "driver": "580.1"}
    cpu = {"type": "cpu", "name": "Made-up CPU, 2 cores", "threads": 2}
    return {
        "schema": results.SCHEMA,
        "kind": kind,
        "command": f"sssd-fast bench {kind}",
        "quick": False,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": True,
        "commit": "0123456789abcdef",
        "modified": False,
        "device": gpu if device == "cuda" else cpu,
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "ceilings": CEILINGS,
        "missing": {},
        "skipped": [],
        "settings": {},
        "file": "made-up.json",
        "rows": rows,
        **more,
    }
