"""Result files with made-up figures for tests of what reads them; none of them is ever committed as a result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.measure import Time, Versus
from benchmarks.results import Row

CPU = {"type": "cpu", "name": "Made-up CPU, 2 cores", "threads": 2}
GPU = {
    "type": "cuda", "name": "Made-up GPU 80GB", "memory_gib": 79.1, "capability": "9.0", "driver": "580.1",
    "host": "Made-up CPU, 2 cores",
}  # fmt: skip
CLOCKS = {"clocks.sm": "1980 MHz", "clocks.max.sm": "1980 MHz", "power.limit": "700.00 W"}
CEILINGS = {"copy_bytes_per_s": 2e12, "matmul_flops_per_s": {"bf16": 8e14, "fp32": 4e14}}


def row(
    case: str,
    provider: str,
    us: float | None,
    *,
    ours_us: float | None = None,
    shape: str = "ViT-B, 8 images",
    dtype: str = "fp32",
    phase: str = "forward",
    **more: Any,
) -> dict[str, Any]:
    """One row as a file holds it: quantiles 4 % off the median; `ours_us` gives it a comparison with ours."""
    time = None if us is None else Time(us, 0.96 * us, 1.04 * us, 50, 1.01 * us, 0.01)
    versus = None
    if us and ours_us:
        ratio = us / ours_us
        verdict = "same" if abs(ratio - 1) < 0.02 else "slower" if ratio > 1 else "faster"
        versus = Versus(ratio, 0.97 * ratio, 1.03 * ratio, verdict)
    fields = {
        "sources": machine.sources_hash(),
        "sizes": {"batch": 8},
        "error": 1e-7,
        "allowed": 3e-6,
        **more,
    }
    return asdict(Row(case, shape, dtype, phase, provider, time=time, versus=versus, **fields))


def race(case: str, times: dict[str, float | str], **more: Any) -> list[dict[str, Any]]:
    """A row per provider: its time, or the reason why it has none."""
    ours = times["ours"]
    rows = []
    for provider, us in times.items():
        told = {**more, "reason": us} if isinstance(us, str) else more
        reference = ours if isinstance(ours, float) and provider != "ours" else None
        rows.append(
            row(case, provider, None if isinstance(us, str) else us, ours_us=reference, **told)
        )
    return rows


def document(
    kind: str, rows: list[dict[str, Any]], device: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    device = CPU if device is None else device
    cuda = device["type"] == "cuda"
    return {
        "schema": results.SCHEMA, "kind": kind, "command": f"sssd-fast bench {kind}", "quick": False,
        "started": "2026-03-01T10:00:00+00:00", "seconds": 12.5, "finished": True,
        "commit": "0123456789abcdef0123456789abcdef01234567", "modified": False, "kernel_sources": machine.sources_hash(),
        "device": dict(device), "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1"}, "ops": {},
        "clocks": {"before": dict(CLOCKS), "after": dict(CLOCKS)} if cuda else {"before": None, "after": None},
        "ceilings": CEILINGS, "missing": {}, "left_out": [], "settings": {}, **more, "rows": rows,
    }  # fmt: skip


def save(found: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.dumps(found), encoding="utf-8")
    return path


# ---- one file of each kind ----

TIMES: dict[str, float | str] = {
    "published": 400.0, "tuned": 210.0, "tuned compiled": 80.0, "library": "no library has this op", "ours": 100.0,
    "ours compiled": 97.0,
}  # fmt: skip


def kernels(device: dict[str, Any] = CPU, **more: Any) -> dict[str, Any]:
    """Two ops at two batches; ours loses one of them to torch.compile."""
    found = []
    for batch in (8, 256):
        for case, factor in (("restore_tokens", 1.0), ("gelu_linear", 2.0)):
            times = {
                name: us if isinstance(us, str) else us * factor * batch / 8
                for name, us in TIMES.items()
            }
            times["tuned compiled"] = (
                80.0 * batch / 8 if case == "restore_tokens" else 300.0 * batch / 8
            )
            for phase in ("forward", "forward+backward"):
                found += race(
                    case, times, shape=f"ViT-B, {batch} images", phase=phase, sizes={"batch": batch}, bytes=1e6 * batch,
                    flops=1e9 * batch if factor > 1 else 0.0, peak_bytes=3_000_000, sources=machine.sources_hash(case),
                )  # fmt: skip
    return document("kernels", found, device, **more)


def step() -> dict[str, Any]:
    found = []
    for provider, ms in (("published", 90.0), ("plain compiled", 40.0), ("ours", 30.0)):
        more = {
            "images_per_s": 256e3 / ms,
            "mfu": 18 / ms,
            "mb_per_image": 20.0,
            "batch": 256,
            "loss": 0.9,
            "loss_start": 1.3,
        }
        sources = machine.sources_hash("step")
        found.append(
            row(
                "MAE",
                provider,
                ms * 1e3,
                ours_us=None if provider == "ours" else 3e4,
                phase="step",
                more=more,
                sources=sources,
            )
        )
    for order, (name, rate) in enumerate(
        (("published", 1000.0), ("compiled", 3000.0), ("fused", 2700.0))
    ):
        more = {"images_per_s": rate, "order": order}
        found.insert(
            0, row("waterfall MAE", name, 1e6 / rate, phase="step", more=more)
        )  # out of order on purpose
    return document("step", found, GPU)


def memory() -> dict[str, Any]:
    found = []
    for batch in (64, 128):
        for provider, size in (("published", 40e6), ("ours", 20e6)):
            told = {
                "sizes": {"batch": batch},
                "peak_bytes": int(size * batch),
                "sources": machine.sources_hash("step"),
            }
            found.append(
                row("MAE", provider, None, shape=f"ViT-B, {batch} images", phase="memory", **told)
            )
    for cap, fits, verified in ((12, 256, True), (16, 384, False)):
        more = {
            "cap_gb": cap,
            "largest_batch": fits,
            "verified": verified,
            "images_per_s": 1e3 * cap if verified else None,
        }
        sources = machine.sources_hash("step")
        found.append(
            row(
                "largest batch MAE",
                "ours",
                None,
                shape="ViT-B",
                phase=f"memory, {cap} GB",
                more=more,
                sources=sources,
            )
        )
    return document("memory", found, GPU)


def loader() -> dict[str, Any]:
    figures = {"median": 1234.0, "p20": 1200.0, "p80": 1300.0, "n": 5, "gap": 0.02}
    head = {"data": "ct", "channels": 1}
    good = {**head, "provider": "resident", "figures": figures, "reason": None, "ratio": 2.5}
    bad = {
        **head,
        "provider": "dali",
        "figures": {},
        "reason": "DALI is not installed",
        "ratio": None,
    }
    return document("loader-speed", [good, bad])
