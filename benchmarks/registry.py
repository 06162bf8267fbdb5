"""Every op with its inputs, its cost by formula, and all who compute it. kernels.py measures what stands here.

Bytes: every input that must be read and every result that must be written, once; FLOPs: those of matrix products, 2 per
multiply-add. What a provider moves or computes beyond that is its own affair.

Shapes: as in shapes.py; F = 4 D hidden width of an MLP, p = 1 prefix token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mae_kernels as mk

from . import eager
from .measure import tensors
from .shapes import Shape

Inputs = dict[str, Tensor]
IDS, FP32 = 8, 4  # bytes


@dataclass(frozen=True)
class Cost:
    """Of one call; backward alone, not with the forward."""

    forward_bytes: float
    backward_bytes: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0


@dataclass(frozen=True)
class Provider:
    """call: the results, the first of which is differentiated. leaves: what gradients are taken of, where that differs from the op's.

    own: turns the gradients of those leaves into those of the op's.
    """

    call: Callable[[Shape, Inputs], Any]
    leaves: tuple[str, ...] | None = None
    own: Callable[[Inputs, list[Tensor]], list[Tensor]] | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Op:
    name: str
    make: Callable[[Shape, torch.device], Inputs]  # floating point in fp32; `floats` are then cast
    leaves: tuple[str, ...]
    cost: Callable[[Shape, int, Inputs], Cost]  # int: bytes of a value
    providers: dict[str, Provider]
    floats: tuple[str, ...] = ()  # inputs of the measured dtype, beside the leaves
    absent: dict[str, str] = field(default_factory=dict)  # provider -> why there is none
    tolerance: float | None = None  # of the largest value, in place of the rule of measure.allowed_error
    exact: str = "published"  # the provider whose results in fp64 are the truth


def with_compiled(providers: dict[str, Provider]) -> dict[str, Provider]:
    """`tuned compiled` and `ours compiled` after what they compile."""
    out: dict[str, Provider] = {}
    for name, provider in providers.items():
        out[name] = provider
        if name in ("tuned", "ours"):
            out[f"{name} compiled"] = Provider(provider.call, provider.leaves, provider.own, compiled=True)
    return out


# ---- inputs ----


def _pixels(s: Shape, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (s.batch, s.channels, *s.image), dtype=torch.uint8, device=device)


def _noise(s: Shape, device: torch.device) -> Tensor:
    """Uniform ranks without a tie, which sorts that are not stable would break in their own way."""
    order = torch.rand(s.batch, s.patches, device=device).argsort(1)
    return (order.float() + 0.5) / s.patches


def _ids(s: Shape, device: torch.device) -> Inputs:
    ids_keep, ids_restore, ids_masked, mask = eager.tuned_masking(_noise(s, device), s.keep)
    ids = {"ids_keep": ids_keep, "ids_restore": ids_restore, "ids_masked": ids_masked, "mask": mask}
    return {name: t.contiguous() for name, t in ids.items()}


def _normal(*shape: int, device: torch.device, fan_in: int = 1) -> Tensor:
    return torch.randn(shape, device=device) / math.sqrt(fan_in)


def _stats(s: Shape) -> dict[str, Any]:
    return {"mean": list(eager.MEAN[: s.channels]), "std": list(eager.STD[: s.channels])}


def _of_masked(name: str) -> Callable[[Inputs, list[Tensor]], list[Tensor]]:
    """The first gradient is one of all patches: the masked rows of it, where the others must be 0, and the rest as it is."""

    def own(x: Inputs, gradients: list[Tensor]) -> list[Tensor]:
        picked = eager.rows(gradients[0], x["ids_masked"])
        return [picked, *gradients[1:]]

    return own


# ---- masking, patches, tokens ----


def _masking_op() -> Op:
    return Op(
        "random_masking",
        lambda s, device: {"noise": _noise(s, device)},
        (),
        lambda s, b, x: Cost(s.batch * (FP32 * s.patches + IDS * 2 * s.patches + s.patches)),
        with_compiled(
            {
                "published": Provider(lambda s, x: eager.published_masking(x["noise"], s.keep)),
                "tuned": Provider(lambda s, x: eager.tuned_masking(x["noise"], s.keep)),
                "ours": Provider(lambda s, x: mk.random_masking(x["noise"], s.keep)),
            }
        ),
        absent={"library": "torch.argsort is what the others call"},
    )


def _gather_op() -> Op:
    def ours(s: Shape, x: Inputs) -> Tensor:
        return mk.gather_patches(x["images"], x["ids_keep"], s.patch, dtype=x["like"].dtype, **_stats(s))

    return Op(
        "gather_patches",
        lambda s, device: {"images": _pixels(s, device), "like": torch.zeros((), device=device), **_ids(s, device)},
        (),
        lambda s, b, x: Cost(s.batch * s.keep * (IDS + s.values * (1 + b))),
        with_compiled(
            {
                "published": Provider(
                    lambda s, x: eager.published_gather(x["images"], x["ids_keep"], s, x["like"].dtype)
                ),
                "tuned": Provider(lambda s, x: eager.tuned_gather(x["images"], x["ids_keep"], s, x["like"].dtype)),
                "library": Provider(lambda s, x: eager.unfold_gather(x["images"], x["ids_keep"], s, x["like"].dtype)),
                "ours": Provider(ours),
            }
        ),
        floats=("like",),
    )


def _embed_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        weight = _normal(s.width, s.channels, s.patch, s.patch, device=device, fan_in=s.values)
        rest = {"bias": _normal(s.width, device=device), "pos": _normal(s.patches, s.width, device=device)}
        return {"images": _pixels(s, device), **_ids(s, device), "weight": weight, **rest}

    def plain(function: Callable[..., Tensor]) -> Provider:
        return Provider(lambda s, x: function(x["images"], x["ids_keep"], x["weight"], x["bias"], x["pos"], s))

    def ours(s: Shape, x: Inputs) -> Tensor:
        return mk.embed_patches(x["images"], x["ids_keep"], x["weight"], x["bias"], x["pos"], **_stats(s))

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        pixels, tokens = s.batch * s.keep * (s.values + IDS), s.batch * s.keep * s.width * b
        weights = (s.values + 1 + s.patches) * s.width * b
        flops = 2.0 * s.batch * s.keep * s.values * s.width
        return Cost(pixels + tokens + weights, pixels + tokens + weights, flops, flops)

    return Op(
        "embed_patches",
        make,
        ("weight", "bias", "pos"),
        cost,
        with_compiled(
            {"published": plain(eager.published_embed), "tuned": plain(eager.tuned_embed), "ours": Provider(ours)}
        ),
        absent={"library": "F.conv2d is what the published code calls"},
    )


def _restore_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        return {
            **_ids(s, device),
            "visible": _normal(s.batch, 1 + s.keep, s.decoder, device=device),
            "mask_token": _normal(s.decoder, device=device),
            "pos": _normal(1 + s.patches, s.decoder, device=device),
        }

    def plain(function: Callable[..., Tensor]) -> Provider:
        return Provider(lambda s, x: function(x["visible"], x["ids_restore"], x["mask_token"], x["pos"]))

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        visible, all_ = (s.batch * n * s.decoder * b for n in (1 + s.keep, 1 + s.patches))
        ids, pos, mask = s.batch * s.patches * IDS, (1 + s.patches) * s.decoder * b, s.decoder * b
        return Cost(visible + ids + mask + pos + all_, all_ + ids + visible + mask)

    return Op(
        "restore_tokens",
        make,
        ("visible", "mask_token"),
        cost,
        with_compiled(
            {
                "published": plain(eager.published_restore),
                "tuned": plain(eager.tuned_restore),
                "ours": plain(lambda *given: mk.restore_tokens(*given, prefix=1)),
            }
        ),
        floats=("pos",),
        absent={"library": "no library has it"},
    )


def _gelu_op() -> Op:
    """The decoder's MLP, where most of its time goes; x is the first layer's product without its bias."""

    def make(s: Shape, device: torch.device) -> Inputs:
        hidden, tokens = 4 * s.decoder, 1 + s.patches
        return {
            "x": _normal(s.batch, tokens, hidden, device=device),
            "bias": _normal(hidden, device=device),
            "weight": _normal(s.decoder, hidden, device=device, fan_in=hidden),
            "out_bias": _normal(s.decoder, device=device),
        }

    def plain(function: Callable[..., Tensor]) -> Provider:
        return Provider(lambda s, x: function(x["x"], x["bias"], x["weight"], x["out_bias"]))

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        rows, hidden = s.batch * (1 + s.patches), 4 * s.decoder
        weights = (hidden + hidden * s.decoder + s.decoder) * b
        flops = 2.0 * rows * hidden * s.decoder
        large, small = rows * hidden * b, rows * s.decoder * b
        return Cost(large + small + weights, 2 * large + small + 2 * weights, flops, 2 * flops)

    return Op(
        "gelu_linear",
        make,
        ("x", "bias", "weight", "out_bias"),
        cost,
        with_compiled({"tuned": plain(eager.gelu_linear), "ours": plain(mk.gelu_linear)}),
        absent={
            "published": "the published code calls what `tuned` calls",
            "library": "F.gelu and F.linear are what `tuned` calls",
        },
        exact="tuned",
    )


# ---- losses ----


def _with_all(x: Inputs, name: str, s: Shape, device: torch.device) -> Inputs:
    """Adds `<name>_all` [B,L,..] for providers that predict every patch, with the rows of `name` at the masked ones."""
    everywhere = torch.randn(s.batch, s.patches, x[name].shape[-1], device=device)
    index = x["ids_masked"].unsqueeze(-1).expand(-1, -1, x[name].shape[-1])
    return {**x, f"{name}_all": everywhere.scatter(1, index, x[name])}


def _reconstruction_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        x = {"images": _pixels(s, device), **_ids(s, device)}
        return _with_all({**x, "pred": _normal(s.batch, s.masked, s.values, device=device)}, "pred", s, device)

    def ours(s: Shape, x: Inputs) -> Tensor:
        return mk.masked_reconstruction_loss(
            x["pred"], x["images"], ids=x["ids_masked"], patch_size=s.patch, **_stats(s)
        )

    return Op(
        "masked_reconstruction_loss",
        make,
        ("pred",),
        lambda s, b, x: _reconstruction_cost(s, b),
        with_compiled(
            {
                "published": Provider(
                    lambda s, x: eager.published_reconstruction(x["pred_all"], x["images"], x["mask"], s),
                    ("pred_all",),
                    _of_masked("pred"),
                ),
                "tuned": Provider(lambda s, x: eager.tuned_reconstruction(x["pred"], x["images"], x["ids_masked"], s)),
                "ours": Provider(ours),
            }
        ),
        floats=("pred_all",),
        absent={"library": "F.mse_loss is what `tuned` calls"},
    )


def _reconstruction_cost(s: Shape, b: int) -> Cost:
    values, ids = s.batch * s.masked * s.values, s.batch * s.masked * IDS
    return Cost(values * (b + 1) + ids, values * (2 * b + 1) + ids)


def _linear_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        x = {"images": _pixels(s, device), **_ids(s, device)}
        x["hidden"] = _normal(s.batch, s.masked, s.decoder, device=device)
        x["weight"] = _normal(s.values, s.decoder, device=device, fan_in=s.decoder)
        return _with_all({**x, "bias": _normal(s.values, device=device)}, "hidden", s, device)

    def published(s: Shape, x: Inputs) -> Tensor:
        pred_BLV = torch.nn.functional.linear(x["hidden_all"], x["weight"], x["bias"])
        return eager.published_reconstruction(pred_BLV, x["images"], x["mask"], s)

    def tuned(s: Shape, x: Inputs) -> Tensor:
        pred_BMV = torch.nn.functional.linear(x["hidden"], x["weight"], x["bias"])
        return eager.tuned_reconstruction(pred_BMV, x["images"], x["ids_masked"], s)

    def ours(s: Shape, x: Inputs) -> Tensor:
        given = x["hidden"], x["weight"], x["bias"], x["images"], x["ids_masked"]
        return mk.linear_reconstruction_loss(*given, patch_size=s.patch, **_stats(s))

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        rows = s.batch * s.masked
        hidden, weights = rows * s.decoder * b, (s.decoder + 1) * s.values * b
        pixels, flops = rows * (s.values + IDS), 2.0 * rows * s.decoder * s.values
        return Cost(hidden + weights + pixels, 2 * hidden + 2 * weights + pixels, flops, 2 * flops)

    return Op(
        "linear_reconstruction_loss",
        make,
        ("hidden", "weight", "bias"),
        cost,
        with_compiled(
            {
                "published": Provider(published, ("hidden_all", "weight", "bias"), _of_masked("hidden")),
                "tuned": Provider(tuned),
                "ours": Provider(ours),
            }
        ),
        floats=("hidden_all",),
        absent={"library": "F.linear and F.mse_loss are what `tuned` calls"},
    )


def _make_logits(s: Shape, device: torch.device) -> Inputs:
    """Of the size that heads with normalised features give: within 1 or so, divided by the temperature later."""
    logits = {name: 0.3 * torch.randn(s.batch, s.logits, device=device) for name in ("student", "teacher")}
    return {**logits, "center": torch.full((s.logits,), 1 / s.logits, device=device)}


def _distillation_cost(s: Shape, b: int) -> Cost:
    logits = 2 * s.batch * s.logits * b
    return Cost(logits + 2 * s.logits * FP32, 2 * logits + s.logits * FP32)


def _distillation_op() -> Op:
    def plain(function: Callable[..., Any]) -> Provider:
        return Provider(lambda s, x: function(x["student"], x["teacher"], x["center"]))

    return Op(
        "distillation_loss",
        _make_logits,
        ("student", "teacher"),
        lambda s, b, x: _distillation_cost(s, b),
        with_compiled(
            {
                "published": plain(eager.distillation),
                "tuned": plain(eager.library_distillation),
                "ours": plain(lambda student, teacher, center: mk.distillation_loss(student, teacher, center=center)),
            }
        ),
        absent={"library": "F.cross_entropy is what `tuned` calls"},
    )


def _sssd_op() -> Op:
    w = eager.WEIGHT

    def make(s: Shape, device: torch.device) -> Inputs:
        return {**_reconstruction_op().make(s, device), **_make_logits(s, device)}

    def published(s: Shape, x: Inputs) -> tuple[Tensor, ...]:
        reconstruction = eager.published_reconstruction(x["pred_all"], x["images"], x["mask"], s)
        distilled, center = eager.distillation(x["student"], x["teacher"], x["center"])
        return w * distilled + (1 - w) * reconstruction, reconstruction, distilled, center

    def tuned(s: Shape, x: Inputs) -> tuple[Tensor, ...]:
        reconstruction = eager.tuned_reconstruction(x["pred"], x["images"], x["ids_masked"], s)
        distilled, center = eager.library_distillation(x["student"], x["teacher"], x["center"])
        return w * distilled + (1 - w) * reconstruction, reconstruction, distilled, center

    def ours(s: Shape, x: Inputs) -> list[Tensor]:
        more: dict[str, Any] = {"ids": x["ids_masked"], "center": x["center"], "patch_size": s.patch, **_stats(s)}
        return tensors(mk.sssd_loss(x["pred"], x["images"], x["student"], x["teacher"], weight=w, **more))

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        one, two = _reconstruction_cost(s, b), _distillation_cost(s, b)
        return Cost(one.forward_bytes + two.forward_bytes, one.backward_bytes + two.backward_bytes)

    return Op(
        "sssd_loss",
        make,
        ("pred", "student", "teacher"),
        cost,
        with_compiled(
            {
                "published": Provider(published, ("pred_all", "student", "teacher"), _of_masked("pred")),
                "tuned": Provider(tuned),
                "ours": Provider(ours),
            }
        ),
        floats=("pred_all",),
        absent={"library": "no library has both losses"},
    )


# ---- crops ----


def _smooth(count: int) -> Tensor:
    """Grey levels that change slowly, as those of pictures do: resizing noise is mostly clipping."""
    level = torch.arange(count, dtype=torch.float32).mul_(0.02).sin_().mul_(90).add_(128)
    return (level + 4 * torch.randn(count)).clamp(0, 255).to(torch.uint8)


def _crop_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        """Images of 300 to 600 pixels a side, crops of 20 to 100 % of their area, as MAE pre-training takes them."""
        shapes = torch.randint(300, 601, (s.batch, 2))
        side = (0.2 + 0.8 * torch.rand(s.batch, 1)).sqrt()
        extent = (shapes * side).long().clamp(min=1)
        corner = ((shapes - extent + 1) * torch.rand(s.batch, 2)).long()
        sizes = shapes.prod(1) * s.channels
        x = {"pixels": _smooth(int(sizes.sum())), "offsets": sizes.cumsum(0) - sizes, "shapes": shapes}
        x |= {"boxes": torch.cat([corner, extent], 1), "flips": torch.rand(s.batch) < 0.5}
        return {name: t.to(device) for name, t in x.items()}

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        read = float(x["boxes"][:, 2:].prod(1).sum()) * s.channels
        return Cost(read + s.batch * s.channels * s.image[0] * s.image[1])

    def given(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return x["pixels"], x["offsets"], x["shapes"], x["boxes"], x["flips"]

    def each(passes: bool) -> Provider:
        return Provider(lambda s, x: eager.crop_each(*given(x), s, passes=passes))

    return Op(
        "crop_resize",
        make,
        (),
        cost,
        {
            "tuned": each(True),
            "library": each(False),
            "ours": Provider(lambda s, x: mk.crop_resize(*given(x), s.image, channels=s.channels)),
        },
        absent={
            "published": "published code resizes with Pillow on the host: see `bench loader`",
            "tuned compiled": "every image has another size: each would be compiled anew",
            "ours compiled": "one kernel, with nothing around it to fuse",
        },
        tolerance=2 / 255,  # two grey levels, where resizing in one or two passes rounds differently
        exact="tuned",
    )


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _masking_op(), _gather_op(), _embed_op(), _restore_op(), _gelu_op(), _reconstruction_op(), _linear_op(),
        _distillation_op(), _sssd_op(), _crop_op(),
    )
}  # fmt: skip
