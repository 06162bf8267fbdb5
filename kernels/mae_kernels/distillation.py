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

from typing import Any, Literal, NamedTuple, get_args

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


class Logits(NamedTuple):
    """Both rows of logits [..., K], and what they are shifted and divided by."""

    student: Tensor
    teacher: Tensor
    center: Tensor | None
    student_temp: float
    teacher_temp: float


# ---- reference ----
def reference(logits: Logits, kind: str, center_mode: str) -> tuple[Tensor, Tensor | None]:
    student, teacher, center, student_temp, teacher_temp = logits
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


@jit
def _distillation_kernel(
    STUDENT, TEACHER, CENTER, LOSSES, PARTIAL, num_rows, group_rows, stride_s, stride_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, LOGIT: tl.constexpr,
    TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    distillation_group(
        STUDENT, TEACHER, CENTER, LOSSES, PARTIAL, tl.program_id(0), num_rows, group_rows, stride_s,
        stride_t, K, BLOCK_K, HAS_CENTER, LOGIT, TAU_S, TAU_T,
    )  # fmt: skip


@jit
def _distillation_backward_kernel(
    GRAD, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, num_rows, stride_s, stride_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CENTER: tl.constexpr, NEEDS_TEACHER: tl.constexpr,
    TAU_S: tl.constexpr, TAU_T: tl.constexpr,
):  # fmt: skip
    factor = tl.load(GRAD) / num_rows
    distillation_gradient_row(
        factor, STUDENT, TEACHER, CENTER, DSTUDENT, DTEACHER, tl.program_id(0).to(tl.int64),
        stride_s, stride_t, K, BLOCK_K, HAS_CENTER, NEEDS_TEACHER, TAU_S, TAU_T,
    )  # fmt: skip


# ---- launchers ----
# Programs of the forward: enough to fill every GPU in the table; each leaves one partial
# centre of K numbers
FORWARD_GROUPS = 128


def warps_for(block: int) -> int:
    """One row of logits in the registers of so many warps."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def logit_arguments(
    logits: Logits,
) -> tuple[tuple[Tensor, Tensor, Tensor], int, tuple[int, int], dict[str, Any]]:
    """(student, teacher, center) as [R,K], R, the two row strides, and the constants of the kernels
    above.
    """
    width, center = logits.student.shape[-1], logits.center
    s_RK, t_RK = (t.reshape(-1, width) for t in logits[:2])
    s_RK, t_RK = (t if t.stride(1) == 1 else t.contiguous() for t in (s_RK, t_RK))
    # without a centre the kernel does not read it
    center_K = s_RK if center is None else center.detach().reshape(-1).contiguous()
    constants: dict[str, Any] = {"K": width, "BLOCK_K": next_power_of_2(width)}
    constants |= {"TAU_S": logits.student_temp, "TAU_T": logits.teacher_temp}
    constants |= {"HAS_CENTER": center is not None}
    return (s_RK, t_RK, center_K), s_RK.shape[0], (s_RK.stride(0), t_RK.stride(0)), constants


def empty_gradients(logits: Logits, needs_teacher: bool) -> tuple[Tensor, Tensor]:
    """For student and teacher, contiguous; the teacher's is empty when not needed."""
    student, teacher = logits[:2]
    shape = teacher.shape if needs_teacher else (0,)
    dstudent = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    return dstudent, torch.empty(shape, dtype=teacher.dtype, device=student.device)


def groups_of(rows: int) -> tuple[int, int]:
    """(number of groups, rows in each) that the forward cuts its rows into."""
    group_rows = max(1, -(-rows // FORWARD_GROUPS))
    return -(-rows // group_rows), group_rows


def empty_partial(logits: Logits, rows: int) -> tuple[int, int, Tensor, Tensor]:
    """Groups, rows of a group; memory for the losses [R] and the groups' partial centres [G,K]."""
    groups, group_rows = groups_of(rows)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": logits.student.device}
    partial_GK = torch.empty((groups, logits.student.shape[-1]), **fp32)
    return groups, group_rows, torch.empty(rows, **fp32), partial_GK


def _launch_distillation(logits: Logits, logit: bool) -> tuple[Tensor, Tensor]:
    tensors, rows, strides, constants = logit_arguments(logits)
    groups, group_rows, losses_R, partial_GK = empty_partial(logits, rows)
    constants |= {"LOGIT": logit, "num_warps": warps_for(constants["BLOCK_K"])}
    arguments = (*tensors, losses_R, partial_GK, rows, group_rows, *strides)
    launch(_distillation_kernel, (groups,), losses_R, *arguments, **constants)
    return losses_R.sum() / max(rows, 1), partial_GK.sum(0) / max(rows, 1)


def _launch_distillation_backward(
    grad: Tensor, logits: Logits, needs_teacher: bool
) -> tuple[Tensor, Tensor]:
    tensors, rows, strides, constants = logit_arguments(logits)
    gradients = empty_gradients(logits, needs_teacher)
    constants |= {"NEEDS_TEACHER": needs_teacher, "num_warps": warps_for(constants["BLOCK_K"])}
    arguments = (grad, *tensors, *gradients, rows, *strides)
    launch(_distillation_backward_kernel, (rows,), grad, *arguments, **constants)
    return gradients


# ---- registration ----
def refusal(width: int) -> str | None:
    """Why the kernels cannot take rows of so many logits; None when they can."""
    if next_power_of_2(width) > MAX_TILE_WIDTH:
        return f"a row has {width} logits and the kernel holds at most {MAX_TILE_WIDTH}"
    return None


def gradients(grad: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """The formula of distillation_gradient_row in plain torch."""
    student, teacher, center, student_temp, teacher_temp = logits
    acc = accumulate_dtype(student, teacher)
    z = teacher.to(acc) if center is None else teacher.to(acc) - center.detach().flatten().to(acc)
    p = F.softmax(z / teacher_temp, dim=-1)
    log_q = F.log_softmax(student.to(acc) / student_temp, dim=-1)
    loss = -(p * log_q).sum(-1, keepdim=True)
    factor = grad / max(student.numel() // student.shape[-1], 1)
    ds = (log_q.exp() - p) * (factor / student_temp)
    dt = p * (-log_q - loss) * (factor / teacher_temp)
    return ds.to(student.dtype), dt.to(teacher.dtype)


def dino_reference(logits: Logits, logit: bool) -> tuple[Tensor, Tensor]:
    loss, batch_center = reference(logits, "dino", "logit" if logit else "prob")
    assert batch_center is not None  # for "dino" it never is
    return loss, batch_center


def _use_triton(student: Tensor, teacher: Tensor) -> bool:
    op, refused = "distillation_loss", refusal(student.shape[-1])
    return use_triton(op, student.device, student.dtype, teacher.dtype, refused=refused)


@triton_op("mae_kernels::distillation_loss", mutates_args=())
def _distillation_op(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    logit: bool,
) -> tuple[Tensor, Tensor]:
    """Kind "dino": (loss, batch_center)."""
    logits = Logits(student, teacher, center, student_temp, teacher_temp)
    launcher = _launch_distillation if _use_triton(student, teacher) else dino_reference
    return launcher(logits, logit)


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
    logits = Logits(student, teacher, center, student_temp, teacher_temp)
    if _use_triton(student, teacher):
        return _launch_distillation_backward(grad, logits, needs_teacher)
    dstudent, dteacher = gradients(grad, logits)
    return dstudent, dteacher if needs_teacher else dteacher.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.student_temp, ctx.teacher_temp, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    needs_teacher = ctx.needs_input_grad[1]
    logits = (*ctx.saved_tensors, ctx.student_temp, ctx.teacher_temp)
    dstudent, dteacher = _distillation_backward_op(grad, *logits, needs_teacher)
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
    logits = Logits(student, teacher, center, student_temp, teacher_temp)
    logits = check_distillation(logits, kind, center_mode, detach_teacher)
    if kind != "dino":
        refused = f"only kind 'dino' has kernels, and this is {kind!r}"
        use_triton("distillation_loss", student.device, refused=refused)
    if kind != "dino" or wants_reference(student):
        return reference(logits, kind, center_mode)
    loss, batch_center = _distillation_op(*logits, center_mode == "logit")
    return loss, batch_center


def check_distillation(logits: Logits, kind: str, center_mode: str, detach_teacher: bool) -> Logits:
    """The checks of every op with a distillation loss; temperatures as floats, the teacher perhaps
    detached.
    """
    student, teacher, center, student_temp, teacher_temp = logits
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
    teacher = teacher.detach() if detach_teacher else teacher
    return Logits(student, teacher, center, float(student_temp), float(teacher_temp))


# ---- samples ----
def _sample(size: Size, name: str, rows: int, logits: int, center: bool, **options: Any) -> Sample:
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
