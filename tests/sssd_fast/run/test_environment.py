"""`sssd-fast doctor` and env.json: complete, JSON-serialisable, quick, and unharmed by whatever is broken on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sssd_fast import __version__
from sssd_fast.run import environment as doctor
from sssd_fast.run.device import pick_precision


@pytest.fixture
def module_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of everything else that child processes import from."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def _package(folder: Path, name: str, code: str, version: str) -> None:
    """An importable package with the metadata of an installed distribution."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _fake_version(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    real = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: versions[name] if name in versions else real(name)
    )


def test_it_reports_this_process_and_survives_json() -> None:
    env = doctor.collect_environment()
    assert json.loads(json.dumps(env, allow_nan=False)) == env
    assert env["sssd_fast"]["version"] == __version__
    assert env["torch"]["version"] == torch.__version__
    assert env["packages"]["numpy"] == metadata.version("numpy")
    assert env["python"]["version"] == sys.version.split()[0]
    assert 1 <= env["cpu"]["cores_usable"] <= os.cpu_count()
    assert 0 < env["memory"]["available_gib"] <= env["memory"]["total_gib"]


def test_without_probing_it_starts_no_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written at the start of every run: an import of xformers or DALI would cost seconds and side effects."""
    real, started = subprocess.Popen, []
    monkeypatch.setattr(
        doctor.subprocess,
        "Popen",
        lambda command, **kw: started.append(command) or real(command, **kw),
    )
    before = {name for name in ("xformers", "nvidia.dali", "torchao") if name in sys.modules}
    doctor.collect_environment()
    assert all(command[0] == "git" for command in started)
    assert {
        name for name in ("xformers", "nvidia.dali", "torchao") if name in sys.modules
    } == before


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "raise OSError('libcudart.so.12: cannot open shared object file')",
            "OSError: libcudart.so.12: cannot open shared object file",
        ),
        (
            "import a_module_nobody_has",
            "ModuleNotFoundError: No module named 'a_module_nobody_has'",
        ),
        ("import os; os.abort()", "ended the process with signal 6"),
        ("import sys; sys.exit('killed itself')", "killed itself"),
        ("", "No module named 'xformers.ops'"),
    ],
    ids=["missing library", "missing dependency", "crash", "exit", "empty placeholder"],
)
def test_a_broken_xformers_is_refused_with_its_reason(
    module_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    _package(module_path, "xformers", code, "0.0.35")
    _fake_version(monkeypatch, {"xformers": "0.0.35"})
    found = doctor.collect_environment(probe=True)["providers"]["xformers"]
    assert found["version"] == "0.0.35"
    assert found["status"] == "refused"
    assert reason in found["reason"]


def test_an_import_that_hangs_is_refused_in_time(
    module_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(module_path, "torchao", "import time; time.sleep(60)", "0.14")
    _fake_version(monkeypatch, {"torchao": "0.14"})
    start = time.perf_counter()
    found = doctor.collect_environment(probe=True, timeout_s=0.5)["providers"]["torchao"]
    assert found["reason"] == "importing it took more than 0.5 s"
    assert time.perf_counter() - start < 50  # not the 60 s of the import


def test_a_working_provider_is_usable_and_a_missing_one_absent(
    module_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(module_path, "torchao", "", "0.14")
    (module_path / "torchao" / "optim.py").write_text("class AdamW8bit: pass\n")
    _package(
        module_path,
        "xformers",
        "raise ModuleNotFoundError(\"No module named 'xformers'\", name='xformers')",
        "0",
    )
    _fake_version(monkeypatch, {"torchao": "0.14", "xformers": None})
    found = doctor.collect_environment(probe=True)["providers"]
    assert (found["torchao"]["status"], found["torchao"]["reason"]) == ("usable", None)
    assert (found["xformers"]["status"], found["xformers"]["version"]) == ("absent", None)


def test_xformers_that_imports_is_still_refused_without_a_gpu(
    module_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU its import succeeds with a warning and the call raises."""
    _package(module_path, "xformers", "", "0.0.35")
    (module_path / "xformers" / "ops.py").write_text("def memory_efficient_attention(): pass\n")
    _fake_version(monkeypatch, {"xformers": "0.0.35"})
    monkeypatch.setattr(doctor, "_gpus", lambda: ([], "none here"))
    assert (
        doctor.collect_environment(probe=True)["providers"]["xformers"]["reason"]
        == "its attention needs a CUDA device"
    )
    gpu = {"name": "card", "memory_gib": 24.0, "capability": "86", "multiprocessors": 82}
    monkeypatch.setattr(doctor, "_gpus", lambda: ([gpu], None))
    assert doctor.collect_environment(probe=True)["providers"]["xformers"]["status"] == "usable"


