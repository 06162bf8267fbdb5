"""One optimizer step: accumulation equals a large batch, and nothing non-finite ever reaches weights, moments or the centre."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sssd_fast.distributed import World, pick_device
from sssd_fast.errors import ConfigError
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.step import Step, TaskLoss, generator, pick_precision

CPU = World(torch.device("cpu"))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def _loss(module: nn.Module, batch: Tensor, step: int, micro: int) -> TaskLoss:
    out = module(batch)
    return TaskLoss(
        out.float().square().mean(), {"part": out.detach().float().abs().mean()}, out.detach().float().mean(0)
    )


def _step(model: nn.Module, **options: Any) -> Step:
    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95))
    return Step(model, optimizer, options.pop("loss", _loss), world=CPU, **options)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_micro_batches_equal_one_large_batch() -> None:
    data = torch.randn(32, 6)
    once, parts = _model(), _model()
    carried: list[Tensor] = []
    a = _step(once, after=lambda carry, finite: carried.append(carry))([data], 0, 1e-2)
    b = _step(parts, after=lambda carry, finite: carried.append(carry))(list(data.chunk(4)), 0, 1e-2)
    for x, y in zip(_weights(once), _weights(parts), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.parts["loss"], b.parts["loss"])
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(carried[0], carried[1])


def test_the_update_is_adamw_on_the_mean_gradient() -> None:
    data, model = torch.randn(8, 6), _model()
    twin = copy.deepcopy(model)
    result = _step(model)([data], 0, 1e-2)
    loss = _loss(twin, data, 0, 0).total
    loss.backward()
    norm = torch.sqrt(sum((p.grad.square().sum() for p in twin.parameters() if p.grad is not None), torch.tensor(0.0)))
    torch.testing.assert_close(result.grad_norm, norm)
    optimizer = torch.optim.AdamW(parameter_groups(twin, weight_decay=0.05), lr=1e-2, betas=(0.9, 0.95))
    optimizer.step()
    for x, y in zip(_weights(model), _weights(twin), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_clipping_bounds_the_applied_gradient() -> None:
    model = _model()
    step = _step(model, clip_grad=0.01)
    seen: list[float] = []
    step.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(
            float(torch.cat([p.grad.flatten() for p in step.parameters if p.grad is not None]).norm())
        )
    )
    result = step([torch.randn(8, 6)], 0, 1e-2)
    assert float(result.grad_norm) > 0.01  # the norm before clipping is what is logged
    assert seen == pytest.approx([0.01], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("poison", ["loss", "gradient", "carry"])
def test_nothing_non_finite_is_applied(precision: str, poison: str) -> None:
    """Weights, moments, step counts and the carried state stay bit-equal through a poisoned step, and training goes on after it."""
    model, state = _model(), {"center": torch.zeros(3)}

    def loss(module: nn.Module, batch: Tensor, step: int, micro: int) -> TaskLoss:
        total, parts, carry = _loss(module, batch, step, micro)
        if step == 1:
            if poison == "loss":
                total = total * float("nan")
            elif poison == "gradient":  # sqrt at 0: the loss is finite, its gradient is not
                total = total + (module[0].weight * 0).sum().sqrt()  # type: ignore[index, operator]
            else:
                assert carry is not None
                carry = carry * float("inf")
        return TaskLoss(total, parts, carry)

    def after(carry: Tensor, finite: Tensor) -> None:
        state["center"] = torch.where(finite, carry, state["center"])

    step = _step(model, loss=loss, precision=precision, after=after)
    if step.scaler is not None:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = torch.randn(8, 6)
    assert bool(step([data], 0, 1e-2).finite)
    weights, center = _weights(model), state["center"].clone()
    moments = copy.deepcopy(step.optimizer.state_dict())
    assert not bool(step([data], 1, 1e-2).finite)
    assert all(torch.equal(x, y) for x, y in zip(weights, _weights(model), strict=True))
    assert torch.equal(center, state["center"])
    for number, values in step.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, moments["state"][number][name]), name
    assert bool(step([data], 2, 1e-2).finite)
    assert not all(torch.equal(x, y) for x, y in zip(weights, _weights(model), strict=True))
    assert all(bool(torch.isfinite(w).all()) for w in _weights(model))


def test_fp16_finds_its_loss_scale() -> None:
    """From a scale that overflows, the scaler comes down and steps are applied again."""
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


def test_precision_is_chosen_by_device() -> None:
    assert pick_precision("auto", torch.device("cpu")) == "fp32"
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        pick_device("tpu")
