"""Prediction head and reconstruction loss together.

    pred = hidden . weight^T + bias
    loss = masked_reconstruction_loss(pred, images, ids=ids, ...)

Source: He et al., arXiv 2111.06377, section 3: the decoder's last layer is a linear projection to
P*P*C pixel values.

Neither the predictions nor their gradient exist at full size: the batch is cut into CHUNKS parts,
and each part's predictions, loss and gradients are made and dropped before the next. A batch that
is symbolic or smaller than CHUNKS is cut by masked patches instead. The gradients of hidden, weight
and bias are made in the forward, up to the factor that only the backward knows, and are what is
kept for it. Above the inputs, forward and backward hold two gradients of hidden, two parts
(predictions and their gradient), and a few copies of the weight.

Shapes: B images, M masked patches, D decoder width, V = P*P*C values per patch, (row, column,
channel).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_floating, check_same_device, check_shape, check_vector
from ._loss_kernels import Scalars, Target, launch_losses, launch_losses_backward, target_refusal
from ._pixels import Numbers, accumulate_dtype
from ._runtime import flat, no_autocast, product_dtype, triton_op, use_triton, wants_reference
from ._samples import CT_16, RGB_16, Case, Draw, Made, Sample, Size, declares
from .reconstruction import Norm, check_target, difference
from .reconstruction import reference as loss_reference

CHUNKS = 8
# Gradients are kept for d(loss)/d(pred) = KEPT_SCALE * (pred - target), which neither overflows nor
# vanishes in fp16
KEPT_SCALE = 1 / 64


# ---- reference ----
def reference(
    hidden_BMD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target: Target, dtype: torch.dtype
) -> Tensor:
    bias_V = None if bias_V is None else bias_V.to(dtype)
    return loss_reference(_predict(hidden_BMD.to(dtype), weight_VD.to(dtype), bias_V), target)


def _predict(hidden_BMD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    with no_autocast(hidden_BMD.device):
        return F.linear(hidden_BMD, weight_VD, bias_V)


# ---- registration ----
@triton_op("mae_kernels::linear_reconstruction_loss", mutates_args=())
@flat
def _linear_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of hidden, weight and bias up to a factor (empty when not needed);
    the target has ids.
    """
    ids, device = target.ids, hidden.device
    assert ids is not None
    dtypes = (hidden.dtype, weight.dtype, target.images.dtype, dtype)
    refused = target_refusal(target)
    triton = use_triton("linear_reconstruction_loss", device, *dtypes, refused=refused)
    acc = accumulate_dtype(hidden, weight, target.images)
    w_VD, b_V = weight.to(dtype), None if bias is None else bias.to(dtype)
    unit = torch.ones((), dtype=acc, device=device)
    # the backward of the loss multiplies by 2 grad / (V count)
    grad = torch.full((), KEPT_SCALE * weight.shape[0] / 2, dtype=acc, device=device)
    scalars = Scalars(None, grad, None, unit)
    losses = []
    shapes = [hidden.shape, weight.shape, weight.shape[:1]] if needs_grad else [(0,)] * 3
    dhidden_BMD = torch.empty(shapes[0], dtype=hidden.dtype, device=device)
    dweight_VD, dbias_V = (torch.zeros(shape, dtype=acc, device=device) for shape in shapes[1:])
    # Parts of the batch are views. A symbolic batch cannot be counted and a small one not cut: then
    # parts of the masked patches, copied, since of strided slices torch would make B products.
    cut = 0 if isinstance(ids.shape[0], int) and ids.shape[0] >= CHUNKS else 1
    chunks = max(1, min(CHUNKS, ids.shape[cut]))
    for i in range(chunks):
        first, last = (ids.shape[cut] * j // chunks for j in (i, i + 1))
        part = (cut, first, last - first)
        h_BMD = hidden.narrow(*part)
        h_ND = h_BMD.to(dtype).flatten(0, 1)  # N = B * M of this part
        pred_BMV = _predict(h_ND, w_VD, b_V).unflatten(0, h_BMD.shape[:2])
        images = target.images.narrow(*part) if cut == 0 else target.images
        chunk = target._replace(images=images, ids=ids.narrow(*part))
        if triton:
            losses.append(launch_losses(pred_BMV, chunk)[0])
            dpred_BMV = None
            if needs_grad:
                dpred_BMV = launch_losses_backward(scalars, pred_BMV, chunk)[0]
        else:
            d_BMV = difference(pred_BMV, chunk)
            losses.append(d_BMV.square().mean(2))
            dpred_BMV = (KEPT_SCALE * d_BMV).to(dtype) if needs_grad else None
        if dpred_BMV is not None:
            dpred_NV = dpred_BMV.flatten(0, 1)
            with no_autocast(device):
                dhidden_BMD.narrow(*part).copy_((dpred_NV @ w_VD).view(h_BMD.shape))
                dweight_VD = dweight_VD + dpred_NV.t() @ h_ND
            dbias_V = dbias_V + dpred_NV.sum(0, dtype=acc)
            del dpred_NV
        del h_BMD, h_ND, pred_BMV, dpred_BMV  # before the next part's are made
    loss = torch.cat(losses, cut).sum() / max(ids.numel(), 1)
    return loss, dhidden_BMD, dweight_VD, dbias_V


@triton_op("mae_kernels::linear_reconstruction_loss_backward", mutates_args=())
def _linear_backward_op(
    grad: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, masked: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept gradients times what was missing: 2 grad / (KEPT_SCALE * V * number of masked
    patches); autograd casts them.
    """
    factor = (grad * (2 / KEPT_SCALE) / (dweight.shape[0] * max(masked, 1))).reshape(1)
    # with `out` a GPU multiplies in fp32 and writes hidden's dtype, and no fp32 copy of the
    # gradient exists
    scaled = torch.mul(dhidden, factor, out=torch.empty_like(dhidden))
    return scaled, dweight * factor, dbias * factor


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ids = inputs[4]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
    ctx.masked = ids.shape[0] * ids.shape[1]


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    dhidden, dweight, dbias = _linear_backward_op(grad, *ctx.saved_tensors, ctx.masked)
    return dhidden, dweight, dbias if ctx.needs_input_grad[2] else None, *[None] * 9


_linear_op.register_autograd(_backward, setup_context=_setup)


# ---- public ----
def linear_reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids: Tensor,
    *,
    patch_size: int,
    norm: Norm = "patch",
    eps: float = 1e-6,
    mean: Numbers = None,
    std: Numbers = None,
) -> Tensor:
    """masked_reconstruction_loss(hidden weight^T + bias, images, ids=ids), without the predictions
    in memory. The product is in the autocast dtype under autocast, else in hidden's.

    Args:
        hidden: [B, M, D] decoder tokens of the masked patches.
        weight: [V, D] and bias: [V] or None, the prediction head; V = P*P*C, (row, column,
        channel).
        images, ids, patch_size, norm, eps, mean, std: as in masked_reconstruction_loss.

    Returns: scalar fp32 (fp64 for fp64 input); 0 when M = 0. Gradients reach hidden, weight and
    bias.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> images, masking = torch.rand(2, 3, 32, 32), random_masking(torch.rand(2, 16), 4)
        >>> hidden, weight, bias = torch.rand(2, 12, 24), torch.rand(192, 24), torch.zeros(192)
        >>> ids = masking.ids_masked
        >>> loss = linear_reconstruction_loss(hidden, weight, bias, images, ids, patch_size=8)
        >>> pred = hidden @ weight.T + bias
        >>> same = masked_reconstruction_loss(pred, images, ids=ids, patch_size=8)
        >>> torch.allclose(loss, same)
        True
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    target = check_target(images, ids, None, patch_size, norm, eps, mean, std)
    batch, channels = images.shape[:2]
    values = patch_size * patch_size * channels
    check_shape("hidden", hidden, (batch, ids.shape[1], None), "[B, M, D]")
    check_shape("weight", weight, (values, hidden.shape[2]), "[P*P*C, D]")
    for name, tensor in (("images", images), ("weight", weight)):
        check_same_device(name, tensor, "hidden", hidden)
    check_vector("bias", bias, values, "[P*P*C]", "hidden", hidden)
    dtype = product_dtype(hidden.device, hidden.dtype)
    if wants_reference(hidden):
        return reference(hidden, weight, bias, target, dtype)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    return _linear_op(hidden, weight, bias, *target, dtype, needs_grad)[0]


# ---- samples ----
def _sample(size: Size, name: str, case: Case, width: int, bias: bool = True) -> Sample:
    def make(draw: Draw) -> Made:
        tensors, options, masked = case.target(draw)
        tensors["hidden"] = draw.normal(draw.batch, masked, width)
        tensors["weight"] = draw.normal(case.values, width, scale=width**-0.5)
        tensors["bias"] = draw.normal(case.values) if bias else None
        return tensors, options

    gradients = ("hidden", "weight", "bias") if bias else ("hidden", "weight")
    op, call, bad = "linear_reconstruction_loss", linear_reconstruction_loss, case.out_of_range
    return Sample(op, name, call, make, gradients, size, out_of_range=bad)


@declares("linear_reconstruction_loss")
def samples() -> list[Sample]:
    """Fewer and more patches than parts, with and without a bias; MAE's decoder at 224."""
    return [
        _sample("small", "19", Case(1, (15, 25), 5), 19),
        _sample("small", "64 without bias", Case(3, (8, 12), 4), 64, bias=False),
        _sample("model", "decoder rgb", RGB_16, 512),
        _sample("model", "decoder ct", CT_16, 512),
    ]
