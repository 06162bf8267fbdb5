"""One optimizer step: accumulation equals a large batch, and nothing non-finite ever reaches
weights, moments or the centre.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sssd_fast.config import load_config
from sssd_fast.errors import ConfigError, DependencyError
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.performance import adamw8bit
from sssd_fast.run import device as device_module
from sssd_fast.run.device import World, generator, pick_device, pick_precision, precision_reason
from sssd_fast.step import Step, TaskLoss

CPU = World(torch.device("cpu"))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def _loss(module: nn.Module, batch: Tensor, step: int, micro: int) -> TaskLoss:
    out = module(batch)
    return TaskLoss(
        out.float().square().mean(),
        {"part": out.detach().float().abs().mean()},
        out.detach().float().mean(0),
    )


def _step(model: nn.Module, **options: Any) -> Step:
    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95))
    return Step(model, optimizer, options.pop("loss", _loss), world=CPU, **options)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    """torch's own."""
    groups = parameter_groups(model, weight_decay=0.05)
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **options)


def _assert_close(a: nn.Module, b: nn.Module, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(_weights(a), _weights(b), rtol=rtol, atol=atol)


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_micro_batches_equal_one_large_batch() -> None:
    data = torch.randn(32, 6)
    once, parts = _model(), _model()
    averaged: list[Tensor] = []
    a = _step(once, update_state=lambda stats, finite: averaged.append(stats))([data], 0, 1e-2)
    b = _step(parts, update_state=lambda stats, finite: averaged.append(stats))(
        list(data.chunk(4)), 0, 1e-2
    )
    _assert_close(once, parts, 1e-5, 1e-6)
    torch.testing.assert_close(a.losses["loss"], b.losses["loss"])
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(averaged[0], averaged[1])


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_equals_that_of_torch(max_norm: float) -> None:
    """Against clip_grad_norm_ and torch's own AdamW, with a norm that is clipped or not."""
    data, model = torch.randn(8, 6), _model()
    twin = copy.deepcopy(model)
    step = _step(model, clip_grad=max_norm)
    result = step([data], 0, 1e-2)
    _loss(twin, data, 0, 0).total.backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
    torch.testing.assert_close(result.grad_norm, norm)  # the norm before clipping is what is logged
    optimizer = _adamw(twin)
    optimizer.step()
    _assert_close(model, twin)
    # Adam's first step hides the gradient's size, the moments do not
    for x, y in zip(model.parameters(), twin.parameters(), strict=True):
        ours, theirs = step.optimizer.state[x], optimizer.state[y]
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("poison", ["loss", "gradient", "batch_stats"])
def test_step_never_applies_non_finite_values(precision: str, poison: str) -> None:
    """Weights, moments, step counts and the averaged state stay bit-equal through a poisoned
    step, and training continues after it.
    """
    model, state = _model(), {"center": torch.zeros(3)}

    def loss(module: nn.Module, batch: Tensor, step: int, micro: int) -> TaskLoss:
        total, parts, batch_stats = _loss(module, batch, step, micro)
        if step == 1:
            if poison == "loss":
                total = total * float("nan")
            elif poison == "gradient":  # sqrt at 0: the loss is finite, its gradient is not
                total = total + (module[0].weight * 0).sum().sqrt()  # type: ignore[index, operator]
            else:
                assert batch_stats is not None
                batch_stats = batch_stats * float("inf")
        return TaskLoss(total, parts, batch_stats)

    def update_state(batch_stats: Tensor, finite: Tensor) -> None:
        state["center"] = torch.where(finite, batch_stats, state["center"])

    step = _step(model, loss=loss, precision=precision, update_state=update_state)
    if step.scaler is not None:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = torch.randn(8, 6)
    assert bool(step([data], 0, 1e-2).finite)
    weights, center = _weights(model), state["center"].clone()
    moments = copy.deepcopy(step.optimizer.state_dict())
    assert not bool(step([data], 1, 1e-2).finite)
    assert _equal(weights, _weights(model))
    assert torch.equal(center, state["center"])
    for number, values in step.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, moments["state"][number][name]), name
    assert bool(step([data], 2, 1e-2).finite)
    assert not _equal(weights, _weights(model))
    assert all(bool(torch.isfinite(w).all()) for w in _weights(model))


class _NoWaiting(TorchDispatchMode):
    """Raises for every operation that makes the host wait for values of the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "aten.item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = any(name in str(func) for name in self.WAITING)
        assert not waits, f"the step waits for the device in {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_never_waits_for_the_device(
    tiny: list[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step, accumulation, clipping, loss scale and centre included, also if skipped."""
    for name, ops in list(sys.modules.items()):
        if name.startswith("mae_kernels") and hasattr(ops, "check_ids"):
            # ids are checked on the CPU only
            monkeypatch.setattr(ops, "check_ids", lambda *args, **kwargs: None)
    config = load_config(None, [*tiny, f"precision={precision}"])
    module = SSSD(config.model, config.objective)
    optimizer = build_optimizer(parameter_groups(module, weight_decay=0.05), (0.9, 0.95))

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor], step: int, micro: int) -> TaskLoss:
        out = module(*batch)
        total = out.total * float("nan") if step == 1 else out.total
        return TaskLoss(total, {"part": out.losses["reconstruction"]}, out.batch_center)

    options = {"precision": precision, "clip_grad": 1.0, "update_state": module.update_center}
    step = Step(module, optimizer, loss, world=CPU, **options)
    batch = (
        torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8),
        torch.rand(4, config.model.num_patches),
    )
    with pytest.raises(AssertionError, match="waits for the device"), _NoWaiting():
        float(torch.ones(()))  # the mode detects a wait
    with _NoWaiting():
        results = [step([batch, batch], i, 1e-3) for i in range(3)]
    flags = [bool(r.finite) for r in results]
    assert not flags[1]
    if precision != "fp16":  # whose loss scale may still be coming down
        assert flags == [True, False, True]


