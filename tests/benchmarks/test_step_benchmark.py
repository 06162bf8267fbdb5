"""The step benchmark on a tiny model: all providers train alike, a wrong one gets no time, and what fails or is left out is told."""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step, step_data, step_models
from benchmarks.bench import Bench
from benchmarks.measure import Cache
from benchmarks.results import Results
from sssd_fast.config import Config, from_dict
from sssd_fast.performance.costs import standard_flops
from sssd_fast.run.log import Console

CPU = torch.device("cpu")
PEAK = 1e12  # FLOP/s that the results pretend were measured
EAGER = [
    (task, name)
    for task in step_models.TASKS
    for name in (*step_models.PROVIDERS[task], "eager attention")
    if name not in ("plain", "ours lean")
]


@pytest.fixture
def config() -> Config:
    model = {
        "image_size": 32, "patch_size": 8, "in_channels": 3, "width": 32, "depth": 1, "heads": 2, "decoder_width": 24,
        "decoder_depth": 1, "decoder_heads": 2,
    }  # fmt: skip
    objective = {"head_hidden": 20, "head_bottleneck": 12, "prototypes": 24}
    return from_dict({"model": model, "objective": objective, "pretrain": {"base_lr": 0.1}})


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> Iterator[Bench]:
    monkeypatch.setattr(step_data, "configuration", lambda name, device: config)
    ceilings = {"matmul_flops_per_s": {"fp32": PEAK, "bf16": PEAK}}
    results = Results(
        "step", CPU, [torch.float32], words=["step"], path=tmp_path / "step.json", ceilings=ceilings
    )
    with Console(stream=io.StringIO()) as console:
        yield Bench(CPU, console, results, Cache(CPU, 0), samples=3, passes=2)


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile traces and partitions as always, but the code is run as it is, without waiting for a C++ compiler."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: real(model, backend="aot_eager", dynamic=False)
    )
    yield
    torch._dynamo.reset()


