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
from benchmarks.processes import Processes
from benchmarks.step_models import TASKS, Data, Provider, Setup
from sssd_fast.performance.estimate import LiveBytes
from tests.benchmarks.helpers import CPU, PEAK, make_bench, tiny_config

FP32, BF16 = torch.float32, torch.bfloat16
FAMILIES = [f for f in ("ours", "plain", "transformers") if step_models.missing(f) is None]
TRAINED = [
    (task, Provider(family, FP32))
    for task in TASKS
    for family in FAMILIES
    if (task, family) != ("SSSD", "transformers")
]
COMPILED = [("MAE", "transformers"), ("SSSD", "plain"), ("SSSD", "published")]
TRAINED += [(task, Provider(family, FP32, compile=True)) for task, family in COMPILED]
TRAINED += [("MAE", Provider("transformers", FP32, attention="eager"))]
TRAINED = [(task, p) for task, p in TRAINED if step_models.missing(p.family) is None]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Cases of a tiny model in one process."""
    monkeypatch.setattr(
        step_models, "configuration", lambda name, task: step_models.for_task(tiny_config(), task)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return make_bench("step", tmp_path)


@pytest.fixture(params=["aot_eager"])
def compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.compile without a C++ compiler; "aot_eager" also traces the backward."""
    real, name = torch.compile, request.param
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: real(model, backend=name, dynamic=False)
    )
    yield
    torch._dynamo.reset()


def setup_of(task: str, batch: int = 4) -> Setup:
    return Setup("tiny", step_models.for_task(tiny_config(), task), task, CPU, batch)


def run(module: Any, bench: Bench, task: str, *words: str, dtypes: Any = (FP32,)) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(["--model", "tiny", "--task", task, *words])
    args.dtypes = list(dtypes)
    module.run(args, bench)


def rows(bench: Bench) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in bench.results.rows}


def change(monkeypatch: pytest.MonkeyPatch, name: str, edit: Callable[[Any, Setup], Any]) -> None:
    """What `build` returns for one provider passes through `edit`."""
    real = step_models.build

    def build(provider: Provider, *args: Any, **more: Any) -> Any:
        made = real(provider, *args, **more)
        return edit(made, args[0]) if provider.name == name else made

    monkeypatch.setattr(step_models, "build", build)


# ---- the same training for all providers ----


@pytest.mark.parametrize(("task", "provider"), TRAINED)
def test_provider_trains_like_published_in_fp64(
    compiler: None, task: str, provider: Provider
) -> None:
    setup = setup_of(task)
    source = step_models.initial_model(setup)
    train = step_models.build(provider, setup, Data(setup), source)
    expected = step_models.reference_losses(setup, source, torch.float64, 3)
    assert [float(train()) for _ in range(3)] == pytest.approx(expected, rel=5e-6)
    assert expected[2] < 0.97 * expected[0]


@pytest.mark.parametrize("task", TASKS)
def test_reference_in_several_parts_trains_like_one(task: str) -> None:
    setup = setup_of(task)
    source, published = step_models.initial_model(setup), Provider("published", torch.float64)
    losses = []
    for at_once in (3, 4):
        train = step_models.build(published, setup, Data(setup), source, at_once=at_once)
        losses.append([float(train()) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_two_processes_train_like_one() -> None:
    setup = setup_of("SSSD")
    source = step_models.initial_model(setup)
    expected = step_models.reference_losses(setup, source, torch.float64, 3)
    both = Processes(Provider("ours", FP32, processes=2), setup)
    try:
        assert "2 processes" in both.how
        assert [float(both()) for _ in range(3)] == pytest.approx(expected, rel=5e-6)
    finally:
        both.close()


def test_providers_decay_the_same_weights() -> None:
    setup = setup_of("MAE")
    data, source = Data(setup), step_models.initial_model(setup)
    decayed = set()
    for family in FAMILIES:
        groups = step_models.build(Provider(family, FP32), setup, data, source).optimizer
        sizes = [
            sum(p.numel() for p in g["params"]) for g in groups.param_groups if g["weight_decay"]
        ]
        decayed.add(sum(sizes))
    assert len(decayed) == 1 and decayed.pop() > 0


def test_float_images_are_those_that_ours_normalises() -> None:
    setup = setup_of("MAE")
    data, model = Data(setup), setup.config.model
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    torch.testing.assert_close(data.floats * std + mean, data.images / 255, rtol=0, atol=1e-6)


# ---- the gate ----


def _zero_a_weight(made: Any, setup: Setup) -> Any:
    with torch.no_grad():
        made.model.mae.encoder.blocks[0].mlp.fc1.weight.zero_()
    return made


def _flip_a_gradient(made: Any, setup: Setup) -> Any:
    made.model.mae.encoder.blocks[0].mlp.fc1.weight.register_hook(torch.neg)
    return made


def _stop(made: Any, setup: Setup) -> Any:
    raise KeyboardInterrupt


def _fill_memory(made: Any, setup: Setup) -> Any:
    if setup.batch > 8 or setup.batch == 4:
        raise torch.OutOfMemoryError("tried to allocate")
    return made


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_zero_a_weight, "wrong: the loss of step 1"),
        (_flip_a_gradient, "wrong: the loss of step 2"),
        (_fill_memory, "out of memory"),
    ],
)
def test_wrong_provider_is_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, edit: Any, reason: str
) -> None:
    bench.only = ("plain", "ours")
    change(monkeypatch, "ours", edit)
    run(step, bench, "MAE", "--batch", "4")
    found = rows(bench)
    assert str(found["ours"]["reason"]).startswith(reason)
    assert found["ours"]["time"] is None and found["plain"]["time"]


