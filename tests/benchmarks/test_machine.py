"""What a result says of its machine and its sources: clocks as nvidia-smi tells them, and a hash of just what an op is made of."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mae_kernels
from benchmarks import machine
from benchmarks.machine import sources_hash
from sssd_fast.performance.ceilings import Ceilings

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OPS = [name for name in mae_kernels.__all__ if name in mae_kernels.info()]
UUID = "5b6ab9d8-0000-1111-2222-333344445555"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both packages that a test may change."""
    kernels, trainer = tmp_path / "mae_kernels", tmp_path / "sssd_fast"
    shutil.copytree(machine.KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    trainer.mkdir()
    for file in machine.TRAINER.glob("*.py"):
        shutil.copy(file, trainer / file.name)
    monkeypatch.setattr(machine, "KERNELS", kernels)
    monkeypatch.setattr(machine, "TRAINER", trainer)
    return tmp_path


def changed_by(file: Path, *what: str | None) -> dict[str | None, bool]:
    """Whose hash a comment in one file changes; the file is as before afterwards."""
    before = {one: sources_hash(one) for one in what}
    text = file.read_text(encoding="utf-8")
    file.write_text(f"{text}# changed\n", encoding="utf-8")
    after = {one: sources_hash(one) for one in what}
    file.write_text(text, encoding="utf-8")
    assert {one: sources_hash(one) for one in what} == before
    return {one: before[one] != after[one] for one in what}


# ---- sources ----


def test_there_are_ops() -> None:
    assert {"attention", "random_masking", "sssd_loss", "restore_tokens", "crop_resize"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_the_hash_of_an_op_is_that_of_something(op: str) -> None:
    """Every op has a file that is found, and no two hashes are equal unless the ops share a file."""
    assert sources_hash(op) == sources_hash(op)
    assert sources_hash(op) != hashlib.sha256().hexdigest()
    module = getattr(mae_kernels, op).__module__
    for other in OPS:
        if getattr(mae_kernels, other).__module__ != module:
            assert sources_hash(other) != sources_hash(op)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("sssd", {"sssd_loss"}),
        ("distillation", {"sssd_loss", "distillation_loss"}),  # sssd.py fuses it
        (
            "reconstruction",
            {"sssd_loss", "masked_reconstruction_loss", "linear_reconstruction_loss"},
        ),
        ("short_attention", {"attention"}),
        ("masking", {"random_masking"}),
        ("_runtime", set(OPS)),
        ("modules", set()),  # uses ops, is used by none
    ],
)
def test_an_op_depends_on_its_file_and_on_what_that_imports(
    sources: Path, file: str, changes: set[str]
) -> None:
    found = changed_by(sources / "mae_kernels" / f"{file}.py", *OPS, None, "step")
    assert {what for what, changed in found.items() if changed} == changes | {None, "step"}


def test_imports_are_followed_however_they_are_written(sources: Path) -> None:
    """One file after another, inside a function, and in a circle; a name that is no file of the package is none."""
    package = sources / "mae_kernels"
    masking = package / "masking.py"
    masking.write_text(
        masking.read_text() + "\n\ndef _late() -> None:\n    from . import first, nothing\n"
    )
    (package / "first.py").write_text("from .second import x\nimport third\nfrom third import y\n")
    (package / "second.py").write_text("if True:\n    from .first import y\n")
    (package / "third.py").write_text("")
    for name, counts in (("first", True), ("second", True), ("third", False)):
        assert changed_by(package / f"{name}.py", "random_masking", "attention") == {
            "random_masking": counts,
            "attention": False,
        }


def test_a_step_depends_on_the_trainers_files_that_it_is_made_of(sources: Path) -> None:
    trainer = sources / "sssd_fast"
    for name in machine.STEP_FILES:
        assert changed_by(trainer / f"{name}.py", "step", None, "attention") == {
            "step": True,
            None: False,
            "attention": False,
        }
    assert changed_by(trainer / "cli.py", "step") == {"step": False}


def test_an_unknown_op_has_no_hash() -> None:
    with pytest.raises(AttributeError, match="no_such_op"):
        sources_hash("no_such_op")


