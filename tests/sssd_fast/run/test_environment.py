"""`sssd-fast doctor` and env.json: complete, serialisable, robust to what is broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from sssd_fast import __version__
from sssd_fast.config import shipped_configs
from sssd_fast.run import device, environment
from sssd_fast.run.environment import advice, collect_environment, print_doctor

PROVIDERS = environment.PROVIDERS
GPU = {"name": "card", "memory_gib": 24.0, "capability": "sm_86"}


@pytest.fixture(scope="module")
def collected() -> dict[str, Any]:
    # a run folder that is not made yet
    return collect_environment("not/there/yet")


@pytest.fixture
def env(collected: dict[str, Any]) -> dict[str, Any]:
    """A copy that a test may change."""
    copy: dict[str, Any] = json.loads(json.dumps(collected, allow_nan=False))
    return copy


def test_environment_describes_this_process(collected: dict[str, Any], env: dict[str, Any]) -> None:
    assert env == collected
    assert env["sssd_fast"]["version"] == __version__
    assert env["torch"]["version"] == torch.__version__
    assert env["packages"]["numpy"] == metadata.version("numpy")
    assert env["python"]["version"] == sys.version.split()[0]
    assert 1 <= env["cpu"]["cores_usable"] <= env["cpu"]["cores"] == os.cpu_count()
    assert 0 < env["memory"]["available_gib"] <= env["memory"]["total_gib"]


def test_environment_starts_no_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is collected at the start of every run: importing xformers or DALI would take seconds."""
    monkeypatch.setattr(environment, "_probe", None)
    before = set(sys.modules)
    collect_environment()
    assert not {"xformers", "nvidia.dali", "torchao"} & (set(sys.modules) - before)


ATTENTION = "def memory_efficient_attention(): pass"
OTHER_CUDA = """
class _cpp_lib:
    _cpp_library_load_exception = RuntimeError("xFormers can't load C++/CUDA extensions")
    _cpp_library_load_exception.__cause__ = OSError("libcudart.so.12: missing")
"""


@pytest.mark.parametrize(
    ("code", "more", "status", "reason"),
    [
        ("raise OSError('lib.so: missing')", {}, "not usable", "OSError: lib.so: missing"),
        ("import none", {}, "not usable", "ModuleNotFoundError: No module named 'none'"),
        ("import os; os.abort()", {}, "not usable", "importing it ended the process with signal 6"),
        ("import time; time.sleep(60)", {}, "not usable", "importing it took more than 0.5 s"),
        ("", {}, "not usable", "ModuleNotFoundError: No module named 'torchao.optim'"),
        ("", {"optim": "class AdamW8bit: pass"}, "usable", None),
        ("raise ModuleNotFoundError('torchao')", {"absent": ""}, "absent", None),
        ("", {"ops": ATTENTION, "gpu": ""}, "usable", None),
        # on the CPU the import succeeds and the call raises
        ("", {"ops": ATTENTION}, "not usable", "its attention needs a CUDA device"),
        # built for another CUDA: it imports, and every call raises
        (
            OTHER_CUDA,
            {"ops": ATTENTION, "gpu": ""},
            "not usable",
            "its compiled part does not load: OSError('libcudart.so.12: missing')",
        ),
    ],
)
def test_provider_is_imported_apart_and_refused_with_its_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    more: dict[str, str],
    status: str,
    reason: str | None,
) -> None:
    """A package made of `code` and of the modules in `more`; no other is imported."""
    name = "xformers" if "ops" in more else "torchao"
    (tmp_path / name).mkdir()
    for module, text in {"__init__": code, **more}.items():
        (tmp_path / name / f"{module}.py").write_text(text)
    version = None if "absent" in more else "0.14"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(environment, "PROVIDERS", {name: PROVIDERS[name]})
    monkeypatch.setattr(environment, "_version", lambda _: version)
    monkeypatch.setattr(environment, "TIMEOUT_S", 0.5 if "sleep" in code else 60.0)
    state = environment._providers(True, "gpu" in more)[name]
    assert (state["version"], state["status"], state["reason"]) == (version, status, reason)


