"""The SSSD objective: reconstruction and self-distillation together.

    total = weight * distillation + (1 - weight) * reconstruction

Source: Tan et al., Computer Methods and Programs in Biomedicine 243 (2024) 107876 (abstract); Luo et al., SD-MAE,
arXiv 2203.16983, for the form and weight = 0.2. The two terms are masked_reconstruction_loss and distillation_loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._runtime import use_triton
from .distillation import distillation_loss
from .reconstruction import masked_reconstruction_loss

Numbers = float | Sequence[float] | None


class SSSDLoss(NamedTuple):
    """total, reconstruction and distillation are scalars; batch_center [K] or None, without a gradient."""

    total: Tensor
    reconstruction: Tensor
    distillation: Tensor
    batch_center: Tensor | None


def sssd_loss(
    pred: Tensor,
    images: Tensor,
    student: Tensor,
    teacher: Tensor,
    *,
    weight: float = 0.2,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    patch_size: int,
    norm: str | None = "patch",
    eps: float = 1e-6,
    mean: Numbers = None,
    std: Numbers = None,
    kind: str = "dino",
    center: Tensor | None = None,
    center_mode: str = "prob",
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    detach_teacher: bool = False,
) -> SSSDLoss:
    """Both losses of SSSD and their weighted sum.

    Args:
        pred, images, ids, mask, patch_size, norm, eps, mean, std: as in masked_reconstruction_loss.
        student, teacher, kind, center, center_mode, student_temp, teacher_temp, detach_teacher: as in
            distillation_loss.
        weight: of the distillation loss, between 0 and 1.

    Returns: SSSDLoss(total, reconstruction, distillation, batch_center). Each of the three scalars is differentiable.

    Raises: TypeError or ValueError naming the argument.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight: got {type(weight).__name__}, needs a Python number")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: got {weight}, needs a number between 0 and 1")
    use_triton("sssd_loss", pred.device)
    reconstruction = masked_reconstruction_loss(
        pred, images, ids=ids, mask=mask, patch_size=patch_size, norm=norm, eps=eps, mean=mean, std=std
    )
    distillation, batch_center = distillation_loss(
        student,
        teacher,
        kind=kind,
        center=center,
        center_mode=center_mode,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        detach_teacher=detach_teacher,
    )
    total = weight * distillation + (1 - weight) * reconstruction
    return SSSDLoss(total, reconstruction, distillation, batch_center)
