"""What this machine has: `sssd-fast doctor`, and env.json of every run.

What is broken on the machine raises no error: the entry holds the reason. Optional packages are
imported only to probe them, each in a separate process: one may crash or hang.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sssd_fast import __version__
from sssd_fast.run.device import GIB, disk_free_gib, memory_gib, read_text
from sssd_fast.run.log import format_metric

PACKAGES = (
    "numpy torch triton pillow pydantic pyyaml rich safetensors scikit-learn matplotlib "
    "tensorboard onnx onnxscript onnxruntime transformers"
)
# xformers also imports without its compiled part, and then rejects every GPU
XFORMERS = """import xformers; from xformers.ops import memory_efficient_attention
problem = getattr(getattr(xformers, "_cpp_lib", None), "_cpp_library_load_exception", None)
while getattr(problem, "__cause__", None): problem = problem.__cause__
raise SystemExit(problem and f"its compiled part does not load: {problem!r}")"""
# provider: (distributions that can contain it, code that must run)
PROVIDERS = {
    "xformers": ("xformers", XFORMERS),
    "dali": ("nvidia-dali-cuda130 nvidia-dali-cuda120", "from nvidia.dali import pipeline_def, fn"),
    "torchao": ("torchao", "from torchao.optim import AdamW8bit"),
}
VARIABLES = (
    "CUDA_VISIBLE_DEVICES MAE_KERNELS_BACKEND OMP_NUM_THREADS PYTORCH_ALLOC_CONF "
    "PYTORCH_CUDA_ALLOC_CONF TRITON_INTERPRET WORLD_SIZE"
)
# for the import of an optional package
TIMEOUT_S = 60.0
# GiB of the GPU from which a shipped configuration fits, largest first; 0 = CPU
CONFIGS = {22: "24gb", 14: "16gb", 1: "8gb", 0: "cpu_smoke"}


def collect_environment(path: str | Path = ".", *, probe: bool = False) -> dict[str, Any]:
    """The environment as JSON-serialisable containers; sizes in GiB, None = unknown or absent.

    `path` is on the disk whose free space is reported; `probe` imports the optional packages.
    """
    gpus, gpu_reason = _gpus()
    return {
        "sssd_fast": {"version": __version__, **_checkout(Path(__file__).resolve().parents[2])},
        "python": {"version": platform.python_version()},
        "system": {"os": platform.platform()},
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), **_usable()},
        "memory": memory_gib(),
        "disk": {"free_gib": disk_free_gib(Path(path))},
        "torch": {"version": torch.__version__, "cuda_build": torch.version.cuda},
        "driver": {"version": _driver()},
        "gpus": gpus,
        "gpu_reason": gpu_reason,
        "packages": {name: _version(name) for name in PACKAGES.split()},
        "providers": _providers(probe, bool(gpus)),
        "mae_kernels": _kernels(),
        "variables": {name: os.environ[name] for name in VARIABLES.split() if name in os.environ},
    }


def print_doctor(env: dict[str, Any]) -> None:
    """Prints a collected environment line by line, then `advice`."""
    rows = []
    for section, facts in env.items():
        if section == "mae_kernels":
            rows += [("kernels", line) for line in _kernel_lines(**facts)]
        elif section == "providers":
            rows += [(provider, _facts(state)) for provider, state in facts.items()]
        elif section == "gpus":
            rows += [("GPU", _facts(gpu)) for gpu in facts or [{"none": env["gpu_reason"]}]]
        elif section == "choices":
            rows += facts.items()
        elif section != "gpu_reason" and (text := _facts(facts)):
            rows.append((section.replace("_", " "), text))
    for name, text in rows:
        print(f"{name:<11}  {text}")
    print("\n".join(advice(env)))


def _facts(section: dict[str, Any]) -> str:
    known = [(name, fact) for name, fact in section.items() if fact is not None]
    return ", ".join(format_metric(name, fact) for name, fact in known)


def _kernel_lines(info: dict[str, str | None] | None, reason: str | None) -> list[str]:
    groups: dict[str | None, list[str]] = {}
    for op, why in (info or {}).items():
        groups.setdefault(why, []).append(op)
    lines = []
    for why, ops in groups.items():
        what = "Triton" if why is None else f"PyTorch fallback ({why})"
        lines.append(f"{what} for {len(ops)} ops: {', '.join(ops)}")
    return lines if reason is None else [reason]


def advice(env: dict[str, Any]) -> list[str]:
    """Problems of a collected environment, one line each; the last line says how to start."""
    lines = []
    driver, gpus, disk = env["driver"]["version"], env["gpus"], env["disk"]["free_gib"]
    if driver and not gpus:
        lines.append(f"NVIDIA driver {driver} is installed, but torch has no GPU")
    for name, state in env["providers"].items():
        if state["status"] == "not usable" and state["version"] and gpus:
            lines.append(f"{name} {state['version']} does not work: {state['reason']}")
    if gpus and not shutil.which(os.environ.get("CC", "gcc")):
        lines.append("No C compiler found, which Triton needs: apt install gcc python3-dev")
    if disk is not None and disk < 2:
        lines.append(f"Only {disk} GiB of disk are free; a ViT-B checkpoint takes about 1.3 GiB")
    memory = gpus[0]["memory_gib"] if gpus else 0
    config = next(name for gib, name in CONFIGS.items() if memory >= gib)
    start = f"You can train; start with: sssd-fast run --config {config}"
    return [*(f"! {line}" for line in lines), start]


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that torch can use; if none, the reason."""
    if torch.version.cuda is None:
        return [], "this torch is built without CUDA"
    try:
        if not torch.cuda.is_available():
            # raises with the reason
            torch.cuda.init()
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # noqa: BLE001 - drivers fail in many ways
        return [], _one_line(error)
    gpus = []
    for gpu in found:
        facts = {"memory_gib": round(gpu.total_memory / GIB, 1)}
        gpus.append({"name": gpu.name, **facts, "capability": f"sm_{gpu.major}{gpu.minor}"})
    return gpus, None if gpus else "no device is visible"


