"""Self-distillation loss between student and teacher logits (or features).

    kind "dino":      P = softmax((teacher - center) / teacher_temp)
                      Q = softmax(student / student_temp)
                      loss = mean over rows of -sum_k P_k log Q_k
    kind "cosine":    loss = mean over rows of 1 - cos(student, teacher)
    kind "mse":       loss = mean over all elements of (student - teacher)^2
    kind "smooth_l1": loss = mean over all elements of the smooth L1 distance, beta = 1

    batch_center ("dino" only) = mean over rows of P (center_mode "prob", SD-MAE) or of the raw
    teacher logits (center_mode "logit", DINO). It is what a running centre is updated with; it
    carries no gradient.

Source: Caron et al., DINO, arXiv 2104.14294, equation 2 and section 3.1; Luo et al., SD-MAE, arXiv
2203.16983, for "prob" and for letting the gradient reach the teacher; "cosine" as in SdAE, arXiv
2208.00449.

On a GPU "dino" is one kernel and the sums of what its programs leave, in a fixed order; the
backward makes both softmaxes again from the logits, so nothing but the inputs is kept. The other
kinds are plain torch everywhere.

Shapes: [..., K]: any leading dimensions (rows), K logits or features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from ._checks import check_choice, check_floating, check_positive, check_same_device, check_shape
from ._pixels import accumulate_dtype
from ._runtime import MAX_TILE_WIDTH, jit, launch, next_power_of_2, tl, use_triton, wants_reference
from ._samples import Draw, Made, Sample, Size, declares

Kind = Literal["dino", "cosine", "mse", "smooth_l1"]
CenterMode = Literal["prob", "logit"]
KINDS = get_args(Kind)
CENTER_MODES = get_args(CenterMode)


# ---- reference ----
def reference(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    center: Tensor | None,
    center_mode: str,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor | None]:
    acc = accumulate_dtype(student, teacher)
    s_RK, t_RK = (t.reshape(-1, student.shape[-1]).to(acc) for t in (student, teacher))
    rows = max(s_RK.shape[0], 1)
    if kind == "dino":
        centred_RK = t_RK if center is None else t_RK - center.detach().flatten().to(acc)
        p_RK = F.softmax(centred_RK / teacher_temp, dim=-1)
        log_q_RK = F.log_softmax(s_RK / student_temp, dim=-1)
        loss = -(p_RK * log_q_RK).sum() / rows
        return loss, (p_RK if center_mode == "prob" else t_RK).detach().sum(0) / rows
    if kind == "cosine":
        return (1 - F.cosine_similarity(s_RK, t_RK, dim=-1)).sum() / rows, None
    if kind == "mse":
        return (s_RK - t_RK).square().sum() / (rows * s_RK.shape[1]), None
    return F.smooth_l1_loss(s_RK, t_RK, reduction="sum") / (rows * s_RK.shape[1]), None


# ---- kernels ----
@jit
def softmax_pair(
    STUDENT, TEACHER, CENTER, row, stride_s, stride_t, K: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_CENTER: tl.constexpr, STUDENT_TEMP: tl.constexpr, TEACHER_TEMP: tl.constexpr,
):  # fmt: skip
    """Raw teacher logits, P, -log Q (0 beyond K) and the loss of one row, in fp32."""
    col = tl.arange(0, BLOCK_K)
    inside = col < K
    t = tl.load(TEACHER + row * stride_t + col, mask=inside, other=0.0).to(tl.float32)
    z = t
    if HAS_CENTER:
        z = t - tl.load(CENTER + col, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z / TEACHER_TEMP, float("-inf"))
    p = tl.exp(z - tl.max(z, 0))
    p = p / tl.sum(p, 0)
    s = tl.load(STUDENT + row * stride_s + col, mask=inside, other=0.0).to(tl.float32)
    s = tl.where(inside, s / STUDENT_TEMP, float("-inf"))
    s = s - tl.max(s, 0)
    minus_log_q = tl.where(inside, tl.log(tl.sum(tl.exp(s), 0)) - s, 0.0)
    return t, p, minus_log_q, tl.sum(p * minus_log_q, 0)


@jit
def distillation_group(
    STUDENT, TEACHER, CENTER, LOSSES, PARTIAL, group, num_rows, group_rows, stride_s, stride_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, LOGIT: tl.constexpr,
    STUDENT_TEMP: tl.constexpr, TEACHER_TEMP: tl.constexpr,
):  # fmt: skip
    """The losses of a group of rows, and the sum of their P (LOGIT: teacher logits) as the group's
    partial centre.
    """
    col = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    first = group.to(tl.int64) * group_rows
    for row in range(first, tl.minimum(first + group_rows, num_rows)):
        t, p, _, loss = softmax_pair(
            STUDENT,
            TEACHER,
            CENTER,
            row,
            stride_s,
            stride_t,
            K,
            BLOCK_K,
            HAS_CENTER,
            STUDENT_TEMP,
            TEACHER_TEMP,
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
    STUDENT_TEMP: tl.constexpr, TEACHER_TEMP: tl.constexpr,
):  # fmt: skip
    """d student = factor (Q - P) / student_temp, d teacher = factor P (-log Q - loss) /
    teacher_temp.
    """
    _, p, minus_log_q, loss = softmax_pair(
        STUDENT,
        TEACHER,
        CENTER,
        row,
        stride_s,
        stride_t,
        K,
        BLOCK_K,
        HAS_CENTER,
        STUDENT_TEMP,
        TEACHER_TEMP,
    )
    col = tl.arange(0, BLOCK_K)
    at = row * K + col
    ds = (tl.exp(-minus_log_q) - p) * (factor / STUDENT_TEMP)
    tl.store(DSTUDENT + at, ds.to(DSTUDENT.dtype.element_ty), mask=col < K)
    if NEEDS_TEACHER:
        dt = p * (minus_log_q - loss) * (factor / TEACHER_TEMP)
        tl.store(DTEACHER + at, dt.to(DTEACHER.dtype.element_ty), mask=col < K)


@jit
def _distillation_kernel(
    STUDENT, TEACHER, CENTER, LOSSES, PARTIAL, num_rows, group_rows, stride_s, stride_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, LOGIT: tl.constexpr,
    STUDENT_TEMP: tl.constexpr, TEACHER_TEMP: tl.constexpr,
):  # fmt: skip
    distillation_group(
        STUDENT, TEACHER, CENTER, LOSSES, PARTIAL, tl.program_id(0), num_rows, group_rows, stride_s,
        stride_t, K, BLOCK_K, HAS_CENTER, LOGIT, STUDENT_TEMP, TEACHER_TEMP,
    )  # fmt: skip


@jit
def _distillation_backward_kernel(
    GRAD, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, num_rows, stride_s, stride_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, NEEDS_TEACHER: tl.constexpr,
    STUDENT_TEMP: tl.constexpr, TEACHER_TEMP: tl.constexpr,
):  # fmt: skip
    factor = tl.load(GRAD) / num_rows
    distillation_gradient_row(
        factor, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, tl.program_id(0).to(tl.int64),
        stride_s, stride_t, K, BLOCK_K, HAS_CENTER, NEEDS_TEACHER, STUDENT_TEMP, TEACHER_TEMP,
    )  # fmt: skip


# ---- launchers ----
# Programs of the forward: enough to fill every GPU in the table; each leaves one partial
# centre of K numbers
FORWARD_GROUPS = 128


def warps_for(block: int) -> int:
    """One row of logits in the registers of so many warps."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def logit_arguments(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], int, tuple[int, int], dict[str, Any]]:
    """(student, teacher, center) as [R,K], R, the two row strides, and the constants of the kernels
    above.
    """
    width = student.shape[-1]
    s_RK, t_RK = (t.reshape(-1, width) for t in (student, teacher))
    s_RK, t_RK = (t if t.stride(1) == 1 else t.contiguous() for t in (s_RK, t_RK))
    centre = (
        s_RK if center is None else center.detach().reshape(-1).contiguous()
    )  # not read when there is none
    constants = {
        "K": width, "BLOCK_K": next_power_of_2(width), "HAS_CENTER": center is not None,
        "STUDENT_TEMP": student_temp, "TEACHER_TEMP": teacher_temp,
    }  # fmt: skip
    return (s_RK, t_RK, centre), s_RK.shape[0], (s_RK.stride(0), t_RK.stride(0)), constants


