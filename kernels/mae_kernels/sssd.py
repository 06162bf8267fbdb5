"""The SSSD objective: reconstruction and self-distillation together.

    total = weight * distillation + (1 - weight) * reconstruction

Source: Tan et al., Computer Methods and Programs in Biomedicine 243 (2024) 107876 (abstract); Luo
et al., SD-MAE, arXiv 2203.16983, for the form and weight = 0.2. The two terms are
masked_reconstruction_loss and distillation_loss.

On a GPU, with kind "dino", both terms are one kernel launch forward and one backward: the first
programs take rows of logits, the others patches. A second, small launch of the forward adds up
what the programs leave, in a fixed order. Nothing but the inputs and the number of masked patches
is kept for the backward.

Shapes: B images, M masked patches, V = P*P*C values per patch, R rows of K logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import distillation as _distillation
from . import reconstruction as _reconstruction
from ._checks import check_floating, check_same_device
from ._loss_kernels import (
    Logits,
    Scalars,
    Target,
    launch_losses,
    launch_losses_backward,
    launch_sums,
    target_refusal,
)
from ._pixels import Numbers
from ._runtime import flat, triton_op, use_triton, wants_reference
from ._samples import CT_16, RGB_16, Case, Draw, Made, Sample, Size, declares
from .distillation import CenterMode, Kind, distillation_loss
from .reconstruction import Norm, masked_reconstruction_loss


# ---- registration ----
def _use_triton(pred: Tensor, target: Target, logits: Logits) -> bool:
    dtypes = (pred.dtype, target.images.dtype, logits.student.dtype, logits.teacher.dtype)
    return use_triton("sssd_loss", pred.device, *dtypes, refused=target_refusal(target))


@triton_op("mae_kernels::sssd_loss", mutates_args=())
@flat
def _sssd_op(
    pred: Tensor, target: Target, logits: Logits, logit: bool, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kind "dino": (total, reconstruction, distillation, batch_center, masked patches)."""
    if _use_triton(pred, target, logits):
        losses_BM, losses_R, partial_GK = launch_losses(pred, target, logits, logit)
        return launch_sums(losses_BM, target.mask, losses_R, partial_GK, weight)
    losses_BM = _reconstruction.difference(pred, target).square().mean(2)
    loss, batch_center = _distillation.dino_reference(logits, logit)
    reconstruction, count = _reconstruction.finish(losses_BM, target.mask)
    return weight * loss + (1 - weight) * reconstruction, reconstruction, loss, batch_center, count


