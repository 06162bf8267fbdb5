"""Listed patches of images, as vectors and as embedded tokens.

    gather_patches: out[b, k] = flatten(patch ids[b, k] of image b), channel-major (channel, row, column), which is the
                    order of a flattened convolution weight [D, C, P, P]
    embed_patches:  out[b, k] = weight . gather[b, k] + bias + pos_embed[ids[b, k]]

Only the listed patches are read. The equivalent in facebookresearch/mae embeds all patches, adds the positions and then
gathers the visible ones; the result is the same.
Source: He et al., arXiv 2111.06377, section 3 (patch embedding); the order of the gather is this package's.

Pixels: uint8 images are used as x / 255, then (x - mean) / std where mean or std is given; float images are used as
they are, then (x - mean) / std where mean or std is given.

Shapes: B images, C channels, H x W pixels, P patch side, L patches (row-major over the grid), K listed, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_channel_stats, check_floating, check_ids, check_images, check_same_device, check_shape
from ._pixels import accumulate_dtype, listed_pixels
from ._runtime import use_triton

Numbers = float | Sequence[float] | None


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    *,
    mean: Numbers = None,
    std: Numbers = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Read the listed patches of each image as vectors, (channel, row, column).

    Args:
        images: [B, C, H, W] uint8 or floating point with any strides (a channels-last buffer needs no copy).
        ids: [B, K] int64 patch numbers, row-major over the (H/P, W/P) grid.
        patch_size: P; H and W must be divisible by it.
        mean, std: a number, or one per channel; applied to x / 255 for uint8 images, to x itself for float images.
        dtype: of the result; default the images' dtype, or torch's default dtype for uint8.

    Returns: [B, K, C*P*P]. Float images that require a gradient get one.

    Raises: TypeError or ValueError naming the argument.
    """
    grid_rows, grid_cols = check_images(images, patch_size)
    check_ids("ids", ids, images.shape[0], grid_rows * grid_cols)
    check_same_device("ids", ids, "images", images)
    means, stds = check_channel_stats(mean, std, images.shape[1])
    if dtype is None:
        dtype = torch.get_default_dtype() if images.dtype == torch.uint8 else images.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, needs a floating point dtype")
    use_triton("gather_patches")
    return _gather_reference(images, ids, patch_size, means, stds, dtype)


def _gather_reference(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    dtype: torch.dtype,
) -> Tensor:
    exact = torch.float64 if dtype == torch.float64 else accumulate_dtype(images_BCHW)
    plain = mean is None and images_BCHW.dtype != torch.uint8  # a copy: no arithmetic, so no wider dtype
    return listed_pixels(images_BCHW, ids_BK, patch_size, "crp", mean, std, dtype if plain else exact).to(dtype)


def embed_patches(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    *,
    mean: Numbers = None,
    std: Numbers = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed the listed patches and add their positions.

    Args:
        images: [B, C, H, W] uint8 or floating point, any strides.
        ids: [B, K] int64 patch numbers.
        weight: [D, C, P, P] the patch embedding convolution's weight.
        bias: [D] or None.
        pos_embed: [L, D], or [1, L, D], positions of the L patches (without a class token's row).
        mean, std: as in gather_patches.
        dtype: of the matrix product; default the autocast dtype under autocast, else the weight's dtype.

    Returns: [B, K, D] in the wider of the product's and pos_embed's dtypes, as `conv(x) + pos_embed` would be.
    Gradients reach weight, bias, pos_embed, and float images that require one.

    Raises: TypeError or ValueError naming the argument.
    """
    check_floating("weight", weight)
    check_shape("weight", weight, (None, None, None, None), "[D, C, P, P]")
    width, channels, patch_size, cols = weight.shape
    if patch_size != cols:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, needs a square patch [D, C, P, P]")
    grid_rows, grid_cols = check_images(images, patch_size)
    if images.shape[1] != channels:
        raise ValueError(f"images: got {images.shape[1]} channels, needs the weight's C = {channels}")
    patches = grid_rows * grid_cols
    check_ids("ids", ids, images.shape[0], patches)
    check_floating("pos_embed", pos_embed)
    if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed[0]
    check_shape("pos_embed", pos_embed, (patches, width), "[L, D]")
    for name, tensor in (("ids", ids), ("weight", weight), ("pos_embed", pos_embed)):
        check_same_device(name, tensor, "images", images)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (width,), "[D]")
        check_same_device("bias", bias, "images", images)
    if dtype is None:
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, needs a floating point dtype")
    means, stds = check_channel_stats(mean, std, channels)
    use_triton("embed_patches")
    return _embed_reference(images, ids, weight, bias, pos_embed, means, stds, dtype)


def _embed_reference(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    weight_DCPP: Tensor,
    bias_D: Tensor | None,
    pos_embed_LD: Tensor,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    dtype: torch.dtype,
) -> Tensor:
    x_BKV = _gather_reference(images_BCHW, ids_BK, weight_DCPP.shape[-1], mean, std, dtype)
    with torch.autocast(images_BCHW.device.type, enabled=False):  # `dtype` was chosen; keep it
        bias = None if bias_D is None else bias_D.to(dtype)
        tokens_BKD = torch.nn.functional.linear(x_BKV, weight_DCPP.flatten(1).to(dtype), bias)
    return tokens_BKD + pos_embed_LD[ids_BK]
