"""`bench ops`: each op of mae_kernels against the ways in which people compute it today.

An entry of OPS has inputs, the bytes that must be moved, and providers. What a provider moves
beyond these bytes is not counted.

Shapes: as in shapes.py; 1 prefix token, and an MLP of 4 E hidden values.
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

# normal inputs: size, and standard deviation if it is not 1; a weight is divided by the root of
# its fan-in. Logits of heads with normalised features are about 1 before the temperature.
NORMAL: dict[str, Callable[[Shape], tuple[int, ...]]] = {
    "patch_weight": lambda s: (s.width, s.channels, s.patch, s.patch),
    "patch_bias": lambda s: (s.width,),
    "patch_pos": lambda s: (s.patches, s.width),
    "visible": lambda s: (s.batch, 1 + s.keep, s.decoder),
    "mask_token": lambda s: (s.decoder,),
    "pos": lambda s: (1 + s.patches, s.decoder),
    # the decoder's MLP: x is the product of its first layer without the bias
    "x": lambda s: (s.batch, 1 + s.patches, 4 * s.decoder),
    "bias": lambda s: (4 * s.decoder,),
    "weight": lambda s: (s.decoder, 4 * s.decoder),
    "out_bias": lambda s: (s.decoder,),
    "pred": lambda s: (s.batch, s.masked, s.values),
    "hidden": lambda s: (s.batch, s.masked, s.decoder),
    "pred_weight": lambda s: (s.values, s.decoder),
    "pred_bias": lambda s: (s.values,),
    "student": lambda s: (s.batch, s.logits),
    "teacher": lambda s: (s.batch, s.logits),
    "center": lambda s: (s.logits,),
}
STD = {"student": 0.3, "teacher": 0.3, "center": 0.01}


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


# ---- inputs ----


def draw(names: str) -> Callable[[Shape, torch.device], Inputs]:
    """The named inputs: those of NORMAL, "images", "noise", "ids" of a masking, "like", "crops",
    and "<name>_all" of all patches, whose masked rows are <name>.
    """

    def make(s: Shape, device: torch.device) -> Inputs:
        x: Inputs = {}
        for name in names.split():
            if name in NORMAL:
                size = NORMAL[name](s)
                fan_in = math.prod(size[1:]) if name.endswith("weight") else 1
                x[name] = torch.randn(size, device=device)
                x[name] *= STD.get(name, fan_in**-0.5)
            elif name == "images":
                size = (s.batch, s.channels, *s.image)
                x[name] = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
            elif name == "noise":
                x[name] = noise(s, device)
            elif name == "ids":
                keys = ("ids_keep", "ids_restore", "ids_masked", "mask")
                found = eager.tuned_masking(noise(s, device), s)
                x |= {key: t.contiguous() for key, t in zip(keys, found, strict=True)}
            elif name == "like":
                x[name] = torch.zeros((), device=device)
            elif name == "crops":
                x |= crops(s, device)
            else:
                rows = x[name.removesuffix("_all")]
                every = torch.randn(s.batch, s.patches, rows.shape[-1], device=device)
                x[name] = every.scatter(1, x["ids_masked"].unsqueeze(-1).expand_as(rows), rows)
        return x

    return make


def noise(s: Shape, device: torch.device) -> Tensor:
    """Uniform ranks without ties, which unstable sorts would break differently."""
    order = torch.rand(s.batch, s.patches, device=device).argsort(1)
    return (order.float() + 0.5) / s.patches


def crops(s: Shape, device: torch.device) -> Inputs:
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


# ---- providers ----


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


def on_all(function: Callable[..., Any], names: str, leaves: str) -> Provider:
    """A published loss: of the first leaf it gets all patches, of whose gradient the masked rows
    are compared."""

    def own(x: Inputs, gradients: list[Tensor]) -> list[Tensor]:
        return [eager.rows(gradients[0], x["ids_masked"]), *gradients[1:]]

    return uses(function, names, leaves=tuple(leaves.split()), own=own)


def stats(s: Shape) -> dict[str, Any]:
    return {"mean": list(eager.MEAN[: s.channels]), "std": list(eager.STD[: s.channels])}


def linear_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of the hidden values before the last layer."""
    return lambda hidden, weight, bias, *given: loss(F.linear(hidden, weight, bias), *given)


