"""The loop: exact resume after a kill, signals, NaN, several processes, and the run folder."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mae_kernels
from mae_kernels import cpu_attention
from sssd_fast.cli import main
from sssd_fast.config import load_config
from sssd_fast.run.checkpoint import CheckpointManager, load_checkpoint
from sssd_fast.run.device import SHARED_BATCH
from sssd_fast.train import Schedule

# Runs the command line in a separate process and sends it a signal right before optimizer step
# KILL_AT.
CHILD = """
import os, sys
from sssd_fast import step
real, count = step.Step.__call__, [0]
def call(self, batches, number, lr):
    if number == int(os.environ["KILL_AT"]) and not count[0]:
        count[0] = 1
        os.kill(os.getpid(), int(os.environ["KILL_WITH"]))
    return real(self, batches, number, lr)
step.Step.__call__ = call
from sssd_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _child(arguments: list[str], kill_at: int, kill_with: int) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KILL_AT": str(kill_at), "KILL_WITH": str(kill_with)}
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def _train(task: str, out: Path, *settings: str) -> None:
    assert main([task, "--out", str(out), *settings]) == 0


def _last(out: Path) -> dict[str, Any]:
    path = CheckpointManager(out / "checkpoints").latest()
    assert path is not None
    return load_checkpoint(path)


