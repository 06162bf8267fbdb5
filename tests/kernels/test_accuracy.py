"""Every small sample against the reference in fp64.

The registered op and its own backward on the CPU; the Triton kernels under the interpreter, where
test_interpreted.py runs this file again; the kernels on a GPU with MAE_KERNELS_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

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


PRODUCTS = {"gelu_linear", "embed_patches", "linear_reconstruction_loss"}


@pytest.mark.parametrize("sample", calls.SMALL, ids=str)
def test_autocast_is_as_accurate_as_eager(sample: Sample) -> None:
    """Only matrix products are computed in bf16, and only gelu_linear returns it."""
    got = calls.check_autocast(sample)
    tensors, options = calls.made(sample)
    with mk.backend("registered"):
        plain = calls.results(sample, tensors, options)
    half = torch.bfloat16 if sample.op == "gelu_linear" else plain[0].dtype
    assert [t.dtype for t in got] == [half, *(t.dtype for t in plain[1:])]
    assert torch.equal(got[0].to(plain[0].dtype), plain[0]) == (sample.op not in PRODUCTS)


FIRST = pytest.mark.parametrize("sample", calls.FIRST, ids=str)


def dtype_of(sample: Sample, device: torch.device) -> torch.dtype:
    """fp16 where a kernel takes no fp32."""
    kernels = INTERPRET or device.type == "cuda"
    return torch.float16 if sample.half_only and kernels else torch.float32


@pytest.mark.kernel
@FIRST
def test_empty_batch_gives_zeros(sample: Sample, device: torch.device) -> None:
    """Losses and statistics of nothing, and the gradients of all parameters."""
    dtype = dtype_of(sample, device)
    tensors, options = calls.made(sample, device, dtype)
    given = {"weight", "bias", "out_bias", "pos_embed", "mask_token", "center", "pixels"}
    tensors = {k: t if t is None or k in given else t[:0] for k, t in tensors.items()}
    with mk.backend(calls.kernels_of(sample, dtype, device)):
        got = calls.results(sample, tensors, options)
    with mk.backend("reference"):
        want = calls.results(sample, tensors, options)
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert not g.any()


def columns(t: torch.Tensor) -> torch.Tensor:
    """The same values, with others, NaN if possible, at both ends of each row."""
    fill = float("nan") if t.is_floating_point() else 1
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), fill, dtype=t.dtype, device=t.device)
    return wide[..., 2:-3].copy_(t)


@pytest.mark.kernel
@pytest.mark.parametrize("view", [columns, lambda t: columns(t.mT).mT], ids=["rows", "columns"])
@FIRST
def test_views_give_the_results_of_copies(
    sample: Sample, view: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> None:
    """Also with an expanded upstream gradient."""
    dtype = dtype_of(sample, device)
    tensors, options = calls.made(sample, device, dtype)
    strided = {k: t if t is None or t.dim() < 2 else view(t) for k, t in tensors.items()}
    with mk.backend(calls.kernels_of(sample, dtype, device)):
        want = calls.results(sample, tensors, options)
        upstream = torch.ones((), device=device).expand(want[0].shape)
        got = calls.results(sample, strided, options, upstream)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


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
