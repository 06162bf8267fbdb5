"""Self-attention on the packed output of a qkv linear layer.

    q, k, v = qkv.unbind(2)
    out     = softmax(q k^T * scale) v        per head, scale = d ** -0.5 by default
    backward, with P = softmax, D = rowsum(out * dout):
    dv = P^T dout,  dS = P * (dout v^T - D) * scale,  dq = dS k,  dk = dS^T q

Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 1; the backward from the log-sum-exp as in
Dao et al., FlashAttention, arXiv 2205.14135, appendix B.

Masked autoencoders attend over short sequences, so one program holds all keys and values of a head on the chip: no
transposes of qkv, one launch each way, no atomics, no fp32 buffer for dq. CONFIGURATIONS tells the sizes that fit without
spilling registers; longer sequences, wider heads, fp32 and GPUs before sm_80, where Triton has no tensor cores, take
torch's scaled_dot_product_attention.

Shapes: B images, N tokens, H heads, d head width. The packed order (3, H, d) is that of timm and facebookresearch/mae.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from ._checks import check_floating, check_positive, check_shape
from ._pixels import accumulate_dtype
from ._runtime import INTERPRET, architecture, jit, launch, next_power_of_2, tl, use_triton, wants_reference


# ---------------------------------------------------------------------------------------------------- reference
def reference(qkv_BN3HD: Tensor, scale: float) -> Tensor:
    q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def _forward(qkv_BN3HD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, log2 of the sum of exponentials [B,H,N]) by the written formula."""
    q, k, v = qkv_BN3HD.to(accumulate_dtype(qkv_BN3HD)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-1, -2) * scale
    out = (scores.softmax(-1) @ v).transpose(1, 2).to(qkv_BN3HD.dtype).contiguous()
    return out, torch.logsumexp(scores, -1) * math.log2(math.e)