def sssd(
    reconstruction: Callable[..., Tensor], distillation: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, ...]]:
    """(total, reconstruction, distillation, mean of the teacher's probabilities)"""

    def both(*given: Any) -> tuple[Tensor, ...]:
        restored = reconstruction(*given[:4])
        distilled, center = distillation(*given[4:])
        total = eager.WEIGHT * distilled + (1 - eager.WEIGHT) * restored
        return total, restored, distilled, center

    return both


def our_reconstruction(s: Shape, x: Inputs) -> Tensor:
    more: dict[str, Any] = {"ids": x["ids_masked"], "patch_size": s.patch, **stats(s)}
    return mk.masked_reconstruction_loss(x["pred"], x["images"], **more)


def our_linear(hidden: Tensor, weight: Tensor, bias: Tensor, *given: Any) -> Tensor:
    images, ids, s = given
    more: dict[str, Any] = {"patch_size": s.patch, **stats(s)}
    return mk.linear_reconstruction_loss(hidden, weight, bias, images, ids, **more)


def our_sssd(s: Shape, x: Inputs) -> list[Tensor]:
    more: dict[str, Any] = {"ids": x["ids_masked"], "center": x["center"], **stats(s)}
    given = (x["pred"], x["images"], x["student"], x["teacher"])
    return tensors(mk.sssd_loss(*given, weight=eager.WEIGHT, patch_size=s.patch, **more))


def our_gather(s: Shape, x: Inputs) -> Tensor:
    more: dict[str, Any] = {"dtype": x["like"].dtype, **stats(s)}
    return mk.gather_patches(x["images"], x["ids_keep"], s.patch, **more)


def our_crop(s: Shape, x: Inputs) -> Tensor:
    given = (x["pixels"], x["offsets"], x["shapes"], x["boxes"], x["flips"])
    return mk.crop_resize(*given, s.image, channels=s.channels)


# ---- bytes of the forward, and of the backward alone ----

Moved = tuple[float, float]
IDS = 8  # bytes


def size(x: Inputs, names: str) -> int:
    return sum(x[name].nbytes for name in names.split())


def embed_moved(s: Shape, b: int, x: Inputs) -> Moved:
    read = s.batch * s.keep * (s.values + IDS)
    every = read + s.batch * s.keep * s.width * b + size(x, "patch_weight patch_bias patch_pos")
    return every, every


def restore_moved(s: Shape, b: int, x: Inputs) -> Moved:
    out = s.batch * (1 + s.patches) * s.decoder * b
    once = size(x, "visible ids_restore mask_token") + out
    return once + size(x, "pos"), once


def gelu_moved(s: Shape, b: int, x: Inputs) -> Moved:
    out, given = s.batch * (1 + s.patches) * s.decoder * b, size(x, "x bias weight out_bias")
    return given + out, 2 * given + out


def reconstruction_moved(s: Shape, b: int, x: Inputs) -> Moved:
    read = s.batch * s.masked * (s.values + IDS)
    return size(x, "pred") + read, 2 * size(x, "pred") + read


def linear_moved(s: Shape, b: int, x: Inputs) -> Moved:
    read, given = s.batch * s.masked * (s.values + IDS), size(x, "hidden pred_weight pred_bias")
    return given + read, 2 * given + read


def distillation_moved(s: Shape, b: int, x: Inputs) -> Moved:
    logits, center = size(x, "student teacher"), size(x, "center")
    return logits + 2 * center, 2 * logits + center


def sssd_moved(s: Shape, b: int, x: Inputs) -> Moved:
    one, two = reconstruction_moved(s, b, x), distillation_moved(s, b, x)
    return one[0] + two[0], one[1] + two[1]


def crop_moved(s: Shape, b: int, x: Inputs) -> Moved:
    read = float(x["boxes"][:, 2:].prod(1).sum()) * s.channels
    return read + s.batch * s.channels * s.image[0] * s.image[1], 0


# ---- the ops ----