# ---- clocks ----


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU with a made-up nvidia-smi; `asked` has the command it got."""
    state = SimpleNamespace(
        asked=None,
        answer="1980 MHz, 2619 MHz, 1980 MHz, 120.53 W, 700.00 W, 41\n",
        error=None,
        uuid=UUID,
    )

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        state.asked = command
        assert options["check"] and options["text"] and options["timeout"] > 0
        if state.error is not None:
            raise state.error
        return SimpleNamespace(stdout=state.answer)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(**({"uuid": state.uuid} if state.uuid else {})),
    )
    return state


def test_clocks_are_read_from_the_line_of_this_device(smi: SimpleNamespace) -> None:
    assert machine.clocks(CUDA) == {
        "clocks.sm": "1980 MHz",
        "clocks.mem": "2619 MHz",
        "clocks.max.sm": "1980 MHz",
        "power.draw": "120.53 W",
        "power.limit": "700.00 W",
        "temperature.gpu": "41",
    }
    assert smi.asked[0] == "nvidia-smi"
    assert f"--id=GPU-{UUID}" in smi.asked  # not the index, which CUDA_VISIBLE_DEVICES changes
    assert (
        "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        in smi.asked
    )
    assert "--format=csv,noheader" in smi.asked


def test_without_a_uuid_the_index_names_the_device(smi: SimpleNamespace) -> None:
    smi.uuid = None
    machine.clocks(torch.device("cuda", 2))
    assert "--id=2" in smi.asked
    machine.clocks(torch.device("cuda"))
    assert "--id=3" in smi.asked


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 20),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_nvidia_smi_fails_there_are_no_clocks(smi: SimpleNamespace, error: Exception) -> None:
    smi.error = error
    assert machine.clocks(CUDA) is None


def test_a_cpu_has_no_clocks_and_nobody_is_asked(smi: SimpleNamespace) -> None:
    assert machine.clocks(CPU) is None
    assert smi.asked is None


# ---- description ----


def test_the_description_names_the_machine_and_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run on it depends on, in plain JSON, without a path, a host or a user."""
    monkeypatch.setattr(socket, "gethostname", lambda: "the-host-of-a-test")
    monkeypatch.setattr(platform, "node", lambda: "the-host-of-a-test")
    found = machine.describe(CPU)
    assert found["device"] == {
        "type": "cpu",
        "name": found["device"]["name"],
        "threads": torch.get_num_threads(),
    }
    assert re.search(r", [1-9]\d* cores$", found["device"]["name"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["kernel_sources"] == sources_hash()
    assert set(found["ops"]) == set(OPS)
    text = json.dumps(found)
    for secret in (
        str(Path(mae_kernels.__file__).parent),
        str(Path.home()) + "/",
        "the-host-of-a-test",
    ):
        assert secret not in text
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        assert (
            found["commit"]
            == subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True).strip()
        )


def test_a_gpu_is_described_by_what_torch_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=int(79.25 * 2**30), major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = machine.describe(CUDA)["device"]
    assert {name: device[name] for name in ("type", "name", "memory_gib", "capability")} == {
        "type": "cuda",
        "name": "NVIDIA H100 80GB HBM3",
        "memory_gib": 79.2,
        "capability": "9.0",
    }
    assert "cores" in device["host"]
    assert machine.slug(device["name"]) == "nvidia-h100-80gb-hbm3"
    assert machine.slug(" (AMD) EPYC™, 2 cores ") == "amd-epyc-2-cores"


def test_the_ceilings_are_measured_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(device: torch.device, dtype: torch.dtype) -> Ceilings:
        if dtype == torch.float32:
            return Ceilings(matmul_flops=1e11, copy_bytes=30e9, dtype="float32")
        return Ceilings(matmul_flops=2e11, copy_bytes=31e9, dtype="bfloat16")

    monkeypatch.setattr(machine, "measure_ceilings", measured)
    assert machine.ceilings(CPU, [torch.float32, torch.bfloat16]) == {
        "copy_bytes_per_s": 31e9,
        "matmul_flops_per_s": {"fp32": 1e11, "bf16": 2e11},
    }