def _backward_formula(grad: Tensor, qkv_BN3HD: Tensor, out: Tensor, lse2: Tensor, scale: float) -> Tensor:
    acc = accumulate_dtype(qkv_BN3HD)
    q, k, v = qkv_BN3HD.to(acc).permute(2, 0, 3, 1, 4).unbind(0)
    do, o = grad.to(acc).transpose(1, 2), out.to(acc).transpose(1, 2)
    p = torch.exp(q @ k.transpose(-1, -2) * scale - lse2[..., None] * math.log(2))
    ds = p * (do @ v.transpose(-1, -2) - (o * do).sum(-1, keepdim=True)) * scale
    grads = (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do)
    return torch.stack(grads, 0).permute(1, 3, 0, 2, 4).to(qkv_BN3HD.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------ kernels
@jit
def _attention_kernel(QKV, OUT, LSE, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_M: tl.constexpr, SCALE_LOG2: tl.constexpr):  # fmt: skip
    """One head: all keys stay on the chip, queries come in blocks, each output row is written once."""
    image, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    col, key = tl.arange(0, D), tl.arange(0, BLOCK_N)
    base = QKV + image * (N * 3 * H * D) + head * D
    keys_at = key[:, None] * (3 * H * D) + col[None, :]
    k = tl.load(base + H * D + keys_at, mask=(key < N)[:, None], other=0.0)
    v = tl.load(base + 2 * H * D + keys_at, mask=(key < N)[:, None], other=0.0)
    for first in range(0, N, BLOCK_M):
        query = first + tl.arange(0, BLOCK_M)
        real = (query < N)[:, None]
        q = tl.load(base + query[:, None] * (3 * H * D) + col[None, :], mask=real, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where((key < N)[None, :], s * SCALE_LOG2, float("-inf"))
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
        out_at = image * (N * H * D) + head * D + query[:, None] * (H * D) + col[None, :]
        tl.store(OUT + out_at, out.to(OUT.dtype.element_ty), mask=real)
        tl.store(LSE + (image * H + head) * N + query, top + tl.log2(total), mask=query < N)


@jit
def _attention_backward_kernel(QKV, OUT, LSE, DOUT, DQKV, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                               BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SCALE: tl.constexpr,
                               SCALE_LOG2: tl.constexpr):  # fmt: skip
    """One head: dk and dv add up in registers while the queries pass by in blocks; transposed scores [keys, queries]."""
    image, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    col, key = tl.arange(0, D), tl.arange(0, BLOCK_N)
    base = QKV + image * (N * 3 * H * D) + head * D
    grads = DQKV + image * (N * 3 * H * D) + head * D
    keys_at = key[:, None] * (3 * H * D) + col[None, :]
    k = tl.load(base + H * D + keys_at, mask=(key < N)[:, None], other=0.0)
    v = tl.load(base + 2 * H * D + keys_at, mask=(key < N)[:, None], other=0.0)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    for first in range(0, N, BLOCK_M):
        query = first + tl.arange(0, BLOCK_M)
        real = (query < N)[:, None]
        q = tl.load(base + query[:, None] * (3 * H * D) + col[None, :], mask=real, other=0.0)
        out_at = image * (N * H * D) + head * D + query[:, None] * (H * D) + col[None, :]
        do = tl.load(DOUT + out_at, mask=real, other=0.0)
        o = tl.load(OUT + out_at, mask=real, other=0.0)
        # an infinite log-sum-exp makes P zero for the queries beyond N; keys beyond N are zero and are never stored
        lse = tl.load(LSE + (image * H + head) * N + query, mask=query < N, other=float("inf"))
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE_LOG2 - lse[None, :])
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dv = tl.dot(p.to(q.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * SCALE
        tl.store(grads + query[:, None] * (3 * H * D) + col[None, :], dq.to(DQKV.dtype.element_ty), mask=real)
    tl.store(grads + H * D + keys_at, (dk * SCALE).to(DQKV.dtype.element_ty), mask=(key < N)[:, None])
    tl.store(grads + 2 * H * D + keys_at, dv.to(DQKV.dtype.element_ty), mask=(key < N)[:, None])


# ---------------------------------------------------------------------------------------------------- launchers
class Configuration(NamedTuple):
    """Up to `tokens` tokens and heads up to `width`: queries per block and warps, forward and backward."""

    tokens: int
    width: int
    forward_queries: int
    forward_warps: int
    backward_queries: int
    backward_warps: int


# The first line that fits holds, on every architecture from sm_80 on: none of them spills a register there (the lint).
# Not tuned on any GPU yet.
CONFIGURATIONS = (
    Configuration(tokens=64, width=64, forward_queries=64, forward_warps=4, backward_queries=64, backward_warps=4),
    Configuration(tokens=256, width=32, forward_queries=64, forward_warps=4, backward_queries=32, backward_warps=8),
)
WIDTHS = (16, 32, 64)
OLDEST_ARCHITECTURE = 80


def configuration(tokens: int, width: int) -> Configuration | None:
    return next((c for c in CONFIGURATIONS if tokens <= c.tokens and width <= c.width), None)


def refusal(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> str | None:
    """Why these sizes take scaled_dot_product_attention; None when the kernels can take them."""
    if width not in WIDTHS or configuration(tokens, width) is None:
        return f"{tokens} tokens with heads of {width} fit none of its configurations"
    if INTERPRET:
        return None
    if dtype == torch.float32:
        return "fp32 has no tensor cores at full precision"
    if architecture(device) < OLDEST_ARCHITECTURE:
        return f"Triton has no tensor cores on sm_{architecture(device)}, before sm_{OLDEST_ARCHITECTURE}"
    return None


@torch.compiler.assume_constant_result
def _takes_kernels(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> bool:
    return use_triton("attention", device, dtype, refused=refusal(device, dtype, tokens, width))


def _sizes(qkv: Tensor, scale: float) -> tuple[Configuration, dict[str, Any]]:
    _, tokens, _, heads, width = qkv.shape
    chosen = configuration(tokens, width)
    assert chosen is not None  # refusal() was asked before
    constants = {"N": tokens, "H": heads, "D": width, "BLOCK_N": max(16, next_power_of_2(tokens))}
    return chosen, {**constants, "SCALE_LOG2": scale * math.log2(math.e)}


def _launch(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    batch, tokens, _, heads, width = qkv.shape
    chosen, constants = _sizes(qkv, scale)
    out = torch.empty((batch, tokens, heads, width), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=qkv.device)
    constants |= {"BLOCK_M": min(chosen.forward_queries, constants["BLOCK_N"]), "num_warps": chosen.forward_warps}
    launch(_attention_kernel, (batch * heads,), qkv, qkv, out, lse, **constants)
    return out, lse


def _launch_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    grad, qkv = grad.contiguous(), qkv.contiguous()
    chosen, constants = _sizes(qkv, scale)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    constants |= {"BLOCK_M": min(chosen.backward_queries, constants["BLOCK_N"]), "num_warps": chosen.backward_warps}
    grid = (qkv.shape[0] * qkv.shape[3],)
    launch(_attention_backward_kernel, grid, qkv, qkv, out, lse, grad, dqkv, SCALE=scale, **constants)
    return dqkv


# ------------------------------------------------------------------------------------------------- registration
@triton_op("mae_kernels::attention", mutates_args=())
def _attention_op(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B,N,H,d], log2-sum-exp of the scores [B,H,N])."""
    refused = refusal(qkv.device, qkv.dtype, qkv.shape[1], qkv.shape[4])
    if use_triton("attention", qkv.device, qkv.dtype, refused=refused):
        return _launch(qkv, scale)
    return _forward(qkv, scale)


@triton_op("mae_kernels::attention_backward", mutates_args=())
def _attention_backward_op(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    refused = refusal(qkv.device, qkv.dtype, qkv.shape[1], qkv.shape[4])
    if use_triton("attention", qkv.device, qkv.dtype, refused=refused):
        return _launch_backward(grad, qkv, out, lse, scale)
    return _backward_formula(grad, qkv, out, lse, scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    return _attention_backward_op(grad, *ctx.saved_tensors, ctx.scale), None


_attention_op.register_autograd(_backward, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------- public
def attention(qkv: Tensor, *, scale: float | None = None) -> Tensor:
    """Multi-head self-attention without dropout or mask.

    Args:
        qkv: [B, N, 3, H, d] floating point, any strides: the qkv linear layer's output, viewed.
        scale: of the scores; default d ** -0.5.

    Returns: [B, N, H, d], contiguous, in qkv's dtype. `out.flatten(2)` is the input of the output projection.

    Raises: TypeError or ValueError naming the argument.
    """
    check_floating("qkv", qkv)
    check_shape("qkv", qkv, (None, None, 3, None, None), "[B, N, 3, H, d]")
    if scale is not None:
        check_positive("scale", scale)
    scale = float(qkv.shape[4] ** -0.5 if scale is None else scale)
    if wants_reference(qkv) or not _takes_kernels(qkv.device, qkv.dtype, qkv.shape[1], qkv.shape[4]):
        return reference(qkv, scale)
    return _attention_op(qkv, scale)[0]
