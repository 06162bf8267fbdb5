"""Listed patches of images, as vectors and as embedded tokens.

    gather_patches: out[b, k] = flatten(patch ids[b, k] of image b), channel-major (channel, row,
                    column), which is the order of a flattened convolution weight [D, C, P, P]
    embed_patches:  out[b, k] = weight . gather[b, k] + bias + pos_embed[ids[b, k]]

Only the listed patches are read. The equivalent in facebookresearch/mae embeds all patches, adds
the positions and then gathers the visible ones; the result is the same.
Source: He et al., arXiv 2111.06377, section 3 (patch embedding); the order of the gather is this
package's.

On a GPU one kernel gathers, cuBLAS multiplies, one kernel adds the positions. For the backward only
ids and the images as they came are kept: the vectors are gathered again. The gradients of the
positions are a product with zeros and ones, so their sums have a fixed order. An image may list a
patch more than once: it gives as many equal tokens, and all their gradients reach weight and
position. A patch id out of range, which only debug_checks reports on a GPU, gives NaN and reads
nothing.

Shapes: B images, C channels, H x W pixels, P patch side, L patches (row-major over the grid), K
listed, D width, V = C*P*P values per patch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    check_floating,
    check_floating_dtype,
    check_ids,
    check_images,
    check_same_device,
    check_shape,
    check_vector,
)
from ._pixels import (
    Numbers,
    accumulate_dtype,
    kernel_stats,
    listed_pixels,
    pixel_stats,
    scale_pixels,
)
from ._runtime import (
    column_block,
    jit,
    launch,
    next_power_of_2,
    no_autocast,
    product_dtype,
    rows_per_program,
    tl,
    triton_op,
    use_triton,
    wants_reference,
)
from ._samples import CT_16, RGB_16, Case, Draw, Made, Sample, Size, declares


# ---- reference ----
def gather_reference(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    stats_4C: Tensor | None,
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    exact = torch.float64 if dtype == torch.float64 else accumulate_dtype(images_BCHW)
    # without statistics it is a copy: no arithmetic, so no wider dtype
    wide = dtype if stats_4C is None else exact
    return listed_pixels(images_BCHW, ids_BK, stats_4C, patch_size, "crp", wide).to(dtype)


def embed_reference(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    weight_DCPP: Tensor,
    bias_D: Tensor | None,
    pos_embed_LD: Tensor | None,
    stats_4C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    x_BKV = gather_reference(images_BCHW, ids_BK, stats_4C, weight_DCPP.shape[-1], dtype)
    tokens_BKD = _project(x_BKV, weight_DCPP, bias_D)
    return tokens_BKD if pos_embed_LD is None else tokens_BKD + pos_embed_LD[ids_BK]


def _project(x_BKV: Tensor, weight_DCPP: Tensor, bias_D: Tensor | None) -> Tensor:
    with no_autocast(x_BKV.device):
        bias = None if bias_D is None else bias_D.to(x_BKV.dtype)
        return torch.nn.functional.linear(x_BKV, weight_DCPP.flatten(1).to(x_BKV.dtype), bias)


# ---- kernels ----
@jit
def _gather_kernel(
    IMAGES, IDS, STATS, OUT, num_rows, listed, patches, grid_cols, stride_b, stride_c, stride_h,
    stride_w, P: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    HAS_STATS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value = tl.arange(0, BLOCK_V)
    in_rows = row < num_rows
    patch = tl.load(IDS + row, mask=in_rows, other=0)
    valid = (patch >= 0) & (patch < patches)
    channel = value // (P * P)
    corner = (row // listed) * stride_b + (patch // grid_cols) * P * stride_h
    corner += (patch % grid_cols) * P * stride_w
    inside = channel.to(tl.int64) * stride_c + (value // P % P).to(tl.int64) * stride_h
    inside += (value % P) * stride_w
    wanted = in_rows[:, None] & (value < V)[None, :]
    x = tl.load(IMAGES + (corner[:, None] + inside[None, :]), mask=wanted & valid[:, None], other=0)
    if HAS_STATS:
        # padding beyond V would have a channel beyond C
        C: tl.constexpr = V // (P * P)
        x = scale_pixels(x, STATS, tl.minimum(channel, C - 1)[None, :], C, HAS_STATS)
    x = tl.where(valid[:, None], x.to(OUT.dtype.element_ty), float("nan"))
    tl.store(OUT + (row[:, None] * V + value[None, :]), x.to(OUT.dtype.element_ty), mask=wanted)


@jit
def _add_positions_kernel(
    TOKENS, POS, IDS, OUT, num_rows, patches, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_rows = row < num_rows
    patch = tl.load(IDS + row, mask=in_rows, other=0)
    valid = (patch >= 0) & (patch < patches)
    wanted = in_rows[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    pos = tl.load(
        POS + (patch[:, None] * D + col[None, :]), mask=wanted & valid[:, None], other=float("nan")
    )
    out = tl.load(TOKENS + at, mask=wanted, other=0.0).to(tl.float32) + pos.to(tl.float32)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=wanted)


# ---- launchers ----
def _launch_gather(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    stats_4C: Tensor | None,
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    ids_BK = ids_BK.contiguous()
    stats, has_stats = kernel_stats(images_BCHW, stats_4C)
    batch, channels, height, width = images_BCHW.shape
    listed, values = ids_BK.shape[1], channels * patch_size * patch_size
    out_BKV = torch.empty((batch, listed, values), dtype=dtype, device=images_BCHW.device)
    grid_cols = width // patch_size
    patches = height // patch_size * grid_cols
    num_rows, block = batch * listed, next_power_of_2(values)
    rows, warps = rows_per_program(images_BCHW.device, block)
    args = (images_BCHW, ids_BK, stats, out_BKV, num_rows, listed, patches, grid_cols)
    constants = {"P": patch_size, "V": values, "BLOCK_V": block, "ROWS": rows}
    grid, strides = (-(-num_rows // rows),), images_BCHW.stride()
    constants |= {"HAS_STATS": has_stats, "num_warps": warps}
    launch(_gather_kernel, grid, out_BKV, *args, *strides, **constants)
    return out_BKV


def _launch_add_positions(
    tokens_BKD: Tensor, pos_embed_LD: Tensor, ids_BK: Tensor, dtype: torch.dtype
) -> Tensor:
    tokens_BKD = tokens_BKD.contiguous()
    pos_embed_LD = pos_embed_LD.contiguous()
    ids_BK = ids_BK.contiguous()
    width, num_rows = tokens_BKD.shape[2], ids_BK.shape[0] * ids_BK.shape[1]
    out_BKD = torch.empty(tokens_BKD.shape, dtype=dtype, device=tokens_BKD.device)
    block = column_block(width)
    rows, warps = rows_per_program(tokens_BKD.device, block)
    grid = (-(-num_rows // rows), -(-width // block))
    args = (tokens_BKD, pos_embed_LD, ids_BK, out_BKD, num_rows, pos_embed_LD.shape[0])
    constants = {"D": width, "BLOCK_D": block, "ROWS": rows, "num_warps": warps}
    launch(_add_positions_kernel, grid, out_BKD, *args, **constants)
    return out_BKD


# ---- registration ----
@triton_op("mae_kernels::gather_patches", mutates_args=())
def _gather_op(
    images: Tensor, ids: Tensor, stats: Tensor | None, patch_size: int, dtype: torch.dtype
) -> Tensor:
    triton = use_triton("gather_patches", images.device, images.dtype, dtype)
    gather = _launch_gather if triton else gather_reference
    return gather(images, ids, stats, patch_size, dtype)


@triton_op("mae_kernels::embed_patches", mutates_args=())
def _embed_op(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    stats: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    of_positions = dtype if pos_embed is None else pos_embed.dtype
    dtypes = (images.dtype, weight.dtype, of_positions, dtype)
    if not use_triton("embed_patches", images.device, *dtypes):
        return embed_reference(images, ids, weight, bias, pos_embed, stats, dtype)
    x_BKV = _launch_gather(images, ids, stats, weight.shape[-1], dtype)
    tokens_BKD = _project(x_BKV, weight, bias)
    if pos_embed is None:
        return tokens_BKD
    wider = torch.promote_types(dtype, pos_embed.dtype)
    return _launch_add_positions(tokens_BKD, pos_embed, ids, wider)


@triton_op("mae_kernels::embed_patches_backward", mutates_args=())
def _embed_backward_op(
    grad: Tensor,
    images: Tensor,
    ids: Tensor,
    stats: Tensor | None,
    patch_size: int,
    patches: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight [D,V], bias [D] and pos_embed [L,D], empty if not needed; autograd casts
    them.
    """
    triton = use_triton("embed_patches", images.device, images.dtype, grad.dtype, dtype)
    grad_ND = grad.reshape(-1, grad.shape[2])
    # outputs of a functional op must not share memory
    dweight, dbias, dpos = (grad.new_empty(0) for _ in range(3))
    if needs[0]:
        gather = _launch_gather if triton else gather_reference
        x_NV = gather(images, ids, stats, patch_size, dtype).flatten(0, 1)
        with no_autocast(grad.device):
            dweight = grad_ND.to(dtype).t() @ x_NV
    if needs[1]:
        dbias = grad_ND.sum(0, dtype=accumulate_dtype(grad))
    if needs[2]:
        # a product with zeros and ones sums in a fixed order; an id out of range selects nothing
        chosen_NL = ids.reshape(-1, 1) == torch.arange(patches, device=ids.device)
        with no_autocast(grad.device):
            dpos = chosen_NL.to(grad.dtype).t() @ grad_ND
    return dweight, dbias, dpos


