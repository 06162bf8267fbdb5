"""Self-attention on the packed output of a qkv linear layer.

    q, k, v = qkv.unbind(2)
    P       = softmax(q k^T * scale)          per head, scale = d ** -0.5 by default
    out     = P v
    backward, with delta = rowsum(out * dout) = rowsum(P * dP):
    dP = dout v^T,  dS = P * (dP - delta) * scale,  dq = dS k,  dk = dS^T q,  dv = P^T dout

Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 1; the backward from
the log-sum-exp as in Dao et al., FlashAttention, arXiv 2205.14135, appendix B.

Masked autoencoders attend over short sequences. One program holds all keys and values of one head
on the chip: qkv is read and its gradient written in their layout, one launch each way, no atomics,
no fp32 buffer for dq. Up to 64 tokens the backward reads only qkv and dout, and nothing but qkv is
kept for it; beyond, out and the log-sum-exp are kept as well. fp16 and bf16 products run on tensor
cores with fp32 sums; the softmax is fp32. Longer sequences, other head widths, fp32 (tensor cores
would round it), fp64 and GPUs before sm_80 (Triton has no tensor cores there) take torch's
scaled_dot_product_attention with torch's own backward; so does the CPU, except for training in bf16
(cpu_attention.py).

Shapes: B images, N tokens, H heads, d head width. The packed order (3, H, d) is that of timm and
facebookresearch/mae.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._checks import check_floating, check_positive, check_shape
from ._pixels import accumulate_dtype
from ._runtime import (
    HAVE_TRITON,
    INTERPRET,
    always_registered,
    architecture,
    constant_in_graphs,
    jit,
    launch,
    next_power_of_2,
    no_autocast,
    tl,
    triton_op,
    use_triton,
    wants_reference,
)
from ._samples import Draw, Made, Sample, Size, declares
from .cpu_attention import attention_on_cpu, cpu_refusal, takes_products

LOG2_E = math.log2(math.e)
# Before sm_80 Triton multiplies matrices without tensor cores
OLDEST = 80


# ---- reference ----
def reference(qkv_BN3Hd: Tensor, scale: float | None) -> Tensor:
    q, k, v = qkv_BN3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    with no_autocast(qkv_BN3Hd.device):  # the dtype of qkv has been chosen already
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def gradient(dout_BNHd: Tensor, qkv_BN3Hd: Tensor, scale: float) -> Tensor:
    """dqkv [B,N,3,H,d] by the formula, [B,H,N,N] at full size."""
    acc = accumulate_dtype(qkv_BN3Hd)
    q, k, v = qkv_BN3Hd.to(acc).permute(2, 0, 3, 1, 4).unbind(0)
    dout = dout_BNHd.to(acc).transpose(1, 2)
    with no_autocast(qkv_BN3Hd.device):
        p = (q @ k.transpose(-1, -2) * scale).softmax(-1)
        dp = dout @ v.transpose(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        d = torch.stack((ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout))
    return d.permute(1, 3, 0, 2, 4).to(qkv_BN3Hd.dtype).contiguous()


# ---- kernels ----
# One program = one head of one image. The keys are cut into up to three tiles of T0 + T1 +
# T2 >= N rows (powers of two, 197 -> 128 + 64 + 16), held on chip; the queries are walked in blocks
# of ROWS. Only the last tile can have padding.
@jit
def _load_rows(X, n, stride, N: tl.constexpr, D: tl.constexpr):
    return tl.load(
        X + (n[:, None] * stride + tl.arange(0, D)[None, :]), mask=(n < N)[:, None], other=0.0
    )


@jit
def _store_rows(X, n, x, stride, N: tl.constexpr, D: tl.constexpr):
    at = X + (n[:, None] * stride + tl.arange(0, D)[None, :])
    tl.store(at, x.to(X.dtype.element_ty), mask=(n < N)[:, None])


@jit
def _scores(q, k, n, N: tl.constexpr, PADDED: tl.constexpr):
    s = tl.dot(q, tl.trans(k))
    if PADDED:
        s = tl.where((n < N)[None, :], s, float("-inf"))
    return s


@jit
def _attention_kernel(
    QKV, OUT, LSE, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, T0: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, ROWS: tl.constexpr, KEEP_LSE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
):  # fmt: skip
    """OUT, and with KEEP_LSE the row's log2(sum(2^(SCALE_LOG2 * q k))), which is what the backward
    needs of the softmax.
    """
    head = tl.program_id(0)
    first = (head // H).to(tl.int64) * N * (H * D) + (head % H) * D
    Q = QKV + (head // H).to(tl.int64) * N * (3 * H * D) + (head % H) * D
    K, V = Q + H * D, Q + 2 * H * D
    n0 = tl.arange(0, T0)
    k0 = _load_rows(K, n0, 3 * H * D, N, D)
    v0 = _load_rows(V, n0, 3 * H * D, N, D)
    if T1 > 0:
        n1 = T0 + tl.arange(0, T1)
        k1 = _load_rows(K, n1, 3 * H * D, N, D)
        v1 = _load_rows(V, n1, 3 * H * D, N, D)
    if T2 > 0:
        n2 = T0 + T1 + tl.arange(0, T2)
        k2 = _load_rows(K, n2, 3 * H * D, N, D)
        v2 = _load_rows(V, n2, 3 * H * D, N, D)
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    # the next queries are loaded while these are computed, where registers are left for them
    AHEAD: tl.constexpr = BLOCKS > 1 and D <= 32
    q = _load_rows(Q, tl.arange(0, ROWS), 3 * H * D, N, D)
    for block in tl.range(0, BLOCKS, num_stages=1):
        m = block * ROWS + tl.arange(0, ROWS)
        q_next = q
        if AHEAD:
            q_next = _load_rows(Q, m + ROWS, 3 * H * D, N, D)
        s0 = _scores(q, k0, n0, N, T0 > N)
        top = tl.max(s0, 1)
        if T1 > 0:
            s1 = _scores(q, k1, n1, N, T0 + T1 > N)
            top = tl.maximum(top, tl.max(s1, 1))
        if T2 > 0:
            s2 = _scores(q, k2, n2, N, T0 + T1 + T2 > N)
            top = tl.maximum(top, tl.max(s2, 1))
        top = top * SCALE_LOG2
        p0 = tl.exp2(s0 * SCALE_LOG2 - top[:, None])
        total = tl.sum(p0, 1)
        o = tl.dot(p0.to(v0.dtype), v0)
        if T1 > 0:
            p1 = tl.exp2(s1 * SCALE_LOG2 - top[:, None])
            total += tl.sum(p1, 1)
            o = tl.dot(p1.to(v1.dtype), v1, o)
        if T2 > 0:
            p2 = tl.exp2(s2 * SCALE_LOG2 - top[:, None])
            total += tl.sum(p2, 1)
            o = tl.dot(p2.to(v2.dtype), v2, o)
        _store_rows(OUT + first, m, o * (1.0 / total)[:, None], H * D, N, D)
        if KEEP_LSE:
            tl.store(LSE + head.to(tl.int64) * N + m, top + tl.log2(total), mask=m < N)
        if BLOCKS > 1 and not AHEAD:
            q_next = _load_rows(Q, m + ROWS, 3 * H * D, N, D)
        q = q_next


@jit
def _backward_rows_kernel(
    QKV, DOUT, DQKV, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, SCALE_LOG2: tl.constexpr,
):  # fmt: skip
    """All queries against all keys at once: P is made again from the scores, so neither OUT nor LSE
    is read.
    """
    head = tl.program_id(0)
    packed = (head // H).to(tl.int64) * N * (3 * H * D) + (head % H) * D
    first = (head // H).to(tl.int64) * N * (H * D) + (head % H) * D
    Q, DQ = QKV + packed, DQKV + packed
    n = tl.arange(0, TILE)
    q = _load_rows(Q, n, 3 * H * D, N, D)
    do = _load_rows(DOUT + first, n, H * D, N, D)
    k = _load_rows(Q + H * D, n, 3 * H * D, N, D)
    v = _load_rows(Q + 2 * H * D, n, 3 * H * D, N, D)
    s = _scores(q, k, n, N, TILE > N)
    dp = tl.dot(do, tl.trans(v))
    p = tl.exp2(s * SCALE_LOG2 - (tl.max(s, 1) * SCALE_LOG2)[:, None])
    p = p * (1.0 / tl.sum(p, 1))[:, None]
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
    _store_rows(DQ + 2 * H * D, n, tl.dot(tl.trans(p.to(q.dtype)), do), 3 * H * D, N, D)
    _store_rows(DQ + H * D, n, tl.dot(tl.trans(ds), q) * SCALE, 3 * H * D, N, D)
    _store_rows(DQ, n, tl.dot(ds, k) * SCALE, 3 * H * D, N, D)


@jit
def _key_tile(k, v, q, do, lse, delta, dk, dv, dq, PADDED: tl.constexpr, SCALE_LOG2: tl.constexpr):
    """One tile of keys against one block of queries, transposed: P^T and dS^T enter the products
    from registers.
    """
    log2_p = tl.dot(k, tl.trans(q)) * SCALE_LOG2 - lse[None, :]
    if PADDED:  # the score of padding is 0, perhaps far above the row's LSE: its P must stay finite
        log2_p = tl.minimum(log2_p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    pt = tl.exp2(log2_p)
    dst = (pt * (tl.dot(v, tl.trans(do)) - delta[None, :])).to(q.dtype)
    return tl.dot(dst, q, dk), tl.dot(pt.to(q.dtype), do, dv), tl.dot(tl.trans(dst), k, dq)


@jit
def _backward_keys_kernel(
    QKV, DOUT, OUT, LSE, DQKV, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, T0: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, ROWS: tl.constexpr, SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
):  # fmt: skip
    """P = 2^(scores - LSE) and delta = rowsum(OUT * DOUT): no reduction over a row of scores."""
    head = tl.program_id(0)
    packed = (head // H).to(tl.int64) * N * (3 * H * D) + (head % H) * D
    first = (head // H).to(tl.int64) * N * (H * D) + (head % H) * D
    Q, DQ = QKV + packed, DQKV + packed
    K, V = Q + H * D, Q + 2 * H * D
    n0 = tl.arange(0, T0)
    k0 = _load_rows(K, n0, 3 * H * D, N, D)
    v0 = _load_rows(V, n0, 3 * H * D, N, D)
    dk0, dv0 = tl.zeros([T0, D], tl.float32), tl.zeros([T0, D], tl.float32)
    if T1 > 0:
        n1 = T0 + tl.arange(0, T1)
        k1 = _load_rows(K, n1, 3 * H * D, N, D)
        v1 = _load_rows(V, n1, 3 * H * D, N, D)
        dk1, dv1 = tl.zeros([T1, D], tl.float32), tl.zeros([T1, D], tl.float32)
    if T2 > 0:
        n2 = T0 + T1 + tl.arange(0, T2)
        k2 = _load_rows(K, n2, 3 * H * D, N, D)
        v2 = _load_rows(V, n2, 3 * H * D, N, D)
        dk2, dv2 = tl.zeros([T2, D], tl.float32), tl.zeros([T2, D], tl.float32)
    for block in tl.range(0, (N + ROWS - 1) // ROWS, num_stages=1):
        m = block * ROWS + tl.arange(0, ROWS)
        q = _load_rows(Q, m, 3 * H * D, N, D)
        do = _load_rows(DOUT + first, m, H * D, N, D)
        o = _load_rows(OUT + first, m, H * D, N, D)
        lse = tl.load(LSE + head.to(tl.int64) * N + m, mask=m < N, other=float("inf"))
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        dq = tl.zeros([ROWS, D], tl.float32)
        dk0, dv0, dq = _key_tile(k0, v0, q, do, lse, delta, dk0, dv0, dq, T0 > N, SCALE_LOG2)
        if T1 > 0:
            dk1, dv1, dq = _key_tile(
                k1, v1, q, do, lse, delta, dk1, dv1, dq, T0 + T1 > N, SCALE_LOG2
            )
        if T2 > 0:
            dk2, dv2, dq = _key_tile(
                k2, v2, q, do, lse, delta, dk2, dv2, dq, T0 + T1 + T2 > N, SCALE_LOG2
            )
        _store_rows(DQ, m, dq * SCALE, 3 * H * D, N, D)
    _store_rows(DQ + H * D, n0, dk0 * SCALE, 3 * H * D, N, D)
    _store_rows(DQ + 2 * H * D, n0, dv0, 3 * H * D, N, D)
    if T1 > 0:
        _store_rows(DQ + H * D, n1, dk1 * SCALE, 3 * H * D, N, D)
        _store_rows(DQ + 2 * H * D, n1, dv1, 3 * H * D, N, D)
    if T2 > 0:
        _store_rows(DQ + H * D, n2, dk2 * SCALE, 3 * H * D, N, D)
        _store_rows(DQ + 2 * H * D, n2, dv2, 3 * H * D, N, D)


# ---- launchers ----
class Sizes(NamedTuple):
    """From sm_<oldest> on, for up to so many tokens and so wide heads."""

    oldest: int
    tokens: int
    width: int
    split: bool  # more than 128 keys in tiles with little padding; else in one tile
    rows: int  # of queries in a block
    warps: int


# Of the lines with the newest architecture that is not newer than the GPU, the first that fits
# holds. Chosen by what the compiler makes of them (no spills, then most programs per
# multiprocessor); not tuned on any GPU yet.
FORWARD = (
    Sizes(120, 128, 128, False, 64, 4),
    Sizes(120, 256, 32, True, 64, 4),
    Sizes(90, 128, 128, False, 64, 4),
    Sizes(90, 256, 64, True, 64, 4),
    Sizes(80, 128, 128, False, 64, 4),
    Sizes(80, 256, 32, True, 64, 4),
    Sizes(80, 256, 64, True, 32, 4),
)
# The kernel that takes keys in columns; up to ROWS_KERNEL_TOKENS the other one runs, with all
# queries in one block.
BACKWARD = (
    Sizes(120, 128, 32, False, 16, 4),
    Sizes(120, 128, 128, False, 16, 8),
    Sizes(120, 256, 32, False, 32, 8),
    Sizes(90, 128, 64, False, 16, 4),
    Sizes(90, 256, 32, False, 16, 4),
    Sizes(90, 128, 128, False, 16, 8),
    Sizes(90, 256, 64, False, 16, 8),
    Sizes(80, 128, 64, False, 16, 4),
    Sizes(80, 128, 128, False, 16, 8),
    Sizes(80, 224, 32, True, 16, 4),
    Sizes(80, 256, 32, False, 32, 8),
    Sizes(80, 224, 64, True, 16, 8),
)
ROWS_KERNEL_TOKENS = 64
WIDTHS = (16, 32, 64, 128)


def lines_for(table: tuple[Sizes, ...], arch: int, width: int) -> list[Sizes]:
    """The lines of the table for sm_<arch> and heads of this width."""
    oldest = max(line.oldest for line in table if line.oldest <= arch)
    return [line for line in table if line.oldest == oldest and width <= line.width]


def attention_refusal(
    tokens: int, head_width: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> str | None:
    """Why `attention` takes scaled_dot_product_attention for a shape; None if its own
    implementation takes it.

    Args:
        tokens, head_width: N and d of qkv [B, N, 3, H, d].
        dtype: of qkv.
        capability: compute capability of the GPU, as torch.cuda.get_device_capability returns it;
            None for training on this machine's CPU.
    """
    if capability is None:
        return cpu_refusal(tokens, dtype)
    arch = 10 * capability[0] + capability[1]
    if arch < OLDEST:
        return f"its kernels need the tensor cores of sm_{OLDEST} or newer, this is sm_{arch}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels take fp16 and bf16, not {str(dtype).removeprefix('torch.')}"
    return _size_refusal(tokens, head_width, arch)


def _size_refusal(tokens: int, width: int, arch: int) -> str | None:
    if width not in WIDTHS:
        return f"its kernels take heads of {', '.join(map(str, WIDTHS))} values, not of {width}"
    most = min(max(line.tokens for line in lines_for(t, arch, width)) for t in (FORWARD, BACKWARD))
    if 1 <= tokens <= most:
        return None
    return f"its kernels hold 1 to {most} tokens with heads of {width} on sm_{arch}, not {tokens}"


_kept_size_refusal = functools.cache(_size_refusal)


@constant_in_graphs
def _architecture(device: torch.device) -> int:
    # under the interpreter the sizes of the oldest one
    return max(architecture(device), OLDEST)


@functools.cache
def sizes_for(
    backward: bool, arch: int, tokens: int, width: int
) -> tuple[Sizes, tuple[int, int, int]]:
    """The line of FORWARD or BACKWARD for sizes that `refusal` lets through, and the key tiles."""
    lines = lines_for(BACKWARD if backward else FORWARD, arch, width)
    sizes = next(line for line in lines if tokens <= line.tokens)
    return sizes, key_tiles(tokens, sizes.split)


def tile_of(tokens: int) -> int:
    return max(16, next_power_of_2(tokens))  # a tensor-core product has sides of at least 16


def key_tiles(tokens: int, split: bool) -> tuple[int, int, int]:
    """Powers of two, padding in the last one only; 0 for a tile that is not needed."""
    if tokens <= 128 or not split:
        return tile_of(tokens), 0, 0
    rest = tokens - 128
    pairs = [(a, b) for a in (16, 32, 64, 128) for b in (0, 16, 32, 64) if b <= a and a + b >= rest]
    return 128, *min(pairs, key=lambda pair: (sum(pair), pair[1] > 0))


def _launch_attention(qkv_BN3Hd: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    qkv_BN3Hd = qkv_BN3Hd.contiguous()
    batch, tokens, heads, width = _sizes(qkv_BN3Hd)
    arch = _architecture(qkv_BN3Hd.device)
    sizes, (t0, t1, t2) = sizes_for(False, arch, tokens, width)
    keep = tokens > ROWS_KERNEL_TOKENS
    device, lse_shape = qkv_BN3Hd.device, (batch, heads, tokens) if keep else (0,)
    out_BNHd = torch.empty((batch, tokens, heads, width), dtype=qkv_BN3Hd.dtype, device=device)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=device)
    constants = {"N": tokens, "H": heads, "D": width, "T0": t0, "T1": t1, "T2": t2}
    constants |= {"ROWS": min(sizes.rows, tile_of(tokens)), "KEEP_LSE": keep}
    tensors, scales = (qkv_BN3Hd, out_BNHd, lse), {"SCALE_LOG2": scale * LOG2_E}
    grid, warps = (batch * heads,), sizes.warps
    launch(_attention_kernel, grid, out_BNHd, *tensors, **constants, **scales, num_warps=warps)
    return out_BNHd, lse


def _launch_attention_backward(
    dout_BNHd: Tensor,
    qkv_BN3Hd: Tensor,
    out_BNHd: Tensor | None,
    lse_BHN: Tensor | None,
    scale: float,
) -> Tensor:
    dout_BNHd, qkv_BN3Hd = dout_BNHd.contiguous(), qkv_BN3Hd.contiguous()
    batch, tokens, heads, width = _sizes(qkv_BN3Hd)
    dqkv_BN3Hd = torch.empty(qkv_BN3Hd.shape, dtype=qkv_BN3Hd.dtype, device=qkv_BN3Hd.device)
    grid = (batch * heads,)
    constants: dict[str, Any] = {"N": tokens, "H": heads, "D": width}
    constants |= {"SCALE": scale, "SCALE_LOG2": scale * LOG2_E}
    tensors: tuple[Tensor, ...] = (qkv_BN3Hd, dout_BNHd)
    if tokens <= ROWS_KERNEL_TOKENS:
        constants |= {"TILE": tile_of(tokens), "num_warps": 4 if width <= 64 else 8}
        launch(_backward_rows_kernel, grid, qkv_BN3Hd, *tensors, dqkv_BN3Hd, **constants)
        return dqkv_BN3Hd
    arch = _architecture(qkv_BN3Hd.device)
    sizes, (t0, t1, t2) = sizes_for(True, arch, tokens, width)
    assert out_BNHd is not None and lse_BHN is not None
    tensors += (out_BNHd.contiguous(), lse_BHN.contiguous())
    constants |= {"T0": t0, "T1": t1, "T2": t2, "ROWS": sizes.rows, "num_warps": sizes.warps}
    launch(_backward_keys_kernel, grid, qkv_BN3Hd, *tensors, dqkv_BN3Hd, **constants)
    return dqkv_BN3Hd


def _sizes(qkv_BN3Hd: Tensor) -> tuple[int, int, int, int]:
    """B, N, H, d; only B can stay symbolic, because the kernels are compiled for the others."""
    batch, tokens, _, heads, width = qkv_BN3Hd.shape
    return batch, int(tokens), int(heads), int(width)


# ---- registration ----
def refusal(qkv_BN3Hd: Tensor) -> str | None:
    """Why this qkv takes scaled_dot_product_attention; None when the kernels can take it."""
    tokens, width = qkv_BN3Hd.shape[1], qkv_BN3Hd.shape[4]
    if qkv_BN3Hd.is_cuda and qkv_BN3Hd.dtype == torch.float32:
        return "tensor cores would round the fp32 products"
    # a compiler may see a symbolic number of tokens
    check = _size_refusal if torch.compiler.is_compiling() else _kept_size_refusal
    return check(tokens, width, _architecture(qkv_BN3Hd.device))


@constant_in_graphs
def _kernels_run(device: torch.device, dtype: torch.dtype, refused: str | None) -> bool:
    return use_triton("attention", device, dtype, refused=refused)


@triton_op("mae_kernels::attention", mutates_args=())
def _attention_op(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B,N,H,d], log2-sum-exp of the scores [B,H,N], or [0] where the backward does not need
    it).
    """
    if _kernels_run(qkv.device, qkv.dtype, refusal(qkv)):
        return _launch_attention(qkv, scale)
    return reference(qkv, scale), torch.empty(0, dtype=torch.float32, device=qkv.device)


