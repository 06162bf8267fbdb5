"""attention: softmax(q k^T * scale) v on packed qkv, and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mae_kernels import attention, backend


def by_hand(qkv, scale=None):
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [(2, 50, 3, 64), (1, 197, 1, 32), (2, 5, 2, 16), (1, 1, 1, 32), (3, 37, 1, 32)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_einsum(batch, tokens, heads, width, dtype, scale, device, close: Callable[..., None]) -> None:
    qkv = torch.randn(batch, tokens, 3, heads, width, device=device).to(dtype)
    upstream = torch.randn(batch, tokens, heads, width, device=device)

    def run(op, dtype=None):
        leaf = (qkv if dtype is None else qkv.to(dtype)).detach().requires_grad_()
        out = op(leaf, scale)
        return [out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]]

    got = run(lambda x, s: attention(x, scale=s))
    assert got[0].is_contiguous()
    close(got, run(by_hand, torch.float64), run(by_hand), atol=2e-6)


@pytest.mark.kernel
def test_strided_input_expanded_gradient_and_reruns(device) -> None:
    wide = torch.full((2, 9, 3, 2, 24), float("nan"), device=device)
    wide[..., 4:20] = torch.randn(2, 9, 3, 2, 16, device=device)
    leaf = wide[..., 4:20].requires_grad_()
    copy = leaf.detach().contiguous().requires_grad_()
    results = []
    for x in (leaf, copy, copy):
        out = attention(x)
        results.append((out.detach(), torch.autograd.grad(out.sum(), x)[0]))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert attention(torch.zeros(0, 9, 3, 2, 16, device=device)).shape == (0, 9, 2, 16)


def test_gradcheck() -> None:
    qkv = torch.randn(1, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    for name in ("auto", "reference"):
        with backend(name):
            assert torch.autograd.gradcheck(lambda x: attention(x, scale=0.7), qkv)


@pytest.mark.parametrize(
    ("qkv", "scale", "error", "text"),
    [
        (torch.zeros(2, 4, 2, 3, 8), None, ValueError, r"qkv: got shape .* needs \[B, N, 3, H, d\]"),
        (torch.zeros(2, 4, 24), None, ValueError, "qkv: got shape"),
        (torch.zeros(2, 4, 3, 3, 8, dtype=torch.int64), None, TypeError, "qkv: got dtype torch.int64"),
        (torch.zeros(2, 4, 3, 3, 8), -1.0, ValueError, "scale: got -1.0, needs a positive number"),
    ],
)
def test_refuses(qkv, scale, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        attention(qkv, scale=scale)