def arguments(*words: str, dtypes: list[torch.dtype] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    args = parser.parse_args(words)
    args.dtypes = dtypes
    return args


def setup_of(config: Config, task: str, dtype: torch.dtype = torch.float32) -> step_data.Setup:
    return step_data.Setup(step_data.for_task(config, task), task, CPU, dtype, 4)


def rows(bench: Bench, case: str | None = None) -> dict[str, dict[str, Any]]:
    return {
        row["provider"]: row for row in bench.results.rows if case is None or row["case"] == case
    }


def instead(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    """What `build` returns for one provider passes through `change`."""
    real = step_models.build

    def build(provider: str, *args: Any) -> Any:
        made = real(provider, *args)
        return change(made) if provider == name else made

    monkeypatch.setattr(step_models, "build", build)


# ---- the same training everywhere ----


@pytest.mark.parametrize(("task", "name"), EAGER)
def test_all_providers_train_like_plain(
    config: Config, aot_eager: None, task: str, name: str
) -> None:
    setup = setup_of(config, task)
    data, source = step_data.Data(setup), step_data.initial_model(setup.config)
    losses = {}
    for provider in ("plain", name):
        train = step_models.build(provider, setup, data, source)
        losses[provider] = [float(train()) for _ in range(3)]
    assert losses[name] == pytest.approx(losses["plain"], rel=2e-6)
    assert (
        losses["plain"][2] < 0.97 * losses["plain"][0]
    )  # it does train: equal losses are no coincidence of standing still


@pytest.mark.parametrize("task", step_models.TASKS)
def test_the_reference_in_parts_trains_like_plain(config: Config, task: str) -> None:
    setup = setup_of(config, task)
    data, source = step_data.Data(setup), step_data.initial_model(setup.config)
    train = step_models.build("plain", setup, data, source)
    expected = step_data.reference_losses(setup, data, source, 3, images_at_once=3)
    assert [float(train()) for _ in range(3)] == pytest.approx(expected, rel=2e-6)


def test_every_provider_decays_the_same_weights(config: Config) -> None:
    setup = setup_of(config, "MAE")
    data, source = step_data.Data(setup), step_data.initial_model(setup.config)
    found = set()
    for name in ("published", "ViTMAE", "plain", "ours"):
        groups = step_models.build(name, setup, data, source).optimizer.param_groups
        found.add(
            tuple(sorted((g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups))
        )
    assert len(found) == 1
    assert [decay for decay, _ in found.pop()] == [0.0, 0.05]


def test_the_published_get_the_images_that_ours_normalise_themselves(config: Config) -> None:
    setup = setup_of(config, "MAE")
    data = step_data.Data(setup)
    model = setup.config.model
    assert data.images.dtype == torch.uint8
    torch.testing.assert_close(
        data.floats * model.std[0] + model.mean[0], data.images.float() / 255
    )
    assert data.bytes() == 4 * 3 * 32 * 32 * (1 + 4) + step_data.NOISES * 4 * 16 * 4


# ---- the gate ----


def test_wrong_weights_get_no_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(made: Any) -> Any:
        with torch.no_grad():
            made.model.decoder_pred.weight.neg_()
        return made

    instead(monkeypatch, "published", spoil)
    step.run(
        arguments("--task", "MAE", "--batch", "4", "--steps", "3", "--no-waterfall"),
        bench_of(bench, "published", "plain"),
    )
    found = rows(bench)
    assert found["published"]["reason"].startswith("wrong: the loss at step 1 is ")
    assert found["published"]["time"] is None
    assert "images_per_s" not in found["published"]["more"]
    assert found["published"]["error"] > found["published"]["allowed"]
    assert found["plain"]["reason"] is None
    assert found["plain"]["error"] < 1e-6
    assert found["plain"]["time"]["n"] == 3


def test_a_wrong_gradient_is_seen_at_the_next_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(made: Any) -> Any:
        made.model.mae.encoder.blocks[0].attn.qkv.weight.register_hook(torch.neg)
        return made

    instead(monkeypatch, "plain", spoil)
    step.run(
        arguments("--task", "MAE", "--batch", "4", "--steps", "3", "--no-waterfall"),
        bench_of(bench, "plain"),
    )
    assert rows(bench)["plain"]["reason"].startswith("wrong: the loss at step 2 is ")
    assert rows(bench)["plain"]["time"] is None


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    row = step.Row("MAE", "", "fp32", "step", "ours", allowed=1e-4)
    step.gate(row, [1.0, float("nan"), 1.0], [1.0, 1.0, 1.0])
    assert row.reason == "wrong: the loss at step 2 is nan, the reference has 1"
    assert row.error is None
    json.dumps(row.error, allow_nan=False)


# ---- rows ----


def bench_of(bench: Bench, *only: str) -> Bench:
    bench.only = only
    return bench


def test_rows_of_a_task_and_its_waterfall(bench: Bench, config: Config, aot_eager: None) -> None:
    step.run(arguments("--task", "MAE", "--batch", "4", "--steps", "4"), bench)
    found = rows(bench, "MAE")
    assert list(found) == [name for name in step_models.PROVIDERS["MAE"] if name != "ours lean"]
    for name, row in found.items():
        check_row(config, name, row)
        assert row["more"]["loss"] == pytest.approx(found["plain"]["more"]["loss"], rel=1e-5)
        assert (row["versus"] is None) == (name == "ours")
    assert found["published"]["peak_bytes"] > found["plain"]["peak_bytes"]
    falls = rows(bench, "waterfall MAE")
    assert list(falls) == [label for label, _ in step_models.WATERFALL]
    assert [row["more"]["order"] for row in falls.values()] == list(range(len(falls)))
    assert falls["published"]["time"] == found["published"]["time"]
    assert falls["+ SDPA"]["time"] == found["plain"]["time"]
    assert (
        falls["+ torch.compile"]["time"] == found["plain compiled"]["time"]
    )  # the ops' kernels do not run here
    for label in ("+ our ops", "+ CUDA graphs", "+ bf16 residual", "+ fused MLP"):
        assert falls[label]["time"] is None
        assert "need a CUDA device, this is cpu" in falls[label]["reason"]
    assert bench.results.head["missing"] == {"ours lean": "needs a CUDA device"}
    assert "kernels off, the kernels of the ops need a CUDA device" in found["ours"]["more"]["how"]


def check_row(config: Config, name: str, row: dict[str, Any]) -> None:
    assert row["reason"] is None, name
    seconds = row["time"]["median_us"] / 1e6
    assert row["more"]["images_per_s"] == pytest.approx(4 / seconds)
    assert row["more"]["mfu"] == pytest.approx(4 * standard_flops(config.model) / seconds / PEAK)
    assert row["more"]["mb_per_image"] == pytest.approx(row["peak_bytes"] / 4 / 1e6)
    assert row["more"]["raced"] == "together"
    assert (row["shape"], row["phase"], row["sizes"]["batch"]) == (
        "ViT 32x1/8, 32, 4 images",
        "step",
        4,
    )


def test_quick_rows_of_both_tasks(bench: Bench, config: Config) -> None:
    bench.quick = True
    step.run(arguments("--batch", "4", "8"), bench)
    assert [(row["case"], row["provider"]) for row in bench.results.rows] == [
        (task, name) for task in step_models.TASKS for name in ("published", "plain", "ours")
    ]
    for row in bench.results.rows:
        check_row(config, row["provider"], row)


def test_out_of_memory_is_a_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(made: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 EiB")

    instead(monkeypatch, "published", fail)
    step.run(
        arguments("--task", "SSSD", "--batch", "4", "--steps", "3", "--no-waterfall"),
        bench_of(bench, "published", "ours"),
    )
    found = rows(bench)
    assert found["published"]["reason"] == "out of memory"
    assert found["published"]["time"] is None
    assert found["ours"]["time"] is not None


def test_what_does_not_fit_together_is_raced_one_after_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    instead(monkeypatch, "plain", lambda made: built.append(made) or made)
    monkeypatch.setattr(step, "free_bytes", lambda device: 1000.0)
    step.run(
        arguments("--task", "MAE", "--batch", "4", "--steps", "3", "--no-waterfall"),
        bench_of(bench, "plain", "ours"),
    )
    found = rows(bench)
    assert len(built) == 1 + bench.passes
    for row in found.values():
        assert row["more"]["raced"] == "one after another, twice"
        assert row["time"]["n"] == 3
        assert row["time"]["again_us"] is not None
        assert row["peak_bytes"] > 0
    assert found["ours"]["versus"] is None
    assert (
        found["plain"]["versus"]["low"]
        <= found["plain"]["versus"]["ratio"]
        <= found["plain"]["versus"]["high"]
    )


@pytest.mark.parametrize("where", ["first call", "race"])
def test_what_runs_out_of_memory_only_beside_others_is_raced_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def crowded(bench: Bench, rows: dict[str, Any], calls: Any) -> None:
        if where == "race":
            raise torch.OutOfMemoryError("tried to allocate 2 EiB")
        rows["plain"].reason = "out of memory"

    monkeypatch.setattr(step, "time_rows", crowded)
    step.run(
        arguments("--task", "MAE", "--batch", "4", "--steps", "3", "--no-waterfall"),
        bench_of(bench, "plain", "ours"),
    )
    for row in rows(bench).values():
        assert row["reason"] is None
        assert row["more"]["raced"] == "one after another, twice"
        assert row["time"]["n"] == 3


def test_no_time_left_is_told(bench: Bench) -> None:
    bench.deadline = time.monotonic() - 1
    step.run(arguments("--task", "MAE", "--batch", "4"), bench)
    assert bench.results.rows == []
    assert bench.results.head["left_out"] == ["MAE, ViT 32x1/8, 32, 4 images, fp32"]


def test_missing_packages_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"transformers"}
    monkeypatch.setattr(step_models, "find_spec", lambda name: None if name in absent else name)
    step.run(
        arguments("--task", "MAE", "--batch", "4", "--steps", "3", "--no-waterfall"),
        bench_of(bench, "ViTMAE", "ours"),
    )
    assert bench.results.head["missing"] == {"ViTMAE": "transformers not installed"}
    assert list(rows(bench)) == ["ours"]
    absent.add("pydantic")
    step.run(arguments("--task", "MAE"), bench)
    assert bench.results.head["missing"]["ours"] == "pydantic not installed"
    assert list(rows(bench)) == ["ours"]


def test_bf16_is_compared_with_fp32(bench: Bench) -> None:
    args = arguments(
        "--task", "SSSD", "--batch", "4", "--steps", "3", "--no-waterfall", dtypes=[torch.bfloat16]
    )
    step.run(args, bench_of(bench, "published", "ours"))
    for row in rows(bench).values():
        assert row["dtype"] == "bf16"
        assert 1e-6 < row["error"] < row["allowed"] == 2e-2