@triton_op("mae_kernels::sssd_loss_backward", mutates_args=())
@flat
def _sssd_backward_op(
    scalars: Scalars,
    pred: Tensor,
    target: Target,
    logits: Logits,
    weight: float,
    needs_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pred, student and teacher; the teacher's is empty when not needed."""
    if _use_triton(pred, target, logits):
        return launch_losses_backward(scalars, pred, target, logits, weight, needs_teacher)
    d_BMV = _reconstruction.difference(pred, target)
    total, reconstruction, distillation = (
        d_BMV.new_zeros(()) if x is None else x for x in scalars[:3]
    )
    factor = reconstruction + total * (1 - weight)
    dpred = (d_BMV * (factor * 2 / (scalars.masked * d_BMV.shape[2]))).to(pred.dtype)
    dstudent, dteacher = _distillation.gradients(distillation + total * weight, logits)
    return dpred, dstudent, dteacher if needs_teacher else dteacher.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.target_options, ctx.temps, ctx.weight = inputs[5:8], inputs[11:13], inputs[14]
    ctx.save_for_backward(output[4], *inputs[:5], *inputs[8:11])
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    count, pred, *tensors = ctx.saved_tensors
    target, logits = (*tensors[:4], *ctx.target_options), (*tensors[4:], *ctx.temps)
    needs_teacher = ctx.needs_input_grad[9]
    dpred, dstudent, dteacher = _sssd_backward_op(
        *grads[:3], count, pred, *target, *logits, ctx.weight, needs_teacher
    )
    return dpred, *[None] * 7, dstudent, dteacher if needs_teacher else None, *[None] * 5


_sssd_op.register_autograd(_backward, setup_context=_setup)


# ---- public ----
class SSSDLoss(NamedTuple):
    """total, reconstruction and distillation are scalars; batch_center [K] or None, without a
    gradient.
    """

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
    norm: Norm = "patch",
    eps: float = 1e-6,
    mean: Numbers = None,
    std: Numbers = None,
    kind: Kind = "dino",
    center: Tensor | None = None,
    center_mode: CenterMode = "prob",
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    detach_teacher: bool = False,
) -> SSSDLoss:
    """weight * distillation + (1 - weight) * reconstruction, and the two losses.

    Args:
        pred, images, ids, mask, patch_size, norm, eps, mean, std: as in masked_reconstruction_loss.
        student, teacher, kind, center, center_mode, student_temp, teacher_temp, detach_teacher: as
            in distillation_loss.
        weight: of the distillation loss, between 0 and 1.

    Returns: SSSDLoss(total, reconstruction, distillation, batch_center). Each of the three scalars
    is differentiable. With a kind other than "dino" the two losses are the two ops, one after the
    other.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> images, masking = torch.rand(8, 3, 32, 32), random_masking(torch.rand(8, 16), 4)
        >>> pred, student, teacher = torch.rand(8, 12, 192), torch.rand(8, 64), torch.rand(8, 64)
        >>> ids = masking.ids_masked
        >>> losses = sssd_loss(pred, images, student, teacher, ids=ids, patch_size=8, weight=0.2)
        >>> want = 0.2 * losses.distillation + 0.8 * losses.reconstruction
        >>> torch.allclose(losses.total, want)
        True
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight: got {type(weight).__name__}, needs a Python number")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: got {weight}, needs a number between 0 and 1")
    if kind == "dino" and not wants_reference(pred):
        check_floating("pred", pred)
        target = _reconstruction.check_target(images, ids, mask, patch_size, norm, eps, mean, std)
        _reconstruction.check_predictions(pred, target)
        logits = Logits(student, teacher, center, student_temp, teacher_temp)
        logits = _distillation.check_distillation(logits, kind, center_mode, detach_teacher)
        check_same_device("student", student, "pred", pred)
        out = _sssd_op(pred, *target, *logits, center_mode == "logit", float(weight))
        return SSSDLoss(*out[:4])
    pixels: dict[str, Any] = {"patch_size": patch_size, "norm": norm, "eps": eps}
    pixels |= {"mean": mean, "std": std}
    reconstruction = masked_reconstruction_loss(pred, images, ids=ids, mask=mask, **pixels)
    options: dict[str, Any] = {"kind": kind, "center": center, "center_mode": center_mode}
    options |= {"student_temp": student_temp, "teacher_temp": teacher_temp}
    options["detach_teacher"] = detach_teacher
    distillation, batch_center = distillation_loss(student, teacher, **options)
    total = weight * distillation + (1 - weight) * reconstruction
    return SSSDLoss(total, reconstruction, distillation, batch_center)


# ---- samples ----
def _sample(size: Size, name: str, case: Case, logits: int) -> Sample:
    def make(draw: Draw) -> Made:
        tensors, options, listed = case.target(draw)
        tensors["pred"] = draw.normal(draw.batch, listed, case.values)
        tensors["student"] = draw.normal(draw.batch, logits)
        tensors["teacher"] = draw.normal(draw.batch, logits)
        tensors["center"] = draw.normal(logits, dtype=torch.float32)
        return tensors, options

    gradients, bad = ("pred", "student", "teacher"), case.out_of_range
    return Sample("sssd_loss", name, sssd_loss, make, gradients, size, out_of_range=bad)


@declares("sssd_loss")
def samples() -> list[Sample]:
    """Rows of logits in one part and in several, both selections; ViT/16 at 224."""
    grey = Case(1, (15, 25), 5, select="mask")
    return [
        _sample("small", "rgb", Case(3, (21, 35), 7), 41),
        _sample("small", "grey mask", grey, 600),
        _sample("model", "rgb", RGB_16, 4096),
        _sample("model", "ct", CT_16, 4096),
    ]