@triton_op("mae_kernels::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor | None, scale: float
) -> Tensor:
    if _kernels_run(qkv.device, qkv.dtype, refusal(qkv)):
        return _launch_attention_backward(dout, qkv, out, lse, scale)
    return gradient(dout, qkv, scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
    ctx.save_for_backward(qkv, *((out, lse) if lse.dim() == 3 else (None, None)))


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
    if dout is None:
        return None, None
    return _attention_backward_op(dout, *ctx.saved_tensors, ctx.scale), None


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dout, qkv, _, _, ctx.scale = inputs
    ctx.save_for_backward(dout, qkv)


def _backward_twice(ctx: Any, d_dqkv: Tensor) -> tuple[Any, ...]:
    """The gradient of the formula; in it out and lse are functions of qkv."""
    pull_back = torch.func.vjp(
        lambda dout, qkv: gradient(dout, qkv, ctx.scale), *ctx.saved_tensors
    )[1]
    return *pull_back(d_dqkv), None, None, None


_attention_op.register_autograd(_backward, setup_context=_setup)
_attention_backward_op.register_autograd(_backward_twice, setup_context=_setup_twice)


def _count_flops() -> None:
    """Tells torch's FLOP counter what the op and its kernels do: 2 products of N x N x d per head
    forward, 5 backward (the scores again, dP, dv, dk, dq). Without it, a compiler that weighs what
    to compute again takes attention for free."""

    def forward(qkv_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, tokens, _, heads, width = qkv_shape
        return 4 * batch * heads * tokens * tokens * width

    def backward(
        dout_shape: Any, qkv_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
    ) -> int:
        return forward(qkv_shape) * 5 // 2

    def of_kernel(output: str, products: int) -> Any:
        def flops(*args: Any, kwargs: dict[str, Any], **other: Any) -> int:
            sizes = kwargs[output]
            batch, tokens, heads, width = sizes[0], sizes[1], sizes[-2], sizes[-1]
            return 2 * products * batch * heads * tokens * tokens * width

        return flops

    register_flop_formula(torch.ops.mae_kernels.attention)(forward)
    register_flop_formula(torch.ops.mae_kernels.attention_backward)(backward)
    if HAVE_TRITON and not INTERPRET:  # an interpreted kernel never enters a graph
        register_flop_formula(_attention_kernel)(of_kernel("OUT", 2))
        register_flop_formula(_backward_rows_kernel)(of_kernel("DQKV", 5))
        register_flop_formula(_backward_keys_kernel)(of_kernel("DQKV", 5))


_count_flops()


# ---- public ----
def attention(qkv: Tensor, *separate: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v: multi-head self-attention without dropout or mask.

    Args:
        qkv: [B, N, 3, H, d] floating point, any strides: the qkv linear layer's output, viewed.
            Read without a copy when contiguous.
        scale: of the scores, positive; default d ** -0.5.

    Returns: [B, N, H, d], contiguous, in qkv's dtype, under autocast too. `out.flatten(2)` is the
    input of the output projection. The gradient reaches qkv. Where the kernels run it can be
    differentiated again; elsewhere that is up to scaled_dot_product_attention, whose fused backward
    on the CPU cannot.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> qkv = torch.rand(8, 50, 3 * 12 * 64)
        >>> attention(qkv.unflatten(-1, (3, 12, 64))).flatten(2).shape
        torch.Size([8, 50, 768])
    """
    hint = "torch.stack((q, k, v), 2) makes it of three [B, N, H, d]"
    if separate:
        raise TypeError(
            f"attention: got {1 + len(separate)} positional arguments, "
            f"needs one, qkv [B, N, 3, H, d]; {hint}"
        )
    check_floating("qkv", qkv)
    check_shape("qkv", qkv, (None, None, 3, None, None), "[B, N, 3, H, d]", hint)
    if qkv.shape[3] < 1 or qkv.shape[4] < 1:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, needs H and d of at least 1")
    if scale is not None:
        check_positive("scale", scale)
    factor = qkv.shape[4] ** -0.5 if scale is None else float(scale)
    if takes_products(qkv):
        return attention_on_cpu(qkv, factor)
    if wants_reference(qkv) or not (
        always_registered() or _kernels_run(qkv.device, qkv.dtype, refusal(qkv))
    ):
        return reference(qkv, scale)
    return _attention_op(qkv, factor)[0]


# ---- samples ----
def _sample(size: Size, tokens: int, heads: int, width: int, max_arch: int = 999) -> Sample:
    def make(draw: Draw) -> Made:
        return {"qkv": draw.normal(draw.batch, tokens, 3, heads, width)}, {}

    name = f"{tokens} x {heads} x {width}"
    limits: dict[str, Any] = {"half_only": True, "min_arch": OLDEST, "max_arch": max_arch}
    return Sample("attention", name, attention, make, ("qkv",), size, **limits)


@declares("attention", oldest=OLDEST)
def samples() -> list[Sample]:
    """Every kernel and number of key tiles; encoders and decoder of MAE's ViTs, and their largest
    blocks unmasked.
    """
    small = ((10, 2, 16), (37, 2, 128), (65, 1, 64), (133, 2, 32))
    model = ((50, 6, 64), (50, 12, 64), (50, 16, 64), (65, 3, 64), (197, 16, 32))
    # sm_120 has less shared memory: there so many tokens of so wide heads take
    # scaled_dot_product_attention
    largest = [_sample("small", 197, 2, 64, 119), _sample("model", 197, 12, 64, 119)]
    return [_sample("small", *s) for s in small] + [_sample("model", *s) for s in model] + largest
