"""Step and memory benchmarks on a tiny model: providers train alike, wrong ones are not timed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory, step, step_models
from benchmarks.harness import Bench
from benchmarks.step_models import Data, Setup
from sssd_fast.performance.estimate import LiveBytes
from tests.benchmarks.helpers import CPU, PEAK, make_bench, tiny_config

EAGER = [
    (task, name)
    for task in step_models.TASKS
    for name in step_models.PROVIDERS[task]
    if name != "plain"
    and step_models.missing(name) is None
    # the compiled SSSD contains the MAE
    and (task, name) not in (("MAE", "published compiled"), ("MAE", "plain compiled"))
]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(step_models, "configuration", lambda name, device: tiny_config())
    monkeypatch.setattr(step, "STEPS", 3)
    return make_bench("step", tmp_path, passes=2)


@pytest.fixture(params=["aot_eager"])
def compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.compile without a C++ compiler; "aot_eager" also traces the backward."""
    real, name = torch.compile, request.param
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: real(model, backend=name, dynamic=False)
    )
    yield
    torch._dynamo.reset()


def setup_of(task: str, dtype: torch.dtype = torch.float32) -> Setup:
    return Setup(step_models.for_task(tiny_config(), task), task, CPU, dtype, 4)


def run(module: Any, bench: Bench, *words: str, dtypes: Any = None) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(words)
    args.dtypes = dtypes
    module.run(args, bench)


def rows(bench: Bench, case: str) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in bench.results.rows if row["case"] == case}


def change(monkeypatch: pytest.MonkeyPatch, name: str, edit: Callable[[Any, Setup], Any]) -> None:
    """What `build` returns for one provider passes through `edit`."""
    real = step_models.build

    def build(provider: str, *args: Any) -> Any:
        made = real(provider, *args)
        return edit(made, args[0]) if provider == name else made

    monkeypatch.setattr(step_models, "build", build)


# ---- the same training for all providers ----


@pytest.mark.parametrize(("task", "name"), EAGER)
def test_provider_trains_like_plain(compiler: None, task: str, name: str) -> None:
    setup = setup_of(task)
    data, source = Data(setup), step_models.initial_model(setup.config)
    losses = {}
    for provider in ("plain", name):
        train = step_models.build(provider, setup, data, source)
        losses[provider] = [float(train()) for _ in range(3)]
    assert losses[name] == pytest.approx(losses["plain"], rel=2e-6)
    assert losses["plain"][2] < 0.97 * losses["plain"][0]


@pytest.mark.parametrize("task", step_models.TASKS)
def test_reference_in_several_parts_trains_like_plain(task: str) -> None:
    setup = setup_of(task)
    data, source = Data(setup), step_models.initial_model(setup.config)
    train = step_models.build("plain", setup, data, source)
    expected = step_models.reference_losses(setup, data, source, 3, images_at_once=3)
    assert [float(train()) for _ in range(3)] == pytest.approx(expected, rel=2e-6)


def test_providers_decay_the_same_weights() -> None:
    setup = setup_of("MAE")
    data, source = Data(setup), step_models.initial_model(setup.config)
    decayed = {}
    for name in ("plain", "published", "ViTMAE"):
        groups = step_models.build(name, setup, data, source).optimizer.param_groups
        sizes = [sum(p.numel() for p in g["params"]) for g in groups if g["weight_decay"]]
        decayed[name] = sum(sizes)
    assert len(set(decayed.values())) == 1 and decayed["plain"] > 0


def test_float_images_are_those_that_ours_normalises() -> None:
    setup = setup_of("MAE")
    data = Data(setup)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (setup.config.model.mean, setup.config.model.std)
    )
    torch.testing.assert_close(data.floats * std + mean, data.images / 255, rtol=0, atol=1e-6)


# ---- the gate ----


def _zero_a_weight(made: Any, setup: Setup) -> Any:
    with torch.no_grad():
        made.model.mae.encoder.blocks[0].mlp.fc1.weight.zero_()
    return made


def _flip_a_gradient(made: Any, setup: Setup) -> Any:
    made.model.mae.encoder.blocks[0].mlp.fc1.weight.register_hook(torch.neg)
    return made


@pytest.mark.parametrize(
    ("edit", "where"), [(_zero_a_weight, "step 1"), (_flip_a_gradient, "step 2")]
)
def test_wrong_provider_is_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, edit: Any, where: str
) -> None:
    bench.only = ("plain", "ours")
    change(monkeypatch, "ours", edit)
    run(step, bench, "--task", "MAE", "--batch", "4")
    found = rows(bench, "MAE")
    assert str(found["ours"]["reason"]).startswith(f"wrong: the loss of {where}")
    assert found["ours"]["time"] is None and found["plain"]["time"]