def _assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, down to optimizer moments, step counts and the centre."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def _records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _losses(out: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in _records(out) if r["kind"] == "train"]


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_killed_run_resumes_bit_for_bit(task: str, tiny: list[str], tmp_path: Path) -> None:
    """10 steps = 5 steps + checkpoint + two more steps + kill -9 + a new process. Drop path,
    mixup and erasing draw random numbers.
    """
    settings = [*tiny, f"{task}.max_steps=10", f"{task}.checkpoint_steps=5"]
    if task == "finetune":
        settings += ["finetune.mixup=0.8", "finetune.random_erasing=0.5"]
    else:
        settings += ["pretrain.accumulate=2", "pretrain.batch_size=4", "pretrain.epochs=5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _train(task, whole, *settings)
    killed = _child([task, "--out", str(broken), *settings], 7, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert _last(broken)["progress"]["step"] == 5
    assert main([task, "--resume", str(broken)]) == 0
    a, b = _last(whole), _last(broken)
    for name in ("model", "optimizer", "progress"):
        _assert_same(a[name], b[name], name)
    assert a["progress"]["step"] == 10
    assert _losses(whole) == _losses(broken)  # nothing twice, nothing missing
    assert [step for step, _ in _losses(whole)] == list(range(1, 11))


def test_run_killed_before_the_first_checkpoint_of_a_stage_resumes_with_that_stage(
    tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = [*tiny, "pretrain.max_steps=1", "finetune.max_steps=11"]
    settings += ["finetune.validate_epochs=3", "finetune.checkpoint_epochs=3"]
    # Before it trains, `run` times the steps 0 to 7.
    killed = _child(["run", "--out", str(out), *settings], 9, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = _last(out / "pretrain")
    assert CheckpointManager(out / "finetune" / "checkpoints").latest() is None
    assert main(["run", "--resume", str(out)]) == 0
    assert _last(out / "finetune")["progress"]["step"] == 11
    _assert_same(before["model"], _last(out / "pretrain")["model"])


def test_sigterm_saves_and_prints_the_command_that_resumes(tiny: list[str], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "my runs"
    settings = [*tiny, "pretrain.max_steps=8"]
    _train("pretrain", whole, *settings)
    stopped = _child(["pretrain", "--out", str(broken), *settings], 3, signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    assert f"sssd-fast pretrain --resume '{broken}'" in stopped.stderr
    assert _last(broken)["progress"]["step"] == 4  # the step under way was finished
    assert main(["pretrain", "--resume", str(broken)]) == 0
    _assert_same(_last(whole)["model"], _last(broken)["model"])


def test_signal_that_also_ends_the_compiler_saves_a_checkpoint(
    tiny: list[str], tmp_path: Path
) -> None:
    """Ctrl-C and `timeout` signal the whole process group; here the C++ compiler does."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) exec c++ "$@";; esac\nkill -TERM 0\n')
    compiler.chmod(0o755)
    out = tmp_path / "run"
    settings = [*tiny, "step.compile=true", "pretrain.max_steps=2"]
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "sssd_fast", "pretrain", "--out", str(out), *settings]
    stopped = subprocess.run(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert stopped.returncode == 143, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert f"sssd-fast pretrain --resume {out}" in stopped.stderr
    assert _last(out)["progress"]["step"] == 0


def test_nan_ends_the_run_and_keeps_the_last_finite_state(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sssd_fast.objective import SSSD

    real = SSSD.forward

    def poisoned(self: SSSD, images: torch.Tensor, noise: torch.Tensor) -> Any:
        out = real(self, images, noise)
        calls[0] += self.training
        return out._replace(total=out.total * math.nan) if calls[0] > 5 else out

    calls = [0]
    monkeypatch.setattr(SSSD, "forward", poisoned)
    out = tmp_path / "run"
    settings = [*tiny, "objective.name=published", "pretrain.max_steps=12"]
    settings += ["pretrain.checkpoint_steps=1", "pretrain.keep_last=20"]
    assert main(["pretrain", "--out", str(out), *settings]) == 3
    assert "finite" in capsys.readouterr().err
    manager = CheckpointManager(out / "checkpoints", keep_last=20)
    # Steps 6 and 7 were skipped, step 8 ended the run.
    good, bad = (load_checkpoint(manager.path(step)) for step in (5, 7))
    assert manager.latest() == manager.path(7)
    _assert_same(good["model"], bad["model"])  # no weight, and not the centre
    _assert_same(good["optimizer"]["state"], bad["optimizer"]["state"])
    before = load_checkpoint(manager.path(4))["model"]["center"]
    assert not torch.equal(before, good["model"]["center"])
    train = [r for r in _records(out) if r["kind"] == "train"]
    assert [r.get("skipped_steps") for r in train if r["step"] > 4] == [None, 1, 2]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores what the launcher of several processes sets."""
    for name in ("OMP_NUM_THREADS", SHARED_BATCH, "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("launcher")
def test_error_of_any_process_is_shown_once(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "--out", str(tmp_path / "run"), *tiny, "processes=2", "threads=2"]
    assert main([*words, "data.source=/nowhere"]) == 2
    error = capfd.readouterr().err
    assert error.count("/nowhere") == 1 and "Traceback" not in error
    assert main([*words, "pretrain.batch_size=7"]) == 2
    error = capfd.readouterr().err
    assert "processes is 2, which does not divide pretrain.batch_size 7" in error


def _torchrun(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(processes), "-m", "sssd_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize(
    ("task", "form"), [("pretrain", "published"), ("pretrain", "sinkhorn"), ("finetune", "")]
)
def test_two_processes_train_as_one(
    task: str, form: str, tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same images, masks and centre: losses and weights of 2 x batch 4 equal those of 1 x
    batch 8.
    """
    settings = [*tiny, f"{task}.max_steps=6", "finetune.drop_path=0"]
    settings += [f"objective.name={form}"] if form else []
    settings += ["objective.center_momentum=0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    _train(task, one, *settings, f"{task}.batch_size=8")
    capfd.readouterr()
    if task == "finetune":  # torchrun, with a batch for each process
        run = _torchrun(2, [task, "--out", str(two), *settings, f"{task}.batch_size=4"])
        assert run.returncode == 0, run.stderr[-3000:]
    else:  # `processes`, which divides the batch
        assert main([task, "--out", str(two), *settings, "processes=2", "threads=2"]) == 0
        text = capfd.readouterr().out
        assert text.count(" 6 steps, ") == 1
        assert "processes: 2" in text
    records = [_records(out) for out in (one, two)]
    first = [next(r for r in found if r["kind"] == "train") for found in records]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-5)
    # Adam divides rounding errors of vanishing gradients (the key biases') by themselves: later
    # losses agree less tightly
    for kind in ("train", "val"):
        losses = [[r["loss"] for r in found if r["kind"] == kind] for found in records]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert len(losses[0]) >= 2
    if task == "pretrain":
        a, b = _last(one)["model"]["center"], _last(two)["model"]["center"]
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)
        assert main([task, "--resume", str(two), "processes=1"]) == 0
        assert "resuming from step-0000006.pt" in capfd.readouterr().out
    else:
        files = [out / "eval" / "test" / "predictions.csv" for out in (one, two)]
        paths = [[row.split(",")[0] for row in f.read_text().splitlines()] for f in files]
        assert paths[0] == paths[1]


def test_schedule_counts_optimizer_steps() -> None:
    values = {"epochs": 10, "batch_size": 16, "accumulate": 3, "warmup_epochs": 2}
    settings = load_config(None, [f"pretrain.{k}={v}" for k, v in values.items()]).pretrain
    schedule = Schedule.of(settings, micro_steps=10, processes=2)
    assert (schedule.steps_per_epoch, schedule.total_steps, schedule.warmup_steps) == (3, 30, 6)
    assert schedule.effective_batch == 96
    assert schedule.peak_lr == pytest.approx(1.5e-4 * 96 / 256)


def test_existing_run_needs_resume_or_overwrite(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["pretrain", "--out", str(out), *tiny, "pretrain.max_steps=1"]
    assert main(command) == 0
    assert main(command) == 2
    assert "--resume" in (text := capsys.readouterr().err)
    assert "--overwrite" in text
    assert main([*command, "--overwrite"]) == 0


def test_resume_rejects_another_run(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    _train("pretrain", out, *tiny, "pretrain.max_steps=2")
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["pretrain", "--resume", str(out), "pretrain.base_lr=0.5", "data.workers=0"]) == 2
    assert "pretrain.base_lr was 0.01, is 0.5" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(out)]) == 2
    assert "a checkpoint of `pretrain`, not of `finetune`" in capsys.readouterr().err
    # not a byte of the run was changed
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # no part of the training
    assert main(["pretrain", "--resume", str(out), "evaluate.crops=5"]) == 0
    assert main(["pretrain", "--resume", str(tmp_path / "nothing")]) == 2


def test_dry_run_trains_two_steps_and_keeps_nothing(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("pretrain", "finetune", "run"):
        assert main([task, "--dry-run", "--out", str(tmp_path / "run"), *tiny]) == 0
        text = capsys.readouterr().out
        assert "dry run:" in text
        assert "2/2" in text
        assert "their files are deleted" in text
        if task == "pretrain":
            # it would name a deleted file
            assert "report:" not in text
    assert list(tmp_path.iterdir()) == []


def test_run_folder_contains_all_files(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train("pretrain", out, *tiny, "pretrain.max_steps=4", "pretrain.image_epochs=1")
    names = {path.name for path in out.iterdir()}
    files = "config.yaml command.txt env.json data.json index.json split.csv train.log"
    results = "metrics.jsonl checkpoints images report.md report.html"
    assert {*files.split(), *results.split()} <= names
    assert "pretrain" in (out / "command.txt").read_text()
    assert load_config(out / "config.yaml").pretrain.max_steps == 4
    facts = json.loads((out / "data.json").read_text())
    assert facts["classes"] == ["synthetic_covid", "synthetic_normal"]
    assert sum(sum(part.values()) for part in facts["counts"].values()) == 48
    keys = "loss loss_reconstruction loss_distillation lr images_per_s data_wait_fraction grad_norm"
    assert set(keys.split()) <= set(_records(out)[0])
    assert len(list((out / "images").glob("reconstruction-*.png"))) >= 1
    assert json.loads((out / "env.json").read_text())["python"]


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_validation_runs_at_its_interval_and_at_the_end(
    task: str, tiny: list[str], tmp_path: Path
) -> None:
    epochs = {}
    for every in (1, 2):
        out = tmp_path / str(every)
        _train(task, out, *tiny, f"{task}.epochs=3", f"{task}.validate_epochs={every}")
        epochs[every] = {r["epoch"]: r["loss"] for r in _records(out) if r["kind"] == "val"}
    assert list(epochs[1]) == [1, 2, 3]
    assert epochs[2] == {epoch: epochs[1][epoch] for epoch in (2, 3)}


def test_training_with_the_ops_equals_training_with_plain_torch(
    tiny: list[str], tmp_path: Path
) -> None:
    """20 steps with the registered ops (their own backward formulas) and with torch's autograd."""
    losses = []
    for backend in ("registered", "reference"):
        out = tmp_path / backend
        with mae_kernels.backend(backend):
            _train("pretrain", out, *tiny, "pretrain.max_steps=20", "pretrain.epochs=5")
        losses.append([loss for _, loss in _losses(out)])
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)


def test_fast_path_of_a_cpu_trains_as_plain_fp32(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 steps in bf16 with the attention products, and in fp32 with
    scaled_dot_product_attention.
    """
    monkeypatch.setattr(cpu_attention, "cpu_bf16_units", lambda: "AMX")
    calls = []
    monkeypatch.setattr(cpu_attention, "products", _counted(cpu_attention.products, calls))
    losses = []
    for precision, attention in (("bf16", "fused"), ("fp32", "sdpa")):
        settings = [f"precision={precision}", f"step.attention={attention}"]
        settings += [f"step.decoder_attention={attention}", "pretrain.max_steps=50"]
        out = tmp_path / precision
        _train("pretrain", out, *tiny, *settings, "pretrain.epochs=20")
        losses.append([r["loss_reconstruction"] for r in _records(out) if r["kind"] == "train"])
    assert len(calls) == 50 * 3  # two blocks of the encoder, one of the decoder
    assert len(losses[0]) == 50
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def _counted(function: Any, calls: list[int]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return counted
