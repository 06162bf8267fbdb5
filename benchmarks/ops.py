"""`bench ops`: each op of mae_kernels against the ways in which people compute it today.

An entry of OPS has inputs, the bytes that must be moved, and providers. What a provider moves
beyond these bytes is not counted.

Shapes: as in shapes.py; F = 4 D hidden width of an MLP, p = 1 prefix token.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mae_kernels as mk
from benchmarks import eager, shapes
from benchmarks.harness import Bench, Inputs, Op, Provider, measure_all
from benchmarks.race import tensors
from benchmarks.shapes import MODELS, Shape

IDS, FP32 = 8, 4  # bytes
Moved = tuple[float, float]  # bytes of the forward, and of the backward alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(OPS)
    parser.add_argument("--op", nargs="+", choices=list(OPS), metavar="OP", help=f"of: {names}")
    shapes.add_arguments(parser, MODELS)


def run(args: argparse.Namespace, bench: Bench) -> None:
    chosen = shapes.chosen(MODELS, args, bench.device)
    dtypes = args.dtypes or [torch.bfloat16 if bench.device.type == "cuda" else torch.float32]
    names = args.op or OPS
    cases = [(OPS[name], s, dtype) for s in chosen for dtype in dtypes for name in names]
    measure_all(bench, cases, "ops")


# ---- providers and inputs ----


def uses(function: Callable[..., Any], names: str, **more: Any) -> Provider:
    """A provider that calls `function` with the named inputs; "s" is the shape."""
    given = tuple(names.split())
    return Provider(
        lambda s, x: function(*[s if name == "s" else x[name] for name in given]), **more
    )


def with_compiled(**providers: Provider) -> dict[str, Provider]:
    """With `tuned compiled` and `ours compiled` after what they compile."""
    out: dict[str, Provider] = {}
    for name, provider in providers.items():
        out[name] = provider
        if name in ("tuned", "ours"):
            out[f"{name} compiled"] = replace(provider, compiled=True)
    return out


def pixels(s: Shape, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (s.batch, s.channels, *s.image), dtype=torch.uint8, device=device)


def noise(s: Shape, device: torch.device) -> Tensor:
    """Uniform ranks without ties, which unstable sorts would break differently."""
    order = torch.rand(s.batch, s.patches, device=device).argsort(1)
    return (order.float() + 0.5) / s.patches


def ids(s: Shape, device: torch.device) -> Inputs:
    found = eager.tuned_masking(noise(s, device), s)
    names = ("ids_keep", "ids_restore", "ids_masked", "mask")
    return {name: t.contiguous() for name, t in zip(names, found, strict=True)}


def normal(*shape: int, device: torch.device, fan_in: int = 1) -> Tensor:
    return torch.randn(shape, device=device) / math.sqrt(fan_in)


def stats(s: Shape) -> dict[str, Any]:
    return {"mean": list(eager.MEAN[: s.channels]), "std": list(eager.STD[: s.channels])}


def with_all(x: Inputs, name: str, s: Shape, device: torch.device) -> Inputs:
    """Adds `<name>_all` [B,L,..] of all patches, whose masked rows are `name`."""
    everywhere = torch.randn(s.batch, s.patches, x[name].shape[-1], device=device)
    index = x["ids_masked"].unsqueeze(-1).expand(-1, -1, x[name].shape[-1])
    return {**x, f"{name}_all": everywhere.scatter(1, index, x[name])}


def of_masked(x: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    """The first gradient is of all patches: its masked rows, and the others as they are."""
    return [eager.rows(gradients[0], x["ids_masked"]), *gradients[1:]]


# ---- ops on pixels and tokens ----


def masking_op() -> Op:
    return Op(
        "random_masking",
        lambda s, device: {"noise": noise(s, device)},
        (),
        lambda s, b, x: (s.batch * s.patches * (FP32 + 2 * IDS + 1), 0),
        with_compiled(
            published=uses(eager.published_masking, "noise s"),
            tuned=uses(eager.tuned_masking, "noise s"),
            ours=Provider(lambda s, x: mk.random_masking(x["noise"], s.keep)),
        ),
        absent={"library": "the other providers call torch.argsort"},
    )


def gather_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        return {
            "images": pixels(s, device),
            "like": torch.zeros((), device=device),
            **ids(s, device),
        }

    def ours(s: Shape, x: Inputs) -> Tensor:
        dtype = x["like"].dtype
        return mk.gather_patches(x["images"], x["ids_keep"], s.patch, dtype=dtype, **stats(s))

    return Op(
        "gather_patches",
        make,
        (),
        lambda s, b, x: (s.batch * s.keep * (IDS + s.values * (1 + b)), 0),
        with_compiled(
            published=uses(eager.published_gather, "images ids_keep like s"),
            tuned=uses(eager.tuned_gather, "images ids_keep like s"),
            library=uses(eager.unfold_gather, "images ids_keep like s"),
            ours=Provider(ours),
        ),
        floats=("like",),
    )


def embed_op() -> Op:
    names = "images ids_keep weight bias pos s"

    def make(s: Shape, device: torch.device) -> Inputs:
        x = {"images": pixels(s, device), **ids(s, device)}
        x["weight"] = normal(s.width, s.channels, s.patch, s.patch, device=device, fan_in=s.values)
        x["bias"] = normal(s.width, device=device)
        return {**x, "pos": normal(s.patches, s.width, device=device)}

    def moved(s: Shape, b: int, x: Inputs) -> Moved:
        read = s.batch * s.keep * (s.values + IDS)
        tokens = s.batch * s.keep * s.width * b
        weights = (s.values + 1 + s.patches) * s.width * b
        return read + tokens + weights, read + tokens + weights

    return Op(
        "embed_patches",
        make,
        ("weight", "bias", "pos"),
        moved,
        with_compiled(
            published=uses(eager.published_embed, names),
            tuned=uses(eager.tuned_embed, names),
            ours=uses(lambda *given: mk.embed_patches(*given[:5], **stats(given[5])), names),
        ),
        absent={"library": "the published code calls F.conv2d"},
    )


def restore_op() -> Op:
    names = "visible ids_restore mask_token pos"

    def make(s: Shape, device: torch.device) -> Inputs:
        return {
            **ids(s, device),
            "visible": normal(s.batch, 1 + s.keep, s.decoder, device=device),
            "mask_token": normal(s.decoder, device=device),
            "pos": normal(1 + s.patches, s.decoder, device=device),
        }

    def moved(s: Shape, b: int, x: Inputs) -> Moved:
        visible, all_ = (s.batch * n * s.decoder * b for n in (1 + s.keep, 1 + s.patches))
        index = s.batch * s.patches * IDS
        mask = s.decoder * b
        pos = (1 + s.patches) * s.decoder * b
        return visible + index + mask + pos + all_, all_ + index + visible + mask

    return Op(
        "restore_tokens",
        make,
        ("visible", "mask_token"),
        moved,
        with_compiled(
            published=uses(eager.published_restore, names),
            tuned=uses(eager.tuned_restore, names),
            ours=uses(lambda *given: mk.restore_tokens(*given, prefix=1), names),
        ),
        floats=("pos",),
        absent={"library": "no library has it"},
    )


def gelu_op() -> Op:
    """The decoder's MLP; x is the product of its first layer without the bias."""
    names = "x bias weight out_bias"

    def make(s: Shape, device: torch.device) -> Inputs:
        hidden, tokens = 4 * s.decoder, 1 + s.patches
        return {
            "x": normal(s.batch, tokens, hidden, device=device),
            "bias": normal(hidden, device=device),
            "weight": normal(s.decoder, hidden, device=device, fan_in=hidden),
            "out_bias": normal(s.decoder, device=device),
        }

    def moved(s: Shape, b: int, x: Inputs) -> Moved:
        tokens, hidden = s.batch * (1 + s.patches), 4 * s.decoder
        weights = (hidden + hidden * s.decoder + s.decoder) * b
        large, small = tokens * hidden * b, tokens * s.decoder * b
        return large + small + weights, 2 * large + small + 2 * weights

    return Op(
        "gelu_linear",
        make,
        ("x", "bias", "weight", "out_bias"),
        moved,
        with_compiled(tuned=uses(eager.gelu_linear, names), ours=uses(mk.gelu_linear, names)),
        absent={
            "published": "the published code is the same as `tuned`",
            "library": "`tuned` calls F.gelu and F.linear",
        },
    )


