"""The kernels of masked_reconstruction_loss, distillation_loss (kind "dino") and sssd_loss.

One kernel forward and one backward. Their first programs take rows of logits, the others patches;
an op without logits or without patches starts the kernel with K = 0 or P = 0, and that part is not
compiled. The formulas are in reconstruction.py and distillation.py.

Shapes: B images, C channels, P patch side, L patches, M masked patches, V = P*P*C values per patch,
R rows of K logits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._pixels import kernel_stats, scale_pixels
from ._runtime import MAX_TILE_WIDTH, jit, launch, next_power_of_2, tl

NORM_CODES = {"none": 0, "patch": 1, "channel": 2, "channel_std": 3}
MAX_NORM_CHANNELS = 16


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
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, NORM: tl.constexpr, HAS_MASK: tl.constexpr,
    WIDE: tl.constexpr, EPS: tl.constexpr, HAS_STATS: tl.constexpr,
):  # fmt: skip
    """pred - target of some rows, fp32 [ROWS, BLOCK_P, BLOCK_W]; zeros for visible patches and
    beyond the ends.

    A patch is P lines of P*C values: what a value of a line is (channel, column) is worked out once
    for all lines and rows. SELECT holds patch ids, or with HAS_MASK the mask. NORM: 0 none, 1
    patch, 2 channel, 3 channel with EPS added to the deviation. WIDE: a patch spans 2^31 elements.
    """
    PADDED: tl.constexpr = BLOCK_P != P or BLOCK_W != P * C
    line, place = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    channel = place % C
    real = ((line < P)[:, None] & (place < P * C)[None, :])[None, :, :]
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
        line_at = line.to(tl.int64) * stride_h
        place_at = channel.to(tl.int64) * stride_c + (place // C).to(tl.int64) * stride_w
    else:
        line_at = line * stride_h
        place_at = channel * stride_c + place // C * stride_w
    pointers = (IMAGES + corner)[:, None, None] + (line_at[:, None] + place_at[None, :])[None, :, :]
    x = tl.load(pointers, mask=(chosen & in_range)[:, None, None] & real, other=0)
    x = scale_pixels(x, STATS, channel[None, None, :], C, HAS_STATS)
    if PADDED:
        x = tl.where(real, x, 0.0)
    # by row: the gradient and loss of a visible patch are exactly 0, those of an id out of range
    # NaN
    keep = tl.where(chosen, tl.where(in_range, 1.0, float("nan")), 0.0)
    if NORM == 0:
        x = tl.where(chosen[:, None, None], x, 0.0) + (keep - keep)[:, None, None]
    if NORM == 1:
        x = x - (sum_patch(x) / (P * P * C))[:, None, None]
        if PADDED:
            x = tl.where(real, x, 0.0)
        x = x * (keep / tl.sqrt(sum_patch(x * x) / (P * P * C - 1) + EPS))[:, None, None]
    if NORM >= 2:
        for c in tl.static_range(C):
            own = real & (channel == c)[None, None, :]
            x = tl.where(own, x - (sum_patch(tl.where(own, x, 0.0)) / (P * P))[:, None, None], x)
            variance = sum_patch(tl.where(own, x * x, 0.0)) / (P * P - 1)
            deviation = tl.sqrt(variance + EPS) if NORM == 2 else tl.sqrt(variance) + EPS
            x = tl.where(own, x * (keep / deviation)[:, None, None], x)
    at = image.to(tl.int64) * pred_stride_b + place_of_row.to(tl.int64) * pred_stride_m
    inside = line[:, None] * (P * C) + place[None, :]
    pointers = (PRED + at)[:, None, None] + inside[None, :, :]
    pred = tl.load(pointers, mask=chosen[:, None, None] & real, other=0.0)
    return pred.to(tl.float32) - x


@jit
def sum_patch(x):
    """[ROWS]: the sum of each row of [ROWS, BLOCK_P, BLOCK_W]."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]]), 1)