def _driver() -> str | None:
    from torch.utils import collect_env

    return str(collect_env.get_nvidia_driver_version(collect_env.run) or "") or None


def _kernels() -> dict[str, Any]:
    try:
        import mae_kernels

        return {"info": mae_kernels.info(), "reason": None}
    except Exception as error:  # noqa: BLE001 - a broken Triton must not hide the rest
        return {"info": None, "reason": f"not usable: {_one_line(error)}"}


def _providers(probe: bool, has_gpu: bool) -> dict[str, Any]:
    """Per provider its version, status (absent, not probed, usable, not usable) and reason."""

    def state(name: str) -> dict[str, Any]:
        distributions, code = PROVIDERS[name]
        version = next(filter(None, map(_version, distributions.split())), None)
        status, reason = ("not probed" if version else "absent"), None
        if probe:
            # without metadata too: a folder on the path can be imported
            status, reason = _probe(code, version is not None)
        if name == "xformers" and status == "usable" and not has_gpu:
            status, reason = "not usable", "its attention needs a CUDA device"
        return {"version": version, "status": status, "reason": reason}

    with ThreadPoolExecutor(len(PROVIDERS)) as pool:
        return dict(zip(PROVIDERS, pool.map(state, PROVIDERS), strict=True))


def _probe(code: str, installed: bool) -> tuple[str, str | None]:
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "not usable", f"importing it took more than {TIMEOUT_S:g} s"
    if done.returncode == 0:
        return "usable", None
    if done.returncode < 0:
        return "not usable", f"importing it ended the process with signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    if not installed and lines[-1].startswith("ModuleNotFoundError"):
        return "absent", None
    return "not usable", lines[-1].strip()


def _checkout(root: Path) -> dict[str, Any]:
    """The commit, and whether tracked files differ, if this package is in its own git checkout."""
    text = ""
    # installed in another project's repository: that one's commit is not ours
    if (root / ".git").exists() and (root / "pyproject.toml").is_file():
        words = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), *words]
            text = subprocess.check_output(
                command, stderr=subprocess.DEVNULL, text=True, timeout=10
            ).strip()
    commit, _, dirty = text.partition("-")
    return {"commit": commit or None, "modified": bool(dirty) if commit else None}


def _usable() -> dict[str, int]:
    """Cores: the affinity mask of this process, or the quota of its control group if smaller."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = (read_text("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    cores = max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores
    return {"cores_usable": cores, "torch_threads": torch.get_num_threads()}


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo") or "", re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
