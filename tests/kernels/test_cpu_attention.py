"""attention in bf16 on a CPU: the products, when they are taken, and what a compiler sees."""

from __future__ import annotations

import pytest
import torch

import mae_kernels
from mae_kernels import attention, attention_refusal, backend, cpu_attention
from mae_kernels.cpu_attention import LONGEST, AttentionProducts, traced
from tests.kernels.test_attention import by_hand

SHAPES = [(2, 7, 2, 16), (1, 1, 1, 8), (3, 65, 1, 32), (0, 5, 2, 16)]


@pytest.fixture(autouse=True)
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "cpu_bf16_units", lambda: "AMX")


def qkv_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    batch, tokens, heads, width = shape
    return torch.randn(batch, tokens, 3, heads, width).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_products_equal_einsum_in_fp64(shape, scale) -> None:
    qkv = qkv_of(shape, torch.float64)
    factor = shape[3] ** -0.5 if scale is None else scale
    want = by_hand(qkv, scale)
    upstream = torch.randn_like(want)
    gradient = torch.autograd.grad(want, qkv, upstream)
    for out in (AttentionProducts.apply(qkv, factor), traced(qkv, factor)):
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad(out, qkv, upstream)
        torch.testing.assert_close(got, gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 65, 3, 64), (2, 197, 2, 32)])
def test_bf16_is_as_accurate_as_eager(shape) -> None:
    qkv = qkv_of(shape, torch.bfloat16)
    wide = qkv.detach().double().requires_grad_()
    upstream = torch.randn(shape[0], shape[1], shape[2], shape[3]).bfloat16()

    def results(function, inputs):
        out = function(inputs)
        return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))

    exact, eager = results(by_hand, wide), results(by_hand, qkv)
    assert "AttentionProducts" in type(attention(qkv).grad_fn).__name__
    for function in (attention, lambda x: traced(x, shape[3] ** -0.5)):
        for mine, theirs, truth in zip(results(function, qkv), eager, exact, strict=True):
            allowed = 2 * (theirs.double() - truth).abs().max() + 1e-3
            assert (mine.double() - truth).abs().max() <= allowed


def test_sdpa_computes_what_it_computes_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(qkv: torch.Tensor) -> bool:
        return "AttentionProducts" in str(attention(qkv).grad_fn)

    half = qkv_of((1, 9, 1, 16), torch.bfloat16)
    assert taken(half)
    assert not taken(half.detach())
    with torch.no_grad():
        assert not taken(half)
    with backend("reference"):
        assert not taken(half)
    assert not taken(qkv_of((1, 9, 1, 16), torch.float32))
    assert not taken(qkv_of((1, LONGEST[torch.bfloat16] + 1, 1, 16), torch.bfloat16))
    monkeypatch.setattr(cpu_attention, "cpu_bf16_units", lambda: None)
    assert not taken(half)


def test_refusal_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_refusal(197, 64, torch.bfloat16, None) is None
    assert "not float32" in str(attention_refusal(197, 64, torch.float32, None))
    assert "up to 640 tokens, not with 700" in str(attention_refusal(700, 64, torch.bfloat16, None))
    monkeypatch.setattr(cpu_attention, "cpu_bf16_units", lambda: None)
    assert "no bf16 units" in str(attention_refusal(197, 64, torch.bfloat16, None))


def test_compiled_attention_takes_any_number_of_tokens() -> None:
    """The compiler makes the number symbolic at the second one."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for tokens in (9, 12, LONGEST[torch.bfloat16], LONGEST[torch.bfloat16] + 1):
        qkv = qkv_of((1, tokens, 2, 16), torch.bfloat16)
        out, expected = compiled(qkv), attention(qkv)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.01)
        gradients = [torch.autograd.grad(x.float().square().sum(), qkv)[0] for x in (out, expected)]
        difference = (gradients[0] - gradients[1]).float().norm()
        assert difference <= 0.02 * gradients[1].float().norm()


def test_bf16_units_come_from_the_capabilities_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert mae_kernels.cpu_bf16_units() is None
    found["avx512_bf16"] = True
    assert mae_kernels.cpu_bf16_units() == "AVX512-BF16"
    found["amx_bf16"] = True
    assert mae_kernels.cpu_bf16_units() == "AMX"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert mae_kernels.cpu_bf16_units() == "AVX512-BF16"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert mae_kernels.cpu_bf16_units() is None
