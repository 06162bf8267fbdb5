"""The kernels of masked_reconstruction_loss, distillation_loss (kind "dino") and sssd_loss.

One kernel forward and one backward. Their first programs take rows of logits, the others patches;
an op without logits or without patches starts the kernel with K = 0 or P = 0, and that part is not
compiled. A second, small kernel of the forward adds up what the first one leaves, in a fixed order.
The formulas are in reconstruction.py and distillation.py.

Shapes: B images, C channels, P patch side, L patches, M masked patches, V = P*P*C values per patch,
R rows of K logits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._pixels import kernel_stats, scale_pixels
from ._runtime import MAX_TILE_WIDTH, jit, launch, next_power_of_2, tl

NORM_CODES = {"none": 0, "patch": 1, "channel": 2, "channel_std": 3}


class Target(NamedTuple):
    """What predictions are compared with, as the ops take it: norm is "patch", "channel",
    "channel_std" or "none", stats is pixel_stats; of ids and mask one is None.
    """

    images: Tensor
    ids: Tensor | None
    mask: Tensor | None
    stats: Tensor | None
    patch_size: int
    norm: str
    eps: float


class Logits(NamedTuple):
    """Both rows of logits [..., K], and what they are shifted and divided by."""

    student: Tensor
    teacher: Tensor
    center: Tensor | None
    student_temp: float
    teacher_temp: float


# ---- patches ----
@jit
def masked_difference(
    PRED, IMAGES, SELECT, STATS, row, num_rows, listed, patches, grid_cols, pred_stride_b,
    pred_stride_m, stride_b, stride_c, stride_h, stride_w, C: tl.constexpr, P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, NORM: tl.constexpr, HAS_MASK: tl.constexpr,
    WIDE: tl.constexpr, EPS: tl.constexpr, HAS_STATS: tl.constexpr,
):  # fmt: skip
    """pred - target of some rows, fp32 [ROWS, BLOCK_P, BLOCK_P, BLOCK_C]; zeros for visible patches
    and beyond the ends.

    Pixels of several channels are read as [channel, line, column], where a line of a plane is one
    access of up to 16 bytes, and turned into pred's order (line, column, channel) after the
    normalisation. SELECT holds patch ids, or with HAS_MASK the mask. NORM: 0 none, 1 patch, 2
    channel, 3 channel with EPS added to the deviation. WIDE: a patch spans 2^31 elements.
    """
    PADDED: tl.constexpr = BLOCK_P != P or BLOCK_C != C
    PLANES: tl.constexpr = C > 1
    side, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    if PLANES:
        channel = channel[:, None, None]
        line, col = side[None, :, None], side[None, None, :]
    else:
        channel = channel[None, None, :]
        line, col = side[:, None, None], side[None, :, None]
    real = ((channel < C) & (line < P) & (col < P))[None, :, :, :]
    chosen = row < num_rows
    image, place_of_row = row // listed, row % listed
    if HAS_MASK:
        patch = place_of_row
        in_range = chosen
        chosen = chosen & (tl.load(SELECT + row, mask=chosen, other=0) != 0)
    else:
        patch_id = tl.load(SELECT + row, mask=chosen, other=0)
        in_range = (patch_id >= 0) & (patch_id < patches)
        patch = tl.where(in_range, patch_id, 0).to(tl.int32)
    corner = image.to(tl.int64) * stride_b + (patch // grid_cols * P).to(tl.int64) * stride_h
    corner += (patch % grid_cols * P).to(tl.int64) * stride_w
    if WIDE:
        inside = channel.to(tl.int64) * stride_c + line.to(tl.int64) * stride_h
        inside += col.to(tl.int64) * stride_w
    else:
        inside = channel * stride_c + line * stride_h + col * stride_w
    pointers = (IMAGES + corner)[:, None, None, None] + inside[None, :, :, :]
    x = tl.load(pointers, mask=(chosen & in_range)[:, None, None, None] & real, other=0)
    x = scale_pixels(x, STATS, channel[None, :, :, :], C, HAS_STATS)
    if PADDED:
        x = tl.where(real, x, 0.0)
    # by row: the gradient and loss of a visible patch are exactly 0, those of an id out of range
    # NaN
    keep = tl.where(chosen, tl.where(in_range, 1.0, float("nan")), 0.0)[:, None, None, None]
    if NORM == 0:
        x = tl.where(chosen[:, None, None, None], x, 0.0) + (keep - keep)
    if NORM == 1:
        x = x - sum_patch(x)[:, None, None, None] / (P * P * C)
        if PADDED:
            x = tl.where(real, x, 0.0)
        variance = sum_patch(x * x)[:, None, None, None] / (P * P * C - 1)
        x = x * (keep / tl.sqrt(variance + EPS))
    if NORM >= 2:
        x = x - sum_channel(x, PLANES) / (P * P)
        if PADDED:
            x = tl.where(real, x, 0.0)
        variance = sum_channel(x * x, PLANES) / (P * P - 1)
        deviation = tl.sqrt(variance + EPS) if NORM == 2 else tl.sqrt(variance) + EPS
        x = x * (keep / deviation)
    if PLANES:
        x = tl.permute(x, (0, 2, 3, 1))
    place, wanted = place_in_patch(C, P, BLOCK_C, BLOCK_P)
    at = image.to(tl.int64) * pred_stride_b + place_of_row.to(tl.int64) * pred_stride_m
    pointers = (PRED + at)[:, None, None, None] + place
    pred = tl.load(pointers, mask=chosen[:, None, None, None] & wanted, other=0.0)
    return pred.to(tl.float32) - x


@jit
def place_in_patch(C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where in a patch the values [1, line, column, channel] are, and which exist."""
    line = tl.arange(0, BLOCK_P)[:, None, None]
    col = tl.arange(0, BLOCK_P)[None, :, None]
    channel = tl.arange(0, BLOCK_C)[None, None, :]
    place = line * (P * C) + col * C + channel
    return place[None, :, :, :], ((line < P) & (col < P) & (channel < C))[None, :, :, :]


