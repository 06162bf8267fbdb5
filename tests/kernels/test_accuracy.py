"""Every small sample against the reference in fp64.

The registered op and its own backward on the CPU; the Triton kernels under the interpreter, where
test_interpreted.py runs this file again; the kernels on a GPU with MAE_KERNELS_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import sys

import pytest
import torch

import mae_kernels as mk
from mae_kernels import Sample
from mae_kernels._runtime import INTERPRET
from tests.kernels import calls


@pytest.mark.kernel
@pytest.mark.parametrize("sample", calls.SMALL, ids=str)
def test_sample_is_as_accurate_as_eager(sample: Sample, device: torch.device) -> None:
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    dtypes = [torch.float32, half]
    if INTERPRET:
        # it is slow, and computes no bf16
        dtypes = [half if sample.half_only or calls.SMALL.index(sample) % 2 else torch.float32]
    for dtype in dtypes:
        calls.check_accuracy(sample, dtype, device)


@pytest.mark.parametrize("sample", calls.SMALL, ids=str)
def test_autocast_is_as_accurate_as_eager(sample: Sample) -> None:
    calls.check_autocast(sample)


SPOILED = [(sample, name) for sample in calls.FIRST for name in sample.out_of_range]


@pytest.mark.kernel
@pytest.mark.parametrize(("sample", "name"), SPOILED, ids=lambda x: str(x))
def test_index_out_of_range(
    sample: Sample, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error on the CPU. A kernel reads nothing: image 0 is NaN or 0, the others are right."""
    tensors, options = calls.made(sample, device)
    spoiled = dict(tensors)
    spoiled[name] = tensors[name].clone()
    spoiled[name].view(3, -1)[0, -1] = sample.out_of_range[name]
    if device.type == "cpu" and not INTERPRET:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            calls.outputs(sample, spoiled, options)
        return
    for module in [m for n, m in sys.modules.items() if n.startswith("mae_kernels")]:
        if hasattr(module, "can_look"):
            monkeypatch.setattr(module, "can_look", lambda x: False)
    with mk.backend(calls.kernels_of(sample, torch.float32, device)):
        want = calls.outputs(sample, tensors, options)[0]
        got = calls.outputs(sample, spoiled, options)[0]
    if want.dim() == 0:
        assert got.isnan()
        return
    assert torch.equal(got[1:], want[1:])
    assert got[0].isnan().any() if got.is_floating_point() else not got[0].any()
