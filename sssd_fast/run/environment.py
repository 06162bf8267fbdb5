"""What this machine has: `sssd-fast doctor`, and env.json of every run.

`collect_environment` does not raise if something on the machine is broken: the entry holds the
reason. It imports no optional package. `probe=True` imports each in a separate process, so that one
that crashes, hangs or prints warnings does no harm.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
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
# distribution: oldest driver branch
DALI_DRIVER = {"nvidia-dali-cuda130": 580, "nvidia-dali-cuda120": 525}
# provider: (distributions that can contain it, code that must run)
PROVIDERS = {
    "xformers": (["xformers"], XFORMERS),
    "dali": (list(DALI_DRIVER), "from nvidia.dali import pipeline_def, fn"),
    "torchao": (["torchao"], "from torchao.optim import AdamW8bit"),
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

    Args:
        path: a folder on the disk whose free space is reported; it may not exist yet.
        probe: import the optional packages, each in a process that gets TIMEOUT_S.
    """
    gpus, gpu_reason = _gpus()
    return {
        "sssd_fast": {"version": __version__, **_checkout(Path(__file__).resolve().parents[2])},
        "python": {"version": platform.python_version()},
        "system": {"os": platform.platform()},
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "cores_usable": _usable_cores(),
            "torch_threads": torch.get_num_threads(),
        },
        "memory": memory_gib(),
        "disk": {"free_gib": disk_free_gib(Path(path))},
        "torch": {"version": torch.__version__, "cuda_build": torch.version.cuda},
        "driver": {"version": _driver()},
        "gpus": gpus,
        "gpu_reason": gpu_reason,
        "build_tools": _build_tools(),
        "packages": {name: _version(name) for name in PACKAGES.split()},
        "providers": _providers(probe, bool(gpus)),
        "mae_kernels": _kernels(),
        "variables": {name: os.environ[name] for name in VARIABLES.split() if name in os.environ},
    }


def print_doctor(more: Callable[[dict[str, Any]], list[tuple[str, str]]]) -> None:
    """Prints the probed environment line by line, then `more` rows of it, then `advice`."""
    env = collect_environment(probe=True)
    rows = []
    for section, facts in env.items():
        name = section.replace("_", " ")
        if section == "mae_kernels":
            rows += [("kernels", line) for line in _kernel_lines(env)]
        elif section == "providers":
            for provider, state in facts.items():
                reason = f": {state['reason']}" if state["reason"] else ""
                rows.append((provider, f"{state['version'] or ''} {state['status']}{reason}"))
        elif section == "gpus":
            rows += [("GPU", _facts(gpu)) for gpu in facts]
        elif section == "gpu_reason":
            rows += [("GPU", f"none: {facts}")] if facts else []
        elif facts:
            rows.append((name, _facts(facts)))
    rows += more(env)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text.strip()}")
    print("\n".join(advice(env)))


def _facts(section: dict[str, Any]) -> str:
    shown = (
        (name.removesuffix("_gib"), "-") if fact is None else (name, fact)
        for name, fact in section.items()
    )
    return ", ".join(format_metric(name, fact) for name, fact in shown)


def _kernel_lines(env: dict[str, Any]) -> list[str]:
    info, reason = env["mae_kernels"]["info"], env["mae_kernels"]["reason"]
    if info is None:
        return [reason]
    fallback = {op: why for op, why in info.items() if why is not None}
    if fallback and not env["gpus"]:
        return [f"PyTorch fallback for all {len(info)} ops (no CUDA GPU)"]
    lines = [f"Triton kernels for {len(info) - len(fallback)} of {len(info)} ops"]
    return lines + [f"PyTorch fallback for {op}: {why}" for op, why in fallback.items()]


