"""The losses, with all who compute them: reconstruction, reconstruction behind its linear head, distillation, both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mae_kernels as mk

from . import eager
from .measure import tensors
from .op import (
    FP32,
    IDS,
    Cost,
    Inputs,
    Op,
    Provider,
    ids,
    normal,
    of_masked,
    pixels,
    stats,
    with_compiled,
)
from .shapes import Shape


def _with_all(x: Inputs, name: str, s: Shape, device: torch.device) -> Inputs:
    """Adds `<name>_all` [B,L,..] for providers that predict every patch, with the rows of `name` at the masked ones."""
    everywhere = torch.randn(s.batch, s.patches, x[name].shape[-1], device=device)
    index = x["ids_masked"].unsqueeze(-1).expand(-1, -1, x[name].shape[-1])
    return {**x, f"{name}_all": everywhere.scatter(1, index, x[name])}


def reconstruction_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        x = {"images": pixels(s, device), **ids(s, device)}
        return _with_all(
            {**x, "pred": normal(s.batch, s.masked, s.values, device=device)}, "pred", s, device
        )

    def ours(s: Shape, x: Inputs) -> Tensor:
        return mk.masked_reconstruction_loss(
            x["pred"], x["images"], ids=x["ids_masked"], patch_size=s.patch, **stats(s)
        )

    return Op(
        "masked_reconstruction_loss",
        make,
        ("pred",),
        lambda s, b, x: _reconstruction_cost(s, b),
        with_compiled(
            {
                "published": Provider(
                    lambda s, x: eager.published_reconstruction(
                        x["pred_all"], x["images"], x["mask"], s
                    ),
                    ("pred_all",),
                    of_masked("pred"),
                ),
                "tuned": Provider(
                    lambda s, x: eager.tuned_reconstruction(
                        x["pred"], x["images"], x["ids_masked"], s
                    )
                ),
                "ours": Provider(ours),
            }
        ),
        floats=("pred_all",),
        absent={"library": "F.mse_loss is what `tuned` calls"},
    )


def _reconstruction_cost(s: Shape, b: int) -> Cost:
    values, ids = s.batch * s.masked * s.values, s.batch * s.masked * IDS
    return Cost(values * (b + 1) + ids, values * (2 * b + 1) + ids)


def linear_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        x = {"images": pixels(s, device), **ids(s, device)}
        x["hidden"] = normal(s.batch, s.masked, s.decoder, device=device)
        x["weight"] = normal(s.values, s.decoder, device=device, fan_in=s.decoder)
        return _with_all({**x, "bias": normal(s.values, device=device)}, "hidden", s, device)

    def published(s: Shape, x: Inputs) -> Tensor:
        pred_BLV = torch.nn.functional.linear(x["hidden_all"], x["weight"], x["bias"])
        return eager.published_reconstruction(pred_BLV, x["images"], x["mask"], s)

    def tuned(s: Shape, x: Inputs) -> Tensor:
        pred_BMV = torch.nn.functional.linear(x["hidden"], x["weight"], x["bias"])
        return eager.tuned_reconstruction(pred_BMV, x["images"], x["ids_masked"], s)

    def ours(s: Shape, x: Inputs) -> Tensor:
        given = x["hidden"], x["weight"], x["bias"], x["images"], x["ids_masked"]
        return mk.linear_reconstruction_loss(*given, patch_size=s.patch, **stats(s))

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
                "published": Provider(
                    published, ("hidden_all", "weight", "bias"), of_masked("hidden")
                ),
                "tuned": Provider(tuned),
                "ours": Provider(ours),
            }
        ),
        floats=("hidden_all",),
        absent={"library": "F.linear and F.mse_loss are what `tuned` calls"},
    )


def _make_logits(s: Shape, device: torch.device) -> Inputs:
    """Of the size that heads with normalised features give: within 1 or so, divided by the temperature later."""
    logits = {
        name: 0.3 * torch.randn(s.batch, s.logits, device=device) for name in ("student", "teacher")
    }
    return {**logits, "center": torch.full((s.logits,), 1 / s.logits, device=device)}


def _distillation_cost(s: Shape, b: int) -> Cost:
    logits = 2 * s.batch * s.logits * b
    return Cost(logits + 2 * s.logits * FP32, 2 * logits + s.logits * FP32)


def distillation_op() -> Op:
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
                "tuned": plain(eager.tuned_distillation),
                "ours": plain(
                    lambda student, teacher, center: mk.distillation_loss(
                        student, teacher, center=center
                    )
                ),
            }
        ),
        absent={"library": "F.cross_entropy is what `tuned` calls"},
    )


def sssd_op() -> Op:
    w = eager.WEIGHT

    def make(s: Shape, device: torch.device) -> Inputs:
        return {**reconstruction_op().make(s, device), **_make_logits(s, device)}

    def published(s: Shape, x: Inputs) -> tuple[Tensor, ...]:
        reconstruction = eager.published_reconstruction(x["pred_all"], x["images"], x["mask"], s)
        distilled, center = eager.distillation(x["student"], x["teacher"], x["center"])
        return w * distilled + (1 - w) * reconstruction, reconstruction, distilled, center

    def tuned(s: Shape, x: Inputs) -> tuple[Tensor, ...]:
        reconstruction = eager.tuned_reconstruction(x["pred"], x["images"], x["ids_masked"], s)
        distilled, center = eager.tuned_distillation(x["student"], x["teacher"], x["center"])
        return w * distilled + (1 - w) * reconstruction, reconstruction, distilled, center

    def ours(s: Shape, x: Inputs) -> list[Tensor]:
        more: dict[str, Any] = {
            "ids": x["ids_masked"],
            "center": x["center"],
            "patch_size": s.patch,
            **stats(s),
        }
        return tensors(
            mk.sssd_loss(x["pred"], x["images"], x["student"], x["teacher"], weight=w, **more)
        )

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
                "published": Provider(
                    published, ("pred_all", "student", "teacher"), of_masked("pred")
                ),
                "tuned": Provider(tuned),
                "ours": Provider(ours),
            }
        ),
        floats=("pred_all",),
        absent={"library": "no library has both losses"},
    )
