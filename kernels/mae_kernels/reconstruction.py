"""Masked reconstruction loss against pixels that are read straight from the images.

    t = pixels of a patch as a vector, (row, column, channel)
    norm "patch":   t <- (t - mean(t)) / sqrt(var(t) + eps)   over the whole vector, unbiased variance
    norm "channel": the same for each channel of the patch separately
    norm None:      t as it is
    loss = mean over masked patches of mean over pixels of (pred - t)^2

Source: He et al., arXiv 2111.06377, section 3 and Table 1d ("w/ norm"); "patch" is facebookresearch/mae's
norm_pix_loss, "channel" is the variant of SD-MAE (arXiv 2203.16983).

Pixels: uint8 images are used as x / 255, then (x - mean) / std where mean or std is given; float images are used as
they are, then (x - mean) / std where mean or std is given.

Shapes: B images, C channels, P patch side, L patches, M masked patches, V = P*P*C values per patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import (
    check_channel_stats,
    check_choice,
    check_floating,
    check_ids,
    check_images,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from ._pixels import accumulate_dtype, listed_pixels
from ._runtime import use_triton

Numbers = float | Sequence[float] | None
NORMS = ("patch", "channel", None)


def masked_reconstruction_loss(
    pred: Tensor,
    images: Tensor,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    patch_size: int,
    norm: str | None = "patch",
    eps: float = 1e-6,
    mean: Numbers = None,
    std: Numbers = None,
) -> Tensor:
    """Mean squared error between predicted and true pixels of the masked patches.

    Args:
        pred: [B, M, V] predictions for the patches in `ids`, or [B, L, V] for all patches together with `mask`; each
            vector is (row, column, channel), V = P*P*C.
        images: [B, C, H, W] uint8 or floating point, any strides. They are the target: no gradient reaches them.
        ids: [B, M] int64, the masked patches (Masking.ids_masked). Exactly one of ids and mask is needed.
        mask: [B, L] bool, True = masked (Masking.mask).
        patch_size: P.
        norm: "patch", "channel" or None.
        eps: added to the variance, inside the root.
        mean, std: a number, or one per channel; applied to x / 255 for uint8 images, to x itself for float images.

    Returns: scalar fp32 (fp64 when pred or images is fp64); 0 when no patch is masked. The gradient reaches pred.

    Raises: TypeError or ValueError naming the argument.
    """
    options = check_reconstruction(pred, images, ids, mask, patch_size, norm, eps, mean, std)
    use_triton("masked_reconstruction_loss", pred.device)
    return reference(pred, images, ids, mask, patch_size, norm, eps, *options)


def check_reconstruction(
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    patch_size: int,
    norm: str | None,
    eps: float,
    mean: Numbers,
    std: Numbers,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The checks of every op with a reconstruction loss; returns mean and std as tuples, empty when not given."""
    check_floating("pred", pred)
    check_target(images, ids, mask, patch_size, norm, eps)
    batch, channels = images.shape[:2]
    listed = mask.shape[1] if ids is None and mask is not None else (ids.shape[1] if ids is not None else 0)
    meaning = "[B, M, P*P*C]" if ids is not None else "[B, L, P*P*C]"
    check_shape("pred", pred, (batch, listed, patch_size * patch_size * channels), meaning)
    check_same_device("images", images, "pred", pred)
    return check_channel_stats(mean, std, channels)


def check_target(
    images: Tensor, ids: Tensor | None, mask: Tensor | None, patch_size: int, norm: str | None, eps: float
) -> None:
    grid_rows, grid_cols = check_images(images, patch_size)
    check_choice("norm", norm, NORMS)
    check_positive("eps", eps)
    batch, channels = images.shape[:2]
    values = patch_size * patch_size * (channels if norm == "patch" else 1)
    if norm is not None and values < 2:
        raise ValueError(f"norm: got {norm!r} over 1 value, needs at least 2 for a variance (patch_size, channels)")
    if (ids is None) == (mask is None):
        raise ValueError(f"ids, mask: got {'neither' if ids is None else 'both'}, needs exactly one of them")
    if ids is not None:
        check_ids("ids", ids, batch, grid_rows * grid_cols)
        check_same_device("ids", ids, "images", images)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: got dtype {mask.dtype}, needs torch.bool with True = masked (use mask.bool())")
        check_shape("mask", mask, (batch, grid_rows * grid_cols), "[B, L]")
        check_same_device("mask", mask, "images", images)


def target_pixels(
    images_BCHW: Tensor,
    ids_BM: Tensor | None,
    patch_size: int,
    norm: str | None,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """[B,M,V] normalised target pixels (row, column, channel); every patch when ids is None."""
    t = listed_pixels(images_BCHW.detach(), ids_BM, patch_size, "rpc", mean, std, dtype)
    if norm is None:
        return t
    if norm == "channel":
        t = torch.unflatten(t, 2, (patch_size * patch_size, -1))
    t = t - t.mean(2, keepdim=True)
    var = t.square().sum(2, keepdim=True) / (t.shape[2] - 1)
    t = t / (var + eps).sqrt()
    return t.flatten(2) if norm == "channel" else t


def reference(
    pred_BMV: Tensor,
    images_BCHW: Tensor,
    ids_BM: Tensor | None,
    mask_BL: Tensor | None,
    patch_size: int,
    norm: str | None,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    acc = accumulate_dtype(pred_BMV, images_BCHW)
    target_BMV = target_pixels(images_BCHW, ids_BM, patch_size, norm, eps, mean, std, acc)
    difference_BMV = pred_BMV.to(acc) - target_BMV
    if mask_BL is None:
        return difference_BMV.square().sum() / max(difference_BMV.numel(), 1)
    # where, not a product: an infinite prediction of a visible patch must turn neither loss nor gradient into NaN
    difference_BMV = torch.where(mask_BL[..., None], difference_BMV, 0.0)
    return difference_BMV.square().sum() / (mask_BL.sum().clamp(min=1) * difference_BMV.shape[2])
