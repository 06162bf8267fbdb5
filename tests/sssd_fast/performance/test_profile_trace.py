"""Where the time of a step goes: planted delays come back in the right part and in no other, and parts add up to the clock's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sssd_fast.config import load_config
from sssd_fast.errors import SssdError
from sssd_fast.loaders import Batch
from sssd_fast.performance import profile_trace
from sssd_fast.performance.profile import Bench, plain_step, time_steps
from sssd_fast.performance.profile_trace import (
    ACCUMULATE,
    BACKWARD,
    DATA,
    FORWARD,
    GAPS,
    HEADS,
    OPTIMIZER,
    OTHER,
    PARTS,
    PREFIX,
    TO_DEVICE,
    Ranges,
    Timeline,
    profile_steps,
    read_trace,
)
from sssd_fast.run.device import World
from sssd_fast.run.log import Console
from sssd_fast.step import Step

CPU = torch.device("cpu")
STEPS = 2
FORWARD_S, BACKWARD_S = (
    0.08,
    0.12,
)  # planted; the real parts of the tiny model take a few milliseconds
NOISE_S = 0.06


@torch.library.custom_op("sssd_fast_test::slow_backward", mutates_args=())
def slow_backward(x: Tensor) -> Tensor:
    time.sleep(BACKWARD_S)
    return x.clone()


@torch.library.custom_op("sssd_fast_test::slow", mutates_args=())
def slow(x: Tensor) -> Tensor:
    """The identity, which takes its time in both directions."""
    time.sleep(FORWARD_S)
    return x.clone()


slow.register_autograd(lambda ctx, dy: slow_backward(dy))


@pytest.fixture
def bench(tiny: list[str], tmp_path: Path) -> Callable[..., tuple[Bench, Step]]:
    def make(*overrides: str) -> tuple[Bench, Step]:
        config = load_config(None, [*tiny, *overrides])
        made = Bench(config, World(CPU), Console(enabled=False), tmp_path, needed=4)
        return made, made.step(plain_step(config))

    return make


Make = Callable[..., tuple[Bench, Step]]


def _model(step: Step) -> nn.Module:
    return step.module


def _seconds(timeline: Timeline) -> dict[str, float]:
    return {name: t / STEPS / 1e6 for name, t in timeline.parts.items()}


def _profiled(
    bench: Bench, step: Step, batches: Iterator[list[Batch]] | None = None
) -> tuple[Timeline, float]:
    return profile_steps(step, batches or bench.batches(), STEPS, 1, CPU, 1e-5)


@pytest.mark.parametrize(
    "overrides", [[], ["pretrain.accumulate=2"], ["objective.weight=0"], ["step.checkpoint=full"]]
)
def test_parts_add_up_to_the_time_on_the_clock(bench: Make, overrides: list[str]) -> None:
    made, step = bench(*overrides)
    timeline, clock_s = _profiled(made, step)
    assert tuple(timeline.parts) == PARTS
    assert sum(timeline.parts.values()) / STEPS / 1e6 == pytest.approx(clock_s, rel=0.05)
    assert sum(timeline.backward.values()) == pytest.approx(timeline.parts[BACKWARD])
    assert sum(timeline.gaps.values()) == pytest.approx(timeline.parts[GAPS])
    assert all(timeline.parts[name] > 0 for name in (*FORWARD, BACKWARD, OPTIMIZER, DATA))
    assert all(timeline.backward[name] > 0 for name in FORWARD)
    assert timeline.parts[TO_DEVICE] == 0  # the batch is where it is used
    assert timeline.parts[OTHER] < 0.02 * timeline.wall
    assert timeline.backward[OTHER] < 0.1 * timeline.parts[BACKWARD]


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("mae.encoder.blocks.1.attn.proj", "encoder attention"),
        ("mae.encoder.blocks.0.mlp", "encoder MLP"),
        ("mae.encoder.blocks.0.norm1", "encoder norms + residual"),
        ("mae.encoder.norm", "encoder norms + residual"),
        ("mae.decoder.embed", "decoder embed + restore"),
        ("mae.decoder.blocks.0.attn", "decoder attention"),
        ("mae.decoder.blocks.0.mlp", "decoder MLP"),
        ("mae.decoder.blocks.0.norm2", "decoder norms + residual"),
        ("mae.decoder.pred", HEADS),
        ("student_head", HEADS),
    ],
)
def test_a_slow_module_moves_its_part_and_its_backward_and_no_other(
    bench: Make, module: str, part: str
) -> None:
    made, step = bench()
    _model(step).get_submodule(module).register_forward_hook(
        lambda _module, _inputs, out: slow(out)
    )
    timeline, _ = _profiled(made, step)
    seconds = _seconds(timeline)
    backward = {name: t / STEPS / 1e6 for name, t in timeline.backward.items()}
    assert FORWARD_S <= seconds.pop(part) < FORWARD_S + NOISE_S
    assert BACKWARD_S <= seconds.pop(BACKWARD) < BACKWARD_S + NOISE_S
    assert BACKWARD_S <= backward.pop(part) < BACKWARD_S + NOISE_S
    assert max(seconds.values()) < NOISE_S and max(backward.values()) < NOISE_S


def test_a_slow_loader_is_data_wait(bench: Make) -> None:
    made, step = bench()

    def batches() -> Iterator[list[Batch]]:
        for micro_batches in made.batches():
            time.sleep(FORWARD_S)
            slow(torch.ones(1))  # an operation in the loader is waiting too
            yield micro_batches

    seconds = _seconds(_profiled(made, step, batches())[0])
    assert 2 * FORWARD_S <= seconds.pop(DATA) < 2 * FORWARD_S + NOISE_S
    assert max(seconds.values()) < NOISE_S
    timed = time_steps(step, batches(), STEPS, 1, CPU)
    assert 2 * FORWARD_S <= timed["data_wait_s"] < 2 * FORWARD_S + NOISE_S


def test_python_between_operations_is_a_gap_with_its_place(bench: Make) -> None:
    made, step = bench()
    mlp = _model(step).get_submodule("mae.decoder.blocks.0.mlp")
    mlp.register_forward_pre_hook(lambda *_: time.sleep(FORWARD_S))
    timeline, _ = _profiled(made, step)
    assert timeline.parts[GAPS] / STEPS / 1e6 >= FORWARD_S
    # hooks run in the order in which they came: this one sleeps before the range of the MLP is opened
    assert timeline.gaps["decoder norms + residual"] / STEPS / 1e6 >= FORWARD_S


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_follows_the_backward_is_the_optimizer(bench: Make, accumulate: int) -> None:
    made, step = bench(f"pretrain.accumulate={accumulate}")
    after = step.after
    assert after is not None

    def slowly(carry: Tensor, finite: Tensor) -> None:
        after(slow(carry), finite)

    step.after = slowly
    seconds = _seconds(_profiled(made, step)[0])
    assert FORWARD_S <= seconds.pop(OPTIMIZER) < FORWARD_S + NOISE_S
    assert max(seconds.values()) < NOISE_S * accumulate
    timed = time_steps(step, made.batches(), STEPS, 1, CPU)
    assert FORWARD_S <= timed["update_s"] < FORWARD_S + NOISE_S
    assert timed["forward_backward_s"] < NOISE_S * accumulate


def test_what_comes_before_the_model_in_a_micro_batch_is_not_the_optimizer(bench: Make) -> None:
    made, step = bench("pretrain.accumulate=2")
    loss = step.loss

    def with_slow_noise(*inputs: Any) -> Any:
        slow(torch.ones(1))
        return loss(*inputs)

    step.loss = with_slow_noise
    seconds = _seconds(_profiled(made, step)[0])
    assert 2 * FORWARD_S <= seconds.pop("masking + embed") < 2 * FORWARD_S + NOISE_S
    assert max(seconds.values()) < NOISE_S


def test_activations_computed_again_belong_to_the_backward(bench: Make) -> None:
    made, step = bench("step.checkpoint=full", "model.depth=1")
    _model(step).get_submodule("mae.encoder.blocks.0.mlp").register_forward_pre_hook(
        lambda *_: slow(torch.ones(1)) and None
    )
    seconds = _seconds(_profiled(made, step)[0])
    assert FORWARD_S <= seconds["encoder norms + residual"] < FORWARD_S + NOISE_S
    assert FORWARD_S <= seconds[BACKWARD] < FORWARD_S + NOISE_S


def test_whole_step_times_add_up(bench: Make) -> None:
    made, step = bench()
    started = time.perf_counter()
    timed = time_steps(step, made.batches(), STEPS, 1, CPU)
    elapsed = time.perf_counter() - started
    assert timed["step_s"] == pytest.approx(
        timed["data_wait_s"] + timed["forward_backward_s"] + timed["update_s"]
    )
    assert timed["spread_s"]["min"] <= timed["spread_s"]["median"] <= timed["spread_s"]["max"]
    assert STEPS * timed["step_s"] <= elapsed


def test_nothing_stays_on_the_model_even_after_an_error(bench: Make) -> None:
    made, step = bench()
    model = _model(step)
    _profiled(made, step)
    time_steps(step, made.batches(), 1, 1, CPU)
    with pytest.raises(ZeroDivisionError), Ranges(model) as ranges, ranges.step(1):
        raise ZeroDivisionError
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    unlike = nn.Module()
    with pytest.raises(AttributeError), Ranges(unlike):
        pass
    assert not unlike._forward_pre_hooks


# ---- traces ---------------------------------------------------------------------------------------------------------------------


def _event(
    cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": start,
        "dur": end - start,
        "tid": tid,
        "args": args,
    }


def _range(name: str, start: float, end: float) -> dict[str, Any]:
    return _event("user_annotation", PREFIX + name, start, end)


def _gpu_trace() -> list[dict[str, Any]]:
    """A step as CUDA's traces describe it: the host runs ahead on thread 1, autograd launches from thread 2, the device works later."""
    node = profile_trace.AUTOGRAD_NODE
    launches = [  # correlation, thread, time of the launch; name, category, start and end on the device
        (1, 1, 3, "Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 5, 9),
        (2, 1, 12, "gather", "kernel", 14, 16),
        (3, 1, 21, "gemm of the MLP", "kernel", 30, 50),
        (4, 1, 26, "loss", "kernel", 50, 52),
        (5, 2, 41, "gemm of the MLP's backward", "kernel", 54, 80),
        (6, 2, 45, "sum", "kernel", 80, 82),
        (7, 1, 62, "adamw", "kernel", 85, 95),
        (8, 1, 27, "on another stream, half hidden", "kernel", 45, 51),
        (10, 1, 33, "scaling of the loss", "kernel", 52, 53),
        (9, 2, 39, "gradient of the loss", "kernel", 53, 54),
    ]
    host = [
        _range("window", 0, 100),
        _range("data wait", 0, 10),
        _range("masking + embed", 10, 20),
        _range("decoder MLP", 20, 25),
        _range("heads + loss", 25, 30),
        _range(profile_trace.THEN_UPDATE, 30, 70),
        _event("cpu_op", "aten::addmm", 20.5, 22, **{"Sequence number": 11}),
        _event("cpu_op", "aten::relu", 22, 23, **{"Sequence number": 12}),
        _event(
            "cpu_op", "aten::detach", 26, 27, **{"Sequence number": 12}
        ),  # shows the next free number: it made node 12
        _event("cpu_op", f"{node}DetachBackward0", 38, 40, 2, **{"Sequence number": 12}),
        _event("cpu_op", f"{node}AddmmBackward0", 40, 44, 2, **{"Sequence number": 11}),
        _event("cpu_op", "aten::mm", 40.5, 43, 2),
        _event("cpu_op", f"{node}torch::autograd::AccumulateGrad", 44, 46, 2),
    ]
    calls = [
        _event("cuda_runtime", "cudaLaunchKernel", t, t + 0.1, tid, correlation=n)
        for n, tid, t, *_ in launches
    ]
    work = [
        _event(cat, name, start, end, 7, correlation=n)
        for n, _, _, name, cat, start, end in launches
    ]
    return [*work, *calls, *host, {"ph": "M", "name": "process_name"}]


def test_device_time_goes_to_the_range_that_launched_it_and_idle_time_to_what_the_host_did() -> (
    None
):
    timeline = read_trace(_gpu_trace(), cuda=True)
    expected = dict.fromkeys(PARTS, 0.0)
    expected |= {
        DATA: 5 + 1,  # [0, 5] before the copy, [9, 10] after it
        TO_DEVICE: 4,
        "masking + embed": 2,
        "decoder MLP": 20,
        HEADS: 1
        + 1,  # of the kernel on another stream [45, 50] was counted already, of the loss kernel [50, 51]
        BACKWARD: 1 + 1 + 26 + 2,
        OPTIMIZER: 10,
        GAPS: 4 + 14 + 3 + 5,
    }
    assert timeline.parts == pytest.approx(expected) and timeline.wall == 100
    assert {name: t for name, t in timeline.backward.items() if t} == pytest.approx(
        {OTHER: 1, HEADS: 1, "decoder MLP": 26, ACCUMULATE: 2}
    )
    assert dict(timeline.gaps) == pytest.approx(
        {"masking + embed": 4 + 4, "decoder MLP": 5, HEADS: 5, OTHER: 3 + 5}
    )


def test_device_work_that_nobody_launched_is_other() -> None:
    events = [
        e for e in _gpu_trace() if e.get("args", {}).get("correlation") != 7 or e["cat"] == "kernel"
    ]
    timeline = read_trace(events, cuda=True)
    assert (timeline.parts[OTHER], timeline.parts[OPTIMIZER]) == (10, 0)


def test_traces_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(SssdError, match="nothing on the GPU"):
        read_trace(
            [e for e in _gpu_trace() if e.get("cat") not in profile_trace.DEVICE_WORK], cuda=True
        )
    with pytest.raises(SssdError, match="0 measured windows"):
        read_trace([e for e in _gpu_trace() if not e["name"].endswith("window")], cuda=True)