def test_gate_allows_twice_the_error_of_the_published_model_and_one_rounding() -> None:
    losses = {torch.float64: [1.0, 1.0, 1.0], BF16: [1.0, 1.01, 1.0]}
    row = step.new_row(setup_of("MAE"), Provider("ours", BF16), "step")
    step.gate(row, BF16, [1.0, 1.0, 0.98], losses.__getitem__)
    assert row.allowed == pytest.approx(0.02 + 2**-8)
    assert row.error == pytest.approx(0.02) and row.reason is None
    for wrong in (0.97, float("nan")):
        step.gate(row, BF16, [1.0, wrong, 1.0], losses.__getitem__)
        assert str(row.reason).startswith("wrong: the loss of step 2")


# ---- rows ----


@pytest.mark.parametrize("compiler", ["eager"], indirect=True)
def test_rows_of_a_case_have_both_precisions_and_one_race(bench: Bench, compiler: None) -> None:
    run(step, bench, "SSSD", "--batch", "4", dtypes=(FP32, BF16))
    found = {(row["provider"], row["dtype"]): row for row in bench.results.rows}
    names = ["plain", "published", "plain, compiled", "published, compiled"]
    expected = {(name, dtype) for name in names for dtype in ("fp32", "bf16")}
    ours = set(found) - expected
    assert {name for name, _ in ours} == {"ours", "ours, compiled"} and len(ours) == 2
    for (name, _), row in found.items():
        assert row["reason"] is None and row["error"] <= row["allowed"]
        seconds = row["time"]["median_us"] / 1e6
        assert row["more"]["images_per_s"] == pytest.approx(4 / seconds)
        assert row["more"]["p20"] <= row["more"]["images_per_s"] <= row["more"]["p80"]
        assert row["more"]["mfu"] == pytest.approx(row["flops"] / seconds / PEAK)
        assert (row["versus"] is None) == (name == "ours")


def test_best_setting_of_transformers_also_runs_in_processes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        how = ""

        def __init__(self, provider: Provider, setup: Setup) -> None:
            source = step_models.initial_model(setup)
            single = replace(provider, processes=1)
            self.step = step_models.build(single, setup, Data(setup), source)

        def __call__(self) -> torch.Tensor:
            return self.step()

        def close(self) -> None:
            self.how = "closed"

    pytest.importorskip("transformers", reason="the rival is a model of transformers")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(step, "Processes", Fake)
    bench.only = ("ours", "transformers", "ours, 2 processes")
    run(step, bench, "finetune", "--batch", "4")
    expected = ["ours", "transformers", "ours, 2 processes", "transformers, 2 processes"]
    assert list(rows(bench)) == expected
    assert all(row["time"] for row in bench.results.rows)


def test_step_that_is_stopped_keeps_what_was_checked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, "plain", _stop)
    bench.only = ("plain", "ours")
    with pytest.raises(KeyboardInterrupt):
        run(step, bench, "MAE", "--batch", "4")
    assert rows(bench)["ours"]["peak_bytes"] > 0


def test_step_after_the_deadline_is_skipped(bench: Bench) -> None:
    bench.deadline = time.monotonic() - 1
    run(step, bench, "MAE", "--batch", "4")
    assert bench.results.head["skipped"] == ["MAE, tiny, 4 images"]
    assert not bench.results.rows


# ---- memory ----


def test_memory_peaks_are_those_of_another_count(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, tables, moments and batch by size, and every storage that a step creates."""
    monkeypatch.setattr(memory, "BATCHES", {"cpu": (8, 16, 24)})
    bench.only = ("plain", "published")
    run(memory, bench, "MAE")
    found = {(r["provider"], r["sizes"]["batch"]): r for r in bench.results.rows}
    assert len(found) == 6
    setup = setup_of("MAE", 24)
    source, data = step_models.initial_model(setup), Data(setup)
    train = step_models.build(Provider("plain", FP32), setup, data, source)
    train()
    moments = [t for values in train.optimizer.state.values() for t in values.values()]
    given = [*train.model.parameters(), *train.model.buffers(), *moments]
    with LiveBytes([*given, data.images, data.noises]) as counted:
        train()
    fixed = sum(4 * p.numel() * (3 if p.requires_grad else 1) for p in source.parameters())
    expected = fixed + data.images.nbytes + data.noises.nbytes + max(counted.timeline)
    row = found["plain", 24]
    assert row["peak_bytes"] == pytest.approx(expected, rel=0.05)
    slope = (row["peak_bytes"] - found["plain", 16]["peak_bytes"]) / 8 / 1e6
    assert row["more"]["mb_per_further_image"] == pytest.approx(slope)
    assert found["published", 24]["peak_bytes"] > 1.1 * row["peak_bytes"]


def test_memory_stops_at_the_first_batch_that_does_not_fit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "BATCHES", {"cpu": (8, 16, 24)})
    change(monkeypatch, "plain", _fill_memory)
    bench.only = ("plain",)
    run(memory, bench, "MAE")
    assert [r["reason"] for r in bench.results.rows] == [None, "out of memory"]
