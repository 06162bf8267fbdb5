"""Prediction head and reconstruction loss together.

    pred = hidden . weight^T + bias
    loss = masked_reconstruction_loss(pred, images, ids=ids, ...)

Source: He et al., arXiv 2111.06377, section 3: the decoder's last layer is a linear projection to P*P*C pixel values.

Shapes: B images, M masked patches, D decoder width, V = P*P*C values per patch, (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_channel_stats, check_floating, check_same_device, check_shape
from ._runtime import use_triton
from .reconstruction import check_target, reference

Numbers = float | Sequence[float] | None


def linear_reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids: Tensor,
    *,
    patch_size: int,
    norm: str | None = "patch",
    eps: float = 1e-6,
    mean: Numbers = None,
    std: Numbers = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Reconstruction loss of a linear prediction head on the masked tokens.

    Args:
        hidden: [B, M, D] decoder tokens of the masked patches.
        weight: [V, D] and bias: [V] or None, the prediction head; V = P*P*C, (row, column, channel).
        images, ids, patch_size, norm, eps, mean, std: as in masked_reconstruction_loss.
        dtype: of the matrix product; default the autocast dtype under autocast, else hidden's dtype.

    Returns: scalar fp32 (fp64 for fp64 input); 0 when M = 0. Gradients reach hidden, weight and bias.

    Raises: TypeError or ValueError naming the argument.
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    check_target(images, ids, None, patch_size, norm, eps)
    batch, channels = images.shape[:2]
    values = patch_size * patch_size * channels
    check_shape("hidden", hidden, (batch, ids.shape[1], None), "[B, M, D]")
    check_shape("weight", weight, (values, hidden.shape[2]), "[P*P*C, D]")
    for name, tensor in (("images", images), ("weight", weight)):
        check_same_device(name, tensor, "hidden", hidden)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (values,), "[P*P*C]")
        check_same_device("bias", bias, "hidden", hidden)
    means, stds = check_channel_stats(mean, std, channels)
    if dtype is None:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, needs a floating point dtype")
    use_triton("linear_reconstruction_loss", hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # `dtype` was chosen; keep it
        head_bias = None if bias is None else bias.to(dtype)
        pred_BMV = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), head_bias)
    return reference(pred_BMV, images, ids, None, patch_size, norm, eps, means, stds)