def crop_op() -> Op:
    names = "pixels offsets shapes boxes flips s"

    def make(s: Shape, device: torch.device) -> Inputs:
        """Images of 300 to 600 pixels a side, crops of 20 to 100 % of their area."""
        sides = torch.randint(300, 601, (s.batch, 2))
        scale = (0.2 + 0.8 * torch.rand(s.batch, 1)).sqrt()
        extent = (sides * scale).long().clamp(min=1)
        corner = ((sides - extent + 1) * torch.rand(s.batch, 2)).long()
        sizes = sides.prod(1) * s.channels
        # grey levels that change slowly, as in pictures: resized noise is mostly clipped
        level = torch.arange(int(sizes.sum()), dtype=torch.float32).mul_(0.02).sin_()
        level = level.mul_(90).add_(128) + 4 * torch.randn(level.shape)
        x = {"pixels": level.clamp(0, 255).to(torch.uint8), "shapes": sides}
        x["offsets"] = sizes.cumsum(0) - sizes
        x |= {"boxes": torch.cat([corner, extent], 1), "flips": torch.rand(s.batch) < 0.5}
        return {name: t.to(device) for name, t in x.items()}

    def moved(s: Shape, b: int, x: Inputs) -> Moved:
        read = float(x["boxes"][:, 2:].prod(1).sum()) * s.channels
        return read + s.batch * s.channels * s.image[0] * s.image[1], 0

    def ours(s: Shape, x: Inputs) -> Tensor:
        given = (x["pixels"], x["offsets"], x["shapes"], x["boxes"], x["flips"])
        return mk.crop_resize(*given, s.image, channels=s.channels)

    return Op(
        "crop_resize",
        make,
        (),
        moved,
        {
            "tuned": uses(eager.crop_two_passes, names),
            "library": uses(eager.crop_one_pass, names),
            "ours": Provider(ours),
        },
        absent={
            "published": "published code resizes with Pillow on the host: see `bench loader`",
            "tuned compiled": "every image has another size and would be compiled again",
            "ours compiled": "one kernel, nothing around it to fuse",
        },
        # two grey levels; the largest value is rarely 255. One or two passes round differently
        tolerance=2.5 / 255,
    )


