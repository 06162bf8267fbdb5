"""Calls of every op at small odd shapes, for compute-sanitizer (sanitize.py runs them).

Sizes for which the kernels differ: padded and whole blocks of columns, one and several rows per program, one and two steps of the
backwards that walk, every tile of attention, one warp and many; grey and colour, both layouts, images that are not square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mae_kernels as mk
from mae_kernels import _runtime

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = torch.float16 if _runtime.INTERPRET else torch.bfloat16  # the interpreter has no bf16

Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    """make() -> (leaves, others) on the CPU; leaves get gradients and have `dtype`, others stay as they are."""

    op: str
    make: Callable[[], tuple[Tensors, Tensors]]
    call: Callable[[Tensors, Tensors], Any]  # gradients are taken of the first result
    dtype: torch.dtype = torch.float32
    spoil: Callable[[Tensors], Tensors] | None = None  # puts something of image 0 out of range


def images(
    batch: int, channels: int, height: int, width: int, layout: str = "nchw uint8"
) -> Tensor:
    x = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)
    x = x.to(memory_format=torch.channels_last) if "nhwc" in layout else x
    return x / 255 if "float" in layout else x


def listed(batch: int, patches: int, count: int) -> Tensor:
    return torch.rand(batch, patches).argsort(1)[:, :count].contiguous()


def linear(*shape: int) -> Tensor:
    return torch.randn(shape) / math.sqrt(shape[-1])


def embed(
    width: int, patch: int, channels: int, layout: str, bias: bool, dtype: torch.dtype
) -> Case:
    def make() -> tuple[Tensors, Tensors]:
        pictures = images(3, channels, 3 * patch, 5 * patch, layout)
        ids = listed(3, 15, 7)
        ids[1, 2] = ids[1, 5]  # a patch listed twice
        weight = linear(width, channels, patch, patch) / patch
        leaves = (weight, torch.randn(15, width), *([torch.randn(width)] if bias else []))
        return leaves, (pictures, ids)

    def call(x: Tensors, o: Tensors) -> Tensor:
        stats = {"mean": MEAN[:channels], "std": STD[:channels]}
        return mk.embed_patches(*o, x[0], x[2] if bias else None, x[1], **stats)

    return Case("embed_patches", make, call, dtype)


def gather(channels: int, patch: int, layout: str, spoil: bool = False) -> Case:
    def make() -> tuple[Tensors, Tensors]:
        return (), (images(2, channels, 3 * patch, 5 * patch, layout), listed(2, 15, 5))

    def call(x: Tensors, o: Tensors) -> Tensor:
        dtype = torch.float64 if o[0].dtype == torch.float64 else torch.float32
        return mk.gather_patches(*o, patch, mean=MEAN[:channels], std=STD[:channels], dtype=dtype)

    return Case(
        "gather_patches",
        make,
        call,
        spoil=(lambda o: (o[0], out_of_range(o[1], 15))) if spoil else None,
    )


def restore(
    batch: int,
    patches: int,
    keep: int,
    width: int,
    prefix: int,
    dtype: torch.dtype,
    spoil: bool = False,
) -> Case:
    def make() -> tuple[Tensors, Tensors]:
        leaves = (
            torch.randn(batch, prefix + keep, width),
            torch.randn(width),
            torch.randn(prefix + patches, width),
        )
        return leaves, (listed(batch, patches, patches),)

    def call(x: Tensors, o: Tensors) -> Tensor:
        return mk.restore_tokens(x[0], o[0], x[1], x[2], prefix=prefix)

    bad = (lambda o: (out_of_range(o[0], patches),)) if spoil else None
    return Case("restore_tokens", make, call, dtype, bad)


def gelu(
    rows: int, hidden: int, width: int, recompute: bool, bias: bool, dtype: torch.dtype
) -> Case:
    def make() -> tuple[Tensors, Tensors]:
        biases = (torch.randn(hidden), torch.randn(width)) if bias else ()
        return (torch.randn(rows, hidden), linear(width, hidden), *biases), ()

    def call(x: Tensors, o: Tensors) -> Tensor:
        first, last = (x[2], x[3]) if bias else (None, None)
        return mk.gelu_linear(x[0], first, x[1], last, recompute=recompute)

    return Case("gelu_linear", make, call, dtype)


def loss(
    norm: str | None, channels: int, patch: int, layout: str, dtype: torch.dtype, mask: bool = False
) -> Case:
    count = 15 if mask else 11

    def make() -> tuple[Tensors, Tensors]:
        select = torch.rand(3, 15) < 0.7 if mask else listed(3, 15, 11)
        pred = torch.randn(3, count, channels * patch**2)
        return (pred,), (images(3, channels, 3 * patch, 5 * patch, layout), select)

    def call(x: Tensors, o: Tensors) -> Tensor:
        options: dict[str, Any] = {
            "mean": MEAN[:channels],
            "std": STD[:channels],
            "mask" if mask else "ids": o[1],
        }
        return mk.masked_reconstruction_loss(x[0], o[0], patch_size=patch, norm=norm, **options)

    return Case("masked_reconstruction_loss", make, call, dtype)


def linear_loss(width: int, dtype: torch.dtype, bias: bool) -> Case:
    def make() -> tuple[Tensors, Tensors]:
        leaves = (
            torch.randn(2, 11, width),
            linear(25, width),
            *([torch.randn(25)] if bias else []),
        )
        return leaves, (images(2, 1, 15, 25), listed(2, 15, 11))

    def call(x: Tensors, o: Tensors) -> Tensor:
        return mk.linear_reconstruction_loss(x[0], x[1], x[2] if bias else None, *o, patch_size=5)

    return Case("linear_reconstruction_loss", make, call, dtype)


def distill(
    rows: int, logits: int, center: bool, options: dict[str, Any], dtype: torch.dtype
) -> Case:
    def make() -> tuple[Tensors, Tensors]:
        return (torch.randn(rows, logits), torch.randn(rows, logits)), (
            torch.randn(logits),
        ) * center

    return Case(
        "distillation_loss",
        make,
        lambda x, o: mk.distillation_loss(*x, center=o[0] if center else None, **options),
        dtype,
    )


def sssd(channels: int, patch: int, mask: bool, dtype: torch.dtype) -> Case:
    reconstruction = loss("patch", channels, patch, "nchw uint8", dtype, mask)

    def make() -> tuple[Tensors, Tensors]:
        leaves, others = reconstruction.make()
        return (*leaves, torch.randn(3, 41), torch.randn(3, 41)), (*others, torch.randn(41))

    def call(x: Tensors, o: Tensors) -> Tensors:
        select = {"mask" if mask else "ids": o[1]}
        return mk.sssd_loss(x[0], o[0], x[1], x[2], center=o[2], patch_size=patch, **select)[:3]

    return Case("sssd_loss", make, call, dtype)


def attend(tokens: int, heads: int, width: int) -> Case:
    return Case(
        "attention",
        lambda: ((torch.randn(2, tokens, 3, heads, width),), ()),
        lambda x, o: mk.attention(x[0]),
        HALF,
    )


def crop(channels: int, size: tuple[int, int], spoil: bool = False) -> Case:
    def make() -> tuple[Tensors, Tensors]:
        shapes = torch.tensor([[13, 19], [7, 5], [21, 9]])
        boxes = torch.tensor([[2, 3, 11, 16], [0, 0, 7, 5], [3, 0, 18, 9]])
        lengths = shapes.prod(1) * channels
        offsets = lengths.cumsum(0) - lengths
        flips = torch.tensor([False, True, True])
        return (), (
            torch.randint(0, 256, (int(lengths.sum()),), dtype=torch.uint8),
            offsets,
            shapes,
            boxes,
            flips,
        )

    def bad(o: Tensors) -> Tensors:
        return (*o[:3], out_of_range(o[3], 10**6), o[4])

    return Case(
        "crop_resize",
        make,
        lambda x, o: mk.crop_resize(*o, size, channels=channels),
        spoil=bad if spoil else None,
    )


def masking(patches: int) -> Case:
    return Case(
        "random_masking",
        lambda: ((), (torch.rand(3, patches),)),
        lambda x, o: mk.random_masking(o[0], patches // 4),
    )


def out_of_range(x: Tensor, value: int) -> Tensor:
    x = x.clone()
    x[0, 1] = value
    return x


FLOAT = torch.float32
CASES: dict[str, Case] = {
    "random_masking 37": masking(37),
    "random_masking 300": masking(300),
    "gather_patches rgb": gather(3, 7, "nchw uint8"),
    "gather_patches nhwc float grey": gather(1, 4, "nhwc float"),
    "gather_patches out of range": gather(3, 7, "nchw uint8", spoil=True),
    "embed_patches nhwc 33": embed(33, 5, 3, "nhwc uint8", True, FLOAT),
    "embed_patches grey 192": embed(192, 8, 1, "nchw float", False, HALF),
    "restore_tokens 33": restore(3, 35, 9, 33, 1, FLOAT),
    "restore_tokens 192": restore(2, 21, 5, 192, 0, HALF),
    "restore_tokens two steps": restore(67, 32, 8, 512, 1, HALF),
    "restore_tokens out of range": restore(3, 35, 9, 33, 1, FLOAT, spoil=True),
    "gelu_linear 37": gelu(21, 37, 19, True, True, FLOAT),
    "gelu_linear g kept": gelu(21, 192, 48, False, False, HALF),
    "gelu_linear two steps": gelu(701, 1536, 40, True, True, HALF),
    "masked_reconstruction_loss patch": loss("patch", 3, 7, "nchw uint8", HALF),
    "masked_reconstruction_loss channel": loss("channel", 3, 8, "nhwc uint8", FLOAT),
    "masked_reconstruction_loss mask grey": loss(None, 1, 5, "nchw float", FLOAT, mask=True),
    "linear_reconstruction_loss 19": linear_loss(19, FLOAT, True),
    "linear_reconstruction_loss 64": linear_loss(64, HALF, False),
    "distillation_loss 41": distill(5, 41, True, {}, FLOAT),
    "distillation_loss 1500": distill(131, 1500, False, {"center_mode": "logit", "detach_teacher": True}, HALF),
    "sssd_loss rgb": sssd(3, 7, False, HALF),
    "sssd_loss mask grey": sssd(1, 5, True, FLOAT),
    "attention 10": attend(10, 2, 16),
    "attention 37": attend(37, 2, 128),
    "attention 65": attend(65, 1, 64),
    "attention 133": attend(133, 2, 32),
    "attention 197": attend(197, 2, 64),
    "crop_resize grey": crop(1, (9, 37)),
    "crop_resize rgb": crop(3, (8, 140)),
    "crop_resize out of range": crop(1, (9, 37), spoil=True),
}  # fmt: skip
