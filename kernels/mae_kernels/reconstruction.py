"""Masked reconstruction loss against pixels that are read straight from the images.

    t = pixels of a patch as a vector, (row, column, channel)
    norm "patch":   t <- (t - mean(t)) / sqrt(var(t) + eps)   over the vector, unbiased variance
    norm "channel": the same for each channel of the patch separately
    norm None:      t as it is
    loss = mean over masked patches of mean over pixels of (pred - t)^2

Source: He et al., arXiv 2111.06377, section 3 and Table 1d ("w/ norm"); "patch" is
facebookresearch/mae's norm_pix_loss, "channel" is the variant of SD-MAE (arXiv 2203.16983).

On a GPU one kernel reads each masked patch and its prediction once; the losses of the patches are
then summed in a fixed order. The target is never written: the backward reads the pixels again and
writes the gradient of pred, nothing else. A patch id out of range, which only debug_checks reports
on a GPU, gives NaN and reads nothing.

Shapes: B images, C channels, P patch side, L patches, M masked patches, V = P*P*C values per patch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.library import triton_op

from ._checks import (
    check_choice,
    check_floating,
    check_ids,
    check_images,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from ._pixels import (
    Numbers,
    accumulate_dtype,
    kernel_stats,
    listed_pixels,
    pixel_stats,
    scale_pixels,
)
from ._runtime import MAX_TILE_WIDTH, jit, launch, next_power_of_2, tl, use_triton, wants_reference
from ._samples import CT_16, RGB_16, Case, Draw, Made, Sample, Size, declares

Norm = Literal["patch", "channel", None]
NORMS = get_args(Norm)
NORM_CODES = {"none": 0, "patch": 1, "channel": 2}
MAX_NORM_CHANNELS = 16


class Target(NamedTuple):
    """What predictions are compared with, as the ops take it: norm is "patch", "channel" or "none",
    stats is pixel_stats; of ids and mask one is None.
    """

    images: Tensor
    ids: Tensor | None
    mask: Tensor | None
    stats: Tensor | None
    patch_size: int
    norm: str
    eps: float


# ---- reference ----
def _target_pixels(target: Target, dtype: torch.dtype) -> Tensor:
    """[B,M,V] normalised target pixels (row, column, channel); every patch when ids is None."""
    images, side = target.images.detach(), target.patch_size
    t = listed_pixels(images, target.ids, target.stats, side, "rpc", dtype)
    if target.norm == "none":
        return t
    if target.norm == "channel":
        t = torch.unflatten(t, 2, (side * side, -1))
    t = t - t.mean(2, keepdim=True)
    var = t.square().sum(2, keepdim=True) / (t.shape[2] - 1)
    t = t / (var + target.eps).sqrt()
    return t.flatten(2) if target.norm == "channel" else t


def difference(pred_BMV: Tensor, target: Target) -> Tensor:
    """pred - target [B,M,V] in fp32, or fp64; zero for visible patches."""
    acc = accumulate_dtype(pred_BMV, target.images)
    d_BMV = pred_BMV.to(acc) - _target_pixels(target, acc)
    # where, not a product: an infinite prediction of a visible patch must turn neither loss nor
    # gradient into NaN
    return d_BMV if target.mask is None else torch.where(target.mask[..., None], d_BMV, 0.0)


def reference(pred_BMV: Tensor, target: Target) -> Tensor:
    d_BMV = difference(pred_BMV, target)
    if target.mask is None:
        return d_BMV.square().sum() / max(d_BMV.numel(), 1)
    return d_BMV.square().sum() / (target.mask.sum().clamp(min=1) * d_BMV.shape[2])


# ---- kernels ----
@jit
def masked_difference(
    PRED, IMAGES, SELECT, STATS, row, num_rows, listed, patches, grid_cols, pred_stride_b,
    pred_stride_m, stride_b, stride_c, stride_h, stride_w, C: tl.constexpr, P: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, NORM: tl.constexpr, HAS_MASK: tl.constexpr,
    WIDE: tl.constexpr, EPS: tl.constexpr, HAS_STATS: tl.constexpr,
):  # fmt: skip
    """pred - target of some rows, fp32 [ROWS, BLOCK_P, BLOCK_W]; zeros for visible patches and
    beyond the ends.

    A patch is P lines of P*C values: what a value of a line is (channel, column) is worked out once
    for all lines and rows. SELECT holds patch ids, or with HAS_MASK the mask. NORM: 0 none, 1
    patch, 2 channel. WIDE: a patch spans 2^31 elements.
    """
    PADDED: tl.constexpr = BLOCK_P != P or BLOCK_W != P * C
    line, place = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    channel = place % C
    real = ((line < P)[:, None] & (place < P * C)[None, :])[None, :, :]
    chosen = row < num_rows
    image, place_of_row = row // listed, row % listed
    if HAS_MASK:
        patch = place_of_row
        in_range = chosen
        chosen = chosen & (tl.load(SELECT + row, mask=chosen, other=0) != 0)
    else:
        patch_id = tl.load(SELECT + row, mask=chosen, other=0)
        in_range = (patch_id >= 0) & (patch_id < patches)
        patch = tl.where(in_range, patch_id, 0).to(tl.int32)
    corner = image.to(tl.int64) * stride_b + (patch // grid_cols * P).to(tl.int64) * stride_h
    corner += (patch % grid_cols * P).to(tl.int64) * stride_w
    if WIDE:
        line_at = line.to(tl.int64) * stride_h
        place_at = channel.to(tl.int64) * stride_c + (place // C).to(tl.int64) * stride_w
    else:
        line_at = line * stride_h
        place_at = channel * stride_c + place // C * stride_w
    pointers = (IMAGES + corner)[:, None, None] + (line_at[:, None] + place_at[None, :])[None, :, :]
    x = tl.load(pointers, mask=(chosen & in_range)[:, None, None] & real, other=0)
    x = scale_pixels(x, STATS, channel[None, None, :], C, HAS_STATS)
    if PADDED:
        x = tl.where(real, x, 0.0)
    # by row: the gradient and loss of a visible patch are exactly 0, those of an id out of range
    # NaN
    keep = tl.where(chosen, tl.where(in_range, 1.0, float("nan")), 0.0)
    if NORM == 0:
        x = tl.where(chosen[:, None, None], x, 0.0) + (keep - keep)[:, None, None]
    if NORM == 1:
        x = x - (sum_patch(x) / (P * P * C))[:, None, None]
        if PADDED:
            x = tl.where(real, x, 0.0)
        x = x * (keep / tl.sqrt(sum_patch(x * x) / (P * P * C - 1) + EPS))[:, None, None]
    if NORM == 2:
        for c in tl.static_range(C):
            own = real & (channel == c)[None, None, :]
            x = tl.where(own, x - (sum_patch(tl.where(own, x, 0.0)) / (P * P))[:, None, None], x)
            variance = sum_patch(tl.where(own, x * x, 0.0)) / (P * P - 1)
            x = tl.where(own, x * (keep / tl.sqrt(variance + EPS))[:, None, None], x)
    at = image.to(tl.int64) * pred_stride_b + place_of_row.to(tl.int64) * pred_stride_m
    inside = line[:, None] * (P * C) + place[None, :]
    pred = tl.load(
        (PRED + at)[:, None, None] + inside[None, :, :],
        mask=chosen[:, None, None] & real,
        other=0.0,
    )
    return pred.to(tl.float32) - x


@jit
def sum_patch(x):
    """[ROWS]: the sum of each row of [ROWS, BLOCK_P, BLOCK_W]."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]]), 1)


