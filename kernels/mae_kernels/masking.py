"""Random masking: which patches stay visible.

    ids_shuffle = stable ascending argsort of the noise (ties by index)
    ids_keep    = ids_shuffle[:K]        visible patches, in shuffled order
    ids_masked  = ids_shuffle[K:]        masked patches, in shuffled order
    ids_restore = argsort(ids_shuffle)   place of each patch; visible where ids_restore[l] < K
    mask[l]     = ids_restore[l] >= K    True = masked

Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377, section 3.
The noise is an argument, so that eager, compiled and CPU runs can use the same mask.

Shapes: B images, L patches, K visible, M = L - K masked.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import can_look, check_dtype, check_floating, check_int, check_shape
from ._runtime import jit, launch, next_power_of_2, tl, triton_op, use_triton, wants_reference
from ._samples import Draw, Made, Sample, Size, declares


class Masking(NamedTuple):
    """ids_keep [B,K], ids_restore [B,L], ids_masked [B,M] (int64) and mask [B,L] (bool, True =
    masked).
    """

    ids_keep: Tensor
    ids_restore: Tensor
    ids_masked: Tensor
    mask: Tensor


# ---- reference ----
def reference(noise_BL: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids_shuffle = torch.argsort(noise_BL, dim=1, stable=True)
    ranks = torch.arange(noise_BL.shape[1], device=noise_BL.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, ranks)
    return (
        ids_shuffle[:, :num_keep].clone(),
        ids_restore,
        ids_shuffle[:, num_keep:].clone(),
        ids_restore >= num_keep,
    )


# ---- kernel ----
@jit
def _masking_kernel(
    NOISE, KEEP, RESTORE, MASKED, MASK, stride_b, stride_l, num_keep, L: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One image per program: sort (noise, index) pairs packed into one 64-bit integer, then write
    all four results.
    """
    image = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_L)
    noise = tl.load(NOISE + image * stride_b + index * stride_l, mask=index < L, other=0.0).to(
        tl.float32
    )
    # the bits of a float order like an integer once negative numbers are reversed; + 0.0 makes -0.0
    # equal 0.0
    bits = (noise + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(noise != noise, 0x7FFFFFFE, bits)  # NaN last, whatever its sign
    bits = tl.where(index < L, bits, 0x7FFFFFFF)  # padding after NaN
    key = (bits.to(tl.int64) << 32) | index.to(tl.int64)
    patch = tl.sort(key) & 0xFFFFFFFF
    rank = tl.arange(0, BLOCK_L)
    real = rank < L
    masked = rank >= num_keep
    tl.store(KEEP + image * num_keep + rank, patch, mask=real & (rank < num_keep))
    tl.store(MASKED + image * (L - num_keep) + rank - num_keep, patch, mask=real & masked)
    tl.store(RESTORE + image * L + patch, rank.to(tl.int64), mask=real)
    tl.store(MASK + image * L + patch, masked, mask=real)


MAX_PATCHES = 4096


def _launch(noise_BL: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, patches = noise_BL.shape
    sizes = ((batch, num_keep), (batch, patches), (batch, patches - num_keep))
    keep, restore, masked = (
        torch.empty(s, dtype=torch.int64, device=noise_BL.device) for s in sizes
    )
    mask = torch.empty((batch, patches), dtype=torch.bool, device=noise_BL.device)
    block = next_power_of_2(patches)
    warps = 1 if block <= 128 else 4 if block <= 1024 else 8
    arguments = (noise_BL, keep, restore, masked, mask, *noise_BL.stride(), num_keep)
    launch(
        _masking_kernel, (batch,), noise_BL, *arguments, L=patches, BLOCK_L=block, num_warps=warps
    )
    return keep, restore, masked, mask


# ---- registration ----
@triton_op("mae_kernels::random_masking", mutates_args=())
def _masking_op(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    too_many = f"there are {noise.shape[1]} patches and the kernel sorts at most {MAX_PATCHES}"
    refused = too_many if noise.shape[1] > MAX_PATCHES else None
    if use_triton("random_masking", noise.device, noise.dtype, refused=refused):
        return _launch(noise, num_keep)
    return reference(noise, num_keep)


# ---- public ----
def random_masking(noise: Tensor, num_keep: int) -> Masking:
    """ids_keep = argsort(noise)[:, :num_keep]: keep the patches with the smallest noise of each
    image.

    Args:
        noise: [B, L] floating point, any strides; usually uniform. NaN sorts last. No gradient
        flows.
        num_keep: visible patches per image, 1 <= num_keep <= L.

    Returns: Masking(ids_keep [B,K], ids_restore [B,L], ids_masked [B,M], mask [B,L] bool, True =
    masked).

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> masking = random_masking(torch.rand(8, 196), num_keep=49)
        >>> masking.ids_keep.shape
        torch.Size([8, 49])
    """
    check_floating("noise", noise)
    check_shape("noise", noise, (None, None), "[B, L]")
    check_int("num_keep", num_keep, 1)
    if num_keep > (patches := noise.shape[1]):
        limit = f"at most the number of patches L = {patches}"
        raise ValueError(f"num_keep: got {num_keep}, needs {limit}")
    noise = noise.detach()
    return Masking(*(reference if wants_reference(noise) else _masking_op)(noise, num_keep))


def masking_from(mask: Tensor, num_keep: int) -> Masking:
    """The ids of a given mask, in ascending order: for masks that are drawn elsewhere (blocks,
    tubes).

    Args:
        mask: [B, L] bool, True = masked.
        num_keep: visible patches per image; each row of the mask has so many (a whole batch has one
            shape). This is checked on the CPU, and on a GPU with debug_checks.

    Returns: Masking, whose mask equals `mask`.

    Raises: TypeError or ValueError naming the argument.
    """
    check_dtype("mask", mask, torch.bool, " with True = masked (use mask.bool())")
    masking = random_masking(mask.float(), num_keep)
    if can_look(mask) and not torch.equal(masking.mask, mask):
        counts = sorted({int(n) for n in (~mask).sum(1)})
        raise ValueError(
            f"mask: got rows with {counts} visible patches, needs num_keep = {num_keep} in each"
        )
    return masking


# ---- samples ----
def _sample(size: Size, patches: int) -> Sample:
    def make(draw: Draw) -> Made:
        noise = draw.uniform(draw.batch, patches)
        return {"noise": noise}, {"num_keep": patches // 4}

    name = f"{patches} patches"
    # its stores are scattered
    return Sample("random_masking", name, random_masking, make, size=size, wide=False)


@declares("random_masking")
def samples() -> list[Sample]:
    """One warp and several; the 14 x 14 and 16 x 16 grids of ViTs at 224; as many patches as one
    program sorts.
    """
    small = [_sample("small", patches) for patches in (37, 130)]
    return small + [_sample("model", patches) for patches in (196, 256, 1024, MAX_PATCHES)]