def test_fused_adamw_updates_the_parameters_that_have_a_gradient_in_this_step() -> None:
    """Like torch's AdamW, while a layer gets no gradient in some steps: no list of another step."""
    ours, theirs = _model(), _model()
    step, reference = _step(ours), _adamw(theirs, fused=True)
    for i, trained in enumerate((True, True, False, True, False)):
        for model in (ours, theirs):
            model[0].requires_grad_(trained)  # type: ignore[index, operator]
        data = torch.randn(8, 6)
        step([data], i, 1e-2)
        reference.zero_grad()
        _loss(theirs, data, 0, 0).total.backward()
        reference.step()
        _assert_close(ours, theirs)


def test_fused_adamw_exchanges_checkpoints_with_torch_adamw() -> None:
    data, ours, theirs = torch.randn(8, 6), _model(), _model()
    step = _step(ours)
    reference = _adamw(theirs, fused=True)

    def train_theirs() -> None:
        reference.zero_grad()
        _loss(theirs, data, 0, 0).total.backward()
        reference.step()

    for _ in range(2):
        train_theirs()
    ours.load_state_dict(theirs.state_dict())
    step.optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for _ in range(2):
        step([data], 0, 1e-2)
        train_theirs()
    _assert_close(ours, theirs)
    theirs.load_state_dict(ours.state_dict())
    reference.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    step([data], 0, 1e-2)
    train_theirs()
    _assert_close(ours, theirs)


@pytest.mark.slow
def test_adamw8bit_follows_adamw_and_does_not_change_in_a_skipped_step() -> None:
    torch.manual_seed(0)
    exact = nn.Linear(64, 64)
    small = copy.deepcopy(exact)
    steps = []
    for model, name in ((exact, "adamw"), (small, "adamw8bit")):
        optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95), name)
        steps.append(Step(model, optimizer, _loss, world=CPU, clip_grad=1.0))
    before = exact.weight.detach().clone()
    for i in range(5):
        data = torch.randn(16, 64)
        for step in steps:
            step([data], i, 1e-3 * (i + 1))
    moved = (exact.weight - before).norm()
    apart = (exact.weight - small.weight).norm()
    assert apart < 0.05 * moved
    state = steps[1].optimizer.state[small.weight]
    assert state["exp_avg"].codes.dtype == torch.uint8  # stored in 8 bits
    saved = steps[1].optimizer.state_dict()
    flat = [value for values in saved["state"].values() for value in values.values()]
    plain = [[*value.values()] if isinstance(value, dict) else [value] for value in flat]
    assert {type(part) for parts in plain for part in parts} == {Tensor, bool}
    again = copy.deepcopy(small)
    groups = parameter_groups(again, weight_decay=0.05)
    resumed = Step(again, build_optimizer(groups, (0.9, 0.95), "adamw8bit"), _loss, world=CPU)
    resumed.optimizer.load_state_dict(copy.deepcopy(saved))
    straight = Step(small, steps[1].optimizer, _loss, world=CPU)
    data = torch.randn(16, 64)
    for step in (straight, resumed):
        step([data], 5, 2e-3)
    assert _equal(_weights(small), _weights(again))

    kept = _weights(small), state["exp_avg"].codes.clone(), float(state["step"])
    assert not bool(steps[1]([torch.full((16, 64), float("nan"))], 5, 1e-3).finite)
    assert _equal(kept[0], _weights(small))
    assert torch.equal(kept[1], state["exp_avg"].codes)
    assert float(state["step"]) == kept[2]


def test_adamw8bit_without_torchao_raises_an_error_naming_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    adamw8bit._optimizer_class.cache_clear()
    with pytest.raises(
        DependencyError, match=r"adamw8bit.*sssd-fast\[torchao\].*step.optimizer=adamw"
    ):
        build_optimizer(parameter_groups(_model(), weight_decay=0.0), (0.9, 0.95), "adamw8bit")


def test_fp16_step_finds_its_loss_scale() -> None:
    """The scaler lowers a scale that overflows, and steps are applied again."""
    model = _model()
    step = _step(model, precision="fp16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    flags = [bool(step([torch.randn(8, 6) * 30], i, 1e-3).finite) for i in range(24)]
    assert not flags[0]
    assert flags[-1]


def test_generators_depend_on_the_whole_key_only() -> None:
    draw = lambda *key: torch.rand(4, generator=generator(torch.device("cpu"), *key)).tolist()  # noqa: E731
    torch.manual_seed(1)
    first = draw(0, 5, 0)
    torch.manual_seed(2)
    assert draw(0, 5, 0) == first
    keys = [(s, t, m) for s in range(4) for t in range(50) for m in range(4)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_precision_is_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for units, chosen, why in ((None, "fp32", "fp32 faster"), ("AMX", "bf16", "bf16 with AMX")):
        monkeypatch.setattr(device_module, "cpu_bf16_units", lambda units=units: units)
        assert pick_precision("auto", torch.device("cpu")) == chosen
        assert why in precision_reason("auto", torch.device("cpu"))
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        pick_device("tpu")