@jit
def _loss_kernel(
    PRED, IMAGES, SELECT, STATS, LOSSES, num_rows, listed, patches, grid_cols, pred_stride_b,
    pred_stride_m, stride_b, stride_c, stride_h, stride_w, C: tl.constexpr, P: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    HAS_MASK: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr, HAS_STATS: tl.constexpr,
):  # fmt: skip
    """LOSSES[row] = mean squared difference of the patch; 0 for a visible one."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = masked_difference(
        PRED, IMAGES, SELECT, STATS, row, num_rows, listed, patches, grid_cols, pred_stride_b,
        pred_stride_m, stride_b, stride_c, stride_h, stride_w, C, P, BLOCK_P, BLOCK_W, NORM,
        HAS_MASK, WIDE, EPS, HAS_STATS,
    )  # fmt: skip
    tl.store(LOSSES + row, sum_patch(d * d) / (P * P * C), mask=row < num_rows)


@jit
def _loss_backward_kernel(
    GRAD, COUNT, PRED, IMAGES, SELECT, STATS, DPRED, num_rows, listed, patches, grid_cols,
    pred_stride_b, pred_stride_m, stride_b, stride_c, stride_h, stride_w, C: tl.constexpr,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, HAS_MASK: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr,
    HAS_STATS: tl.constexpr,
):  # fmt: skip
    """DPRED = GRAD * 2 (pred - target) / (V * number of masked patches); the target is read from
    the images again.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = masked_difference(
        PRED, IMAGES, SELECT, STATS, row, num_rows, listed, patches, grid_cols, pred_stride_b,
        pred_stride_m, stride_b, stride_c, stride_h, stride_w, C, P, BLOCK_P, BLOCK_W, NORM,
        HAS_MASK, WIDE, EPS, HAS_STATS,
    )  # fmt: skip
    factor = tl.load(GRAD) * (2.0 / (P * P * C)) / tl.load(COUNT)
    store_gradient(DPRED, d * factor, row, num_rows, C, P, BLOCK_P, BLOCK_W)


