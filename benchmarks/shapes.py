"""The sizes at which ops are measured: ViT-S, B and L of masked autoencoders, and their sequences.

D encoder width, E decoder width, L patches, K visible, M masked, V = P*P*C values of a patch, S
prototypes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    model: str
    batch: int
    width: int
    heads: int
    decoder: int = 512
    decoder_heads: int = 16
    image: tuple[int, int] = (224, 224)
    patch: int = 16
    channels: int = 3
    mask_ratio: float = 0.75
    logits: int = 4096
    tokens: int = 0  # of attention, whose shape is known by its tokens and heads

    @property
    def name(self) -> str:
        if self.tokens:
            return f"{self.model} [{self.batch}, {self.tokens}, {self.heads}x{self.head_width}]"
        return f"{self.model}, {self.batch} images"

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patches(self) -> int:
        return (self.image[0] // self.patch) * (self.image[1] // self.patch)

    @property
    def keep(self) -> int:
        return int(self.patches * (1 - self.mask_ratio))

    @property
    def masked(self) -> int:
        return self.patches - self.keep

    @property
    def values(self) -> int:
        return self.patch**2 * self.channels

    def at(self, batch: int) -> Shape:
        return replace(self, batch=batch)


# The usual model, the large one, the one for small data sets (decoder of SD-MAE), one-channel CT.
MODELS = {
    "ViT-B": Shape("ViT-B", 1, 768, 12),
    "ViT-S": Shape("ViT-S", 1, 384, 6, 192, 3),
    "ViT-L": Shape("ViT-L", 1, 1024, 16),
    "ViT-B, CT": Shape("ViT-B, CT", 1, 768, 12, channels=1),
}


def sequence(model: str, block: str) -> Shape:
    """block: "encoder" (visible tokens), "decoder" or "classifier" (all tokens, encoder width)."""
    s = MODELS[model]
    width, heads = (s.decoder, s.decoder_heads) if block == "decoder" else (s.width, s.heads)
    tokens = 1 + (s.keep if block == "encoder" else s.patches)
    return Shape(f"{model} {block}", 1, width, heads, tokens=tokens)


BLOCKS = (
    "ViT-B encoder, ViT-B decoder, ViT-S encoder, ViT-S decoder, ViT-L encoder, ViT-B classifier"
)
SEQUENCES = {name: sequence(*name.split()) for name in BLOCKS.split(", ")}
BATCHES = {"cuda": 256, "cpu": 8}
QUICK = {"cuda": 64, "cpu": 2}


def add_arguments(parser: argparse.ArgumentParser, known: Mapping[str, Shape]) -> None:
    add = parser.add_argument
    text = f"of: {', '.join(known)}"
    add("--shape", nargs="+", choices=list(known), metavar="SHAPE", help=text)
    add("--batch", nargs="+", type=int, metavar="N", help="images")


def chosen(
    known: Mapping[str, Shape], args: argparse.Namespace, device: torch.device
) -> list[Shape]:
    """In the order in which they are measured; on a CPU usually the first two models."""
    usual = list(known)
    if device.type == "cpu":
        usual = [name for name in known if name.startswith(("ViT-B", "ViT-S")) and "CT" not in name]
    if args.quick:
        usual = usual[:1]
    batches = args.batch or [(QUICK if args.quick else BATCHES)[device.type]]
    return [known[name].at(batch) for batch in batches for name in args.shape or usual]