def advice(env: dict[str, Any]) -> list[str]:
    """Problems of a collected environment, one line each; the last line says how to start."""
    lines = []
    driver, gpus, disk = env["driver"]["version"], env["gpus"], env["disk"]["free_gib"]
    installed = env["providers"]["dali"]["distributions"]
    missing = [name for name, tool in env["build_tools"].items() if not tool]
    if driver and not gpus:
        reason = env["gpu_reason"]
        lines.append(f"NVIDIA driver {driver} is installed, but torch has no GPU: {reason}")
    if len(installed) > 1:
        lines.append(
            "Both DALI packages are installed and overwrite each other's files: uninstall both, "
            "then install one."
        )
    elif driver and installed and int(driver.split(".")[0]) < DALI_DRIVER[installed[0]]:
        lines.append(
            f"{installed[0]} needs driver {DALI_DRIVER[installed[0]]} or newer, found {driver}: "
            "install the other DALI extra or a new driver."
        )
    for name, state in env["providers"].items():
        if state["status"] == "not usable" and state["version"] and gpus:
            version = f"{name} {state['version']}"
            lines.append(f"{version} is installed but does not work: {state['reason']}")
    if gpus and missing:
        what = " and ".join(missing).replace("_", " ")
        lines.append(
            f"No {what} found: Triton builds its launchers with them. On Debian or Ubuntu: "
            "apt install gcc python3-dev."
        )
    if disk is not None and disk < 2:
        lines.append(f"Only {disk} GiB of disk are free; a ViT-B checkpoint takes about 1.3 GiB.")
    lines = [f"! {line}" for line in lines]
    if env["packages"]["rich"] is None or env["packages"]["pydantic"] is None:
        install = "pip install 'sssd-fast[train]'"
        return [*lines, f"Only the fused ops are installed; for training: {install}"]
    memory = gpus[0]["memory_gib"] if gpus else 0
    config = next(name for gib, name in CONFIGS.items() if memory >= gib)
    return [*lines, f"You can train; start with: sssd-fast run --config {config}"]


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
    gpus = [
        {
            "name": p.name,
            "memory_gib": round(p.total_memory / GIB, 1),
            "capability": f"sm_{p.major}{p.minor}",
        }
        for p in found
    ]
    return gpus, None if gpus else "no device is visible"


def _driver() -> str | None:
    from torch.utils import collect_env

    return str(collect_env.get_nvidia_driver_version(collect_env.run) or "") or None


def _build_tools() -> dict[str, str | None]:
    """What Triton needs on the first use of a kernel: a C compiler, and Python's headers."""
    names = (os.environ.get("CC", "gcc"), "gcc", "clang", "cc")
    compiler = next((name for name in names if shutil.which(name)), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    return {
        "compiler": Path(compiler).name if compiler else None,
        "python_headers": header.name if header.is_file() else None,
    }


def _kernels() -> dict[str, Any]:
    try:
        import mae_kernels

        return {"info": mae_kernels.info(), "reason": None}
    except Exception as error:  # noqa: BLE001 - a broken Triton must not hide the rest
        return {"info": None, "reason": f"not usable: {_one_line(error)}"}


def _providers(probe: bool, has_gpu: bool) -> dict[str, Any]:
    """Per provider its version, status (absent, not probed, usable, not usable) and reason."""

    def state(name: str) -> dict[str, Any]:
        distributions = [d for d in PROVIDERS[name][0] if _version(d)]
        status, reason = ("not probed" if distributions else "absent"), None
        if probe:
            # without metadata too: a folder on the path can be imported
            status, reason = _probe(PROVIDERS[name][1], bool(distributions))
        if name == "xformers" and status == "usable" and not has_gpu:
            status, reason = "not usable", "its attention needs a CUDA device"
        version = _version(distributions[0]) if distributions else None
        facts = {"version": version, "distributions": distributions}
        return {**facts, "status": status, "reason": reason}

    with ThreadPoolExecutor(len(PROVIDERS)) as pool:
        return dict(zip(PROVIDERS, pool.map(state, PROVIDERS), strict=True))


def _probe(code: str, installed: bool) -> tuple[str, str | None]:
    command = [sys.executable, "-c", code]
    limits: dict[str, Any] = {"timeout": TIMEOUT_S, "check": False}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **limits)
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
    nothing = {"commit": None, "modified": None}
    if not ((root / ".git").exists() and (root / "pyproject.toml").is_file()):
        # installed; a repository further up is another project's
        return nothing

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)

    try:
        status = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD").strip(), "modified": bool(status)}
    except (OSError, subprocess.SubprocessError):
        return nothing


def _usable_cores() -> int:
    """The affinity mask of this process, or the quota of its control group if smaller."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = (read_text("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores


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
