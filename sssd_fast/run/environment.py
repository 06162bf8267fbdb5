"""What this machine has and what will be used: `sssd-fast doctor`, and env.json of every run.

`collect_environment` never raises over something broken on the machine: what cannot be used stands there with the reason. It imports
no optional package and takes well under 3 seconds. The command adds `probe=True`, which imports each optional package in a process of
its own, so that one that crashes, hangs or prints warnings harms nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sssd_fast import __version__
from sssd_fast.run.device import GIB, _disk_free, _memory, _read

PACKAGES = (
    "numpy", "torch", "triton", "pillow", "pydantic", "pyyaml", "rich", "safetensors", "scikit-learn", "matplotlib", "tensorboard",
    "onnx", "onnxscript", "onnxruntime", "transformers",
)  # fmt: skip
# The attention of a ViT-B/16 masked autoencoder at 224 x 224: setting, tokens, heads, head width
ATTENTION = (("step.attention", 50, 12, 64), ("step.decoder_attention", 197, 16, 32))
# As attention.load_xformers: it also imports without its compiled part, and then refuses every GPU
XFORMERS = """import xformers; from xformers.ops import memory_efficient_attention
problem = getattr(getattr(xformers, "_cpp_lib", None), "_cpp_library_load_exception", None)
while getattr(problem, "__cause__", None): problem = problem.__cause__
raise SystemExit(problem and f"its compiled part does not load, and without it every GPU is refused: {problem!r}")"""
# provider: (distributions that may hold it, what it must be able to do)
PROVIDERS = {
    "xformers": (("xformers",), XFORMERS),
    "dali": (
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "from nvidia.dali import pipeline_def, fn",
    ),
    "torchao": (("torchao",), "from torchao.optim import AdamW8bit"),
}
DALI_DRIVER = {
    "nvidia-dali-cuda130": 580,
    "nvidia-dali-cuda120": 525,
}  # oldest driver branch of each
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "MAE_KERNELS_BACKEND", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_INTERPRET", "WORLD_SIZE",
)  # fmt: skip


def collect_environment(
    path: str | Path = ".", *, probe: bool = False, timeout_s: float = 60.0
) -> dict[str, Any]:
    """The environment as plain JSON-serialisable containers; sizes in GiB (2**30 bytes), None = unknown or absent.

    path: a folder on the disk whose free space counts (its nearest existing parent is taken).
    probe: import the optional packages too, each in a process of its own that gets `timeout_s` seconds.
    """
    gpus, gpu_reason = _gpus()
    driver, driver_reason = _driver()
    providers = _providers(probe, bool(gpus), timeout_s)
    return {
        "schema": 1,
        "sssd_fast": {"version": __version__, **_checkout(Path(__file__).resolve().parent.parent)},
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
        },
        "system": {"os": platform.platform(), "machine": platform.machine()},
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "cores_usable": _usable_cores(),
            "torch_threads": torch.get_num_threads(),
        },
        "memory": _memory(),
        "disk": {"free_gib": _disk_free(Path(path))},
        "torch": {
            "version": torch.__version__,
            "cuda_build": torch.version.cuda,
            "cudnn": _cudnn(),
        },
        "driver": {"version": driver, "reason": driver_reason},
        "gpus": gpus,
        "gpu_reason": gpu_reason,
        "build_tools": _build_tools(),
        "packages": {name: _version(name) for name in PACKAGES},
        "providers": providers,
        "mae_kernels": _kernels(),
        "attention": _attention(gpus, providers["xformers"]),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def print_doctor(write: Callable[[str], Any] = print, *, path: str | Path = ".") -> dict[str, Any]:
    """Writes the probed environment line by line, advice last; returns what was collected."""
    env = collect_environment(path, probe=True)
    own, cpu, memory = env["sssd_fast"], env["cpu"], env["memory"]
    commit = (
        f", commit {own['commit'][:10]}{' with changes' if own['modified'] else ''}"
        if own["commit"]
        else ""
    )
    limit = f", limited to {memory['limit_gib']} GiB" if memory["limit_gib"] else ""
    rows = [
        ("sssd_fast", own["version"] + commit),
        ("Python", f"{env['python']['version']} ({env['python']['implementation']})"),
        ("system", env["system"]["os"]),
        (
            "CPU",
            f"{cpu['model']}, {cpu['cores_usable']} of {cpu['cores']} cores usable, torch uses {cpu['torch_threads']}",
        ),
        (
            "memory",
            f"{memory['available_gib']} of {memory['total_gib']} GiB free{limit}; /dev/shm {memory['shm_free_gib']} GiB free",
        ),
        ("disk", f"{env['disk']['free_gib']} GiB free"),
        (
            "torch",
            f"{env['torch']['version']}, CUDA {env['torch']['cuda_build'] or 'not built in'}, cuDNN {env['torch']['cudnn']}",
        ),
        ("driver", env["driver"]["version"] or f"none: {env['driver']['reason']}"),
    ]
    rows += [
        ("GPU", f"{g['name']}, {g['memory_gib']} GiB, sm_{g['capability']}") for g in env["gpus"]
    ]
    rows += [] if env["gpus"] else [("GPU", f"none: {env['gpu_reason']}")]
    rows.append(
        (
            "build tools",
            ", ".join(
                f"{what.replace('_', ' ')} {found or 'not found'}"
                for what, found in env["build_tools"].items()
            ),
        )
    )
    for name, state in env["providers"].items():
        version = f"{state['version']} " if state["version"] else ""
        rows.append(
            (name, version + state["status"] + (f": {state['reason']}" if state["reason"] else ""))
        )
    kernels = env["mae_kernels"]
    rows.append(("mae_kernels", kernels["reason"] or "importable"))
    rows += [("", f"{op}: {why or 'triton'}") for op, why in (kernels["info"] or {}).items()]
    rows += [("attention", env["attention"]["reason"])] if env["attention"]["reason"] else []
    for block, told in env["attention"]["blocks"].items():
        rows.append(
            ("attention", f"{block} ({told['site']}): {told['provider']}, because {told['reason']}")
        )
        rows += [
            ("", f"{name}: {why or 'can run, when it is named'}")
            for name, why in told["others"].items()
        ]
    rows.append(
        ("packages", ", ".join(f"{name} {v or '-'}" for name, v in env["packages"].items()))
    )
    rows += [(name, value) for name, value in env["variables"].items()]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        write(f"{name:<{width}}  {text}")
    for line in advice(env):
        write(f"! {line}")
    return env


def advice(env: dict[str, Any]) -> list[str]:
    """What deserves the reader's attention in a collected environment, one sentence each."""
    lines = []
    driver, gpus = env["driver"]["version"], env["gpus"]
    if driver and not gpus:
        lines.append(
            f"There is an NVIDIA driver ({driver}), but torch sees no GPU: {env['gpu_reason']}."
        )
    dali = env["providers"]["dali"]
    if len(dali["distributions"]) > 1:
        lines.append(
            "Both DALI packages are installed and overwrite each other's files: uninstall both, then install one."
        )
    elif (
        driver
        and dali["distributions"]
        and int(driver.split(".")[0]) < DALI_DRIVER[dali["distributions"][0]]
    ):
        name = dali["distributions"][0]
        lines.append(
            f"{name} needs driver {DALI_DRIVER[name]} or newer, here is {driver}: take the other DALI extra or a new driver."
        )
    for name, state in env["providers"].items():
        if state["status"] == "refused" and state["version"] and gpus:
            lines.append(
                f"{name} {state['version']} is installed but cannot be used: {state['reason']}."
            )
    missing = [what for what, found in env["build_tools"].items() if not found]
    if gpus and missing:
        what = " and ".join(missing).replace("_", " ")
        lines.append(
            f"No {what} found: Triton builds its launchers with them. On Debian or Ubuntu: apt install gcc python3-dev."
        )
    if env["packages"]["rich"] is None or env["packages"]["pydantic"] is None:
        lines.append(
            "Only the fused ops are installed; for training: pip install 'sssd-fast[train]'."
        )
    if env["disk"]["free_gib"] is not None and env["disk"]["free_gib"] < 2:
        lines.append(
            f"Only {env['disk']['free_gib']} GiB of disk are free; one ViT-B training checkpoint takes about 1.3 GiB."
        )
    return lines


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that torch can use, and why there are none."""
    if torch.version.cuda is None:
        return [], "this torch is built without CUDA"
    try:
        if not torch.cuda.is_available():
            torch.cuda.init()  # raises with the reason
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # noqa: BLE001 - drivers fail in many ways, and the reason is what the reader wants
        return [], _one_line(error)
    gpus = [
        {
            "name": p.name,
            "memory_gib": round(p.total_memory / GIB, 1),
            "capability": f"{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
        }
        for p in found
    ]
    return gpus, None if gpus else "no device is visible"


def _driver() -> tuple[str | None, str | None]:
    """Version of the NVIDIA driver, from its own management library, or why there is none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)
        if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
            return None, "the NVIDIA management library does not answer"
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None, "no NVIDIA driver library on this machine"
    return text.value.decode(), None