@jit
def sum_patch(x):
    """[ROWS]: the sum of each row of a tensor with four dimensions."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]]), 1)


@jit
def sum_channel(x, PLANES: tl.constexpr):
    """[ROWS, BLOCK_C, 1, 1]: the sum of each channel of [ROWS, BLOCK_C, BLOCK_P, BLOCK_P]; without
    PLANES there is one channel.
    """
    if PLANES:
        flat = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] * x.shape[3]])
        return tl.sum(flat, 2)[:, :, None, None]
    else:
        return sum_patch(x)[:, None, None, None]


@jit
def store_gradient(
    DPRED, d, row, num_rows, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rows of [ROWS, BLOCK_P, BLOCK_P, BLOCK_C] to the contiguous DPRED [B,M,V]."""
    place, wanted = place_in_patch(C, P, BLOCK_C, BLOCK_P)
    pointers = (DPRED + row.to(tl.int64) * (P * P * C))[:, None, None, None] + place
    wanted = (row < num_rows)[:, None, None, None] & wanted
    tl.store(pointers, d.to(DPRED.dtype.element_ty), mask=wanted)


# ---- logits ----
@jit
def load_logits(
    STUDENT, TEACHER, CENTER, row, first, stride_s, stride_t, K: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_K logits of a row from `first`: the teacher's raw, the teacher's as they enter softmax,
    the student's; fp32, -inf beyond K for the last two.
    """
    col = first + tl.arange(0, BLOCK_K)
    inside = col < K
    t = tl.load(TEACHER + row * stride_t + col, mask=inside, other=0.0).to(tl.float32)
    z = t
    if HAS_CENTER:
        z = t - tl.load(CENTER + col, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(STUDENT + row * stride_s + col, mask=inside, other=0.0).to(tl.float32)
    minus_inf = float("-inf")
    return t, tl.where(inside, z / TAU_T, minus_inf), tl.where(inside, s / TAU_S, minus_inf)


@jit
def softmax_statistics(
    STUDENT, TEACHER, CENTER, row, stride_s, stride_t, K: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_CENTER: tl.constexpr, TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    """Of one row, in parts of BLOCK_K: the teacher's largest logit and the sum of its exponentials
    relative to that, the student's largest logit and the logarithm of such a sum.
    """
    # finite: -inf - -inf would be NaN
    max_t, max_s = tl.full([], -3.0e38, tl.float32), tl.full([], -3.0e38, tl.float32)
    sum_t, sum_s = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    for first in range(0, K, BLOCK_K):
        _, z, s = load_logits(
            STUDENT, TEACHER, CENTER, row, first, stride_s, stride_t, K, BLOCK_K, HAS_CENTER, TAU_S,
            TAU_T,
        )  # fmt: skip
        before_t, before_s = max_t, max_s
        max_t, max_s = tl.maximum(max_t, tl.max(z, 0)), tl.maximum(max_s, tl.max(s, 0))
        sum_t = sum_t * tl.exp(before_t - max_t) + tl.sum(tl.exp(z - max_t), 0)
        sum_s = sum_s * tl.exp(before_s - max_s) + tl.sum(tl.exp(s - max_s), 0)
    return max_t, sum_t, max_s, tl.log(sum_s)


@jit
def softmax_pair(
    STUDENT, TEACHER, CENTER, row, first, stride_s, stride_t, max_t, sum_t, max_s, log_sum_s,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, TAU_S: tl.constexpr,
    TAU_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_K values of a row from `first`: raw teacher logits, P and -log Q; 0 beyond K."""
    t, z, s = load_logits(
        STUDENT, TEACHER, CENTER, row, first, stride_s, stride_t, K, BLOCK_K, HAS_CENTER, TAU_S,
        TAU_T,
    )  # fmt: skip
    inside = first + tl.arange(0, BLOCK_K) < K
    return t, tl.exp(z - max_t) / sum_t, tl.where(inside, log_sum_s - (s - max_s), 0.0)


@jit
def distillation_group(
    STUDENT, TEACHER, CENTER, LOSSES, PARTIAL, group, num_rows, group_rows, stride_s, stride_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, LOGIT: tl.constexpr,
    TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    """The losses of a group of rows, and the sum of their P (LOGIT: teacher logits) as the group's
    partial centre.
    """
    begin = group.to(tl.int64) * group_rows
    for row in range(begin, tl.minimum(begin + group_rows, num_rows)):
        max_t, sum_t, max_s, log_sum_s = softmax_statistics(
            STUDENT, TEACHER, CENTER, row, stride_s, stride_t, K, BLOCK_K, HAS_CENTER, TAU_S, TAU_T
        )
        loss = tl.full([], 0.0, tl.float32)
        for first in range(0, K, BLOCK_K):
            t, p, minus_log_q = softmax_pair(
                STUDENT, TEACHER, CENTER, row, first, stride_s, stride_t, max_t, sum_t, max_s,
                log_sum_s, K, BLOCK_K, HAS_CENTER, TAU_S, TAU_T,
            )  # fmt: skip
            loss += tl.sum(p * minus_log_q, 0)
            col = first + tl.arange(0, BLOCK_K)
            at = PARTIAL + group.to(tl.int64) * K + col
            total = tl.load(at, mask=(col < K) & (row > begin), other=0.0)
            tl.store(at, total + (t if LOGIT else p), mask=col < K)
        tl.store(LOSSES + row, loss)
        # the next row reads PARTIAL, perhaps in other threads
        tl.debug_barrier()


@jit
def distillation_gradient_row(
    factor, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, row, stride_s, stride_t, K: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, NEEDS_TEACHER: tl.constexpr,
    TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    """d student = factor (Q - P) / student_temp, d teacher = factor P (-log Q - loss) /
    teacher_temp.
    """
    max_t, sum_t, max_s, log_sum_s = softmax_statistics(
        STUDENT, TEACHER, CENTER, row, stride_s, stride_t, K, BLOCK_K, HAS_CENTER, TAU_S, TAU_T
    )
    loss = tl.full([], 0.0, tl.float32)
    if NEEDS_TEACHER:
        for first in range(0, K, BLOCK_K):
            _, p, minus_log_q = softmax_pair(
                STUDENT, TEACHER, CENTER, row, first, stride_s, stride_t, max_t, sum_t, max_s,
                log_sum_s, K, BLOCK_K, HAS_CENTER, TAU_S, TAU_T,
            )  # fmt: skip
            loss += tl.sum(p * minus_log_q, 0)
    for first in range(0, K, BLOCK_K):
        _, p, minus_log_q = softmax_pair(
            STUDENT, TEACHER, CENTER, row, first, stride_s, stride_t, max_t, sum_t, max_s,
            log_sum_s, K, BLOCK_K, HAS_CENTER, TAU_S, TAU_T,
        )  # fmt: skip
        col = first + tl.arange(0, BLOCK_K)
        at = row * K + col
        ds = (tl.exp(-minus_log_q) - p) * (factor / TAU_S)
        tl.store(DSTUDENT + at, ds.to(DSTUDENT.dtype.element_ty), mask=col < K)
        if NEEDS_TEACHER:
            dt = p * (minus_log_q - loss) * (factor / TAU_T)
            tl.store(DTEACHER + at, dt.to(DTEACHER.dtype.element_ty), mask=col < K)


# ---- kernels ----
@jit
def _losses_kernel(
    STUDENT, TEACHER, CENTER, LOGIT_LOSSES, PARTIAL, PRED, IMAGES, SELECT, STATS, PATCH_LOSSES,
    num_logit_rows, group_rows, groups, stride_s, stride_t, num_rows, listed, patches, grid_cols,
    pred_stride_b, pred_stride_m, stride_b, stride_c, stride_h, stride_w, K: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, LOGIT: tl.constexpr,
    TAU_S: tl.constexpr, TAU_T: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    HAS_MASK: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr, HAS_STATS: tl.constexpr,
):  # fmt: skip
    """PATCH_LOSSES[row] = mean squared difference of the patch; 0 for a visible one."""
    program = tl.program_id(0)
    if K > 0 and program < groups:
        distillation_group(
            STUDENT, TEACHER, CENTER, LOGIT_LOSSES, PARTIAL, program, num_logit_rows, group_rows,
            stride_s, stride_t, K, BLOCK_K, HAS_CENTER, LOGIT, TAU_S, TAU_T,
        )  # fmt: skip
    if P > 0 and program >= groups:
        row = (program - groups) * ROWS + tl.arange(0, ROWS)
        d = masked_difference(
            PRED, IMAGES, SELECT, STATS, row, num_rows, listed, patches, grid_cols, pred_stride_b,
            pred_stride_m, stride_b, stride_c, stride_h, stride_w, C, P, BLOCK_C, BLOCK_P, NORM,
            HAS_MASK, WIDE, EPS, HAS_STATS,
        )  # fmt: skip
        tl.store(PATCH_LOSSES + row, sum_patch(d * d) / (P * P * C), mask=row < num_rows)


@jit
def _sums_kernel(
    PATCH_LOSSES, MASK, LOGIT_LOSSES, PARTIAL, TOTAL, RECONSTRUCTION, DISTILLATION, BATCH_CENTER,
    MASKED, num_rows, num_logit_rows, groups, WEIGHT: tl.constexpr, K: tl.constexpr,
    HAS_PATCHES: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first program makes the scalars, each other one BLOCK_K values of the batch's centre."""
    program = tl.program_id(0)
    if program == 0:
        reconstruction = tl.full([], 0.0, tl.float32)
        if HAS_PATCHES:
            masked = num_rows
            if HAS_MASK:
                masked = sum_values(MASK, num_rows, BLOCK, tl.int32)
            count = tl.maximum(masked, 1).to(tl.float32)
            reconstruction = sum_values(PATCH_LOSSES, num_rows, BLOCK, tl.float32) / count
            tl.store(RECONSTRUCTION, reconstruction)
            tl.store(MASKED, count)
        if K > 0:
            distillation = sum_values(LOGIT_LOSSES, num_logit_rows, BLOCK, tl.float32)
            distillation /= tl.maximum(num_logit_rows, 1)
            tl.store(DISTILLATION, distillation)
            if HAS_PATCHES:
                tl.store(TOTAL, WEIGHT * distillation + (1.0 - WEIGHT) * reconstruction)
    elif K > 0:
        col = (program - 1) * BLOCK_K + tl.arange(0, BLOCK_K)
        sums = tl.zeros([BLOCK_G, BLOCK_K], tl.float32)
        for first in range(0, groups, BLOCK_G):
            group = first + tl.arange(0, BLOCK_G)
            wanted = (group < groups)[:, None] & (col < K)[None, :]
            at = (group.to(tl.int64) * K)[:, None] + col[None, :]
            sums += tl.load(PARTIAL + at, mask=wanted, other=0.0)
        center = tl.sum(sums, 0) / tl.maximum(num_logit_rows, 1)
        tl.store(BATCH_CENTER + col, center, mask=col < K)


@jit
def sum_values(VALUES, count, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """The sum of a vector: BLOCK running sums, then theirs."""
    sums = tl.zeros([BLOCK], dtype)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(VALUES + at, mask=at < count, other=0).to(dtype)
    return tl.sum(sums, 0)


@jit
def _losses_backward_kernel(
    TOTAL, RECONSTRUCTION, DISTILLATION, COUNT, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, PRED,
    IMAGES, SELECT, STATS, DPRED, FACTORS, num_logit_rows, stride_s, stride_t, num_rows, listed,
    patches, grid_cols, pred_stride_b, pred_stride_m, stride_b, stride_c, stride_h, stride_w,
    WEIGHT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr,
    NEEDS_TEACHER: tl.constexpr, TAU_S: tl.constexpr, TAU_T: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, HAS_MASK: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr,
    HAS_STATS: tl.constexpr, HAS_FACTORS: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HAS_RECONSTRUCTION: tl.constexpr, HAS_DISTILLATION: tl.constexpr,
):  # fmt: skip
    """DPRED = gradient * 2 (pred - target) / (V * COUNT); the target is read from the images again.
    TOTAL, RECONSTRUCTION and DISTILLATION are gradients of scalars. With HAS_FACTORS the gradient
    of each patch's loss is read from FACTORS [B,M] instead.
    """
    program = tl.program_id(0)
    if K > 0 and program < num_logit_rows:
        factor = tl.full([], 0.0, tl.float32)
        if HAS_DISTILLATION:
            factor += tl.load(DISTILLATION)
        if HAS_TOTAL:
            factor += tl.load(TOTAL) * WEIGHT
        distillation_gradient_row(
            factor / num_logit_rows, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER,
            program.to(tl.int64), stride_s, stride_t, K, BLOCK_K, HAS_CENTER, NEEDS_TEACHER, TAU_S,
            TAU_T,
        )  # fmt: skip
    if P > 0 and program >= num_logit_rows:
        row = (program - num_logit_rows) * ROWS + tl.arange(0, ROWS)
        d = masked_difference(
            PRED, IMAGES, SELECT, STATS, row, num_rows, listed, patches, grid_cols, pred_stride_b,
            pred_stride_m, stride_b, stride_c, stride_h, stride_w, C, P, BLOCK_C, BLOCK_P, NORM,
            HAS_MASK, WIDE, EPS, HAS_STATS,
        )  # fmt: skip
        if HAS_FACTORS:
            factor = tl.load(FACTORS + row, mask=row < num_rows, other=0.0).to(tl.float32)
            d *= (factor * (2.0 / (P * P * C)))[:, None, None, None]
        else:
            gradient = tl.full([], 0.0, tl.float32)
            if HAS_RECONSTRUCTION:
                gradient += tl.load(RECONSTRUCTION)
            if HAS_TOTAL:
                gradient += tl.load(TOTAL) * (1.0 - WEIGHT)
            d *= gradient * (2.0 / (P * P * C)) / tl.load(COUNT)
        store_gradient(DPRED, d, row, num_rows, C, P, BLOCK_C, BLOCK_P)


# ---- launchers ----
# Programs of the forward that take logits: enough to fill every GPU. Each leaves one partial centre
# of K numbers. Next to patches a program has few warps and must end before the patches do: it takes
# one row, as long as the partial centres have at most so many numbers.
FORWARD_GROUPS = 128
SHARED_CENTER_VALUES = 2**22
VALUES_PER_WARP = 1024


class Pixels(NamedTuple):
    """What of the pixels a kernel is compiled for; without patches, P = 0."""

    C: int = 1
    P: int = 0
    norm: str = "none"
    has_mask: bool = False
    wide: bool = False
    eps: float = 0.0
    has_stats: bool = False


class Rows(NamedTuple):
    """What of the logits a kernel is compiled for; without logits, K = 0."""

    K: int = 0
    tau_s: float = 1.0
    tau_t: float = 1.0
    has_center: bool = False


def _pixel_arguments(
    pred_BMV: Tensor, target: Target
) -> tuple[tuple[Tensor, ...], tuple[int, ...], Pixels]:
    """(pred, images, select, stats), the integers, and what the kernel is compiled for."""
    images, side = target.images, target.patch_size
    stats, has_stats = kernel_stats(images, target.stats)
    channels, height, width = images.shape[1:]
    grid_cols = width // side
    patches = height // side * grid_cols
    if pred_BMV.stride(2) != 1:
        pred_BMV = pred_BMV.contiguous()
    select = target.mask if target.ids is None else target.ids
    assert select is not None
    batch, listed = pred_BMV.shape[:2]
    _, stride_c, stride_h, stride_w = images.stride()
    span = (channels - 1) * stride_c + (side - 1) * (stride_h + stride_w)
    sizes = (batch * listed, listed, patches, grid_cols)
    kinds = (target.norm, target.ids is None, bool(span >= 2**31), target.eps, has_stats)
    tensors = (pred_BMV, images, select.contiguous(), stats)
    integers = (*sizes, *pred_BMV.stride()[:2], *images.stride())
    return tensors, integers, Pixels(int(channels), side, *kinds)


def tile_of(patch_size: int, channels: int) -> tuple[int, int]:
    """Channels and lines (or columns) that the kernels hold of a patch: powers of two."""
    return next_power_of_2(channels), next_power_of_2(patch_size)


def rows_per_program(width: int) -> tuple[int, int]:
    """Patches of `width` values (padding counts) that one program handles, and its warps.

    32 values a thread share what a thread works out about its columns, and up to 1024 values need
    no barrier: by the instructions counted for sm_90, 55 % of those of 16 values a thread in four
    warps.
    """
    return max(1, VALUES_PER_WARP // width), max(1, min(width // VALUES_PER_WARP, 16))


# Logits of each tensor that one warp holds at a time: as many registers as a warp of patches needs
LOGITS_PER_WARP = 512


def _logit_arguments(
    logits: Logits,
) -> tuple[tuple[Tensor, Tensor, Tensor], int, tuple[int, int], Rows]:
    """(student, teacher, center) as [R,K], R, the two row strides, and what the kernel is compiled
    for.
    """
    width, center = logits.student.shape[-1], logits.center
    s_RK, t_RK = (t.reshape(-1, width) for t in logits[:2])
    s_RK, t_RK = (t if t.stride(1) == 1 else t.contiguous() for t in (s_RK, t_RK))
    # without a centre the kernel does not read it
    center_K = s_RK if center is None else center.detach().reshape(-1).contiguous()
    compiled_for = Rows(int(width), logits.student_temp, logits.teacher_temp, center is not None)
    return (s_RK, t_RK, center_K), s_RK.shape[0], (s_RK.stride(0), t_RK.stride(0)), compiled_for


def _warps(width: int, shared: bool) -> int:
    """For rows of `width` logits. Alone: a row at once, up to 8 warps. In one kernel with patches,
    whose many programs need one warp: a row in up to 16 parts.
    """
    parts = -(-width // LOGITS_PER_WARP)
    return min(next_power_of_2(-(-parts // 16) if shared else parts), 8)


@functools.cache
def _constants(pixels: Pixels, logits: Rows) -> dict[str, Any]:
    """The constants of both parts, num_warps included. The wider of the two picks the warps, and a
    program takes as many patches as fill them.
    """
    block_c, block_p = tile_of(pixels.P, pixels.C) if pixels.P else (1, 1)
    rows, least = rows_per_program(block_c * block_p * block_p) if pixels.P else (1, 1)
    warps = max(least, _warps(logits.K, shared=pixels.P > 0)) if logits.K else least
    block_k = min(next_power_of_2(logits.K), LOGITS_PER_WARP * warps) if logits.K else 1
    constants: dict[str, Any] = {"C": pixels.C, "P": pixels.P}
    constants |= {"BLOCK_C": block_c, "BLOCK_P": block_p}
    constants |= {"ROWS": rows * warps // least, "NORM": NORM_CODES[pixels.norm]}
    constants |= {"HAS_MASK": pixels.has_mask, "WIDE": pixels.wide, "EPS": pixels.eps}
    constants |= {"HAS_STATS": pixels.has_stats, "K": logits.K, "BLOCK_K": block_k}
    constants |= {"TAU_S": logits.tau_s, "TAU_T": logits.tau_t, "HAS_CENTER": logits.has_center}
    return constants | {"num_warps": warps}


def _arguments(
    pred: Tensor | None, target: Target | None, logits: Logits | None
) -> tuple[tuple[Tensor, ...], list[int], tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """(student, teacher, center), R and the row strides; (pred, images, select, stats), integers;
    constants. Instead of absent tensors a kernel gets one of the others, and does not access it.
    """
    if logits is not None:
        inputs, rows, strides, of_logits = _logit_arguments(logits)
    if pred is not None and target is not None:
        tensors, integers, of_pixels = _pixel_arguments(pred, target)
    if logits is None:
        inputs, rows, strides, of_logits = (tensors[0],) * 3, 0, (0, 0), Rows()
    if pred is None:
        tensors, integers, of_pixels = (inputs[0],) * 4, (0,) * 10, Pixels()
    return inputs, [rows, *strides], tensors, integers, _constants(of_pixels, of_logits)


def launch_losses(
    pred: Tensor | None = None,
    target: Target | None = None,
    logits: Logits | None = None,
    logit: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the patches [B,M], of the rows [R], and partial centres [G,K], in fp32; without
    pred or logits theirs are undefined.
    """
    inputs, (rows, *strides), tensors, integers, constants = _arguments(pred, target, logits)
    most_groups = FORWARD_GROUPS
    if pred is not None and logits is not None:
        most_groups = max(FORWARD_GROUPS, SHARED_CENTER_VALUES // constants["K"])
    group_rows = max(1, -(-rows // most_groups))
    groups = -(-rows // group_rows)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": tensors[0].device}
    losses_BM, losses_R, partial_GK = tensors[0], inputs[0], inputs[0]
    if logits is not None:
        losses_R = torch.empty(rows, **fp32)
        partial_GK = torch.empty((groups, constants["K"]), **fp32)
    if pred is not None:
        losses_BM = torch.empty(pred.shape[:2], **fp32)
    grid = (groups + -(-integers[0] // constants["ROWS"]),)
    buffers = (*inputs, losses_R, partial_GK, *tensors, losses_BM)
    sizes = (rows, group_rows, groups, *strides, *integers)
    launch(_losses_kernel, grid, tensors[0], *buffers, *sizes, LOGIT=logit, **constants)
    return losses_BM, losses_R, partial_GK


# Few programs with many loads under way, since nothing else runs then.
SUMS_TILE: dict[str, int] = {"BLOCK": 8192, "BLOCK_G": 128, "BLOCK_K": 32, "num_warps": 16}


def launch_sums(
    losses_BM: Tensor | None = None,
    mask_BL: Tensor | None = None,
    losses_R: Tensor | None = None,
    partial_GK: Tensor | None = None,
    weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, reconstruction, distillation, batch_center [K], number of masked patches as fp32) of
    what launch_losses leaves; what needs absent losses is undefined.
    """
    some = losses_R if losses_BM is None else losses_BM
    assert some is not None
    total = reconstruction = distillation = batch_center = masked = some
    rows = logit_rows = groups = width = 0
    new: dict[str, Any] = {"dtype": torch.float32, "device": some.device}
    if losses_BM is not None:
        rows = losses_BM.numel()
        reconstruction, masked = torch.empty((), **new), torch.empty((), **new)
    if losses_R is not None and partial_GK is not None:
        logit_rows, (groups, width) = losses_R.shape[0], partial_GK.shape
        distillation, batch_center = torch.empty((), **new), torch.empty(width, **new)
        total = some if losses_BM is None else torch.empty((), **new)
    mask = None if mask_BL is None else mask_BL.contiguous()
    # absent tensors are not accessed
    inputs = [some if x is None else x for x in (losses_BM, mask, losses_R, partial_GK)]
    outputs = (total, reconstruction, distillation, batch_center, masked)
    has = {"HAS_PATCHES": losses_BM is not None, "HAS_MASK": mask_BL is not None}
    grid = (1 + -(-width // SUMS_TILE["BLOCK_K"]),)
    sizes = (rows, logit_rows, groups)
    launch(
        _sums_kernel, grid, some, *inputs, *outputs, *sizes, WEIGHT=weight, K=width, **has,
        **SUMS_TILE,
    )  # fmt: skip
    return outputs


class Scalars(NamedTuple):
    """The gradients of total, reconstruction and distillation, None = 0; the number of masked
    patches.
    """

    total: Tensor | None
    reconstruction: Tensor | None
    distillation: Tensor | None
    masked: Tensor


def launch_losses_backward(
    scalars: Scalars,
    pred: Tensor | None = None,
    target: Target | None = None,
    logits: Logits | None = None,
    weight: float = 0.0,
    needs_teacher: bool = False,
    factors_BM: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pred, student and teacher; the teacher's is empty when not needed. Without pred
    or logits theirs are undefined. factors_BM: the gradient of each patch's loss; scalars are not
    read then.
    """
    inputs, rows, tensors, integers, constants = _arguments(pred, target, logits)
    dpred, dstudent, dteacher = tensors[0], *inputs[:2]
    if pred is not None:
        dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if logits is not None:
        student, teacher = logits[:2]
        shape = teacher.shape if needs_teacher else (0,)
        dstudent = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        dteacher = torch.empty(shape, dtype=teacher.dtype, device=student.device)
    grid = (rows[0] + -(-integers[0] // constants["ROWS"]),)
    factors = tensors[0] if factors_BM is None else factors_BM.contiguous()
    given = [scalars.masked if x is None else x for x in scalars]
    buffers = (*given, *inputs, dstudent, dteacher, *tensors, dpred, factors)
    own = {"WEIGHT": weight, "NEEDS_TEACHER": needs_teacher, "HAS_FACTORS": factors_BM is not None}
    for name, x in zip(scalars._fields[:3], scalars, strict=False):
        own["HAS_" + name.upper()] = x is not None
    launch(
        _losses_backward_kernel, grid, tensors[0], *buffers, *rows, *integers, **constants, **own
    )
    return dpred, dstudent, dteacher


# ---- limits ----
def target_refusal(target: Target) -> str | None:
    """Why the kernels cannot take such patches; None when they can."""
    side, channels = target.patch_size, target.images.shape[1]
    block_c, block_p = tile_of(side, channels)
    padded = block_c * block_p * block_p
    if padded > MAX_TILE_WIDTH:
        return (
            f"a patch has {side * side * channels} values, {padded} with padding, "
            f"and the kernel holds at most {MAX_TILE_WIDTH}"
        )
    return None
