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

On a GPU "dino" is one kernel, and a small one that adds up what its programs leave in a fixed
order; the backward makes both softmaxes again from the logits, so nothing but the inputs is kept.
The other kinds are plain torch everywhere.

Shapes: [..., K]: any leading dimensions (rows), K logits or features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_choice, check_floating, check_positive, check_same_device, check_shape
from ._loss_kernels import (
    Logits,
    Scalars,
    launch_losses,
    launch_losses_backward,
    launch_sums,
)
from ._pixels import accumulate_dtype
from ._runtime import flat, triton_op, use_triton, wants_reference
from ._samples import Draw, Made, Sample, Size, declares

Kind = Literal["dino", "cosine", "mse", "smooth_l1"]
CenterMode = Literal["prob", "logit"]
KINDS = get_args(Kind)
CENTER_MODES = get_args(CenterMode)


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


def dino_reference(logits: Logits, logit: bool) -> tuple[Tensor, Tensor]:
    loss, batch_center = reference(logits, "dino", "logit" if logit else "prob")
    assert batch_center is not None  # for "dino" it never is
    return loss, batch_center


def gradients(grad: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """The formula of the kernel in plain torch."""
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


# ---- registration ----
def _use_triton(logits: Logits) -> bool:
    (student, teacher), op = logits[:2], "distillation_loss"
    return use_triton(op, student.device, student.dtype, teacher.dtype)


@triton_op("mae_kernels::distillation_loss", mutates_args=())
@flat
def _distillation_op(logits: Logits, logit: bool) -> tuple[Tensor, Tensor]:
    """Kind "dino": (loss, batch_center)."""
    if _use_triton(logits):
        _, losses_R, partial_GK = launch_losses(logits=logits, logit=logit)
        return launch_sums(losses_R=losses_R, partial_GK=partial_GK)[2:4]
    return dino_reference(logits, logit)


@triton_op("mae_kernels::distillation_loss_backward", mutates_args=())
@flat
def _distillation_backward_op(
    grad: Tensor, logits: Logits, needs_teacher: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of student and teacher; the teacher's is empty when not needed."""
    if _use_triton(logits):
        scalars = Scalars(None, None, grad, grad)
        return launch_losses_backward(scalars, logits=logits, needs_teacher=needs_teacher)[1:]
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


@torch.no_grad()
def sinkhorn_center(
    teacher: Tensor,
    teacher_temp: float = 0.04,
    *,
    iterations: int = 3,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The centre with which softmax((teacher - center) / teacher_temp) is the Sinkhorn-Knopp
    assignment of the rows to prototypes.

    Sinkhorn-Knopp scales the columns of exp(teacher / teacher_temp) to equal sums, then its rows to
    sums of 1, and repeats this. The logarithm of a column's scale, times -teacher_temp, is the
    centre; the last scaling of the rows is the softmax. With `detach_teacher=True` and this
    `center`, distillation_loss and sssd_loss compute the loss of SwAV (Caron et al., arXiv
    2006.09882, section 3.1) in their kernels.

    Args:
        teacher: [..., K] floating point logits.
        teacher_temp: temperature, the same as in the loss.
        iterations: scalings of columns and rows (SwAV and DINOv2: 3).
        reduce: sums a float64 tensor over processes and returns it; None = one process.

    Returns: [K] fp32 (fp64 for fp64 input) without a gradient.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> teacher = torch.randn(8, 4)
        >>> center = sinkhorn_center(teacher, 1.0, iterations=50)
        >>> (teacher - center).softmax(-1).sum(0)
        tensor([2.0000, 2.0000, 2.0000, 2.0000])
    """
    check_floating("teacher", teacher)
    check_positive("teacher_temp", teacher_temp)
    if teacher.ndim < 1 or teacher.shape[-1] < 1:
        shape = tuple(teacher.shape)
        raise ValueError(f"teacher: got shape {shape}, needs [..., K] with K of at least 1")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: got {iterations!r}, needs an integer of at least 1")
    acc = accumulate_dtype(teacher)
    z_RK = teacher.reshape(-1, teacher.shape[-1]).to(acc) / teacher_temp
    rows_R = z_RK.new_zeros(z_RK.shape[0])
    columns_K = z_RK.new_zeros(z_RK.shape[1])
    for _ in range(iterations):
        sums_K = torch.logsumexp(z_RK + rows_R[:, None], 0)
        if reduce is not None:
            # exp in float64: logits / temperature of up to 700 do not overflow
            sums_K = reduce(sums_K.double().exp()).log().to(acc)
        columns_K = -sums_K
        rows_R = -torch.logsumexp(z_RK + columns_K, 1)
    return columns_K * -teacher_temp


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
    shape = tuple(student.shape)
    if not shape or shape[-1] < 1:
        raise ValueError(f"student: got shape {shape}, needs [..., K] with K of at least 1")
    check_shape("teacher", teacher, shape, "the student's shape")
    check_same_device("teacher", teacher, "student", student)
    if center is not None:
        if kind != "dino":
            needs = "needs kind 'dino' (or center=None)"
            raise ValueError(f"center: got a tensor with kind {kind!r}, {needs}")
        check_floating("center", center)
        if center.numel() != shape[-1]:
            got = f"got shape {tuple(center.shape)}"
            raise ValueError(f"center: {got}, needs K = {shape[-1]} numbers")
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
    """Both modes of the centre, with and without one; rows in one part and in several; the 65536
    logits of DINO.
    """
    return [
        _sample("small", "41", 2, 41, True),
        _sample("small", "1500 logit", 1, 1500, False, center_mode="logit", detach_teacher=True),
        _sample("small", "5000", 1, 5000, True),
        _sample("model", "4096", 1, 4096, True),
        _sample("model", "65536", 1, 65536, True),
    ]