def _build_tools() -> dict[str, str | None]:
    """What Triton needs on first use of a kernel: a C compiler, and Python's headers."""
    names = (os.environ.get("CC", "gcc"), "gcc", "clang", "cc")
    compiler = next((name for name in names if shutil.which(name)), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    return {
        "compiler": Path(compiler).name if compiler else None,
        "python_headers": header.name if header.is_file() else None,
    }


def _cudnn() -> int | None:
    try:
        return torch.backends.cudnn.version()
    except RuntimeError:  # raised when the library found does not fit the one torch was built with
        return None


def _kernels() -> dict[str, Any]:
    try:
        import mae_kernels

        return {"info": mae_kernels.info(), "reason": None}
    except Exception as error:  # noqa: BLE001 - a broken Triton must not hide the rest of the report
        return {"info": None, "reason": f"cannot be used: {_one_line(error)}"}


def _attention(gpus: list[dict[str, Any]], xformers: dict[str, Any]) -> dict[str, Any]:
    """For each of ATTENTION what `auto` takes on the first GPU, or the CPU, and why the others refuse (None: they can run)."""
    problem = (
        xformers["reason"] if xformers["status"] in ("refused", "usable") else xformers["status"]
    )
    device, capability, dtype = torch.device("cpu"), (0, 0), torch.float32
    if gpus:  # the dtypes are those of step.pick_precision
        device = torch.device("cuda", 0)
        capability = divmod(int(gpus[0]["capability"]), 10)
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    try:
        from sssd_fast.attention import BLOCKS, PROVIDERS, AttentionShape, choose, refusal

        blocks = {}
        for setting, tokens, heads, width in ATTENTION:
            site = AttentionShape(
                device, dtype, tokens, heads, width, compiled=bool(gpus), capability=capability
            )
            choice = choose("auto", site, setting)
            rest = [name for name in PROVIDERS if name != choice.provider]
            others = {name: refusal(name, site, xformers_problem=lambda: problem) for name in rest}
            found = {"provider": choice.provider, "reason": choice.reason, "others": others}
            blocks[BLOCKS[setting]] = {"site": str(site), **found}
        return {"blocks": blocks, "reason": None}
    except Exception as error:  # noqa: BLE001 - a broken Triton must not hide the rest of the report
        return {"blocks": {}, "reason": f"cannot be used: {_one_line(error)}"}


def _providers(probe: bool, has_gpu: bool, timeout_s: float) -> dict[str, Any]:
    """Per optional provider: version, its installed distributions, status (absent | not probed | usable | refused) and reason."""
    found = {name: [d for d in dists if _version(d)] for name, (dists, _) in PROVIDERS.items()}
    children: dict[str, subprocess.Popen[str]] = {}
    if probe:
        for name in found:  # also those without metadata: a folder on the path is importable too
            command = [sys.executable, "-c", PROVIDERS[name][1]]
            children[name] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
    result = {}
    for name, dists in found.items():
        status, reason = ("not probed", None) if dists else ("absent", None)
        if name in children:
            status, reason = _verdict(children[name], timeout_s, installed=bool(dists))
            if name == "xformers" and status == "usable" and not has_gpu:
                status, reason = "refused", "its attention needs a CUDA device"
        version = _version(dists[0]) if dists else None
        result[name] = {
            "version": version,
            "distributions": dists,
            "status": status,
            "reason": reason,
        }
    return result


def _verdict(
    child: subprocess.Popen[str], timeout_s: float, *, installed: bool
) -> tuple[str, str | None]:
    try:
        _, stderr = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return "refused", f"importing it took more than {timeout_s:g} s"
    if child.returncode == 0:
        return "usable", None
    if child.returncode < 0:
        return "refused", f"importing it ended the process with signal {-child.returncode}"
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no reason given"]
    if not installed and lines[-1].startswith("ModuleNotFoundError"):
        return "absent", None
    return "refused", lines[-1].strip()


def _checkout(root: Path) -> dict[str, Any]:
    """Commit and whether tracked files differ from it, when this package lies in its own git checkout."""
    nothing = {"commit": None, "modified": None}
    if not ((root / ".git").exists() and (root / "pyproject.toml").is_file()):
        return nothing  # installed; a repository further up would be somebody else's
    try:
        commit, status = (
            subprocess.check_output(
                ["git", "-C", str(root), *what], stderr=subprocess.DEVNULL, text=True, timeout=10
            ).strip()
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return nothing
    return {"commit": commit, "modified": bool(status)}


def _usable_cores() -> int:
    """Cores that this process may use: the affinity mask, and the quota of its control group."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return (
        max(1, min(cores, int(quota) // int(period)))
        if quota.isdigit() and period.strip().isdigit()
        else cores
    )


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