def test_environment_survives_broken_kernels_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is\n too old (found version 12020)")

    # importing it raises ImportError
    monkeypatch.setitem(sys.modules, "mae_kernels", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    env = collect_environment()
    assert env["mae_kernels"]["info"] is None
    assert env["mae_kernels"]["reason"].startswith("not usable: ")
    assert env["gpus"] == []
    text = "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)"
    assert env["gpu_reason"] == text


@pytest.mark.parametrize(
    ("memory", "config"),
    [(None, "cpu_smoke"), (7.6, "8gb"), (15.7, "16gb"), (23.5, "24gb"), (139.8, "24gb")],
)
def test_advice_starts_with_a_configuration_that_fits(
    env: dict[str, Any], memory: float | None, config: str
) -> None:
    env["gpus"] = [] if memory is None else [{**GPU, "memory_gib": memory}]
    env["driver"]["version"] = "580.65.06"
    no_gpu = "! NVIDIA driver 580.65.06 is installed, but torch has no GPU"
    assert (no_gpu in advice(env)) is (memory is None)
    assert advice(env)[-1].endswith(f"sssd-fast run --config {config}")
    assert config in shipped_configs()


def test_commit_is_that_of_our_own_checkout_only(tmp_path: Path) -> None:
    """Installed in another project's repository, that project's commit must not be reported."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    (tmp_path / "pyproject.toml").write_text("")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert environment._checkout(tmp_path) == {"commit": head, "modified": False}
    (tmp_path / "pyproject.toml").write_text("changed")
    assert environment._checkout(tmp_path) == {"commit": head, "modified": True}
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert environment._checkout(inside) == {"commit": None, "modified": None}


def test_limits_of_the_control_group_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, the machine's cores and memory are not this process's."""
    memory = "MemTotal:  16777216 kB\nMemAvailable: 12582912 kB\n"
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/memory.max": "8589934592\n",
    }
    for module in (environment, device):
        monkeypatch.setattr(module, "read_text", lambda path: files.get(path, memory))
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert environment._usable()["cores_usable"] == 1
    assert device.memory_gib()["limit_gib"] == 8.0
    assert device.memory_gib()["total_gib"] == 16.0
    assert device.available_memory() == 8 * 2**30
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert environment._usable()["cores_usable"] == 8


def test_doctor_prints_what_was_collected(
    env: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    env["gpus"] = []
    env["gpu_reason"] = "no device"
    env["driver"] = {"version": None}
    env["mae_kernels"] = {"info": {"a": None, "b": "cpu", "c": "cpu"}, "reason": None}
    env["providers"]["dali"] = {"version": "2.0", "status": "not usable", "reason": "broken here"}
    print_doctor(env)
    text = re.sub(" +", " ", capsys.readouterr().out)
    for line in (
        f"sssd fast version {__version__}",
        f"torch version {torch.__version__}",
        f"cpu model {re.sub(' +', ' ', env['cpu']['model'])}, cores {os.cpu_count()}, ",
        "GPU none no device\n",
        "dali version 2.0, status not usable, reason broken here\n",
        "kernels Triton for 1 ops: a\nkernels PyTorch fallback (cpu) for 2 ops: b, c\n",
    ):
        assert line in text
    assert all(len(line.split()) > 1 for line in text.splitlines())  # no driver, no row
    assert re.search(r"disk free [\d.]+ GiB\n", text)
    assert text.splitlines()[-1].startswith("You can train; start with: sssd-fast run --config ")
    env["gpus"] = [GPU]
    print_doctor(env)
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert "GPU name card, memory 24.0 GiB, capability sm_86\n" in text
    assert "! dali 2.0 does not work: broken here\n" in text