def test_non_finite_loss_is_wrong() -> None:
    row = step.new_row(setup_of("MAE"), "MAE", "ours", "step")
    step.gate(row, [1.0, float("nan")], [1.0, 1.0])
    assert row.error is None and str(row.reason).startswith("wrong: the loss of step 2 is nan")


# ---- rows ----


@pytest.mark.parametrize("compiler", ["eager"], indirect=True)
def test_rows_of_a_task(bench: Bench, compiler: None) -> None:
    run(step, bench, "--task", "SSSD", "--batch", "4")
    found = rows(bench, "SSSD")
    assert list(found) == ["published", "published compiled", "plain", "plain compiled", "ours"]
    for name, row in found.items():
        assert row["reason"] is None and row["error"] <= row["allowed"]
        seconds = row["time"]["median_us"] / 1e6
        assert row["more"]["images_per_s"] == pytest.approx(4 / seconds)
        assert row["more"]["mfu"] == pytest.approx(row["flops"] / seconds / PEAK)
        assert row["more"]["loss"] < row["more"]["loss_start"]
        assert (row["versus"] is None) == (name == "ours")


def test_step_that_is_stopped_keeps_what_was_checked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(made: Any, setup: Setup) -> Any:
        raise KeyboardInterrupt

    change(monkeypatch, "plain", stop)
    bench.only = ("plain", "ours")
    with pytest.raises(KeyboardInterrupt):
        run(step, bench, "--task", "MAE", "--batch", "4")
    assert rows(bench, "MAE")["ours"]["peak_bytes"] > 0


def test_provider_out_of_memory_is_a_row_with_the_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(made: Any, setup: Setup) -> Any:
        raise torch.OutOfMemoryError("tried to allocate")

    change(monkeypatch, "ours", fail)
    bench.only = ("plain", "ours")
    run(step, bench, "--task", "MAE", "--batch", "4")
    assert str(rows(bench, "MAE")["ours"]["reason"]).startswith("out of memory")
    assert rows(bench, "MAE")["plain"]["time"]


def test_step_after_the_deadline_is_skipped(bench: Bench) -> None:
    bench.deadline = time.monotonic() - 1
    run(step, bench, "--task", "MAE", "--batch", "4")
    assert bench.results.head["skipped"] == ["MAE, ViT 32x1/8, 32, 4 images, fp32"]
    assert not bench.results.rows


def test_bf16_is_compared_with_fp32(bench: Bench) -> None:
    bench.only = ("ours",)
    run(step, bench, "--task", "SSSD", "--batch", "4", dtypes=[torch.bfloat16])
    row = rows(bench, "SSSD")["ours"]
    assert row["dtype"] == "bf16" and 1e-7 < row["error"] < row["allowed"] == 2e-2


# ---- memory ----


def test_memory_peaks_are_those_of_another_count(bench: Bench) -> None:
    """Weights, tables, moments and batch by size, and every storage that a step creates."""
    bench.only = ("plain", "published")
    run(memory, bench, "--task", "MAE", "--batch", "8", "24", "16")
    found = {(r["provider"], r["sizes"]["batch"]): r for r in bench.results.rows}
    assert len(found) == 6
    setup = replace(setup_of("MAE"), batch=24)
    source, data = step_models.initial_model(setup.config), Data(setup)
    train = step_models.build("plain", setup, data, source)
    train()
    moments = [t for values in train.optimizer.state.values() for t in values.values()]
    given = [*train.model.parameters(), *train.model.buffers(), *moments]
    with LiveBytes([*given, data.images, data.noises]) as counted:
        train()
    fixed = sum(4 * p.numel() * (3 if p.requires_grad else 1) for p in source.parameters())
    expected = fixed + data.images.nbytes + data.noises.nbytes + max(counted.timeline)
    row = found["plain", 24]
    assert row["peak_bytes"] == pytest.approx(expected, rel=0.03)
    slope = (row["peak_bytes"] - found["plain", 16]["peak_bytes"]) / 8 / 1e6
    assert row["more"]["mb_per_further_image"] == pytest.approx(slope)
    assert found["published", 24]["peak_bytes"] > 1.1 * row["peak_bytes"]


def test_memory_stops_at_the_first_batch_that_does_not_fit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(made: Any, setup: Setup) -> Any:
        if setup.batch > 8:
            raise torch.OutOfMemoryError("tried to allocate")
        return made

    change(monkeypatch, "plain", fail)
    bench.only = ("plain",)
    run(memory, bench, "--task", "MAE", "--batch", "8", "16", "24")
    assert [r["reason"] for r in bench.results.rows] == [None, "out of memory"]
