"""Self-attention in bf16 on a CPU, for training: every product is one batched matrix product.

    P = softmax(q k^T * scale),  out = P v
    dP = dout v^T,  dS = P * (dP - rowsum(P * dP)),  dq = dS k * scale,  dk = dS^T q * scale,
    dv = P^T dout

oneDNN computes bf16 products with the CPU's bf16 units. torch's scaled_dot_product_attention uses
them in the forward only: its backward in bf16 is slower than in fp32. P is kept for the backward.

Source: Vaswani et al., arXiv 1706.03762, equation 1.

Shapes: B images, N tokens, H heads, d head width, S = B * H sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._pixels import accumulate_dtype
from ._runtime import constant_in_graphs, no_autocast, wants_cpu_ops

# The longest sequence for which these products take less time than scaled_dot_product_attention,
# forward and backward. Measured on an Intel Xeon with AMX, one thread, 32 images of 3 heads or as
# many values: 6 times faster at 17 to 65 tokens, 2 to 2.5 times at 197, 1.8 times at 577, equal at
# 1025 (docs/cpu.md). In fp32 the products are at most as fast beyond 17 tokens.
LONGEST = {torch.bfloat16: 640}


def cpu_bf16_units() -> str | None:
    """The instructions with which this CPU multiplies bf16 matrices; None if it has none.

    Asks torch for the CPU's capabilities. Without such instructions bf16 products are slower than
    fp32 ones.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
    else:  # earlier versions of torch
        asked = {
            "amx_bf16": "_is_amx_tile_supported",
            "avx512_bf16": "_is_avx512_bf16_supported",
        }
        found = {key: getattr(torch.cpu, name, lambda: False)() for key, name in asked.items()}
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "sve_bf16": "SVE", "bf16": "NEON"}
    return next((name for key, name in names.items() if found.get(key)), None)


def cpu_refusal(tokens: int, dtype: torch.dtype) -> str | None:
    """Why training on a CPU takes scaled_dot_product_attention; None if it takes the products."""
    longest = LONGEST.get(dtype)
    if longest is None:
        return f"on a CPU its products take bf16, not {str(dtype).removeprefix('torch.')}"
    if tokens > longest:
        return f"on a CPU it is faster up to {longest} tokens, not with {tokens}"
    if cpu_bf16_units() is None:
        return "this CPU has no bf16 units"
    return None


@constant_in_graphs
def _longest(dtype: torch.dtype) -> int:
    """The most tokens that the products take here."""
    return 0 if cpu_bf16_units() is None else LONGEST.get(dtype, 0)


def takes_products(qkv_BN3Hd: Tensor) -> bool:
    """Whether `attention` is computed here. Without gradients the fused forward of
    scaled_dot_product_attention is faster.
    """
    if not wants_cpu_ops(qkv_BN3Hd) or not (qkv_BN3Hd.requires_grad and torch.is_grad_enabled()):
        return False
    # a compiler may see a symbolic number of tokens
    return qkv_BN3Hd.shape[1] <= _longest(qkv_BN3Hd.dtype)


# ---- formula ----
def products(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out [B,N,H,d] and, for the backward, q, k and v [3,S,N,d] and P [S,N,N]."""
    batch, tokens, _, heads, width = qkv.shape
    shape = (3, batch * heads, tokens, width)
    heads_first = qkv.permute(2, 0, 3, 1, 4)
    qkv_3SNd = heads_first.clone(memory_format=torch.contiguous_format).view(shape)
    q, k, v = qkv_3SNd.unbind(0)
    with no_autocast(qkv.device):
        scores_SNN = qkv.new_empty((batch * heads, tokens, tokens))
        p_SNN = _scaled_product(q, k.transpose(1, 2), scale, scores_SNN).softmax(-1)
        out_SNd = torch.bmm(p_SNN, v)
    out = out_SNd.view(batch, heads, tokens, width).transpose(1, 2).contiguous()
    return out, qkv_3SNd, p_SNN


def products_backward(dout: Tensor, qkv_3SNd: Tensor, p_SNN: Tensor, scale: float) -> Tensor:
    """dqkv [B,N,3,H,d]."""
    batch, tokens, heads, width = dout.shape
    q, k, v = qkv_3SNd.unbind(0)
    d_3SNd = torch.empty_like(qkv_3SNd)
    dq, dk, dv = d_3SNd.unbind(0)
    with no_autocast(dout.device):
        dout_SNd = dout.transpose(1, 2).reshape(q.shape)
        torch.bmm(p_SNN.transpose(1, 2), dout_SNd, out=dv)
        dp_SNN = torch.bmm(dout_SNd, v.transpose(1, 2))
        ds_SNN = torch._softmax_backward_data(dp_SNN, p_SNN, -1, p_SNN.dtype)
        _scaled_product(ds_SNN, k, scale, dq)
        _scaled_product(ds_SNN.transpose(1, 2), q, scale, dk)
    d_3BHNd = d_3SNd.view(3, batch, heads, tokens, width)
    return d_3BHNd.permute(1, 3, 0, 2, 4).contiguous()


def _scaled_product(a_SNK: Tensor, b_SKM: Tensor, scale: float, out_SNM: Tensor) -> Tensor:
    """out = a b * scale; oneDNN scales while it writes."""
    return torch.baddbmm(out_SNM, a_SNK, b_SKM, beta=0, alpha=scale, out=out_SNM)


class AttentionProducts(torch.autograd.Function):
    """The products without a compiler."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        out, *kept = products(qkv, scale)
        ctx.save_for_backward(*kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        qkv_3SNd, p_SNN = ctx.saved_tensors
        return products_backward(grads[0], qkv_3SNd, p_SNN, ctx.scale), None


def traced(qkv: Tensor, scale: float) -> Tensor:
    """out [B,N,H,d] of qkv [B,N,3,H,d], for torch.compile: it derives the backward, and fuses
    scale, softmax and copies.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with no_autocast(qkv.device):
        scores_BHNN = (q @ k.transpose(-1, -2)).to(accumulate_dtype(qkv)) * scale
        return (scores_BHNN.softmax(-1).to(v.dtype) @ v).transpose(1, 2).contiguous()


def attention_on_cpu(qkv: Tensor, scale: float) -> Tensor:
    """out [B,N,H,d], for a qkv that `takes_products`."""
    if torch.compiler.is_compiling():
        return traced(qkv, scale)
    out: Tensor = AttentionProducts.apply(qkv, scale)
    return out
