"""Self-distillation loss between student and teacher logits (or features).

    kind "dino":      P = softmax((teacher - center) / teacher_temp), Q = softmax(student / student_temp)
                      loss = mean over rows of -sum_k P_k log Q_k
    kind "cosine":    loss = mean over rows of 1 - cos(student, teacher)
    kind "mse":       loss = mean over all elements of (student - teacher)^2
    kind "smooth_l1": loss = mean over all elements of the smooth L1 distance, beta = 1

    batch_center ("dino" only) = mean over rows of P (center_mode "prob", SD-MAE) or of the raw teacher logits
    (center_mode "logit", DINO). It is what a running centre is updated with; it carries no gradient.

Source: Caron et al., DINO, arXiv 2104.14294, equation 2 and section 3.1; Luo et al., SD-MAE, arXiv 2203.16983, for
"prob" and for letting the gradient reach the teacher; "cosine" as in SdAE, arXiv 2208.00449.

Shapes: [..., K]: any leading dimensions (rows), K logits or features.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._checks import check_choice, check_floating, check_positive, check_same_device, check_shape
from ._pixels import accumulate_dtype
from ._runtime import use_triton

KINDS = ("dino", "cosine", "mse", "smooth_l1")
CENTER_MODES = ("prob", "logit")


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "dino",
    center: Tensor | None = None,
    center_mode: str = "prob",
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    detach_teacher: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Loss that pulls the student towards the teacher, and the batch statistic that updates the centre.

    Args:
        student, teacher: [..., K] floating point, the same shape.
        kind: "dino", "cosine", "mse" or "smooth_l1".
        center: [K], or any shape that flattens to it such as [1, K]; subtracted from the teacher ("dino" only).
        center_mode: what batch_center holds, "prob" or "logit" ("dino" only).
        student_temp, teacher_temp: temperatures ("dino" only).
        detach_teacher: stop the gradient to the teacher.

    Returns: (loss, batch_center): a scalar fp32 (fp64 for fp64 input), 0 when there are no rows; batch_center is [K] of
    the same dtype without a gradient for "dino", None for the other kinds. Gradients reach student and teacher.

    Raises: TypeError or ValueError naming the argument.
    """
    check_distillation(student, teacher, kind, center, center_mode, student_temp, teacher_temp)
    use_triton("distillation_loss", student.device)
    if detach_teacher:
        teacher = teacher.detach()
    return reference(student, teacher, kind, center, center_mode, student_temp, teacher_temp)


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
        raise ValueError(f"student: got shape {tuple(student.shape)}, needs [..., K] with K of at least 1")
    check_shape("teacher", teacher, tuple(student.shape), "the student's shape")
    check_same_device("teacher", teacher, "student", student)
    if center is not None:
        if kind != "dino":
            raise ValueError(f"center: got a tensor with kind {kind!r}, needs kind 'dino' (or center=None)")
        check_floating("center", center)
        if center.numel() != student.shape[-1]:
            raise ValueError(f"center: got shape {tuple(center.shape)}, needs K = {student.shape[-1]} numbers")
        check_same_device("center", center, "student", student)


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