# ---- losses ----


def reconstruction_moved(s: Shape, b: int, x: Inputs) -> Moved:
    values, index = s.batch * s.masked * s.values, s.batch * s.masked * IDS
    return values * (b + 1) + index, values * (2 * b + 1) + index


def distillation_moved(s: Shape, b: int, x: Inputs) -> Moved:
    logits = 2 * s.batch * s.logits * b
    return logits + 2 * s.logits * FP32, 2 * logits + s.logits * FP32


def make_reconstruction(s: Shape, device: torch.device) -> Inputs:
    x = {"images": pixels(s, device), **ids(s, device)}
    x["pred"] = normal(s.batch, s.masked, s.values, device=device)
    return with_all(x, "pred", s, device)


def make_logits(s: Shape, device: torch.device) -> Inputs:
    """Logits of heads with normalised features: about 1 before the temperature."""
    x = {
        name: 0.3 * torch.randn(s.batch, s.logits, device=device) for name in ("student", "teacher")
    }
    return {**x, "center": torch.full((s.logits,), 1 / s.logits, device=device)}


def reconstruction_op() -> Op:
    def ours(pred: Tensor, images: Tensor, ids_masked: Tensor, s: Shape) -> Tensor:
        return mk.masked_reconstruction_loss(
            pred, images, ids=ids_masked, patch_size=s.patch, **stats(s)
        )

    every: dict[str, Any] = {"leaves": ("pred_all",), "own": of_masked}
    return Op(
        "masked_reconstruction_loss",
        make_reconstruction,
        ("pred",),
        reconstruction_moved,
        with_compiled(
            published=uses(eager.published_reconstruction, "pred_all images mask s", **every),
            tuned=uses(eager.tuned_reconstruction, "pred images ids_masked s"),
            ours=uses(ours, "pred images ids_masked s"),
        ),
        floats=("pred_all",),
        absent={"library": "`tuned` calls F.mse_loss"},
    )


