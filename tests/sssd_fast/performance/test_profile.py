"""`sssd-fast profile`: its figures, picture and table, and that the caller's state stays as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sssd_fast.config import Config, load_config
from sssd_fast.errors import ConfigError
from sssd_fast.performance.ceilings import Ceilings
from sssd_fast.performance.costs import Part, parts
from sssd_fast.performance.profile import breakdown, profile
from sssd_fast.performance.profile_trace import (
    BACKWARD,
    DATA,
    FORWARD,
    GAPS,
    HEADS,
    OPTIMIZER,
    OTHER,
    PARTS,
    TO_DEVICE,
    Timeline,
)


def test_rows_hold_work_over_time_against_the_ceilings() -> None:
    timeline = Timeline(8e6)
    timeline.add(HEADS, None, 4e6)
    timeline.add(BACKWARD, HEADS, 2e6)
    timeline.add(OPTIMIZER, None, 2e6)
    costs = [
        Part("prediction head", 10, 20, 1, 2),
        Part("loss", 0, 0, 3, 4, forward_weight_bytes=5),
        Part("optimizer", update_bytes=96),
    ]
    rows = breakdown(timeline, 2, costs, 4, 2, Ceilings(40.0, 50.0, "float32"))
    assert [row["name"] for row in rows] == list(PARTS)
    found = {row["name"]: row for row in rows}
    heads = found[HEADS]
    assert (heads["seconds"], heads["share"], heads["flops"], heads["bytes"]) == (2, 0.5, 40, 26)
    assert (
        heads["flops_per_s"] == 20
        and heads["share_of"] == {"matmul": 0.5, "copy": 0.26}
        and heads["nearer"] == "matmul"
    )
    below = {row["name"]: row for row in found[BACKWARD]["below"]}
    assert below[HEADS]["flops"] == found[BACKWARD]["flops"] == 80
    assert (
        below[HEADS]["share_of"] == found[BACKWARD]["share_of"] == {"matmul": 2.0, "copy": 24 / 50}
    )
    assert found[OPTIMIZER]["nearer"] == "copy" and found[OPTIMIZER]["share_of"][
        "copy"
    ] == pytest.approx(96 / 50)
    assert found[DATA]["share_of"] is None and found[GAPS]["nearer"] is None


def test_rows_cover_all_costs(tiny: list[str]) -> None:
    config = load_config(None, tiny)
    costs = parts(config.model, config.objective)
    timeline = Timeline(1.0, parts=dict.fromkeys(PARTS, 1.0))
    rows = breakdown(timeline, 1, costs, 8, 1, Ceilings(1.0, 1.0, "float32"))
    total = sum(costs, Part())
    assert sum(row["flops"] for row in rows) == sum(total.step_flops(8))
    assert sum(row["bytes"] for row in rows) == sum(total.step_bytes(8))


# ---- the command ----------------------------------------------------------------------------------------------------------------


def _config(tiny: list[str], *overrides: str) -> Config:
    return load_config(None, [*tiny, *overrides])


def _numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for value in tree:
            yield from _numbers(value)
    elif isinstance(tree, float):
        yield tree


def test_command_writes_table_picture_and_figures_and_leaves_the_caller_alone(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    profile(
        _config(tiny, "threads=2"),
        steps=2,
        warmup=1,
        out="step.png",
        json_out="step.json",
        command="typed",
    )
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert sorted(path.name for path in work.iterdir()) == ["step.json", "step.png"]
    assert (work / "step.png").read_bytes().startswith(b"\x89PNG") and (
        work / "step.png"
    ).stat().st_size > 20_000
    result = json.loads((work / "step.json").read_text())
    assert result["schema"] == 1 and result["command"] == "typed" and result["images_per_step"] == 8
    assert (
        result["settings"]["config"]["model"]["width"] == 32
        and result["environment"]["torch"]["version"]
    )
    assert result["configured"]["compiled"] is False and result["configured"]["how"]
    rows = result["profiled"]["parts"]
    assert [row["name"] for row in rows] == list(PARTS)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["seconds"] for row in rows) == pytest.approx(
        result["profiled"]["step_s"], rel=0.05
    )
    assert all(math.isfinite(number) for number in _numbers(result))
    plain = result["plain"]
    assert plain["images_per_s"] == pytest.approx(8 / plain["step_s"])
    ceiling = result["ceilings"]["matmul_flops"]
    flops = result["flops_per_image"]["standard"]
    assert plain["mfu"] == pytest.approx(flops * plain["images_per_s"] / ceiling)
    text = capsys.readouterr().out
    assert "\x1b" not in text and all(name in text for name in PARTS)
    assert "The configured step is the plain one" in text


def test_a_compiled_step_is_timed_whole_beside_the_plain_one(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, modes = torch.compile, []

    def quick(
        what: Any, **options: Any
    ) -> Any:  # Inductor takes a minute for what this test is about
        modes.append(what)
        return real(what, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", quick)
    result = profile(
        _config(tiny, "step.compile=true"), steps=1, warmup=1, out=tmp_path / "step.png"
    )
    assert modes and result["configured"]["compiled"] is True
    assert result["configured"]["step_s"] != result["plain"]["step_s"]
    assert result["configured"]["forward_backward_s"] > 0 and result["configured"]["mfu"] > 0
    assert {row["name"]: row["seconds"] for row in result["profiled"]["parts"]}[
        "encoder attention"
    ] > 0
    text = capsys.readouterr().out
    assert "A compiled step has no parts any more" in text and "configured, compiled" in text


def test_bad_settings_are_all_named(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as error:
        profile(
            _config(tiny, "pretrain.batch=auto"),
            steps=0,
            warmup=0,
            out="step.jpg",
            json_out=tmp_path / "none" / "step.json",
        )
    for words in (
        "steps is 0",
        "warmup is 0",
        "'step.jpg', needs a file name that ends in .png",
        "folder does not exist",
    ):
        assert words in str(error.value)
    assert "without torchrun" in str(error.value) and "pretrain.batch is auto" in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("compile_it", ["false", "true"])
def test_on_a_gpu(tiny: list[str], tmp_path: Path, compile_it: str) -> None:
    config = _config(tiny, "device=cuda", f"step.compile={compile_it}", "pretrain.batch_size=16")
    result = profile(
        config, steps=4, warmup=2, out=tmp_path / "step.png", json_out=tmp_path / "step.json"
    )
    found = {row["name"]: row["seconds"] for row in result["profiled"]["parts"]}
    assert sum(found.values()) == pytest.approx(result["profiled"]["step_s"], rel=0.05)
    assert all(found[name] > 0 for name in (*FORWARD, TO_DEVICE, BACKWARD, OPTIMIZER))
    assert found[OTHER] < 0.02 * sum(found.values())
    below = {
        row["name"]: row["seconds"]
        for row in result["profiled"]["parts"][PARTS.index(BACKWARD)]["below"]
    }
    assert all(below[name] > 0 for name in FORWARD) and below[OTHER] < 0.2 * found[BACKWARD]
    assert result["configured"]["compiled"] is (compile_it == "true")
    assert result["configured"]["step_s"] > 0 and result["configured"]["update_s"] > 0