GPU = {"name": "card", "memory_gib": 24.0, "capability": "86", "multiprocessors": 82}
OTHER_CUDA = """
class _cpp_lib:
    _cpp_library_load_exception = RuntimeError("xFormers can't load C++/CUDA extensions")
    _cpp_library_load_exception.__cause__ = OSError("libcudart.so.12: cannot open shared object file")
"""


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("", None),
        (
            OTHER_CUDA,
            "its compiled part does not load, and without it every GPU is refused: "
            "OSError('libcudart.so.12: cannot open shared object file')",
        ),
    ],
    ids=["works", "built for another CUDA"],
)
def test_attention_reuses_the_verdict_on_xformers(
    module_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, reason: str | None
) -> None:
    """An xformers built for another CUDA imports, and then refuses every call: it must not be called usable."""
    _package(module_path, "xformers", package, "0.0.35")
    (module_path / "xformers" / "ops.py").write_text("def memory_efficient_attention(): pass\n")
    _fake_version(monkeypatch, {"xformers": "0.0.35"})
    monkeypatch.setattr(doctor, "_gpus", lambda: ([GPU], None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a real GPU here has no say
    before = {name for name in sys.modules if name.startswith("xformers")}
    env = doctor.collect_environment(probe=True)
    assert {name for name in sys.modules if name.startswith("xformers")} == before
    assert env["providers"]["xformers"]["status"] == ("usable" if reason is None else "refused")
    assert env["providers"]["xformers"]["reason"] == reason
    assert env["attention"]["reason"] is None
    for block, site in (
        ("encoder", "50 tokens, 12 heads of 64, bf16"),
        ("decoder", "197 tokens, 16 heads of 32, bf16"),
    ):
        found = env["attention"]["blocks"][block]
        assert (found["site"], found["provider"]) == (site, "fused")
        assert found["others"] == {"xformers": reason, "sdpa": None, "eager": None}


def test_attention_without_a_gpu_on_an_old_one_and_not_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _fake_version(monkeypatch, {"xformers": "0.0.35"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_gpus", lambda: ([], "none here"))
    found = doctor.collect_environment()["attention"]["blocks"]["encoder"]
    assert (found["site"], found["provider"]) == ("50 tokens, 12 heads of 64, fp32", "sdpa")
    assert "no kernel for the cpu" in found["others"]["fused"]
    assert found["others"]["xformers"] == "its attention needs an NVIDIA GPU"
    assert found["others"]["eager"] is None
    monkeypatch.setattr(doctor, "_gpus", lambda: ([{**GPU, "capability": "75"}], None))
    found = doctor.collect_environment()["attention"]["blocks"]["decoder"]
    assert (found["site"], found["provider"]) == ("197 tokens, 16 heads of 32, fp16", "sdpa")
    assert "tensor cores of sm_80" in found["others"]["fused"]
    assert (
        found["others"]["xformers"]
        == "compiled it takes only fp16 and bf16 on sm_80 or newer, with heads of at most 256 values"
    )
    monkeypatch.setattr(doctor, "_gpus", lambda: ([{**GPU, "capability": "120"}], None))
    found = doctor.collect_environment()["attention"]["blocks"]["decoder"]
    assert (found["provider"], found["others"]["xformers"]) == ("fused", "not probed")
    _fake_version(monkeypatch, {"xformers": None})
    assert (
        doctor.collect_environment()["attention"]["blocks"]["decoder"]["others"]["xformers"]
        == "absent"
    )


@pytest.mark.gpu
def test_attention_is_reported_in_the_dtype_that_training_takes() -> None:
    blocks = doctor.collect_environment()["attention"]["blocks"]
    assert all(
        found["site"].endswith(pick_precision("auto", torch.device("cuda")))
        for found in blocks.values()
    )


def test_attention_that_cannot_be_imported_does_not_hide_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sssd_fast.attention", None)
    lines: list[str] = []
    env = doctor.print_doctor(lines.append)
    assert env["attention"]["blocks"] == {}
    assert any(
        line.startswith("attention") and "cannot be used: ModuleNotFoundError" in line
        for line in lines
    )
    assert env["torch"]["version"] == torch.__version__


def test_every_optional_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", nothing)
    lines: list[str] = []
    env = doctor.print_doctor(lines.append)
    assert set(env["packages"].values()) == {None}
    assert any("pip install 'sssd-fast[train]'" in line for line in lines)


def test_broken_kernels_and_cuda_do_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mae_kernels", None)  # importing it raises ImportError
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is\n too old (found version 12020)")

    monkeypatch.setattr(torch.cuda, "init", init)
    env = doctor.collect_environment()
    assert env["mae_kernels"]["info"] is None
    assert env["mae_kernels"]["reason"].startswith("cannot be used: ")
    assert env["gpus"] == []
    assert (
        env["gpu_reason"]
        == "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)"
    )


def test_advice_names_both_dali_packages_an_old_driver_and_an_unused_gpu() -> None:
    env = doctor.collect_environment()
    env["driver"] = {"version": "550.54.15", "reason": None}
    env["gpus"], env["gpu_reason"] = [], "this torch is built without CUDA"
    env["providers"]["dali"]["distributions"] = ["nvidia-dali-cuda130"]
    text = "\n".join(doctor.advice(env))
    assert "driver (550.54.15), but torch sees no GPU: this torch is built without CUDA" in text
    assert "nvidia-dali-cuda130 needs driver 580 or newer, here is 550.54.15" in text
    env["driver"]["version"] = "580.65.06"
    assert "needs driver" not in "\n".join(doctor.advice(env))
    env["providers"]["dali"]["distributions"] = ["nvidia-dali-cuda130", "nvidia-dali-cuda120"]
    assert "overwrite each other" in "\n".join(doctor.advice(env))


def test_missing_build_tools_matter_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton fails in its first kernel without them, with a message that does not say what to install."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: "no such folder")
    env = doctor.collect_environment()
    assert env["build_tools"] == {"compiler": None, "python_headers": None}
    assert "Triton" not in "\n".join(doctor.advice(env))
    env["gpus"] = [{"name": "card", "memory_gib": 24.0, "capability": "86", "multiprocessors": 82}]
    assert "No compiler and python headers found" in "\n".join(doctor.advice(env))


def test_the_commit_is_that_of_the_own_checkout_only(tmp_path: Path) -> None:
    """Installed inside another project's repository, that project's commit must not be reported."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    (tmp_path / "pyproject.toml").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert doctor._checkout(tmp_path) == {"commit": head, "modified": False}
    (tmp_path / "pyproject.toml").write_text("changed")
    assert doctor._checkout(tmp_path) == {"commit": head, "modified": True}
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert doctor._checkout(inside) == {"commit": None, "modified": None}


def test_limits_of_the_control_group_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the machine's cores and memory are not this process's."""
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/memory.max": "8589934592\n",
    }
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, "MemTotal:  16777216 kB\n"))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert doctor._usable_cores() == 1
    assert doctor._memory()["limit_gib"] == 8.0
    assert doctor._memory()["total_gib"] == 16.0
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert doctor._usable_cores() == 8


def test_the_printed_lines_hold_what_was_collected(tmp_path: Path) -> None:
    lines: list[str] = []
    env = doctor.print_doctor(lines.append, path=tmp_path / "not" / "there" / "yet")
    text = "\n".join(lines)
    for part in (
        __version__,
        torch.__version__,
        env["cpu"]["model"],
        "xformers",
        "dali",
        "mae_kernels",
        "driver",
    ):
        assert part in text
    assert f"{env['disk']['free_gib']} GiB free" in text
    for block, found in env["attention"]["blocks"].items():
        assert f"{block} ({found['site']}): {found['provider']}, because {found['reason']}" in text
        for name, reason in found["others"].items():
            assert f"{name}: {reason or 'can run, when it is named'}" in text