def groups_of(rows: int) -> tuple[int, int]:
    """(number of groups, rows in each) that the forward cuts its rows into."""
    group_rows = max(1, -(-rows // FORWARD_GROUPS))
    return -(-rows // group_rows), group_rows


def _launch_distillation(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    logit: bool,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor]:
    tensors, rows, strides, constants = logit_arguments(
        student, teacher, center, student_temp, teacher_temp
    )
    groups, group_rows = groups_of(rows)
    losses_R = torch.empty(rows, dtype=torch.float32, device=student.device)
    partial_GK = torch.empty(
        (groups, student.shape[-1]), dtype=torch.float32, device=student.device
    )
    constants |= {"LOGIT": logit, "num_warps": warps_for(constants["BLOCK_K"])}
    arguments = (*tensors, losses_R, partial_GK, rows, group_rows, *strides)
    launch(_distillation_kernel, (groups,), student, *arguments, **constants)
    return losses_R.sum() / max(rows, 1), partial_GK.sum(0) / max(rows, 1)


def _launch_distillation_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    needs_teacher: bool,
) -> tuple[Tensor, Tensor]:
    tensors, rows, strides, constants = logit_arguments(
        student, teacher, center, student_temp, teacher_temp
    )
    dstudent = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    dteacher = torch.empty(
        teacher.shape if needs_teacher else (0,), dtype=teacher.dtype, device=student.device
    )
    constants |= {"NEEDS_TEACHER": needs_teacher, "num_warps": warps_for(constants["BLOCK_K"])}
    arguments = (grad, *tensors, dstudent, dteacher, rows, *strides)
    launch(_distillation_backward_kernel, (rows,), student, *arguments, **constants)
    return dstudent, dteacher


# ---- registration ----
def refusal(width: int) -> str | None:
    """Why the kernels cannot take rows of so many logits; None when they can."""
    if next_power_of_2(width) > MAX_TILE_WIDTH:
        return f"a row has {width} logits and the kernel holds at most {MAX_TILE_WIDTH}"
    return None


def gradients(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor]:
    """The formula of distillation_gradient_row in plain torch."""
    acc = accumulate_dtype(student, teacher)
    z = teacher.to(acc) if center is None else teacher.to(acc) - center.detach().flatten().to(acc)
    p = F.softmax(z / teacher_temp, dim=-1)
    log_q = F.log_softmax(student.to(acc) / student_temp, dim=-1)
    loss = -(p * log_q).sum(-1, keepdim=True)
    factor = grad / max(student.numel() // student.shape[-1], 1)
    ds = (log_q.exp() - p) * (factor / student_temp)
    dt = p * (-log_q - loss) * (factor / teacher_temp)
    return ds.to(student.dtype), dt.to(teacher.dtype)


def _use_triton(student: Tensor, teacher: Tensor) -> bool:
    op, refused = "distillation_loss", refusal(student.shape[-1])
    return use_triton(op, student.device, student.dtype, teacher.dtype, refused=refused)


@triton_op("mae_kernels::distillation_loss", mutates_args=())
def _distillation_op(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    logit: bool,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor]:
    """Kind "dino": (loss, batch_center)."""
    if _use_triton(student, teacher):
        return _launch_distillation(student, teacher, center, logit, student_temp, teacher_temp)
    loss, batch_center = reference(
        student, teacher, "dino", center, "logit" if logit else "prob", student_temp, teacher_temp
    )
    assert batch_center is not None  # for "dino" it never is
    return loss, batch_center


@triton_op("mae_kernels::distillation_loss_backward", mutates_args=())
def _distillation_backward_op(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    needs_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of student and teacher; the teacher's is empty when not needed."""
    if _use_triton(student, teacher):
        return _launch_distillation_backward(
            grad, student, teacher, center, student_temp, teacher_temp, needs_teacher
        )
    dstudent, dteacher = gradients(grad, student, teacher, center, student_temp, teacher_temp)
    return dstudent, dteacher if needs_teacher else dteacher.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, center, _, *ctx.temps = inputs
    ctx.save_for_backward(student, teacher, center)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    needs_teacher = ctx.needs_input_grad[1]
    dstudent, dteacher = _distillation_backward_op(
        grad, *ctx.saved_tensors, *ctx.temps, needs_teacher
    )
    return dstudent, dteacher if needs_teacher else None, None, None, None, None


_distillation_op.register_autograd(_backward, setup_context=_setup)


# ---- public ----
def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Kind = "dino",
    center: Tensor | None = None,
    center_mode: CenterMode = "prob",
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    detach_teacher: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """-sum P log Q, or another distance of student and teacher, and the statistic that updates the
    centre.

    Args:
        student, teacher: [..., K] floating point, the same shape.
        kind: "dino", "cosine", "mse" or "smooth_l1".
        center: [K], or any shape that flattens to it such as [1, K]; subtracted from the teacher
        ("dino" only).
        center_mode: what batch_center holds, "prob" or "logit" ("dino" only).
        student_temp, teacher_temp: temperatures ("dino" only).
        detach_teacher: stop the gradient to the teacher.

    Returns: (loss, batch_center): a scalar fp32 (fp64 for fp64 input), 0 when there are no rows;
    batch_center is [K] of the same dtype without a gradient for "dino", None for the other kinds.
    Gradients reach student and teacher.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> loss, batch_center = distillation_loss(torch.rand(8, 64), torch.rand(8, 64))
        >>> batch_center.shape
        torch.Size([64])
    """
    check_distillation(student, teacher, kind, center, center_mode, student_temp, teacher_temp)
    if detach_teacher:
        teacher = teacher.detach()
    temps = float(student_temp), float(teacher_temp)
    if kind != "dino":
        use_triton(
            "distillation_loss",
            student.device,
            refused=f"only kind 'dino' has kernels, and this is {kind!r}",
        )
    if kind != "dino" or wants_reference(student):
        return reference(student, teacher, kind, center, center_mode, *temps)
    loss, batch_center = _distillation_op(student, teacher, center, center_mode == "logit", *temps)
    return loss, batch_center


def check_distillation(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    center: Tensor | None,
    center_mode: str,
    student_temp: float,
    teacher_temp: float,
) -> None:
    check_floating("student", student)
    check_floating("teacher", teacher)
    check_choice("kind", kind, KINDS)
    check_choice("center_mode", center_mode, CENTER_MODES)
    check_positive("student_temp", student_temp)
    check_positive("teacher_temp", teacher_temp)
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(
            f"student: got shape {tuple(student.shape)}, needs [..., K] with K of at least 1"
        )
    check_shape("teacher", teacher, tuple(student.shape), "the student's shape")
    check_same_device("teacher", teacher, "student", student)
    if center is not None:
        if kind != "dino":
            raise ValueError(
                f"center: got a tensor with kind {kind!r}, needs kind 'dino' (or center=None)"
            )
        check_floating("center", center)
        if center.numel() != student.shape[-1]:
            raise ValueError(
                f"center: got shape {tuple(center.shape)}, needs K = {student.shape[-1]} numbers"
            )
        check_same_device("center", center, "student", student)


# ---- samples ----
def _sample(size: Size, name: str, rows: int, logits: int, center: bool, **options: Any) -> Sample:
    """`rows` per image."""

    def make(draw: Draw) -> Made:
        tensors = {
            "student": draw.normal(draw.batch, rows, logits),
            "teacher": draw.normal(draw.batch, rows, logits),
            "center": draw.normal(logits, dtype=torch.float32) if center else None,
        }
        return tensors, options

    gradients = ("student",) if options.get("detach_teacher") else ("student", "teacher")
    return Sample("distillation_loss", name, distillation_loss, make, gradients, size)


@declares("distillation_loss")
def samples() -> list[Sample]:
    """One row per program and several, both modes of the centre, with and without one; 4096 and
    65536 / 4 logits.
    """
    return [
        _sample("small", "41", 2, 41, True),
        _sample("small", "1500 logit", 50, 1500, False, center_mode="logit", detach_teacher=True),
        _sample("model", "4096", 1, 4096, True),
        _sample("model", "16384", 1, 16384, True),
    ]
