"""`sssd-fast profile`: known delays appear in their stage and kind."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import profile as torch_profiler

from sssd_fast.config import load_config
from sssd_fast.errors import ConfigError
from sssd_fast.performance import profile as profiler
from sssd_fast.performance.profile import IDLE, STAGES, profile, read_events, time_steps
from sssd_fast.pretrain import PretrainTask
from sssd_fast.run.device import World
from sssd_fast.run.folder import open_run
from sssd_fast.train import make_step

CPU = torch.device("cpu")
PAUSE_S = 0.08


def build(run: Any, *data: Any) -> Any:
    return make_step(PretrainTask(run, *data), run, run.config)


@torch.library.custom_op("sssd_fast_test::slow_gelu", mutates_args=())
def slow_gelu(x: torch.Tensor) -> torch.Tensor:
    time.sleep(PAUSE_S)
    return x.clone()


@torch.library.custom_op("sssd_fast_test::slow_layer_norm", mutates_args=())
def slow_layer_norm(x: torch.Tensor) -> torch.Tensor:
    """The identity, slow in both directions, under names of known kinds."""
    time.sleep(PAUSE_S)
    return x.clone()


slow_layer_norm.register_autograd(lambda ctx, dy: slow_gelu(dy))


def test_profile_finds_delays_in_stage_and_kind(tiny: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*tiny, "objective.name=published", "pretrain.accumulate=2"])
    with open_run("pretrain", config, tmp_path / "run", World(CPU)) as run:
        step, batches, _ = profiler.prepare(run, build, 4)
    step.module.mae.decoder.pred.register_forward_hook(lambda _m, _i, out: slow_layer_norm(out))
    update = step.update_state
    assert update is not None

    def slow_update(stats: torch.Tensor, finite: torch.Tensor) -> None:
        time.sleep(PAUSE_S)  # no operation
        update(stats, finite)

    step.update_state = slow_update
    time_steps(step, batches, 1, 0, CPU)
    with torch_profiler() as recorded:
        time_steps(step, batches, 2, 0, CPU)
    stages = read_events(recorded.events(), 2, cuda=False)
    # two micro-batches sleep in forward and backward, the update once
    assert stages["forward"]["norms"] >= 1.99 * PAUSE_S
    assert stages["backward"]["GELU, additions"] >= 1.99 * PAUSE_S
    assert stages["update"][IDLE] >= 0.99 * PAUSE_S
    assert stages["update"]["optimizer"] > 0
    assert stages["forward"]["matrix products"] > 0
    assert stages["backward"]["attention"] > 0


def test_read_events_puts_kernels_into_the_stage_that_launched_them() -> None:
    def event(name: str, start: float, end: float, device_us: float = 0.0) -> Any:
        return SimpleNamespace(
            name=name,
            thread=1,
            time_range=SimpleNamespace(start=start, end=end),
            device_type=SimpleNamespace(name="CPU"),
            self_device_time_total=device_us,
            self_cpu_time_total=end - start,
        )

    events = [
        event("forward", 0, 100),
        event("aten::addmm", 10, 20, 50),
        event("backward", 100, 300),
        event("aten::mm", 110, 120, 400),
        event("mae_kernels::gelu_linear_backward", 130, 140, 30),
        event("aten::mm", 310, 320, 7),  # outside of all stages
    ]
    stages = read_events(events, 1, cuda=True)
    us = {stage: {kind: s * 1e6 for kind, s in kinds.items()} for stage, kinds in stages.items()}
    assert us["forward"] == pytest.approx({"matrix products": 50, IDLE: 50})
    assert us["backward"] == pytest.approx({"matrix products": 430, IDLE: 0})
    assert us["data"] == us["update"] == {IDLE: 0}


def test_kind_of_knows_the_operations_of_a_step() -> None:
    kinds = {
        "aten::addmm": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "mae_kernels::sssd_loss_backward": "losses",
        "aten::native_layer_norm": "norms",
        "aten::_fused_adamw_": "optimizer",
        "triton_poi_fused_add_0": "compiled kernels",
        "aten::copy_": "copies, casts",
        "aten::unknown": profiler.OTHER,
    }
    assert {name: profiler.kind_of(name) for name in kinds} == kinds


def test_profile_prints_tables_and_draws_a_picture(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "step.png"
    result = profile(load_config(None, tiny), build, steps=2, warmup=1, out=png)
    assert png.read_bytes().startswith(b"\x89PNG")
    # the median of two
    assert result["images_per_s"] == pytest.approx(8 / (sum(result["times"]) / 2))
    text = capsys.readouterr().out
    assert all(stage in text for stage in (*STAGES, "matrix products", "8 images"))


def test_profile_names_all_bad_settings(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_config(None, [*tiny, "pretrain.batch=auto"])
    with pytest.raises(ConfigError) as error:
        profile(config, build, steps=0, warmup=0, out=tmp_path / "none" / "step.jpg")
    problems = ["steps is 0, warmup is 0", "ends in .png", "does not exist", "torchrun", "is auto"]
    assert [words for words in problems if words not in str(error.value)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("compile_it", ["false", "true"])
def test_profile_on_a_gpu(tiny: list[str], compile_it: str) -> None:
    settings = ["device=cuda", f"step.compile={compile_it}", "pretrain.batch_size=16"]
    result = profile(load_config(None, [*tiny, *settings]), build, steps=4, warmup=2)
    stages = result["stages"]
    assert result["compiled"] is (compile_it == "true")
    for stage in STAGES[1:]:
        assert sum(s for kind, s in stages[stage].items() if kind != IDLE) > 0
