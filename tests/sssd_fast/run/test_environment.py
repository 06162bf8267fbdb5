"""`sssd-fast doctor` and env.json: complete, serialisable, and robust to whatever is broken
here.
"""

from __future__ import annotations

import json
import os
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
GPU = {"name": "card", "memory_gib": 24.0, "capability": "86", "multiprocessors": 82}


@pytest.fixture(scope="module")
def collected() -> dict[str, Any]:
    return collect_environment()


@pytest.fixture
def env(collected: dict[str, Any]) -> dict[str, Any]:
    """A copy that a test may change."""
    copy: dict[str, Any] = json.loads(json.dumps(collected, allow_nan=False))
    return copy


def probe(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, files: dict[str, str], **options: Any
) -> dict[str, Any]:
    """The state of one provider whose package is made of `files`; no other is imported."""
    (folder / name).mkdir()
    for file, code in files.items():
        (folder / name / file).write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(environment, "PROVIDERS", {name: PROVIDERS[name]})
    version = None if options.get("absent") else "0.14"
    monkeypatch.setattr(environment, "_version", lambda _: version)
    timeout_s = options.get("timeout_s", 60.0)
    state: dict[str, Any] = environment._providers(True, options.get("gpu", False), timeout_s)[name]
    assert state["version"] == version
    return state


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
    started: list[list[str]] = []
    real = subprocess.Popen

    def popen(words: list[str], *args: Any, **options: Any) -> Any:
        started.append(words)
        return real(words, *args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    before = set(sys.modules)
    collect_environment()
    assert not {"xformers", "nvidia.dali", "torchao"} & (set(sys.modules) - before)
    assert not [words for words in started if words[0] == sys.executable]


CRASH = "import os; os.abort()"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('libcudart.so.12: missing')", "OSError: libcudart.so.12: missing"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (CRASH, "importing it ended the process with signal 6"),
        ("import time; time.sleep(60)", "importing it took more than 0.5 s"),
        ("", "ModuleNotFoundError: No module named 'torchao.optim'"),
    ],
)
def test_broken_provider_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    limit = 0.5 if "sleep" in code else 60.0
    state = probe(monkeypatch, tmp_path, "torchao", {"__init__.py": code}, timeout_s=limit)
    assert (state["status"], state["reason"]) == ("not usable", reason)


def test_provider_is_usable_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"__init__.py": "", "optim.py": "class AdamW8bit: pass"}
    assert probe(monkeypatch, tmp_path, "torchao", files)["status"] == "usable"
    files = {"__init__.py": "raise ModuleNotFoundError(\"No module named 'xformers'\")"}
    state = probe(monkeypatch, tmp_path, "xformers", files, absent=True)
    assert (state["status"], state["reason"]) == ("absent", None)


OTHER_CUDA = """
class _cpp_lib:
    _cpp_library_load_exception = RuntimeError("xFormers can't load C++/CUDA extensions")
    _cpp_library_load_exception.__cause__ = OSError("libcudart.so.12: missing")
"""


@pytest.mark.parametrize(
    ("code", "gpu", "reason"),
    [
        ("", True, None),
        # on the CPU the import succeeds and the call raises
        ("", False, "its attention needs a CUDA device"),
        # built for another CUDA: it imports, and every call raises
        (OTHER_CUDA, True, "its compiled part does not load: OSError('libcudart.so.12: missing')"),
    ],
)
def test_xformers_that_imports_may_still_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, gpu: bool, reason: str | None
) -> None:
    files = {"__init__.py": code, "ops.py": "def memory_efficient_attention(): pass"}
    state = probe(monkeypatch, tmp_path, "xformers", files, gpu=gpu)
    assert (state["status"], state["reason"]) == ("not usable" if reason else "usable", reason)


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


def test_advice_names_problems_and_the_way_to_start(env: dict[str, Any]) -> None:
    dali = env["providers"]["dali"]
    env["driver"]["version"], env["gpus"] = "550.54.15", []
    env["gpu_reason"] = "this torch is built without CUDA"
    dali["distributions"] = ["nvidia-dali-cuda130"]
    text = "\n".join(advice(env))
    assert "driver 550.54.15 is installed, but torch has no GPU: this torch is built" in text
    assert "nvidia-dali-cuda130 needs driver 580 or newer, found 550.54.15" in text
    env["driver"]["version"] = "580.65.06"
    assert "needs driver" not in "\n".join(advice(env))
    dali["distributions"] = ["nvidia-dali-cuda130", "nvidia-dali-cuda120"]
    assert "overwrite each other" in "\n".join(advice(env))
    env["packages"]["rich"] = None
    assert "pip install 'sssd-fast[train]'" in advice(env)[-1]


@pytest.mark.parametrize(
    ("memory", "config"),
    [(None, "cpu_smoke"), (7.6, "8gb"), (15.7, "16gb"), (23.5, "24gb"), (139.8, "24gb")],
)
def test_advice_starts_with_a_configuration_that_fits(
    env: dict[str, Any], memory: float | None, config: str
) -> None:
    env["gpus"] = [] if memory is None else [{**GPU, "memory_gib": memory}]
    assert advice(env)[-1].endswith(f"sssd-fast run --config {config}")
    assert config in shipped_configs()


def test_missing_build_tools_matter_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, Any]
) -> None:
    """Triton fails in its first kernel without them, and does not say what to install."""
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: "no such folder")
    env["build_tools"] = environment._build_tools()
    env["gpus"] = []
    assert env["build_tools"] == {"compiler": None, "python_headers": None}
    assert "Triton" not in "\n".join(advice(env))
    env["gpus"] = [GPU]
    assert "No compiler and python headers found" in "\n".join(advice(env))


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
    assert environment._usable_cores() == 1
    assert device.memory_gib()["limit_gib"] == 8.0
    assert device.memory_gib()["total_gib"] == 16.0
    assert device.available_memory() == 8 * 2**30
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert environment._usable_cores() == 8


def test_doctor_prints_what_was_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_probe", lambda *_: ("not usable", "broken here"))
    lines: list[str] = []
    path = tmp_path / "not" / "there" / "yet"
    env = print_doctor(lines.append, path=path, more=lambda env: [("more", str(env["schema"]))])
    text = "\n".join(lines)
    parts = [
        __version__,
        torch.__version__,
        env["cpu"]["model"],
        "not usable: broken here",
        "more ",
    ]
    assert [part for part in parts if part not in text] == []
    assert f"{env['disk']['free_gib']} GiB free" in text
    assert lines[-1].startswith("You can train; start with: sssd-fast run --config ")


def test_doctor_summarises_the_kernels(env: dict[str, Any]) -> None:
    env["gpus"], env["mae_kernels"] = [], {"info": {"a": "cpu", "b": "cpu"}, "reason": None}
    line = "PyTorch fallback for all 2 ops (no CUDA GPU)"
    assert environment._kernel_lines(env) == [line]
    env["gpus"], env["mae_kernels"]["info"] = [GPU], {"a": None, "b": "needs sm_80"}
    lines = ["Triton kernels for 1 of 2 ops", "PyTorch fallback for b: needs sm_80"]
    assert environment._kernel_lines(env) == lines
