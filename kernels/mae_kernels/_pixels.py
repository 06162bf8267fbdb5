"""Pixels of listed patches as vectors, in plain torch: what the gather and loss ops mean by a patch.

Images are uint8 or float [B,C,H,W] with any strides. uint8 pixels are used as x / 255, then (x - mean) / std where
mean or std is given; float pixels are used as they are, then (x - mean) / std where mean or std is given.
The kernels take the same pixels as x * a + b with a and b per channel, folded on the host.
Shapes: B images, C channels, P patch side, K listed patches, V = P*P*C values per patch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._runtime import jit, tl


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 as soon as one tensor is fp64, otherwise fp32: the dtype of statistics and sums."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def listed_pixels(
    images_BCHW: Tensor,
    ids_BK: Tensor | None,
    patch_size: int,
    order: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """[B,K,V] in `dtype`; order "crp" = (channel, row, column), "rpc" = (row, column, channel); ids None = all."""
    grid_cols = images_BCHW.shape[3] // patch_size
    # a view for any strides: unflatten only splits dimensions
    x = torch.unflatten(
        torch.unflatten(images_BCHW, 3, (grid_cols, patch_size)), 2, (-1, patch_size)
    )  # B C gr P gc P
    x = x.permute(0, 2, 4, 1, 3, 5) if order == "crp" else x.permute(0, 2, 4, 3, 5, 1)
    if ids_BK is None:
        x = x.flatten(1, 2)
    else:
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        x = x[batch, ids_BK // grid_cols, ids_BK % grid_cols]
    x = x.to(dtype)
    if images_BCHW.dtype == torch.uint8:
        x = x / 255
    if mean and std:
        per_channel = (-1, 1, 1) if order == "crp" else (-1,)
        x = (x - _channel_vector(mean, x).view(per_channel)) / _channel_vector(std, x).view(
            per_channel
        )
    return x.flatten(2)


def _channel_vector(values: Sequence[float], like: Tensor) -> Tensor:
    """Made on the device by fills: copying Python numbers there would wait for the GPU and break graph capture."""
    return torch.cat([like.new_full((1,), v) for v in values])


MAX_CONSTANT_CHANNELS = 4


def fold_pixels(
    images_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, dict[str, float | int]]:
    """The images a kernel reads and its constants A0..A3, B0..B3 and AFFINE: 0 no arithmetic, 1 one a and b, 2 by channel.

    With more than four channels of different mean or std the images are normalised first, in one extra pass.
    """
    unit = 255.0 if images_BCHW.dtype == torch.uint8 else 1.0
    means, stds = (list(mean), list(std)) if mean else ([0.0], [1.0])
    if len(set(means)) == len(set(stds)) == 1:
        means, stds = means[:1], stds[:1]
    if len(means) > MAX_CONSTANT_CHANNELS:
        x = images_BCHW.float() / unit
        shift, scale = (_channel_vector(v, x).view(-1, 1, 1) for v in (means, stds))
        images_BCHW, means, stds, unit = (x - shift) / scale, [0.0], [1.0], 1.0
    pairs = [(1.0 / (unit * s), -m / s) for m, s in zip(means, stds, strict=True)]
    affine = 0 if pairs == [(1.0, 0.0)] else min(len(pairs), 2)
    pairs += [(1.0, 0.0)] * (MAX_CONSTANT_CHANNELS - len(pairs))
    constants: dict[str, float | int] = {"AFFINE": affine}
    for i, (a, b) in enumerate(pairs):
        constants |= {f"A{i}": a, f"B{i}": b}
    return images_BCHW, constants


@jit
def scale_pixels(
    x,
    channel,
    AFFINE: tl.constexpr,
    A0: tl.constexpr,
    A1: tl.constexpr,
    A2: tl.constexpr,
    A3: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
):
    """x * a + b in fp32 with a and b of each value's channel."""
    x = x.to(tl.float32)
    if AFFINE == 1:
        x = x * A0 + B0
    if AFFINE == 2:
        a = tl.where(channel == 0, A0, tl.where(channel == 1, A1, tl.where(channel == 2, A2, A3)))
        b = tl.where(channel == 0, B0, tl.where(channel == 1, B1, tl.where(channel == 2, B2, B3)))
        x = x * a + b
    return x
