"""Masked reconstruction loss against pixels that are read straight from the images.

    t = pixels of a patch as a vector, (row, column, channel)
    norm "patch":   t <- (t - mean(t)) / sqrt(var(t) + eps)   over the vector, unbiased variance
    norm "channel": the same for each channel of the patch separately
    norm "channel_std": for each channel (t - mean(t)) / (sqrt(var(t)) + eps)
    norm None:      t as it is
    patch loss = mean over pixels of (pred - t)^2
    loss = mean over masked patches, or sum(weight * patch loss) / sum(weight)

Source: He et al., arXiv 2111.06377, section 3 and Table 1d ("w/ norm"); "patch" is
facebookresearch/mae's norm_pix_loss, "channel" is the variant of SD-MAE (arXiv 2203.16983).
"channel_std" is what the code of SD-MAE, MAE-pytorch and VideoMAE computes: it differs from
"channel" for patches of a small variance.

On a GPU one kernel reads each masked patch and its prediction once, and a small one adds up the
losses of the patches in a fixed order. The target is never written: the backward reads the pixels
again and writes the gradient of pred, nothing else. A patch id out of range, which only
debug_checks reports on a GPU, gives NaN and reads nothing.

Shapes: B images, C channels, P patch side, L patches, M masked patches, V = P*P*C values per patch.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ._checks import (
    check_choice,
    check_dtype,
    check_floating,
    check_ids,
    check_images,
    check_int,
    check_positive,
    check_same_device,
    check_shape,
)
from ._loss_kernels import (
    Scalars,
    Target,
    launch_losses,
    launch_losses_backward,
    launch_sums,
    target_refusal,
)
from ._pixels import Numbers, accumulate_dtype, listed_pixels, pixel_stats
from ._runtime import flat, triton_op, use_triton, wants_reference
from ._samples import CT_16, RGB_16, Case, Draw, Made, Sample, Size, declares

Norm = Literal["patch", "channel", "channel_std", None]
NORMS = get_args(Norm)
PixelLoss = Literal["mse", "l1", "smooth_l1"]
PIXEL_LOSSES = get_args(PixelLoss)
Reduction = Literal["mean", "none"]
REDUCTIONS = get_args(Reduction)


# ---- reference ----
def _target_pixels(target: Target, dtype: torch.dtype) -> Tensor:
    """[B,M,V] normalised target pixels (row, column, channel); every patch when ids is None."""
    images, side = target.images.detach(), target.patch_size
    t = listed_pixels(images, target.ids, target.stats, side, "rpc", dtype)
    if target.norm == "none":
        return t
    if target.norm != "patch":
        t = torch.unflatten(t, 2, (side * side, -1))
    t = t - t.mean(2, keepdim=True)
    var = t.square().sum(2, keepdim=True) / (t.shape[2] - 1)
    if target.norm == "channel_std":
        t = t / (var.sqrt() + target.eps)
    else:
        t = t / (var + target.eps).sqrt()
    return t if target.norm == "patch" else t.flatten(2)


def difference(pred_BMV: Tensor, target: Target) -> Tensor:
    """pred - target [B,M,V] in fp32, or fp64; zero for visible patches."""
    acc = accumulate_dtype(pred_BMV, target.images)
    d_BMV = pred_BMV.to(acc) - _target_pixels(target, acc)
    # where, not a product: an infinite prediction of a visible patch must turn neither loss nor
    # gradient into NaN
    return d_BMV if target.mask is None else torch.where(target.mask[..., None], d_BMV, 0.0)


def plain_patch_losses(
    pred_BMV: Tensor, target: Target, loss: str, valid_BCHW: Tensor | None
) -> Tensor:
    """[B,M] in plain torch: the mean over the valid pixels of each patch; 0 where there is none."""
    d_BMV = difference(pred_BMV, target)
    if loss == "mse":
        each_BMV = d_BMV.square()
    elif loss == "l1":
        each_BMV = d_BMV.abs()
    else:
        each_BMV = functional.smooth_l1_loss(d_BMV, torch.zeros_like(d_BMV), reduction="none")
    if valid_BCHW is None:
        return each_BMV.mean(2)
    valid_BCHW = valid_BCHW.expand(target.images.shape)
    v_BMV = listed_pixels(valid_BCHW, target.ids, None, target.patch_size, "rpc", d_BMV.dtype)
    return (each_BMV * v_BMV).sum(2) / v_BMV.sum(2).clamp(min=1)


def reference(pred_BMV: Tensor, target: Target) -> Tensor:
    d_BMV = difference(pred_BMV, target)
    if target.mask is None:
        return d_BMV.square().sum() / max(d_BMV.numel(), 1)
    return d_BMV.square().sum() / (target.mask.sum().clamp(min=1) * d_BMV.shape[2])


def finish(losses_BM: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean over the masked patches of their losses, and their number as fp32; both scalars on the
    device.
    """
    if mask_BL is None:
        count = losses_BM.new_full((), max(losses_BM.shape[0] * losses_BM.shape[1], 1))
    else:
        count = mask_BL.sum().clamp(min=1).to(losses_BM.dtype)
    return losses_BM.sum() / count, count


