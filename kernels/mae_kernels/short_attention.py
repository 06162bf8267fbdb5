"""Self-attention on the packed output of a qkv linear layer.

    q, k, v = qkv.unbind(2)
    out     = softmax(q k^T * scale) v        per head, scale = d ** -0.5 by default

Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 1.

Shapes: B images, N tokens, H heads, d head width. The packed order (3, H, d) is that of timm and facebookresearch/mae.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._checks import check_floating, check_positive, check_shape
from ._runtime import use_triton


def attention(qkv: Tensor, *, scale: float | None = None) -> Tensor:
    """Multi-head self-attention without dropout or mask.

    Args:
        qkv: [B, N, 3, H, d] floating point, any strides: the qkv linear layer's output, viewed.
        scale: of the scores; default d ** -0.5.

    Returns: [B, N, H, d], contiguous, in qkv's dtype. `out.flatten(2)` is the input of the output projection.

    Raises: TypeError or ValueError naming the argument.
    """
    check_floating("qkv", qkv)
    check_shape("qkv", qkv, (None, None, 3, None, None), "[B, N, 3, H, d]")
    if scale is not None:
        check_positive("scale", scale)
    use_triton("attention", qkv.device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