def linear_op() -> Op:
    names = "hidden weight bias images ids_masked s"

    def make(s: Shape, device: torch.device) -> Inputs:
        x = {"images": pixels(s, device), **ids(s, device)}
        x["hidden"] = normal(s.batch, s.masked, s.decoder, device=device)
        x["weight"] = normal(s.values, s.decoder, device=device, fan_in=s.decoder)
        return with_all({**x, "bias": normal(s.values, device=device)}, "hidden", s, device)

    def published(hidden: Tensor, weight: Tensor, bias: Tensor, *given: Any) -> Tensor:
        pred_BLV = F.linear(hidden, weight, bias)
        return eager.published_reconstruction(pred_BLV, *given)

    def tuned(hidden: Tensor, weight: Tensor, bias: Tensor, *given: Any) -> Tensor:
        pred_BMV = F.linear(hidden, weight, bias)
        return eager.tuned_reconstruction(pred_BMV, *given)

    def ours(*given: Any) -> Tensor:
        s: Shape = given[5]
        return mk.linear_reconstruction_loss(*given[:5], patch_size=s.patch, **stats(s))

    def moved(s: Shape, b: int, x: Inputs) -> Moved:
        count = s.batch * s.masked
        hidden, weights = count * s.decoder * b, (s.decoder + 1) * s.values * b
        read = count * (s.values + IDS)
        return hidden + weights + read, 2 * hidden + 2 * weights + read

    every: dict[str, Any] = {"leaves": ("hidden_all", "weight", "bias"), "own": of_masked}
    return Op(
        "linear_reconstruction_loss",
        make,
        ("hidden", "weight", "bias"),
        moved,
        with_compiled(
            published=uses(published, "hidden_all weight bias images mask s", **every),
            tuned=uses(tuned, names),
            ours=uses(ours, names),
        ),
        floats=("hidden_all",),
        absent={"library": "`tuned` calls F.linear and F.mse_loss"},
    )


def distillation_op() -> Op:
    names = "student teacher center"
    return Op(
        "distillation_loss",
        make_logits,
        ("student", "teacher"),
        distillation_moved,
        with_compiled(
            published=uses(eager.distillation, names),
            tuned=uses(eager.tuned_distillation, names),
            ours=uses(lambda *given: mk.distillation_loss(*given[:2], center=given[2]), names),
        ),
        absent={"library": "`tuned` calls F.cross_entropy"},
    )


def sssd_op() -> Op:
    w = eager.WEIGHT

    def make(s: Shape, device: torch.device) -> Inputs:
        return {**make_reconstruction(s, device), **make_logits(s, device)}

    def both(reconstruction: Tensor, distilled: Tensor, center: Tensor) -> tuple[Tensor, ...]:
        return w * distilled + (1 - w) * reconstruction, reconstruction, distilled, center

    def published(*given: Any) -> tuple[Tensor, ...]:
        loss = eager.published_reconstruction(*given[:4])
        return both(loss, *eager.distillation(*given[4:]))

    def tuned(*given: Any) -> tuple[Tensor, ...]:
        loss = eager.tuned_reconstruction(*given[:4])
        return both(loss, *eager.tuned_distillation(*given[4:]))

    def ours(s: Shape, x: Inputs) -> list[Tensor]:
        more: dict[str, Any] = {"ids": x["ids_masked"], "center": x["center"], **stats(s)}
        given = (x["pred"], x["images"], x["student"], x["teacher"])
        return tensors(mk.sssd_loss(*given, weight=w, patch_size=s.patch, **more))

    def moved(s: Shape, b: int, x: Inputs) -> Moved:
        one, two = reconstruction_moved(s, b, x), distillation_moved(s, b, x)
        return one[0] + two[0], one[1] + two[1]

    logits = "student teacher center"
    every: dict[str, Any] = {"leaves": ("pred_all", "student", "teacher"), "own": of_masked}
    return Op(
        "sssd_loss",
        make,
        ("pred", "student", "teacher"),
        moved,
        with_compiled(
            published=uses(published, f"pred_all images mask s {logits}", **every),
            tuned=uses(tuned, f"pred images ids_masked s {logits}"),
            ours=Provider(ours),
        ),
        floats=("pred_all",),
        absent={"library": "no library has both losses"},
    )


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        masking_op(),
        gather_op(),
        embed_op(),
        restore_op(),
        gelu_op(),
        reconstruction_op(),
        linear_op(),
        distillation_op(),
        sssd_op(),
        crop_op(),
    )
}