@jit
def store_gradient(
    DPRED, d, row, num_rows, C: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rows of [ROWS, BLOCK_P, BLOCK_W] to the contiguous DPRED [B,M,V]."""
    line, place = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    real = (line < P)[:, None] & (place < P * C)[None, :]
    inside = line[:, None] * (P * C) + place[None, :]
    pointers = (DPRED + row.to(tl.int64) * (P * P * C))[:, None, None] + inside[None, :, :]
    tl.store(
        pointers,
        d.to(DPRED.dtype.element_ty),
        mask=(row < num_rows)[:, None, None] & real[None, :, :],
    )


# ---- launchers ----
def kernel_arguments(
    pred_BMV: Tensor, target: Target
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """(pred, images, select, stats), the integers, and the constants of the kernels above,
    num_warps included.
    """
    images, side = target.images, target.patch_size
    stats, has_stats = kernel_stats(images, target.stats)
    channels, height, width = images.shape[1:]
    grid_cols = width // side
    patches = height // side * grid_cols
    if pred_BMV.stride(2) != 1:
        pred_BMV = pred_BMV.contiguous()
    select = target.mask if target.ids is None else target.ids
    assert select is not None
    batch, listed = pred_BMV.shape[:2]
    block_p, block_w = tile_of(side, channels)
    rows, warps = rows_per_program(pred_BMV.device, block_p * block_w)
    if target.norm == "channel":
        # one channel at a time needs more registers: half as many values a thread
        rows, warps = (rows // 2, warps) if rows > 1 else (1, min(2 * warps, 16))
    _, stride_c, stride_h, stride_w = images.stride()
    span = (channels - 1) * stride_c + (side - 1) * (stride_h + stride_w)
    sizes = (batch * listed, listed, patches, grid_cols)
    constants: dict[str, Any] = {"C": channels, "P": side, "BLOCK_P": block_p, "BLOCK_W": block_w}
    constants |= {"ROWS": rows, "NORM": NORM_CODES[target.norm], "HAS_MASK": target.ids is None}
    constants |= {"WIDE": span >= 2**31, "EPS": target.eps, "HAS_STATS": has_stats}
    constants |= {"num_warps": warps}
    tensors = (pred_BMV, images, select.contiguous(), stats)
    return tensors, (*sizes, *pred_BMV.stride()[:2], *images.stride()), constants


def tile_of(patch_size: int, channels: int) -> tuple[int, int]:
    """Lines and values of a line that the kernels hold of a patch: powers of two."""
    return next_power_of_2(patch_size), next_power_of_2(patch_size * channels)


VALUES_PER_WARP = 1024


def rows_per_program(device: torch.device, width: int) -> tuple[int, int]:
    """Patches of `width` values (padding counts) that one program handles, and its warps.

    32 values a thread share what a thread works out about its columns, and up to 1024 values need
    no barrier: by the instructions counted for sm_90, 55 % of those of 16 values a thread in four
    warps.
    """
    return max(1, VALUES_PER_WARP // width), max(1, min(width // VALUES_PER_WARP, 16))


def finish(losses_BM: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean over the masked patches of their losses, and their number as fp32; both scalars on the
    device.
    """
    if mask_BL is None:
        count = losses_BM.new_full((), max(losses_BM.shape[0] * losses_BM.shape[1], 1))
    else:
        count = mask_BL.sum().clamp(min=1).to(losses_BM.dtype)
    return losses_BM.sum() / count, count


def launch_loss_rows(pred_BMV: Tensor, target: Target) -> Tensor:
    """The loss of each patch, fp32 [B,M]."""
    tensors, integers, constants = kernel_arguments(pred_BMV, target)
    losses_BM = torch.empty(pred_BMV.shape[:2], dtype=torch.float32, device=pred_BMV.device)
    grid = (-(-integers[0] // constants["ROWS"]),)
    launch(_loss_kernel, grid, losses_BM, *tensors, losses_BM, *integers, **constants)
    return losses_BM


def launch_loss_backward(grad: Tensor, count: Tensor, pred_BMV: Tensor, target: Target) -> Tensor:
    tensors, integers, constants = kernel_arguments(pred_BMV, target)
    dpred_BMV = torch.empty(pred_BMV.shape, dtype=pred_BMV.dtype, device=pred_BMV.device)
    grid = (-(-integers[0] // constants["ROWS"]),)
    arguments = (grad, count, *tensors, dpred_BMV, *integers)
    launch(_loss_backward_kernel, grid, dpred_BMV, *arguments, **constants)
    return dpred_BMV


# ---- registration ----
def refusal(values: int, channels: int, norm: str) -> str | None:
    """Why the kernels cannot take patches of so many values and channels; None when they can."""
    lines, places = tile_of(math.isqrt(values // channels), channels)
    if lines * places > MAX_TILE_WIDTH:
        return (
            f"a patch has {values} values, {lines * places} with padding, "
            f"and the kernel holds at most {MAX_TILE_WIDTH}"
        )
    if norm == "channel" and channels > MAX_NORM_CHANNELS:
        return f"norm 'channel' is compiled for up to {MAX_NORM_CHANNELS} channels"
    return None


def _use_triton(pred: Tensor, images: Tensor, norm: str) -> bool:
    op, refused = "masked_reconstruction_loss", refusal(pred.shape[2], images.shape[1], norm)
    return use_triton(op, pred.device, pred.dtype, images.dtype, refused=refused)


@triton_op("mae_kernels::masked_reconstruction_loss", mutates_args=())
def _loss_op(
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    stats: Tensor | None,
    patch_size: int,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(loss, number of masked patches), both scalars."""
    target = Target(images, ids, mask, stats, patch_size, norm, eps)
    if _use_triton(pred, images, norm):
        return finish(launch_loss_rows(pred, target), mask)
    return finish(difference(pred, target).square().mean(2), mask)


@triton_op("mae_kernels::masked_reconstruction_loss_backward", mutates_args=())
def _loss_backward_op(
    grad: Tensor,
    count: Tensor,
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    stats: Tensor | None,
    patch_size: int,
    norm: str,
    eps: float,
) -> Tensor:
    target = Target(images, ids, mask, stats, patch_size, norm, eps)
    if _use_triton(pred, images, norm):
        return launch_loss_backward(grad, count, pred, target)
    d_BMV = difference(pred, target)
    return (d_BMV * (grad * 2 / (count * d_BMV.shape[2]))).to(pred.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.patch_size, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    options = (ctx.patch_size, ctx.norm, ctx.eps)
    return _loss_backward_op(grad, *ctx.saved_tensors, *options), *[None] * 7


_loss_op.register_autograd(_backward, setup_context=_setup)


# ---- public ----
def masked_reconstruction_loss(
    pred: Tensor,
    images: Tensor,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    patch_size: int,
    norm: Norm = "patch",
    eps: float = 1e-6,
    mean: Numbers = None,
    std: Numbers = None,
) -> Tensor:
    """mean((pred - target)^2) over the pixels of the masked patches, with target = normalised
    pixels.

    Args:
        pred: [B, M, V] predictions for the patches in `ids`, or [B, L, V] for all patches together
            with `mask`; each vector is (row, column, channel), V = P*P*C.
        images: [B, C, H, W] uint8 or floating point, any strides. They are the target: no gradient
        reaches them.
        ids: [B, M] int64, the masked patches (Masking.ids_masked). Exactly one of ids and mask is
        needed.
        mask: [B, L] bool, True = masked (Masking.mask).
        patch_size: P.
        norm: "patch", "channel" or None.
        eps: added to the variance, inside the root.
        mean, std: a number or one per channel, also as a tensor; applied to x / 255 for uint8
            images, to x itself for float images.

    Returns: scalar fp32 (fp64 when pred or images is fp64); 0 when no patch is masked. The gradient
    reaches pred.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> images, masking = torch.rand(8, 3, 224, 224), random_masking(torch.rand(8, 196), 49)
        >>> pred = torch.rand(8, 147, 16 * 16 * 3)
        >>> loss = masked_reconstruction_loss(pred, images, ids=masking.ids_masked, patch_size=16)
    """
    check_floating("pred", pred)
    target = check_target(images, ids, mask, patch_size, norm, eps, mean, std)
    check_predictions(pred, target)
    return reference(pred, target) if wants_reference(pred) else _loss_op(pred, *target)[0]


def check_target(
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    patch_size: int,
    norm: str | None,
    eps: float,
    mean: Numbers,
    std: Numbers,
) -> Target:
    """The checks of every op with a reconstruction loss."""
    grid_rows, grid_cols = check_images(images, patch_size)
    check_choice("norm", norm, NORMS)
    check_positive("eps", eps)
    batch, channels = images.shape[:2]
    values = patch_size * patch_size * (channels if norm == "patch" else 1)
    if norm is not None and values < 2:
        raise ValueError(
            f"norm: got {norm!r} over 1 value, needs at least 2 for a variance "
            f"(patch_size, channels)"
        )
    if (ids is None) == (mask is None):
        got = "neither" if ids is None else "both"
        raise ValueError(f"ids, mask: got {got}, needs exactly one of them")
    if ids is not None:
        check_ids("ids", ids, batch, grid_rows * grid_cols)
        check_same_device("ids", ids, "images", images)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: got dtype {mask.dtype}, needs torch.bool with True = masked "
                "(use mask.bool())"
            )
        check_shape("mask", mask, (batch, grid_rows * grid_cols), "[B, L]")
        check_same_device("mask", mask, "images", images)
    stats = pixel_stats(images, mean, std)
    return Target(images, ids, mask, stats, patch_size, norm or "none", float(eps))


def check_predictions(pred: Tensor, target: Target) -> None:
    select = target.mask if target.ids is None else target.ids
    assert select is not None
    meaning = "[B, L, P*P*C]" if target.ids is None else "[B, M, P*P*C]"
    batch, channels = target.images.shape[:2]
    values = target.patch_size**2 * channels
    check_shape("pred", pred, (batch, select.shape[1], values), meaning)
    check_same_device("images", target.images, "pred", pred)


# ---- samples ----
def _sample(size: Size, norm: Norm, case: Case, wide: bool = True) -> Sample:
    def make(draw: Draw) -> Made:
        tensors, options, listed = case.target(draw)
        tensors["pred"] = draw.normal(draw.batch, listed, case.values)
        return tensors, options | {"norm": norm}

    op, bad = "masked_reconstruction_loss", case.out_of_range
    color = "ct" if case.channels == 1 else "rgb"
    name = f"{norm} {color} {case.patch} {case.layout} {case.select}"
    call = masked_reconstruction_loss
    return Sample(op, name, call, make, ("pred",), size, wide=wide, out_of_range=bad)


@declares("masked_reconstruction_loss")
def samples() -> list[Sample]:
    """Every norm, layout and selection, padded and whole tiles; ViT/16 and patch 14 at 224."""
    return [
        _sample("small", "patch", Case(3, (21, 35), 7)),
        _sample("small", "channel", Case(3, (24, 40), 8, "nhwc uint8")),
        _sample("small", None, Case(1, (15, 25), 5, "nchw float", "mask")),
        _sample("small", "patch", Case(1, (16, 8), 4, "nhwc float", "mask")),
        _sample("model", "patch", RGB_16),
        _sample("model", "patch", CT_16),
        _sample("model", "channel", Case(3, (224, 224), 16, "nhwc uint8")),
        _sample("model", None, Case(3, (224, 224), 16, "nhwc float", "mask")),
        _sample("model", "patch", Case(3, (224, 224), 14), wide=False),
    ]
