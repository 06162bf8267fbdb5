"""Random masking: which patches stay visible.

    ids_shuffle = stable ascending argsort of the noise (ties by index)
    ids_keep    = ids_shuffle[:K]        visible patches, in shuffled order
    ids_masked  = ids_shuffle[K:]        masked patches, in shuffled order
    ids_restore = argsort(ids_shuffle)   where each patch went; patch l is visible when ids_restore[l] < K
    mask[l]     = ids_restore[l] >= K    True = masked

Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377, section 3.
The noise is an argument, so that eager, compiled and CPU runs can use the same mask.

Shapes: B images, L patches, K visible, M = L - K masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_floating, check_int, check_shape
from ._runtime import use_triton


class Masking(NamedTuple):
    """ids_keep [B,K], ids_restore [B,L], ids_masked [B,M] (int64) and mask [B,L] (bool, True = masked)."""

    ids_keep: Tensor
    ids_restore: Tensor
    ids_masked: Tensor
    mask: Tensor


def _reference(noise_BL: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids_shuffle = torch.argsort(noise_BL, dim=1, stable=True)
    ranks = torch.arange(noise_BL.shape[1], device=noise_BL.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, ranks)
    return ids_shuffle[:, :num_keep].clone(), ids_restore, ids_shuffle[:, num_keep:].clone(), ids_restore >= num_keep


def random_masking(noise: Tensor, num_keep: int) -> Masking:
    """Keep the `num_keep` patches with the smallest noise of each image.

    Args:
        noise: [B, L] floating point, any strides; usually uniform. NaN sorts last. No gradient flows.
        num_keep: visible patches per image, 1 <= num_keep <= L.

    Returns: Masking(ids_keep [B,K], ids_restore [B,L], ids_masked [B,M], mask [B,L] bool, True = masked).

    Raises: TypeError or ValueError naming the argument.
    """
    check_floating("noise", noise)
    check_shape("noise", noise, (None, None), "[B, L]")
    check_int("num_keep", num_keep, 1)
    if num_keep > noise.shape[1]:
        raise ValueError(f"num_keep: got {num_keep}, needs at most the number of patches L = {noise.shape[1]}")
    use_triton("random_masking", noise.device)
    return Masking(*_reference(noise.detach(), num_keep))
