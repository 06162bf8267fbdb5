"""tools/tune.py: every candidate is another launch, and nothing stays changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import Calls
from benchmarks.ops import op_of
from benchmarks.race import Time, Versus
from benchmarks.results import Row
from mae_kernels import backend
from mae_kernels._runtime import record_launches
from tools import tune

TUNED = {tuned.name: tuned for tuned in tune.tuned_kernels()}
META = torch.device("meta")


def label(tuned: Any, candidate: Any) -> str:
    """The launch that the op records on an sm_90, without a GPU."""
    op = op_of(tuned.sample, META, torch.bfloat16, 256)
    calls = Calls(op.inputs(), op.providers["ours"])
    with backend("triton"), record_launches(90), tune.choosing(tuned, candidate) as started:
        calls.timed[tuned.phase]()
    assert started, tuned.kernel
    return str(started[0].label)


@pytest.mark.parametrize("name", TUNED)
def test_candidates_change_the_launch_and_are_gone_afterwards(name: str) -> None:
    tuned = TUNED[name]
    before = label(tuned, tune.AS_IS)
    labels = [label(tuned, candidate) for candidate in tuned.candidates]
    assert len({before, *labels}) >= len(labels)  # one may be the current launch
    assert label(tuned, tune.AS_IS) == before


def test_choosing_refuses_a_name_that_the_module_does_not_have() -> None:
    tuned = TUNED["random_masking 196 patches forward, masking_kernel"]
    real = tuned.module.launch
    with (
        pytest.raises(AttributeError, match="NO_SUCH_NAME"),
        tune.choosing(tuned, tune.Candidate({"NO_SUCH_NAME": 1})),
    ):
        pass
    assert tuned.module.launch is real


def test_launch_is_kept_unless_another_is_certainly_faster() -> None:
    def row(name: str, us: float | None, verdict: str = "same") -> Row:
        time = None if us is None else Time(us, us, us, 50, 0.0, us)
        versus = None if us is None else Versus(us / 100, us / 100, us / 100, verdict)
        return Row("op", "s", "bf16", "forward", name, time=time, versus=versus)

    for rows, expected in (
        ([row("a", 100), row("b", 98)], "keep"),
        ([row("a", 100), row("b", 80, "faster")], "change to b"),
        ([row("a", None), row("b", 120, "slower")], "change to b"),
    ):
        tune.decide(rows)
        assert rows[0].more["verdict"] == expected
