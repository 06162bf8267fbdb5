"""Pixels of listed patches as vectors, in plain torch: what the gather and loss ops mean by a patch.

Images are uint8 or float [B,C,H,W] with any strides. uint8 pixels are used as x / 255, then (x - mean) / std where
mean or std is given; float pixels are used as they are, then (x - mean) / std where mean or std is given.
Shapes: B images, C channels, P patch side, K listed patches, V = P*P*C values per patch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 as soon as one tensor is fp64, otherwise fp32: the dtype of statistics and sums."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def listed_pixels(
    images_BCHW: Tensor,
    ids_BK: Tensor | None,
    patch_size: int,
    order: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B,K,V] in `dtype`; order "crp" = (channel, row, column), "rpc" = (row, column, channel); ids None = all."""
    grid_cols = images_BCHW.shape[3] // patch_size
    # a view for any strides: unflatten only splits dimensions
    x = torch.unflatten(torch.unflatten(images_BCHW, 3, (grid_cols, patch_size)), 2, (-1, patch_size))  # B C gr P gc P
    x = x.permute(0, 2, 4, 1, 3, 5) if order == "crp" else x.permute(0, 2, 4, 3, 5, 1)
    if ids_BK is None:
        x = x.flatten(1, 2)
    else:
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        x = x[batch, ids_BK // grid_cols, ids_BK % grid_cols]
    x = x.to(dtype)
    if images_BCHW.dtype == torch.uint8:
        x = x / 255
    if mean is not None and std is not None:
        per_channel = (-1, 1, 1) if order == "crp" else (-1,)
        x = (x - _channel_vector(mean, x).view(per_channel)) / _channel_vector(std, x).view(per_channel)
    return x.flatten(2)


def _channel_vector(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Made on the device by fills: copying Python numbers there would wait for the GPU and break graph capture."""
    return torch.cat([like.new_full((1,), v) for v in values])