# ---- registration ----
def _use_triton(pred: Tensor, target: Target) -> bool:
    op, dtypes = "masked_reconstruction_loss", (pred.dtype, target.images.dtype)
    return use_triton(op, pred.device, *dtypes, refused=target_refusal(target))


@triton_op("mae_kernels::masked_reconstruction_loss", mutates_args=())
@flat
def _loss_op(pred: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """(loss, number of masked patches), both scalars."""
    if _use_triton(pred, target):
        sums = launch_sums(launch_losses(pred, target)[0], target.mask)
        return sums[1], sums[4]
    return finish(difference(pred, target).square().mean(2), target.mask)


@triton_op("mae_kernels::masked_reconstruction_loss_backward", mutates_args=())
@flat
def _loss_backward_op(grad: Tensor, count: Tensor, pred: Tensor, target: Target) -> Tensor:
    if _use_triton(pred, target):
        return launch_losses_backward(Scalars(None, grad, None, count), pred, target)[0]
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


@triton_op("mae_kernels::patch_losses", mutates_args=())
@flat
def _patch_losses_op(pred: Tensor, target: Target) -> Tensor:
    """[B,M]: the loss of each patch; 0 for a visible one."""
    if _use_triton(pred, target):
        return launch_losses(pred, target)[0]
    return difference(pred, target).square().mean(2)


@triton_op("mae_kernels::patch_losses_backward", mutates_args=())
@flat
def _patch_losses_backward_op(grad: Tensor, pred: Tensor, target: Target) -> Tensor:
    if _use_triton(pred, target):
        scalars = Scalars(None, None, None, grad)
        return launch_losses_backward(scalars, pred, target, factors_BM=grad)[0]
    d_BMV = difference(pred, target)
    return (d_BMV * (grad * 2 / d_BMV.shape[2])[..., None]).to(pred.dtype)


def _patch_losses_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.patch_size, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _patch_losses_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    options = (ctx.patch_size, ctx.norm, ctx.eps)
    return _patch_losses_backward_op(grad, *ctx.saved_tensors, *options), *[None] * 7


_patch_losses_op.register_autograd(_patch_losses_backward, setup_context=_patch_losses_setup)


# ---- public ----
def masked_reconstruction_loss(
    pred: Tensor,
    images: Tensor,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    patch_size: int | None = None,
    norm: Norm = "patch",
    eps: float = 1e-6,
    mean: Numbers = None,
    std: Numbers = None,
    loss: PixelLoss = "mse",
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean of (pred - target)^2 over the pixels of the masked patches, with target = normalised
    pixels.

    Args:
        pred: [B, M, V] predictions for the patches in `ids`, or [B, L, V] for all patches together
            with `mask` or `weights`; each vector is (row, column, channel), V = P*P*C.
        images: [B, C, H, W] uint8 or floating point, any strides; or targets that are patches
            already, [B, L, V] floating point in the order of pred: features, or patches of volumes,
            signals or rectangles. They are the target: no gradient reaches them.
        ids: [B, M] int64, the masked patches (Masking.ids_masked). At most one of ids and mask; one
            of ids, mask and weights is needed.
        mask: [B, L] bool, True = masked (Masking.mask).
        weights: floating point, of each patch: [B, M] with ids, else [B, L]. The loss is
            sum(weights * patch losses) / sum(weights), and 0 if that sum is 0. Gradients reach the
            weights; a patch with weight 0 is read only for these.
        patch_size: P, for images; None for patches.
        norm: "patch", "channel", "channel_std" or None. The channel norms need images.
        eps: added to the variance, inside the root; for "channel_std" to the deviation.
        mean, std: a number or one per channel; applied to x / 255 for uint8
            images, to x itself for float images.
        loss: "mse", or "l1" or "smooth_l1" of the difference, in plain torch.
        valid: [B, 1, H, W] or [B, C, H, W] bool, True = the pixel counts, in plain torch: a patch's
            loss is the mean over its valid pixels. The normalisation of the target uses all pixels.
        reduction: "mean", or "none" for the loss of each patch, [B, M] or [B, L] (0 where masked
            out, times its weight).

    Returns: scalar fp32 (fp64 when pred or images is fp64), or the losses of the patches; 0 when no
    patch is masked. The gradient reaches pred.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> images, masking = torch.rand(8, 3, 224, 224), random_masking(torch.rand(8, 196), 49)
        >>> pred = torch.rand(8, 147, 16 * 16 * 3)
        >>> loss = masked_reconstruction_loss(pred, images, ids=masking.ids_masked, patch_size=16)
    """
    check_floating("pred", pred)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("loss", loss, PIXEL_LOSSES)
    if isinstance(images, Tensor) and images.dim() == 3:
        images = _as_images(images, patch_size, norm, mean, std)
        patch_size = 1
    if weights is not None:
        check_floating("weights", weights)
        check_same_device("weights", weights, "pred", pred)
        check_shape("weights", weights, pred.shape[:2], "[B, M] or [B, L]")
        if ids is None and mask is None:
            # the gradient of a weight of 0 needs the loss of its patch
            mask = (weights != 0) | weights.requires_grad
    target = check_target(images, ids, mask, patch_size, norm, eps, mean, std)
    check_predictions(pred, target)
    plain = loss != "mse" or valid is not None
    if valid is not None:
        check_dtype("valid", valid, torch.bool)
        check_same_device("valid", valid, "images", images)
        batch, channels, *size = images.shape
        shown = 1 if valid.dim() == 4 and valid.shape[1] == 1 else channels
        check_shape("valid", valid, (batch, shown, *size), "[B, 1 or C, H, W]")
    if weights is None and reduction == "mean" and not plain:
        return reference(pred, target) if wants_reference(pred) else _loss_op(pred, *target)[0]
    if plain or wants_reference(pred):
        if plain:
            refused = "its kernels compute loss 'mse' over all pixels of a patch"
            use_triton("masked_reconstruction_loss", pred.device, refused=refused)
        losses_BM = plain_patch_losses(pred, target, loss, valid)
    else:
        losses_BM = _patch_losses_op(pred, *target)
    if weights is None and reduction == "none":
        return losses_BM
    weights = torch.ones_like(losses_BM) if weights is None else weights.to(losses_BM.dtype)
    losses_BM = losses_BM * weights
    if reduction == "none":
        return losses_BM
    total = (weights if mask is None else torch.where(mask, weights, 0.0)).sum()
    return losses_BM.sum() / torch.where(total == 0, 1.0, total)


def _as_images(
    patches_BLV: Tensor, patch_size: int | None, norm: Norm, mean: Numbers, std: Numbers
) -> Tensor:
    """Patches as a view: images [B,V,L,1] of V channels, cut into patches of one pixel."""
    check_floating("images", patches_BLV)
    options = {"patch_size": patch_size, "mean": mean, "std": std}
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r}, needs None for targets [B, L, V]")
    if norm not in ("patch", None):
        raise ValueError(f"norm: got {norm!r}, needs 'patch' or None for targets [B, L, V]")
    return patches_BLV.transpose(1, 2)[..., None]


def check_target(
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    patch_size: int | None,
    norm: str | None,
    eps: float,
    mean: Numbers,
    std: Numbers,
) -> Target:
    """The checks of every op with a reconstruction loss."""
    check_int("patch_size", patch_size, 1)
    assert patch_size is not None
    grid_rows, grid_cols = check_images(images, patch_size)
    check_choice("norm", norm, NORMS)
    check_positive("eps", eps)
    (batch, channels), patches = images.shape[:2], grid_rows * grid_cols
    if norm is not None and patch_size * patch_size * (channels if norm == "patch" else 1) < 2:
        needs = "needs at least 2 for a variance (patch_size, channels)"
        raise ValueError(f"norm: got {norm!r} over 1 value, {needs}")
    if (ids is None) == (mask is None):
        got = "neither" if ids is None else "both"
        raise ValueError(f"ids, mask: got {got}, needs exactly one of them")
    if ids is not None:
        check_ids("ids", ids, batch, patches)
        check_same_device("ids", ids, "images", images)
    if mask is not None:
        check_dtype("mask", mask, torch.bool, " with True = masked (use mask.bool())")
        check_shape("mask", mask, (batch, patches), "[B, L]")
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
def _sample(size: Size, norm: Norm, case: Case, wide: bool = True, **extra: Any) -> Sample:
    def make(draw: Draw) -> Made:
        tensors, options, listed = case.target(draw)
        tensors["pred"] = draw.normal(draw.batch, listed, case.values)
        return tensors, options | {"norm": norm} | extra

    color = "ct" if case.channels == 1 else "rgb"
    name = f"{norm} {color} {case.patch} {case.layout} {case.select}"
    more: dict[str, Any] = {"wide": wide, "out_of_range": case.out_of_range}
    op = masked_reconstruction_loss
    return Sample(op.__name__, name, op, make, ("pred",), size, **more)


@declares("masked_reconstruction_loss")
def samples() -> list[Sample]:
    """Every norm, layout and selection, padded and whole tiles; ViT/16 and patch 14 at 224."""
    return [
        _sample("small", "patch", Case(3, (21, 35), 7)),
        _sample("small", "channel", Case(3, (24, 40), 8, "nhwc uint8")),
        _sample("small", None, Case(1, (15, 25), 5, "nchw float", "mask")),
        _sample("small", "patch", Case(1, (16, 8), 4, "nhwc float", "mask")),
        _sample("small", "channel_std", Case(3, (24, 16), 8), reduction="none"),
        _sample("model", "patch", RGB_16),
        _sample("model", "patch", CT_16),
        _sample("model", "channel", Case(3, (224, 224), 16)),
        # three interleaved channels: no 16 bytes in a row are of one channel
        _sample("model", "channel", Case(3, (224, 224), 16, "nhwc uint8"), wide=False),
        _sample("model", None, Case(3, (224, 224), 16, "nhwc float", "mask"), wide=False),
        _sample("model", "patch", Case(3, (224, 224), 14), wide=False),
    ]
