"""Restore the full sequence from visible tokens: unshuffle, mask tokens and positions in one write.

    out[b, j]     = visible[b, j] + pos_embed[j]            prefix tokens (a class token), j < p
    out[b, p + l] = visible[b, p + r] + pos_embed[p + l]  where r = ids_restore[b, l] < K
                  = mask_token + pos_embed[p + l]         otherwise

Source: He et al., arXiv 2111.06377, section 3 (decoder input); the same numbers as the concatenate,
gather and add of facebookresearch/mae.

On a GPU one kernel writes every output once. Only ids_restore is kept for the backward, which reads
the gradient once: a visible row has one place, so plain stores do, and the mask token's gradient is
summed in a fixed order. A rank out of range, which only debug_checks reports on a GPU, gives NaN
and reads nothing.

Shapes: B images, L patches, K visible, p prefix tokens, D decoder width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_floating, check_ids, check_int, check_same_device, check_shape
from ._pixels import accumulate_dtype
from ._runtime import (
    column_block,
    jit,
    launch,
    rows_per_program,
    tl,
    triton_op,
    use_triton,
    wants_reference,
)
from ._samples import Draw, Made, Sample, Size, declares


# ---- reference ----
def reference(
    visible_BTD: Tensor,
    ids_restore_BL: Tensor,
    mask_token_D: Tensor,
    pos_embed_ND: Tensor,
    prefix: int,
) -> Tensor:
    dtype = _result_dtype(visible_BTD, mask_token_D, pos_embed_ND)
    num_visible = visible_BTD.shape[1] - prefix
    batch = visible_BTD.shape[0]
    # one extra row, the mask token, is read for every masked patch
    token_B1D = mask_token_D.to(dtype).expand(batch, 1, -1)
    table = torch.cat([visible_BTD.to(dtype), token_B1D], 1)
    rows_BL = ids_restore_BL.clamp(max=num_visible) + prefix
    first_BP = torch.arange(prefix, device=rows_BL.device).expand(batch, -1)
    rows_BN = torch.cat([first_BP, rows_BL], 1)
    return table.gather(1, rows_BN[..., None].expand(-1, -1, table.shape[2])) + pos_embed_ND


def _result_dtype(visible: Tensor, mask_token: Tensor, pos_embed: Tensor) -> torch.dtype:
    return torch.promote_types(
        visible.dtype, torch.promote_types(mask_token.dtype, pos_embed.dtype)
    )


# ---- kernels ----
@jit
def _restore_kernel(
    VISIBLE, IDS, MASK_TOKEN, POS, OUT, num_rows, patches, keep, stride_b, stride_t,
    PREFIX: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = PREFIX + patches
    image, token = row // tokens, row % tokens
    is_patch = token >= PREFIX
    in_rows = row < num_rows
    rank = tl.load(IDS + image * patches + token - PREFIX, mask=in_rows & is_patch, other=0)
    in_range = (rank >= 0) & (rank < patches)
    source = tl.where(is_patch, PREFIX + rank, token)
    visible = in_range & (source < PREFIX + keep)
    wanted = in_rows[:, None] & (col < D)[None, :]
    at = image * stride_b + source * stride_t
    x = tl.load(
        VISIBLE + (at[:, None] + col[None, :]), mask=wanted & visible[:, None], other=0.0
    ).to(tl.float32)
    mask_token = tl.load(MASK_TOKEN + col, mask=col < D, other=0.0).to(tl.float32)
    pos = tl.load(POS + (token[:, None] * D + col[None, :]), mask=wanted, other=0.0).to(tl.float32)
    x = tl.where(visible[:, None], x, mask_token[None, :]) + pos
    x = tl.where(in_range[:, None], x, float("nan"))
    tl.store(OUT + (row[:, None] * D + col[None, :]), x.to(OUT.dtype.element_ty), mask=wanted)


@jit
def _restore_backward_kernel(
    GRAD, IDS, DVISIBLE, PARTIAL, num_rows, patches, keep, steps, PREFIX: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One pass over the gradient: a visible row goes to its one place, masked rows add up in this
    program's partial.
    """
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = PREFIX + patches
    total = tl.zeros([BLOCK_D], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        image, token = row // tokens, row % tokens
        is_patch = token >= PREFIX
        in_rows = row < num_rows
        rank = tl.load(IDS + image * patches + token - PREFIX, mask=in_rows & is_patch, other=0)
        target = tl.where(is_patch, PREFIX + rank, token)
        visible = (rank >= 0) & (target < PREFIX + keep)
        wanted = in_rows[:, None] & (col < D)[None, :]
        grad = tl.load(GRAD + (row[:, None] * D + col[None, :]), mask=wanted, other=0.0)
        at = (image * (PREFIX + keep) + target) * D
        tl.store(
            DVISIBLE + (at[:, None] + col[None, :]),
            grad.to(DVISIBLE.dtype.element_ty),
            mask=wanted & visible[:, None],
        )
        total += tl.sum(tl.where(visible[:, None], 0.0, grad.to(tl.float32)), 0)
    tl.store(PARTIAL + tl.program_id(0) * D + col, total, mask=col < D)


# ---- launchers ----
# Programs of the backward: enough to fill every GPU in the table, few enough that their
# partial sums cost nothing
BACKWARD_PROGRAMS = 512


def _launch_restore(
    visible_BTD: Tensor,
    ids_restore_BL: Tensor,
    mask_token_D: Tensor,
    pos_embed_ND: Tensor,
    prefix: int,
) -> Tensor:
    if visible_BTD.stride(2) != 1:
        visible_BTD = visible_BTD.contiguous()
    others = (t.contiguous() for t in (ids_restore_BL, mask_token_D, pos_embed_ND))
    tensors = (visible_BTD, *others)
    (batch, patches), width = ids_restore_BL.shape, visible_BTD.shape[2]
    dtype = _result_dtype(visible_BTD, mask_token_D, pos_embed_ND)
    out_BND = torch.empty((batch, prefix + patches, width), dtype=dtype, device=visible_BTD.device)
    num_rows, block = batch * (prefix + patches), column_block(width)
    rows, warps = rows_per_program(visible_BTD.device, block)
    grid = (-(-num_rows // rows), -(-width // block))
    integers = (num_rows, patches, visible_BTD.shape[1] - prefix, *visible_BTD.stride()[:2])
    constants = {"PREFIX": prefix, "D": width, "BLOCK_D": block, "ROWS": rows, "num_warps": warps}
    launch(_restore_kernel, grid, out_BND, *tensors, out_BND, *integers, **constants)
    return out_BND


def _launch_restore_backward(
    grad_BND: Tensor,
    ids_restore_BL: Tensor,
    num_tokens: int,
    prefix: int,
    visible_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad_BND, ids_restore_BL = grad_BND.contiguous(), ids_restore_BL.contiguous()
    (batch, patches), width = ids_restore_BL.shape, grad_BND.shape[2]
    num_rows, block = batch * (prefix + patches), column_block(width)
    rows, warps = rows_per_program(grad_BND.device, block)
    steps = -(-num_rows // (rows * BACKWARD_PROGRAMS))
    programs = -(-num_rows // (rows * max(steps, 1)))
    shape, device = (batch, num_tokens, width), grad_BND.device
    dvisible_BTD = torch.empty(shape, dtype=visible_dtype, device=device)
    partial_SD = torch.empty((programs, width), dtype=torch.float32, device=device)
    grid = (programs, -(-width // block))
    integers = (num_rows, patches, num_tokens - prefix, steps)
    constants = {"PREFIX": prefix, "D": width, "BLOCK_D": block, "ROWS": rows, "num_warps": warps}
    tensors = (grad_BND, ids_restore_BL, dvisible_BTD, partial_SD)
    launch(_restore_backward_kernel, grid, grad_BND, *tensors, *integers, **constants)
    return dvisible_BTD, partial_SD.sum(0)


# ---- registration ----
@triton_op("mae_kernels::restore_tokens", mutates_args=())
def _restore_op(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, prefix: int
) -> Tensor:
    dtype = _result_dtype(visible, mask_token, pos_embed)
    if use_triton("restore_tokens", visible.device, dtype):
        return _launch_restore(visible, ids_restore, mask_token, pos_embed, prefix)
    return reference(visible, ids_restore, mask_token, pos_embed, prefix)


@triton_op("mae_kernels::restore_tokens_backward", mutates_args=())
def _restore_backward_op(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, prefix: int, visible_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of visible [B,p+K,D] and mask_token [D], which autograd casts."""
    if use_triton("restore_tokens", grad.device, grad.dtype):
        return _launch_restore_backward(grad, ids_restore, num_tokens, prefix, visible_dtype)
    keep, patches_BLD = num_tokens - prefix, grad[:, prefix:]
    places_BK = torch.argsort(ids_restore, dim=1)[:, :keep]
    at_BKD = places_BK[..., None].expand(-1, -1, grad.shape[2])
    dvisible = torch.cat([grad[:, :prefix], patches_BLD.gather(1, at_BKD)], 1)
    masked_BLD = torch.where((ids_restore >= keep)[..., None], patches_BLD, 0.0)
    return dvisible.to(visible_dtype), masked_BLD.sum((0, 1), dtype=accumulate_dtype(grad))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, ids_restore, _, _, ctx.prefix = inputs
    ctx.save_for_backward(ids_restore)
    ctx.num_tokens, ctx.dtype = visible.shape[1], visible.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (ids_restore,) = ctx.saved_tensors
    dvisible, dmask = _restore_backward_op(grad, ids_restore, ctx.num_tokens, ctx.prefix, ctx.dtype)
    # in fp32, or fp64; a plain sum, which a compiler fuses
    dpos = grad.sum(0, dtype=accumulate_dtype(grad)) if ctx.needs_input_grad[3] else None
    return dvisible, None, dmask, dpos, None


_restore_op.register_autograd(_backward, setup_context=_setup)


# ---- public ----
def restore_tokens(
    visible: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    *,
    prefix: int,
) -> Tensor:
    """out[b, p + l] = (visible token of patch l, or mask_token) + pos_embed[p + l].

    Args:
        visible: [B, p+K, D], prefix tokens first, then the visible tokens in the order of ids_keep.
        ids_restore: [B, L] int64, a permutation of 0..L-1 per image (Masking.ids_restore).
        mask_token: [D] or [1, 1, D].
        pos_embed: [p+L, D] or [1, p+L, D]; [B, p+L, D] for positions of each image, which plain
            torch adds; or None.
        prefix: p, the number of prefix tokens (0 or more).

    Returns: [B, p+L, D] in the widest of the three floating dtypes. Gradients reach visible,
    mask_token and pos_embed.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> ids_restore = torch.rand(8, 196).argsort(1)
        >>> visible, token, pos = torch.rand(8, 50, 512), torch.rand(512), torch.rand(197, 512)
        >>> restore_tokens(visible, ids_restore, token, pos, prefix=1).shape
        torch.Size([8, 197, 512])
    """
    floating = {"visible": visible, "mask_token": mask_token}
    if pos_embed is not None:
        floating["pos_embed"] = pos_embed
    for name, tensor in floating.items():
        check_floating(name, tensor)
        check_same_device(name, tensor, "visible", visible)
    check_shape("visible", visible, (None, None, None), "[B, p+K, D]")
    check_int("prefix", prefix, 0)
    batch, tokens, width = visible.shape
    listed = ids_restore.shape[-1] if isinstance(ids_restore, Tensor) else 0
    check_ids("ids_restore", ids_restore, batch, listed, distinct=True)
    check_same_device("ids_restore", ids_restore, "visible", visible)
    patches = ids_restore.shape[1]
    if not prefix <= tokens <= prefix + patches:
        raise ValueError(
            f"visible: got {tokens} tokens, "
            f"needs between prefix = {prefix} and prefix + L = {prefix + patches}"
        )
    if mask_token.dim() == 3 and mask_token.shape[:2] == (1, 1):
        mask_token = mask_token[0, 0]
    check_shape("mask_token", mask_token, (width,), "[D]")
    if pos_embed is None:
        pos_embed = visible.new_zeros(prefix + patches, width)
    if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed[0]
    if pos_embed.dim() == 3:
        check_shape("pos_embed", pos_embed, (batch, prefix + patches, width), "[B, p+L, D]")
        return restore_tokens(visible, ids_restore, mask_token, None, prefix=prefix) + pos_embed
    check_shape("pos_embed", pos_embed, (prefix + patches, width), "[p+L, D]")
    arguments = (visible, ids_restore, mask_token, pos_embed, prefix)
    return reference(*arguments) if wants_reference(visible) else _restore_op(*arguments)


# ---- samples ----
def _sample(size: Size, name: str, patches: int, keep: int, width: int, prefix: int) -> Sample:
    def make(draw: Draw) -> Made:
        tensors = {
            "visible": draw.normal(draw.batch, prefix + keep, width),
            "ids_restore": draw.ids(patches, patches),
            "mask_token": draw.normal(width),
            "pos_embed": draw.normal(prefix + patches, width),
        }
        return tensors, {"prefix": prefix}

    gradients = ("visible", "mask_token", "pos_embed")
    bad = {"ids_restore": patches}
    return Sample("restore_tokens", name, restore_tokens, make, gradients, size, out_of_range=bad)


@declares("restore_tokens")
def samples() -> list[Sample]:
    """Padded and whole blocks; MAE's decoders at 224."""
    return [
        _sample("small", "33", 35, 9, 33, 1),
        _sample("small", "192", 21, 5, 192, 0),
        _sample("model", "decoder 512", 196, 49, 512, 1),
        _sample("model", "decoder 192 without class token", 256, 64, 192, 0),
    ]
