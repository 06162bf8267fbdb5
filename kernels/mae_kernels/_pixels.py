"""Pixels of listed patches as vectors, in plain torch: what the gather and loss ops mean by a
patch.

Images are uint8 or float [B,C,H,W] with any strides. uint8 pixels are used as x / 255, then (x -
mean) / std if mean or std is given; float pixels are used as they are, then (x - mean) / std if
mean or std is given. mean and std travel through the ops as one small tensor, `stats` [4, C]: mean,
std, and what the kernels use instead, x * scale + shift with scale = 1 / (255 std) or 1 / std, and
shift = -mean / std.
Shapes: B images, C channels, P patch side, K listed patches, V = P*P*C values per patch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._runtime import is_eager, jit, tl

# What the public functions take as mean and std: one number for all channels, or one per channel
Numbers = float | Sequence[float] | None
Plain = float | tuple[float, ...] | None  # the same, hashable


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 as soon as one tensor is fp64, otherwise fp32: the dtype of statistics and sums."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def pixel_stats(images: Tensor, mean: Numbers, std: Numbers) -> Tensor | None:
    """`stats` [4, C] on the images' device; None if pixels are used as they are.

    Raises TypeError or ValueError naming mean or std. fp64 on the CPU, where the reference may need
    it, else fp32.
    """
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    if mean is None and std is None and unit == 1:
        return None
    device, channels = images.device, int(images.shape[1])
    mean, std = _plain("mean", mean), _plain("std", std)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    if type(images) is not Tensor or torch.compiler.is_compiling():
        return _filled(_rows(mean, std, channels, unit), dtype, device)
    found = _kept_stats.get(key := (mean, std, channels, unit, device))
    if found is not None:
        return found
    rows = _rows(mean, std, channels, unit)
    if not is_eager() or (images.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _filled(rows, dtype, device)
    # a tensor made in inference mode could not be saved for a backward
    with torch.inference_mode(False):
        found = torch.tensor(rows, dtype=dtype, device=device)
    if len(_kept_stats) < MOST_KEPT:
        _kept_stats[key] = found
    return found


# Copied to the device once per set of numbers: a copy per call would wait for the host. Never
# removed: captured CUDA graphs read them.
MOST_KEPT = 256
_kept_stats: dict[tuple[object, ...], Tensor] = {}


def _filled(
    rows: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """In a trace, under a mode, and in the capture of a CUDA graph without an earlier call: fills
    on the device, which a compiler joins to one kernel.
    """
    fills = [torch.full((1,), x, dtype=dtype, device=device) for row in rows for x in row]
    return torch.cat(fills).view(len(rows), -1)


def _plain(name: str, value: Numbers) -> Plain:
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: got a tensor, needs Python numbers (use .tolist())")
    return value if value is None or isinstance(value, (int, float)) else tuple(value)


def _rows(mean: Plain, std: Plain, channels: int, unit: float) -> tuple[tuple[float, ...], ...]:
    """The numbers of `stats`."""
    means = _per_channel("mean", 0.0 if mean is None else mean, channels)
    stds = _per_channel("std", 1.0 if std is None else std, channels)
    if not all(s > 0 for s in stds):
        raise ValueError(f"std: got {stds}, needs positive numbers")
    shifts = tuple(-m / s for m, s in zip(means, stds, strict=True))
    return means, stds, tuple(1 / (unit * s) for s in stds), shifts


def _per_channel(name: str, value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    values = (value,) if isinstance(value, (int, float)) else value
    if len(values) not in (1, channels):
        raise ValueError(
            f"{name}: got {len(values)} numbers, needs one, or one per image channel = {channels}"
        )
    return tuple(float(v) for v in values) * (channels // len(values))


def listed_pixels(
    images_BCHW: Tensor,
    ids_BK: Tensor | None,
    stats_4C: Tensor | None,
    patch_size: int,
    order: str,
    dtype: torch.dtype,
) -> Tensor:
    """[B,K,V] in `dtype`; order "crp" = (channel, row, column), "rpc" = (row, column, channel); ids
    None = all.
    """
    grid_cols = images_BCHW.shape[3] // patch_size
    # a view for any strides: unflatten only splits dimensions
    x = torch.unflatten(images_BCHW, 3, (grid_cols, patch_size))
    x = torch.unflatten(x, 2, (-1, patch_size))  # B C gr P gc P
    x = x.permute(0, 2, 4, 1, 3, 5) if order == "crp" else x.permute(0, 2, 4, 3, 5, 1)
    has_lines = images_BCHW.device.type == "cpu" and images_BCHW.is_contiguous()
    if ids_BK is None:
        x = x.flatten(1, 2)
    elif has_lines and not images_BCHW.requires_grad and (pick := _line_picker()) is not None:
        x = pick(images_BCHW, ids_BK, patch_size, order)
    else:
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        x = x[batch, ids_BK // grid_cols, ids_BK % grid_cols]
    x = x.flatten(2).to(dtype)
    if stats_4C is not None:
        if images_BCHW.dtype == torch.uint8:
            x = x / 255
        # one number per value: torch's loops over three channels are not vectorised
        area = patch_size * patch_size
        to_values = (
            (lambda t: t.repeat_interleave(area)) if order == "crp" else (lambda t: t.repeat(area))
        )
        x = (x - to_values(stats_4C[0].to(dtype))) / to_values(stats_4C[1].to(dtype))
    return x


def listed_lines(images: Tensor, ids: Tensor, patch_size: int, order: str) -> Tensor:
    """The listed patches of contiguous images as they are: [B,K,C,P,P] for order "crp",
    [B,K,P,P,C] for "rpc".

    For a CPU: copies whole lines of a patch. An index into six dimensions takes three times as
    long (one channel). Raises IndexError for an id out of range.
    """
    (batch, channels, height, _), side = images.shape, patch_size
    lines_NP = images.view(-1, side)
    grid_cols = images.shape[3] // side
    patches = height // side * grid_cols
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < patches:
        # a compiled call has not checked them; lines of another image would be copied
        raise IndexError(f"ids: got {int(ids.min())} to {int(ids.max())}, needs 0 to {patches - 1}")
    count = functools.partial(torch.arange, device=images.device)
    first_B1 = count(batch)[:, None] * (channels * height)
    first_BK = (first_B1 + ids // grid_cols * side) * grid_cols + ids % grid_cols
    of_channel_C1 = count(channels)[:, None] * (height * grid_cols)
    numbers_BKCP = first_BK[..., None, None] + of_channel_C1 + count(side) * grid_cols
    if order == "rpc":
        numbers_BKCP = numbers_BKCP.transpose(2, 3)  # B K P C
    x = lines_NP.index_select(0, numbers_BKCP.flatten()).view(*numbers_BKCP.shape, side)
    return x if order == "crp" else x.transpose(3, 4).contiguous()


# For torch.compile, to which the op is opaque: Inductor would read the pixels through the ids in
# every pass over them, one by one.
listed_lines_op = torch.library.custom_op(
    "mae_kernels::listed_lines", listed_lines, mutates_args=()
)


@listed_lines_op.register_fake
def _(images: Tensor, ids: Tensor, patch_size: int, order: str) -> Tensor:
    channels, P = images.shape[1], patch_size
    patch = (channels, P, P) if order == "crp" else (P, P, channels)
    return images.new_empty((*ids.shape, *patch))


def _line_picker() -> Callable[..., Tensor] | None:
    """How to call `listed_lines`; None where torch's own operators are needed: in an export, under
    a dispatch mode, in a transformation.
    """
    if torch.compiler.is_compiling():
        return None if torch.compiler.is_exporting() else listed_lines_op
    return listed_lines if is_eager() else None


def kernel_stats(images_BCHW: Tensor, stats_4C: Tensor | None) -> tuple[Tensor, bool]:
    """What a kernel takes: the statistics in fp32, or the images if there are none, and whether
    there are any.
    """
    return (images_BCHW, False) if stats_4C is None else (stats_4C.float(), True)


@jit
def scale_pixels(x, STATS, channel, C: tl.constexpr, HAS_STATS: tl.constexpr):
    """x * scale + shift in fp32 by each value's channel; STATS is [4, C], and `channel` is smaller
    than C.
    """
    x = x.to(tl.float32)
    if HAS_STATS:
        if C <= 4:
            # a choice between scalars costs less than a load per value, whose layout would have to
            # be converted
            scale = tl.load(STATS + 2 * C)
            shift = tl.load(STATS + 3 * C)
            for c in tl.static_range(1, C):
                scale = tl.where(channel == c, tl.load(STATS + 2 * C + c), scale)
                shift = tl.where(channel == c, tl.load(STATS + 3 * C + c), shift)
        else:
            scale = tl.load(STATS + 2 * C + channel)
            shift = tl.load(STATS + 3 * C + channel)
        x = x * scale + shift
    return x