EMBED = "images ids_keep patch_weight patch_bias patch_pos s"
RESTORE = "visible ids_restore mask_token pos"
GELU = "x bias weight out_bias"
ALL, LISTED = "images mask s", "images ids_masked s"
LINEAR = "pred_weight pred_bias"
LOGITS = "student teacher center"
CROP = "pixels offsets shapes boxes flips s"
_OPS = [
    Op(
        "random_masking",
        draw("noise"),
        (),
        lambda s, b, x: (size(x, "noise") + s.batch * s.patches * (2 * IDS + 1), 0),
        with_compiled(
            published=uses(eager.published_masking, "noise s"),
            tuned=uses(eager.tuned_masking, "noise s"),
            ours=Provider(lambda s, x: mk.random_masking(x["noise"], s.keep)),
        ),
    ),
    Op(
        "gather_patches",
        draw("images ids like"),
        (),
        lambda s, b, x: (s.batch * s.keep * (IDS + s.values * (1 + b)), 0),
        with_compiled(
            published=uses(eager.published_gather, "images ids_keep like s"),
            tuned=uses(eager.tuned_gather, "images ids_keep like s"),
            library=uses(eager.unfold_gather, "images ids_keep like s"),
            ours=Provider(our_gather),
        ),
        floats=("like",),
    ),
    Op(
        "embed_patches",
        draw("images ids patch_weight patch_bias patch_pos"),
        ("patch_weight", "patch_bias", "patch_pos"),
        embed_moved,
        with_compiled(
            published=uses(eager.published_embed, EMBED),
            tuned=uses(eager.tuned_embed, EMBED),
            ours=uses(lambda *given: mk.embed_patches(*given[:5], **stats(given[5])), EMBED),
        ),
    ),
    Op(
        "restore_tokens",
        draw("ids visible mask_token pos"),
        ("visible", "mask_token"),
        restore_moved,
        with_compiled(
            published=uses(eager.published_restore, RESTORE),
            tuned=uses(eager.tuned_restore, RESTORE),
            ours=uses(lambda *given: mk.restore_tokens(*given, prefix=1), RESTORE),
        ),
        floats=("pos",),
    ),
    Op(
        "gelu_linear",
        draw(GELU),
        ("x", "bias", "weight", "out_bias"),
        gelu_moved,
        with_compiled(tuned=uses(eager.gelu_linear, GELU), ours=uses(mk.gelu_linear, GELU)),
    ),
    Op(
        "masked_reconstruction_loss",
        draw("images ids pred pred_all"),
        ("pred",),
        reconstruction_moved,
        with_compiled(
            published=on_all(eager.published_reconstruction, f"pred_all {ALL}", "pred_all"),
            tuned=uses(eager.tuned_reconstruction, f"pred {LISTED}"),
            ours=Provider(our_reconstruction),
        ),
        floats=("pred_all",),
    ),
    Op(
        "linear_reconstruction_loss",
        draw(f"images ids hidden hidden_all {LINEAR}"),
        ("hidden", "pred_weight", "pred_bias"),
        linear_moved,
        with_compiled(
            published=on_all(
                linear_loss(eager.published_reconstruction),
                f"hidden_all {LINEAR} {ALL}",
                f"hidden_all {LINEAR}",
            ),
            tuned=uses(linear_loss(eager.tuned_reconstruction), f"hidden {LINEAR} {LISTED}"),
            ours=uses(our_linear, f"hidden {LINEAR} {LISTED}"),
        ),
        floats=("hidden_all",),
    ),
    Op(
        "distillation_loss",
        draw(LOGITS),
        ("student", "teacher"),
        distillation_moved,
        with_compiled(
            published=uses(eager.distillation, LOGITS),
            tuned=uses(eager.tuned_distillation, LOGITS),
            ours=uses(lambda *given: mk.distillation_loss(*given[:2], center=given[2]), LOGITS),
        ),
    ),
    Op(
        "sssd_loss",
        draw(f"images ids pred pred_all {LOGITS}"),
        ("pred", "student", "teacher"),
        sssd_moved,
        with_compiled(
            published=on_all(
                sssd(eager.published_reconstruction, eager.distillation),
                f"pred_all {ALL} {LOGITS}",
                "pred_all student teacher",
            ),
            tuned=uses(
                sssd(eager.tuned_reconstruction, eager.tuned_distillation),
                f"pred {LISTED} {LOGITS}",
            ),
            ours=Provider(our_sssd),
        ),
        floats=("pred_all",),
    ),
    Op(
        "crop_resize",
        draw("crops"),
        (),
        crop_moved,
        {
            "tuned": uses(eager.crop_two_passes, CROP),
            "library": uses(eager.crop_one_pass, CROP),
            "ours": Provider(our_crop),
        },
        # two grey levels; the largest value is rarely 255. One or two passes round differently
        tolerance=2.5 / 255,
    ),
]
OPS = {op.name: op for op in _OPS}
