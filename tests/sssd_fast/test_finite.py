"""Steps whose loss or gradients are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sssd_fast.errors import ConfigError, NumericsError
from sssd_fast.optim import all_finite
from sssd_fast.train import FiniteGuard

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("loss", [0.0, 1.0, NAN, INF])
@pytest.mark.parametrize("norm", [0.0, 2.0, NAN, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_checks_loss_and_gradient_norm(
    loss: float, norm: float, dtype: torch.dtype
) -> None:
    flag = all_finite(torch.tensor(loss, dtype=dtype, requires_grad=True), torch.tensor(norm))
    assert flag.dtype == torch.bool
    assert bool(flag) is (math.isfinite(loss) and math.isfinite(norm))
    assert not flag.requires_grad


def test_all_finite_does_not_wait_for_the_device() -> None:
    """On the meta device, any read of a value (.item(), bool()) would raise."""
    loss, norm = torch.empty((), device="meta"), torch.empty((3,), device="meta")
    assert all_finite(loss, norm).device.type == "meta"


def test_finite_guard_ends_the_run_after_three_skipped_steps_in_a_row() -> None:
    guard = FiniteGuard(limit=3)
    for step, finite in enumerate((True, False, False, True, False, False), 1):
        assert guard.check(finite, step) is finite
    assert (guard.consecutive, guard.skipped) == (2, 4)
    message = r"3 steps in a row, the last was step 7 \(loss nan\).*bf16.*base_lr.*clip_grad"
    with pytest.raises(NumericsError, match=message) as error:
        guard.check(False, 7, "loss nan")
    assert error.value.exit_code == 3
    with pytest.raises(ConfigError, match="at least 1"):
        FiniteGuard(limit=0)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_run_that_applied_less_than_half_of_its_steps_has_failed(precision: str) -> None:
    guard = FiniteGuard(limit=25)
    for step in range(1, 4):
        guard.check(False, step)
    guard.check_applied(6, precision)
    with pytest.raises(NumericsError, match="only 2 of 5 steps were applied") as error:
        guard.check_applied(5, precision)
    assert error.value.exit_code == 3
    advice = "train more steps, or set precision=bf16 or fp32" if precision == "fp16" else "base_lr"
    assert advice in str(error.value)
    # a dry run
    dry = FiniteGuard(limit=25)
    dry.check(False, 1)
    dry.check(False, 2)
    dry.check_applied(2, precision)


def test_finite_guard_writes_valid_json(tmp_path: Path) -> None:
    """NaN is not JSON, and tools reject a file with it."""
    guard = FiniteGuard(limit=1, folder=tmp_path)
    message = r"loss nan, lr 0\.5\).*Details: .*failure/step-12\.json"
    with pytest.raises(NumericsError, match=message):
        guard.check(False, 12, "loss nan, lr 0.5")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "failure" / "step-12.json").read_text(), parse_constant=refuse)
    assert record == {"step": 12, "consecutive": 1, "skipped": 1, "context": "loss nan, lr 0.5"}


def test_finite_guard_that_cannot_write_still_gives_the_reason(tmp_path: Path) -> None:
    (tmp_path / "failure").write_text("a file where the folder should be")
    with pytest.raises(NumericsError, match=r"not finite in 1 steps.*failed as well"):
        FiniteGuard(limit=1, folder=tmp_path).check(False, 1)
