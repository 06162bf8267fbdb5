"""The memory formulas against what autograd keeps, what torch's partitioner keeps, and what the optimizers hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sssd_fast.config import ModelConfig, ObjectiveConfig
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD
from sssd_fast.optim import FusedAdamW, build_optimizer, clipped_update, parameter_groups
from sssd_fast.performance.costs import parameter_counts
from sssd_fast.performance.memory_check import (
    _Unwritten,
    budget_is_ignored,
    compiled_options,
    eager_options,
    main,
    measure,
    measured_saved_bytes,
    small_works,
)
from sssd_fast.performance.memory_model import (
    Options,
    Work,
    fixed_bytes,
    keeping,
    optimizer_bytes,
    peak,
    saved_constant,
    saved_per_image,
    total_peak,
)

WORKS = small_works()
EAGER = list(eager_options())


def label(o: Options) -> str:
    mlp = "fused" if o.fused_mlp else "plain"
    return f"{o.precision}-{o.residual}-{o.device}-{o.checkpoint}-{o.attention}-{mlp}"


# A quarter of the options for each kind of work, each time other ones, so that together they are all
CASES = [(name, o) for i, name in enumerate(WORKS) for o in EAGER[i % 4 :: 4]]


@pytest.mark.parametrize(("name", "o"), CASES, ids=[f"{name}-{label(o)}" for name, o in CASES])
def test_eager_bytes_are_exact_and_the_peak_is_close(name: str, o: Options) -> None:
    work, images = WORKS[name], (2, 5)
    few, many = (measure(work, o, n) for n in images)
    stages = work.stages(o)
    per_image = (many.kept - few.kept) / (images[1] - images[0])
    assert saved_per_image(stages) == pytest.approx(per_image, abs=0.5)
    # beside it a few scalars: the loss and its parts
    assert 0 <= few.kept - images[0] * per_image - saved_constant(stages, o) <= 64
    assert 0.95 <= peak(stages, images[1], o) / many.peak <= 1.15


FP32_OPTIONS, BF16, LEAN, EAGER_ATTENTION = compiled_options()
COMPILED = [("SSSD", BF16), ("MAE", LEAN), ("odd SSSD", LEAN), ("classifier, mean", BF16)]
COMPILED += [("classifier, mean", FP32_OPTIONS), ("classifier, cls", EAGER_ATTENTION)]


@pytest.mark.parametrize(
    ("name", "o"), COMPILED, ids=[f"{name}-{label(o)}" for name, o in COMPILED]
)
def test_compiled_bytes_at_budget_1(name: str, o: Options) -> None:
    stages = WORKS[name].stages(o)
    traced = measured_saved_bytes(WORKS[name], o, 4)
    assert saved_per_image(stages) == pytest.approx(traced.per_image, rel=0.03)
    assert saved_constant(stages, o) == pytest.approx(
        traced.constant, abs=256
    )  # patch indices, mean and deviation
    assert traced.recomputed_flops == 0


def test_smaller_budgets_keep_less_and_compute_more() -> None:
    by_budget = [measured_saved_bytes(WORKS["MAE"], BF16, 32, budget) for budget in (1.0, 0.8, 0.5)]
    kept = [traced.per_image for traced in by_budget]
    assert kept[0] > kept[1] > kept[2]
    assert by_budget[2].recomputed_flops >= by_budget[0].recomputed_flops


@pytest.mark.parametrize("images", [1, 32])
def test_a_budget_is_ignored_where_activations_are_smaller_than_the_parameters(images: int) -> None:
    work, o = WORKS["MAE"], BF16
    one, half = (measured_saved_bytes(work, o, images, budget).per_image for budget in (1.0, 0.5))
    ignored = budget_is_ignored(work, o, images)
    assert ignored == (images == 1)
    assert (half == one) if ignored else (half < one)


def test_keeping_a_part_moves_the_rest_to_the_backward() -> None:
    stages = WORKS["SSSD"].stages(Options(device="cpu"))
    full = saved_per_image(stages)
    half = keeping(stages, full / 2)
    assert saved_per_image(half) == pytest.approx(full / 2)
    assert sum(stage.again for stage in half) == pytest.approx(full / 2)
    assert keeping(stages, 2 * full) == stages


# ---- what does not depend on the images ----------------------------------------------------------------------------------------


def built(work: Work) -> SSSD | Classifier:
    if work.objective is not None:
        return SSSD(work.model, work.objective)
    return Classifier(work.model, work.classes, work.pool, work.drop_path)


FULL = {
    f"{name}, {what}": Work(ModelConfig(name=name, in_channels=3), objective)
    for name in ("tiny", "base", "large")
    for what, objective in (
        ("SSSD", ObjectiveConfig()),
        ("MAE", ObjectiveConfig(weight=0.0)),
        ("classifier", None),
    )
}


@pytest.mark.parametrize("name", [*WORKS, *FULL])
def test_parameters_are_those_of_the_modules(name: str) -> None:
    work = {**WORKS, **FULL}[name]
    with _Unwritten():
        parameters = list(built(work).parameters())
    stages = work.stages(Options())
    weights = [n for stage in stages for n in stage.weights]
    frozen = sum(stage.frozen for stage in stages)
    detached = work.objective is not None and work.objective.detach_teacher
    assert sum(weights) + frozen == sum(p.numel() for p in parameters)
    if not detached:  # a head that no gradient reaches counts as frozen
        assert sorted(weights) == sorted(p.numel() for p in parameters if p.requires_grad)
    if work.objective is not None and not detached:
        assert sum(weights) == sum(parameter_counts(work.model, work.objective).values())


def state_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(state_bytes(v) for v in value.values())
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        return sum(state_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def built_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95), name)


def test_adamw_state() -> None:
    work = WORKS["odd SSSD"]  # whose teacher's head gets no gradient, and no state
    model = built(work)
    pixels = torch.zeros(2, work.model.in_channels, *work.model.image_size, dtype=torch.uint8)
    model(pixels, torch.rand(2, work.model.num_patches)).total.backward()
    optimizer = built_optimizer(model, "adamw")
    assert isinstance(optimizer, FusedAdamW)
    with torch.no_grad():
        clipped_update(optimizer.filled_groups(), None, [])
    weights = [n for stage in work.stages(Options()) for n in stage.weights]
    assert optimizer_bytes(weights, "adamw") == state_bytes(dict(optimizer.state))
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    assert gradients == sum(weights)
    values = sum(p.numel() for p in model.parameters())
    expected = 4 * (values + gradients) + state_bytes(dict(optimizer.state))
    assert fixed_bytes(work.stages(Options()), Options()) == expected


def test_adamw8bit_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        nn.Linear(64, 96), nn.Linear(96, 43)
    )  # 6144 values: 8 bit; 4128, no multiple of 256: fp32
    optimizer = built_optimizer(model, "adamw8bit")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(
        torch, "compile", lambda update, **_: update
    )  # the state is the same, and nothing to wait for
    optimizer.step()
    found = {p.numel(): state_bytes(dict(optimizer.state[p])) for p in model.parameters()}
    assert found == {n: optimizer_bytes([n], "adamw8bit") for n in found}
    assert found[6144] < found[4128]


def test_accumulation_and_exchange_add_gradients() -> None:
    work, o = WORKS["SSSD"], Options(device="cpu")
    stages = work.stages(o)
    gradients = 4 * sum(n for stage in stages for n in stage.weights)
    once = peak(stages, 4, o)
    assert once < peak(stages, 4, o, accumulate=2) <= once + gradients
    assert peak(stages, 4, o, gradient_copies=1) == once + gradients
    compiled = replace(o, compiled=True)
    many = work.stages(compiled)
    assert peak(many, 1, compiled, accumulate=2) >= 2 * gradients
    rest = fixed_bytes(stages, o) - gradients + 4 * work.image_bytes
    assert total_peak(work, stages, 4, o) == pytest.approx(rest + once)


def test_the_table_is_markdown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sssd_fast.performance import memory_check

    def one_option() -> Iterator[Options]:
        yield EAGER[0]

    monkeypatch.setattr(memory_check, "small_works", lambda: {"MAE": WORKS["MAE"]})
    monkeypatch.setattr(memory_check, "eager_options", one_option)
    monkeypatch.setattr(memory_check, "compiled_options", lambda: [BF16])
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 3
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "+0.00 %" in lines[2]
