"""The compiled trainer against the plain one: losses, random numbers, checkpoints, the cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sssd_fast.cli import main
from sssd_fast.run.checkpoint import CheckpointManager, load_checkpoint


@pytest.fixture(autouse=True)
def _new_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and differentiated like for Inductor, then run without code generation."""
    real = torch.compile

    def compile_(function: Any, *, options: Any = None, **how: Any) -> Any:
        return real(function, backend="aot_eager", **how)

    monkeypatch.setattr(torch, "compile", compile_)


def _losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def _train(command: str, out: Path, *settings: str) -> dict[int, float]:
    assert main([command, "--out", str(out), *settings]) == 0
    return _losses(out)


def _last(out: Path) -> dict[str, Any]:
    newest = CheckpointManager(out / "checkpoints").latest()
    assert newest is not None
    return load_checkpoint(newest)


@pytest.mark.usefixtures("_traced")
def test_compiled_pretraining_agrees_and_exchanges_checkpoints(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten plain steps equal five plain, three compiled and two plain ones, with the same graphs."""
    schedule = "max_steps=10 epochs=20 checkpoint_steps=5 checkpoint_epochs=100 keep_last=9"
    settings = [f"pretrain.{setting}" for setting in [*schedule.split(), "base_lr=0.002"]]
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    settings = [*tiny, "objective.name=published", "model.depth=1", *settings]
    losses = _train("pretrain", plain, "step.compile=false", *settings)
    assert losses[10] < 0.99 * losses[1]  # it learned
    expected = _last(plain)
    shutil.copytree(plain, mixed)
    capsys.readouterr()
    for start, compile_it in ((5, True), (8, False)):
        for path in (mixed / "checkpoints").iterdir():
            if f"{start:03}.pt" not in path.name:
                path.unlink()
        change = [f"step.compile={str(compile_it).lower()}", "pretrain.checkpoint_steps=4"]
        assert main(["pretrain", "--resume", str(mixed), *change]) == 0
        printed = capsys.readouterr().out
        assert ("compiling the training step" in printed) is compile_it
        assert _losses(mixed) == pytest.approx(losses, rel=2e-4)
        found = _last(mixed)
        assert found["progress"]["step"] == 10
        # parameters differ by rounding carried through Adam
        torch.testing.assert_close(found["model"], expected["model"], rtol=0.02, atol=2e-3)
        state = expected["optimizer"]["state"]
        assert found["optimizer"]["state"].keys() == state.keys()
        for key, values in found["optimizer"]["state"].items():
            assert values["step"] == state[key]["step"]
    # forward with backward; nothing was compiled a second time
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


FINETUNE = ["finetune.mixup=0.8", "finetune.random_erasing=0.5", "finetune.drop_path=0.3"]
FINETUNE += ["finetune.patch_drop=0.5", "finetune.max_steps=4", "model.depth=1"]


@pytest.mark.usefixtures("_traced")
def test_compiled_fine_tuning_draws_the_same_numbers(tiny: list[str], tmp_path: Path) -> None:
    """Drop path and patch drop draw inside the compiled graph, mixing and erasing outside."""
    losses = [
        _train("finetune", tmp_path / name, *tiny, *FINETUNE, f"step.compile={name}")
        for name in ("false", "true")
    ]
    assert not counters["graph_break"]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_agrees_draws_the_same_random_numbers_and_is_cached(
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    settings = [*tiny, *FINETUNE]
    plain = _train("finetune", tmp_path / "plain", *settings, "step.compile=false")
    capsys.readouterr()
    for name, message in (("new", "compiled, kept in"), ("cached", "every graph was found in")):
        torch._dynamo.reset()
        counters.clear()
        losses = _train("finetune", tmp_path / name, *settings, "step.compile=true")
        assert losses == pytest.approx(plain, rel=1e-4)
        assert message in capsys.readouterr().out
