"""The ops on pixels and tokens, with all who compute them: masking, patches, embedding, restoring, GELU, crops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mae_kernels as mk

from . import eager
from .op import (
    FP32,
    IDS,
    Cost,
    Inputs,
    Op,
    Provider,
    ids,
    noise,
    normal,
    pixels,
    stats,
    with_compiled,
)
from .shapes import Shape


def masking_op() -> Op:
    return Op(
        "random_masking",
        lambda s, device: {"noise": noise(s, device)},
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


def gather_op() -> Op:
    def ours(s: Shape, x: Inputs) -> Tensor:
        return mk.gather_patches(
            x["images"], x["ids_keep"], s.patch, dtype=x["like"].dtype, **stats(s)
        )

    return Op(
        "gather_patches",
        lambda s, device: {
            "images": pixels(s, device),
            "like": torch.zeros((), device=device),
            **ids(s, device),
        },
        (),
        lambda s, b, x: Cost(s.batch * s.keep * (IDS + s.values * (1 + b))),
        with_compiled(
            {
                "published": Provider(
                    lambda s, x: eager.published_gather(
                        x["images"], x["ids_keep"], s, x["like"].dtype
                    )
                ),
                "tuned": Provider(
                    lambda s, x: eager.tuned_gather(x["images"], x["ids_keep"], s, x["like"].dtype)
                ),
                "library": Provider(
                    lambda s, x: eager.unfold_gather(x["images"], x["ids_keep"], s, x["like"].dtype)
                ),
                "ours": Provider(ours),
            }
        ),
        floats=("like",),
    )


def embed_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        weight = normal(s.width, s.channels, s.patch, s.patch, device=device, fan_in=s.values)
        rest = {
            "bias": normal(s.width, device=device),
            "pos": normal(s.patches, s.width, device=device),
        }
        return {"images": pixels(s, device), **ids(s, device), "weight": weight, **rest}

    def plain(function: Callable[..., Tensor]) -> Provider:
        return Provider(
            lambda s, x: function(x["images"], x["ids_keep"], x["weight"], x["bias"], x["pos"], s)
        )

    def ours(s: Shape, x: Inputs) -> Tensor:
        return mk.embed_patches(
            x["images"], x["ids_keep"], x["weight"], x["bias"], x["pos"], **stats(s)
        )

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        pixels = s.batch * s.keep * (s.values + IDS)
        tokens = s.batch * s.keep * s.width * b
        weights = (s.values + 1 + s.patches) * s.width * b
        flops = 2.0 * s.batch * s.keep * s.values * s.width
        return Cost(pixels + tokens + weights, pixels + tokens + weights, flops, flops)

    return Op(
        "embed_patches",
        make,
        ("weight", "bias", "pos"),
        cost,
        with_compiled(
            {
                "published": plain(eager.published_embed),
                "tuned": plain(eager.tuned_embed),
                "ours": Provider(ours),
            }
        ),
        absent={"library": "F.conv2d is what the published code calls"},
    )


def restore_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        return {
            **ids(s, device),
            "visible": normal(s.batch, 1 + s.keep, s.decoder, device=device),
            "mask_token": normal(s.decoder, device=device),
            "pos": normal(1 + s.patches, s.decoder, device=device),
        }

    def plain(function: Callable[..., Tensor]) -> Provider:
        return Provider(
            lambda s, x: function(x["visible"], x["ids_restore"], x["mask_token"], x["pos"])
        )

    def cost(s: Shape, b: int, x: Inputs) -> Cost:
        visible, all_ = (s.batch * n * s.decoder * b for n in (1 + s.keep, 1 + s.patches))
        ids = s.batch * s.patches * IDS
        pos = (1 + s.patches) * s.decoder * b
        mask = s.decoder * b
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


def gelu_op() -> Op:
    """The decoder's MLP, where most of its time goes; x is the first layer's product without its bias."""

    def make(s: Shape, device: torch.device) -> Inputs:
        hidden, tokens = 4 * s.decoder, 1 + s.patches
        return {
            "x": normal(s.batch, tokens, hidden, device=device),
            "bias": normal(hidden, device=device),
            "weight": normal(s.decoder, hidden, device=device, fan_in=hidden),
            "out_bias": normal(s.decoder, device=device),
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


# ---- crops ----


def _smooth(count: int) -> Tensor:
    """Grey levels that change slowly, as those of pictures do: resizing noise is mostly clipping."""
    level = torch.arange(count, dtype=torch.float32).mul_(0.02).sin_().mul_(90).add_(128)
    return (level + 4 * torch.randn(count)).clamp(0, 255).to(torch.uint8)


def crop_op() -> Op:
    def make(s: Shape, device: torch.device) -> Inputs:
        """Images of 300 to 600 pixels a side, crops of 20 to 100 % of their area, as MAE pre-training takes them."""
        shapes = torch.randint(300, 601, (s.batch, 2))
        side = (0.2 + 0.8 * torch.rand(s.batch, 1)).sqrt()
        extent = (shapes * side).long().clamp(min=1)
        corner = ((shapes - extent + 1) * torch.rand(s.batch, 2)).long()
        sizes = shapes.prod(1) * s.channels
        x = {
            "pixels": _smooth(int(sizes.sum())),
            "offsets": sizes.cumsum(0) - sizes,
            "shapes": shapes,
        }
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
        tolerance=2.5
        / 255,  # two grey levels, of a largest value that is seldom 255: one or two passes round differently
        exact="tuned",
    )