@jit
def store_gradient(
    DPRED, d, row, num_rows, C: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rows of [ROWS, BLOCK_P, BLOCK_W] to the contiguous DPRED [B,M,V]."""
    line, place = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    real = (line < P)[:, None] & (place < P * C)[None, :]
    inside = line[:, None] * (P * C) + place[None, :]
    pointers = (DPRED + row.to(tl.int64) * (P * P * C))[:, None, None] + inside[None, :, :]
    wanted = (row < num_rows)[:, None, None] & real[None, :, :]
    tl.store(pointers, d.to(DPRED.dtype.element_ty), mask=wanted)


# ---- logits ----
@jit
def softmax_pair(
    STUDENT, TEACHER, CENTER, row, stride_s, stride_t, K: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_CENTER: tl.constexpr, TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    """Raw teacher logits, P, -log Q (0 beyond K) and the loss of one row, in fp32."""
    col = tl.arange(0, BLOCK_K)
    inside = col < K
    t = tl.load(TEACHER + row * stride_t + col, mask=inside, other=0.0).to(tl.float32)
    z = t
    if HAS_CENTER:
        z = t - tl.load(CENTER + col, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z / TAU_T, float("-inf"))
    p = tl.exp(z - tl.max(z, 0))
    p = p / tl.sum(p, 0)
    s = tl.load(STUDENT + row * stride_s + col, mask=inside, other=0.0).to(tl.float32)
    s = tl.where(inside, s / TAU_S, float("-inf"))
    s = s - tl.max(s, 0)
    minus_log_q = tl.where(inside, tl.log(tl.sum(tl.exp(s), 0)) - s, 0.0)
    return t, p, minus_log_q, tl.sum(p * minus_log_q, 0)


@jit
def distillation_group(
    STUDENT, TEACHER, CENTER, LOSSES, PARTIAL, group, num_rows, group_rows, stride_s, stride_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, LOGIT: tl.constexpr,
    TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    """The losses of a group of rows, and the sum of their P (LOGIT: teacher logits) as the group's
    partial centre.
    """
    col = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    first = group.to(tl.int64) * group_rows
    for row in range(first, tl.minimum(first + group_rows, num_rows)):
        t, p, _, loss = softmax_pair(
            STUDENT, TEACHER, CENTER, row, stride_s, stride_t, K, BLOCK_K, HAS_CENTER, TAU_S, TAU_T
        )
        tl.store(LOSSES + row, loss)
        if LOGIT:
            total += t
        else:
            total += p
    tl.store(PARTIAL + group.to(tl.int64) * K + col, total, mask=col < K)


@jit
def distillation_gradient_row(
    factor, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, row, stride_s, stride_t, K: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, NEEDS_TEACHER: tl.constexpr,
    TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    """d student = factor (Q - P) / student_temp, d teacher = factor P (-log Q - loss) /
    teacher_temp.
    """
    _, p, minus_log_q, loss = softmax_pair(
        STUDENT, TEACHER, CENTER, row, stride_s, stride_t, K, BLOCK_K, HAS_CENTER, TAU_S, TAU_T
    )
    col = tl.arange(0, BLOCK_K)
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
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
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
            pred_stride_m, stride_b, stride_c, stride_h, stride_w, C, P, BLOCK_P, BLOCK_W, NORM,
            HAS_MASK, WIDE, EPS, HAS_STATS,
        )  # fmt: skip
        tl.store(PATCH_LOSSES + row, sum_patch(d * d) / (P * P * C), mask=row < num_rows)


@jit
def _losses_backward_kernel(
    TOTAL, RECONSTRUCTION, DISTILLATION, COUNT, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, PRED,
    IMAGES, SELECT, STATS, DPRED, FACTORS, num_logit_rows, stride_s, stride_t, num_rows, listed,
    patches, grid_cols, pred_stride_b, pred_stride_m, stride_b, stride_c, stride_h, stride_w,
    WEIGHT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr,
    NEEDS_TEACHER: tl.constexpr, TAU_S: tl.constexpr, TAU_T: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, HAS_MASK: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr,
    HAS_STATS: tl.constexpr, HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    """DPRED = gradient * 2 (pred - target) / (V * COUNT); the target is read from the images again.
    The gradients of both losses, of TOTAL only with logits and patches. With HAS_FACTORS the
    gradient of each patch's loss is read from FACTORS [B,M] instead of the scalars.
    """
    program = tl.program_id(0)
    if K > 0 and program < num_logit_rows:
        factor = tl.load(DISTILLATION)
        if P > 0:
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
            pred_stride_m, stride_b, stride_c, stride_h, stride_w, C, P, BLOCK_P, BLOCK_W, NORM,
            HAS_MASK, WIDE, EPS, HAS_STATS,
        )  # fmt: skip
        if HAS_FACTORS:
            factor = tl.load(FACTORS + row, mask=row < num_rows, other=0.0).to(tl.float32)
            d *= (factor * (2.0 / (P * P * C)))[:, None, None]
        else:
            gradient = tl.load(RECONSTRUCTION)
            if K > 0:
                gradient += tl.load(TOTAL) * (1.0 - WEIGHT)
            d *= gradient * (2.0 / (P * P * C)) / tl.load(COUNT)
        store_gradient(DPRED, d, row, num_rows, C, P, BLOCK_P, BLOCK_W)


# ---- launchers ----
# Programs of the forward: enough to fill every GPU; each leaves one partial centre of K numbers
FORWARD_GROUPS = 128
VALUES_PER_WARP = 1024


def _pixel_arguments(
    pred_BMV: Tensor, target: Target
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """(pred, images, select, stats), the integers, and the constants num_warps included."""
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
    block_p, block_w = tile_of(side, channels)
    rows, warps = rows_per_program(pred_BMV.device, block_p * block_w)
    if target.norm.startswith("channel"):
        # one channel at a time needs more registers: half as many values a thread
        rows, warps = (rows // 2, warps) if rows > 1 else (1, min(2 * warps, 16))
    _, stride_c, stride_h, stride_w = images.stride()
    span = (channels - 1) * stride_c + (side - 1) * (stride_h + stride_w)
    sizes = (batch * listed, listed, patches, grid_cols)
    constants: dict[str, Any] = {"C": channels, "P": side, "BLOCK_P": block_p, "BLOCK_W": block_w}
    constants |= {"ROWS": rows, "NORM": NORM_CODES[target.norm], "HAS_MASK": target.ids is None}
    constants |= {"WIDE": span >= 2**31, "EPS": target.eps, "HAS_STATS": has_stats}
    constants["num_warps"] = warps
    tensors = (pred_BMV, images, select.contiguous(), stats)
    return tensors, (*sizes, *pred_BMV.stride()[:2], *images.stride()), constants


def tile_of(patch_size: int, channels: int) -> tuple[int, int]:
    """Lines and values of a line that the kernels hold of a patch: powers of two."""
    return next_power_of_2(patch_size), next_power_of_2(patch_size * channels)


def rows_per_program(device: torch.device, width: int) -> tuple[int, int]:
    """Patches of `width` values (padding counts) that one program handles, and its warps.

    32 values a thread share what a thread works out about its columns, and up to 1024 values need
    no barrier: by the instructions counted for sm_90, 55 % of those of 16 values a thread in four
    warps.
    """
    return max(1, VALUES_PER_WARP // width), max(1, min(width // VALUES_PER_WARP, 16))


def warps_for(block: int) -> int:
    """One row of logits in the registers of so many warps."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def _logit_arguments(
    logits: Logits,
) -> tuple[tuple[Tensor, Tensor, Tensor], int, tuple[int, int], dict[str, Any]]:
    """(student, teacher, center) as [R,K], R, the two row strides, and the constants, num_warps
    included.
    """
    width, center = logits.student.shape[-1], logits.center
    s_RK, t_RK = (t.reshape(-1, width) for t in logits[:2])
    s_RK, t_RK = (t if t.stride(1) == 1 else t.contiguous() for t in (s_RK, t_RK))
    # without a centre the kernel does not read it
    center_K = s_RK if center is None else center.detach().reshape(-1).contiguous()
    constants: dict[str, Any] = {"K": width, "BLOCK_K": next_power_of_2(width)}
    constants |= {"TAU_S": logits.student_temp, "TAU_T": logits.teacher_temp}
    constants |= {"HAS_CENTER": center is not None, "num_warps": warps_for(constants["BLOCK_K"])}
    return (s_RK, t_RK, center_K), s_RK.shape[0], (s_RK.stride(0), t_RK.stride(0)), constants