def _embed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, weight, _, pos_embed, stats, ctx.dtype = inputs
    ctx.save_for_backward(images, ids, stats)
    ctx.weight_shape = weight.shape
    ctx.patches = 0 if pos_embed is None else pos_embed.shape[0]


def _embed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[2:5])
    sizes = (ctx.weight_shape[-1], ctx.patches)
    gradients = _embed_backward_op(grad, *ctx.saved_tensors, *sizes, ctx.dtype, needs)
    dweight, dbias, dpos = (g if need else None for g, need in zip(gradients, needs, strict=True))
    dweight = None if dweight is None else dweight.view(ctx.weight_shape)
    return None, None, dweight, dbias, dpos, None, None


_embed_op.register_autograd(_embed_backward, setup_context=_embed_setup)


# ---- public ----
def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    *,
    mean: Numbers = None,
    std: Numbers = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out[b, k] = pixels of patch ids[b, k] of image b as a vector, (channel, row, column).

    Args:
        images: [B, C, H, W] uint8 or floating point with any strides (a channels-last buffer needs
        no copy).
        ids: [B, K] int64 patch numbers, row-major over the (H/P, W/P) grid, in any order, repeats
        included.
        patch_size: P; H and W must be divisible by it.
        mean, std: a number or one per channel; applied to x / 255 for uint8
        images, to x itself for float images.
        dtype: of the result; default the images' dtype, or torch's default dtype for uint8.

    Returns: [B, K, C*P*P]. Float images that require a gradient get one; they take the plain torch
    path.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> images = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> gather_patches(images, torch.tensor([[3, 0]]), patch_size=2)
        tensor([[[10., 11., 14., 15.],
                 [ 0.,  1.,  4.,  5.]]])
    """
    grid_rows, grid_cols = check_images(images, patch_size)
    check_ids("ids", ids, images.shape[0], grid_rows * grid_cols)
    check_same_device("ids", ids, "images", images)
    stats = pixel_stats(images, mean, std)
    if dtype is None:
        dtype = torch.get_default_dtype() if images.dtype == torch.uint8 else images.dtype
    check_floating_dtype(dtype)
    if wants_reference(images) or images.requires_grad:
        return gather_reference(images, ids, stats, patch_size, dtype)
    return _gather_op(images, ids, stats, patch_size, dtype)


def embed_patches(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    *,
    mean: Numbers = None,
    std: Numbers = None,
) -> Tensor:
    """out[b, k] = weight . patch ids[b, k] + bias + pos_embed[ids[b, k]].

    The product is in the autocast dtype under autocast, else in the weight's.

    Args:
        images: [B, C, H, W] uint8 or floating point, any strides.
        ids: [B, K] int64 patch numbers, in any order, repeats included.
        weight: [D, C, P, P] the patch embedding convolution's weight.
        bias: [D] or None.
        pos_embed: [L, D], or [1, L, D], positions of the L patches (without a class token's row);
            [B, L, D] for positions of each image, which plain torch gathers and adds; or None.
        mean, std: as in gather_patches.

    Returns: [B, K, D] in the wider of the product's and pos_embed's dtypes, as `conv(x) +
    pos_embed` would be. Gradients reach weight, bias, pos_embed, and float images that require one
    (these take the plain torch path).

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
        >>> ids = torch.rand(8, 196).argsort(1)[:, :49]
        >>> weight, pos = torch.rand(768, 3, 16, 16), torch.rand(196, 768)
        >>> embed_patches(images, ids, weight, None, pos, mean=0.5, std=0.25).shape
        torch.Size([8, 49, 768])
    """
    check_floating("weight", weight)
    check_shape("weight", weight, (None, None, None, None), "[D, C, P, P]")
    width, channels, patch_size, cols = weight.shape
    if patch_size != cols:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, needs a square patch [D, C, P, P]"
        )
    grid_rows, grid_cols = check_images(images, patch_size)
    if images.shape[1] != channels:
        raise ValueError(
            f"images: got {images.shape[1]} channels, needs the weight's C = {channels}"
        )
    patches = grid_rows * grid_cols
    check_ids("ids", ids, images.shape[0], patches)
    for name, tensor in (("ids", ids), ("weight", weight)):
        check_same_device(name, tensor, "images", images)
    if pos_embed is not None:
        check_floating("pos_embed", pos_embed)
        check_same_device("pos_embed", pos_embed, "images", images)
        if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
            pos_embed = pos_embed[0]
        if pos_embed.dim() == 3:
            check_shape("pos_embed", pos_embed, (images.shape[0], patches, width), "[B, L, D]")
            positions = pos_embed.gather(1, ids[..., None].expand(-1, -1, width))
            tokens = embed_patches(images, ids, weight, bias, None, mean=mean, std=std)
            return tokens + positions
        check_shape("pos_embed", pos_embed, (patches, width), "[L, D]")
    check_vector("bias", bias, width, "[D]", "images", images)
    dtype = product_dtype(images.device, weight.dtype)
    stats = pixel_stats(images, mean, std)
    if wants_reference(images) or images.requires_grad:
        return embed_reference(images, ids, weight, bias, pos_embed, stats, dtype)
    return _embed_op(images, ids, weight, bias, pos_embed, stats, dtype)


# ---- samples ----
def _gather_sample(size: Size, name: str, case: Case, wide: bool = True) -> Sample:
    def make(draw: Draw) -> Made:
        ids = draw.ids(case.patches, max(1, case.patches // 4))
        options = case.stats | {"patch_size": case.patch, "dtype": draw.dtype}
        return {"images": case.images(draw), "ids": ids}, options

    call, bad = gather_patches, case.out_of_range
    return Sample("gather_patches", name, call, make, size=size, out_of_range=bad, wide=wide)


def _embed_sample(size: Size, name: str, case: Case, width: int, bias: bool = True) -> Sample:
    def make(draw: Draw) -> Made:
        images, ids = case.images(draw), draw.ids(case.patches, max(3, case.patches // 4))
        if size == "small":
            # a patch that is listed twice
            ids = torch.cat([ids, ids.narrow(1, 0, 1)], 1)
        shape = (width, case.channels, case.patch, case.patch)
        tensors = {
            "images": images,
            "ids": ids,
            "weight": draw.normal(*shape, scale=case.values**-0.5),
            "bias": draw.normal(width) if bias else None,
            "pos_embed": draw.normal(case.patches, width),
        }
        return tensors, case.stats

    gradients = ("weight", "bias", "pos_embed") if bias else ("weight", "pos_embed")
    call, bad = embed_patches, case.out_of_range
    return Sample("embed_patches", name, call, make, gradients, size, out_of_range=bad)


@declares("gather_patches", "embed_patches")
def samples() -> list[Sample]:
    """Padded and whole blocks, both layouts, grey and colour; ViT-S/16, B/16, L/16 and patch 14 at
    224.
    """
    nhwc_16 = Case(3, (224, 224), 16, "nhwc uint8")
    float_16 = Case(3, (224, 224), 16, "nhwc float")
    grey_8 = Case(1, (24, 40), 8, "nchw float")
    return [
        _gather_sample("small", "rgb", Case(3, (21, 35), 7)),
        _gather_sample("small", "nhwc float grey", Case(1, (12, 20), 4, "nhwc float")),
        _gather_sample("small", "rgb 8", Case(3, (24, 16), 8, "nhwc uint8")),
        _gather_sample("model", "rgb 16", RGB_16),
        _gather_sample("model", "rgb nhwc 16", nhwc_16),
        _gather_sample("model", "ct 16", CT_16),
        _gather_sample("model", "rgb 14", Case(3, (224, 224), 14), wide=False),
        _embed_sample("small", "nhwc 33", Case(3, (15, 25), 5, "nhwc uint8"), 33),
        _embed_sample("small", "grey 192", grey_8, 192, bias=False),
        _embed_sample("model", "S/16 ct", CT_16, 384),
        _embed_sample("model", "B/16", RGB_16, 768),
        _embed_sample("model", "B/16 nhwc", nhwc_16, 768, bias=False),
        _embed_sample("model", "L/16 nhwc float", float_16, 1024),
    ]
