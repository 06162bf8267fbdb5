"""The compiled trainer against the plain one: 50 steps on the same data and noise, checkpoints exchanged in both directions, the cache."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sssd_fast.cli import main
from sssd_fast.run.checkpoint import CheckpointManager, load_checkpoint

STEPS, HALF = 50, 25


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compiler cache for this file, so that only its first run compiles."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def _compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._dynamo.reset()
    counters.clear()


def _last(out: Path) -> dict[str, Any]:
    path = CheckpointManager(out / "checkpoints").latest()
    assert path is not None
    return load_checkpoint(path)


def _losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def _train(out: Path, settings: list[str], *, command: str = "pretrain") -> Path:
    schedule = [
        f"{command}.max_steps={STEPS}",
        f"{command}.epochs=20",
        f"{command}.checkpoint_steps={HALF}",
    ]
    schedule += [
        f"{command}.checkpoint_epochs=1000",
        f"{command}.base_lr=0.002",
        f"{command}.keep_last={STEPS}",
    ]
    assert main([command, "--out", str(out), *settings, *schedule]) == 0
    return out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_50_steps_agree_and_checkpoints_go_both_ways(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs: dict[str, Path] = {}
    for name in ("false", "true"):
        outs[name] = _train(tmp_path / name, [*tiny, f"step.compile={name}"])
        said = capsys.readouterr().out
        assert ("compiling the training step" in said) is (name == "true")
        assert f"compile: {'on' if name == 'true' else 'off'}, step.compile is {name}" in said
    assert re.search(r"[1-9] graphs? compiled, kept in ", said)
    assert (
        counters["stats"]["unique_graphs"] == 2
    )  # forward with backward, and the update; nothing was compiled again
    assert not counters["graph_break"]
    plain, made = (_losses(outs[name]) for name in ("false", "true"))
    assert list(plain) == list(made) == list(range(1, STEPS + 1))
    assert made == pytest.approx(plain, rel=2e-4)
    assert made[1] == pytest.approx(plain[1], rel=1e-6)
    assert plain[STEPS] < 0.9 * plain[1]  # it learned, so there is something to agree on
    _same_state(_last(outs["false"]), _last(outs["true"]))

    for source, target in (("false", "true"), ("true", "false")):  # half of the way each
        resumed = tmp_path / f"{source}-{target}"
        shutil.copytree(outs[source], resumed)
        for path in (resumed / "checkpoints").iterdir():
            if path.name.startswith("best") or int(re.findall(r"\d+", path.name)[0]) > HALF:
                path.unlink()
        torch._dynamo.reset()
        counters.clear()
        assert main(["pretrain", "--resume", str(resumed), f"step.compile={target}"]) == 0
        assert ("every graph was found in " in capsys.readouterr().out) is (target == "true")
        _same_state(_last(resumed), _last(outs["false"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fine_tuning_draws_the_same_random_numbers_compiled(
    tiny: list[str], tmp_path: Path
) -> None:
    """Drop path draws inside the compiled graph, mixing and erasing outside."""
    settings = [
        *tiny,
        "finetune.mixup=0.8",
        "finetune.random_erasing=0.5",
        "finetune.drop_path=0.3",
        "finetune.max_steps=6",
    ]
    losses = []
    for name in ("false", "true"):
        assert (
            main(["finetune", "--out", str(tmp_path / name), *settings, f"step.compile={name}"])
            == 0
        )
        losses.append(_losses(tmp_path / name))
    assert not counters["graph_break"]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_50_steps_in_bf16_stay_as_close_to_fp32_compiled_as_plain(
    tiny: list[str], tmp_path: Path
) -> None:
    runs = {"fp32": ("fp32", "false"), "plain": ("bf16", "false"), "compiled": ("bf16", "true")}
    losses = {}
    for name, (precision, compile_it) in runs.items():
        out = _train(
            tmp_path / name, [*tiny, f"precision={precision}", f"step.compile={compile_it}"]
        )
        losses[name] = torch.tensor(list(_losses(out).values()))
    errors = {name: (losses[name] - losses["fp32"]).abs() for name in ("plain", "compiled")}
    assert errors["plain"].max() > 0  # it is bf16
    assert errors["compiled"].max() <= 2 * errors["plain"].max() + 1e-3
    assert errors["compiled"].mean() <= 2 * errors["plain"].mean() + 1e-4


def _same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal names, shapes and step counts; parameters that differ by rounding carried through Adam."""
    assert a["progress"]["step"] == b["progress"]["step"] == STEPS
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        torch.testing.assert_close(
            value, b["model"][name], rtol=0.02, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for key, state in a["optimizer"]["state"].items():
        assert state["step"] == b["optimizer"]["state"][key]["step"]
        assert state["exp_avg"].shape == b["optimizer"]["state"][key]["exp_avg"].shape