def _constants(pixels: dict[str, Any], logits: dict[str, Any]) -> dict[str, Any]:
    """Both parts' constants; the wider of the two picks the warps, and a program takes as many
    patches as fill them.
    """
    warps = max(pixels["num_warps"], logits["num_warps"])
    rows = pixels["ROWS"] * warps // pixels["num_warps"]
    return {**pixels, **logits, "num_warps": warps, "ROWS": rows}


NO_LOGITS: dict[str, Any] = {"K": 0, "BLOCK_K": 1, "TAU_S": 1.0, "TAU_T": 1.0}
NO_LOGITS |= {"HAS_CENTER": False, "num_warps": 1}
NO_PATCHES: dict[str, Any] = {"C": 1, "P": 0, "BLOCK_P": 1, "BLOCK_W": 1, "ROWS": 1, "NORM": 0}
NO_PATCHES |= {"HAS_MASK": False, "WIDE": False, "EPS": 0.0, "HAS_STATS": False, "num_warps": 1}


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
        inputs, rows, strides, of_logits = (tensors[0],) * 3, 0, (0, 0), NO_LOGITS
    if pred is None:
        tensors, integers, of_pixels = (inputs[0],) * 4, (0,) * 10, NO_PATCHES
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
    group_rows = max(1, -(-rows // FORWARD_GROUPS))
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


class Scalars(NamedTuple):
    """The gradients of total, reconstruction and distillation; the number of masked patches."""

    total: Tensor
    reconstruction: Tensor
    distillation: Tensor
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
    buffers = (*scalars, *inputs, dstudent, dteacher, *tensors, dpred, factors)
    constants |= {"WEIGHT": weight, "NEEDS_TEACHER": needs_teacher}
    constants["HAS_FACTORS"] = factors_BM is not None
    launch(_losses_backward_kernel, grid, tensors[0], *buffers, *rows, *integers, **constants)
    return dpred, dstudent, dteacher


# ---- limits ----
def target_refusal(target: Target) -> str | None:
    """Why the kernels cannot take such patches; None when they can."""
    side, channels = target.patch_size, target.images.shape[1]
    lines, places = tile_of(side, channels)
    if lines * places > MAX_TILE_WIDTH:
        return (
            f"a patch has {side * side * channels} values, {lines * places} with padding, "
            f"and the kernel holds at most {MAX_TILE_WIDTH}"
        )
    if target.norm.startswith("channel") and channels > MAX_NORM_CHANNELS:
        return f"norm {target.norm!r} is compiled for up to {MAX_NORM_CHANNELS} channels"
    return None


def logits_refusal(logits: Logits) -> str | None:
    """Why the kernels cannot take such rows; None when they can."""
    width = logits.student.shape[-1]
    if next_power_of_2(width) > MAX_TILE_WIDTH:
        return f"a row has {width} logits and the kernel holds at most {MAX_TILE_WIDTH}"
    return None
