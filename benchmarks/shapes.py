"""The sizes at which ops are measured: ViT-S, B and L of masked autoencoders, and odd sizes.

D encoder width, E decoder width, L patches, K visible, M masked, V = P*P*C values of a patch, S
prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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

    @property
    def name(self) -> str:
        return f"{self.model}, {self.batch} images"

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

    def sizes(self) -> dict[str, int | float | list[int]]:
        """As written to a result file."""
        names = ("batch", "width", "heads", "decoder", "patch", "channels", "mask_ratio", "logits")
        return {**{name: getattr(self, name) for name in names}, "image": list(self.image)}


ODD_SIZES: dict[str, Any] = {
    "image": (154, 238),
    "patch": 14,
    "channels": 1,
    "mask_ratio": 0.6,
    "logits": 1000,
}
# The usual model, the large one, the one for small data sets (decoder of SD-MAE), one-channel CT,
# and sizes that are not multiples of 8 (patch 14, 11 x 17 patches, heads of 40 and 8 values).
MODELS = {
    "ViT-B": Shape("ViT-B", 1, 768, 12),
    "ViT-L": Shape("ViT-L", 1, 1024, 16),
    "ViT-S": Shape("ViT-S", 1, 384, 6, 192, 3),
    "ViT-B, CT": Shape("ViT-B, CT", 1, 768, 12, channels=1),
    "odd": Shape("odd", 1, 200, 5, 104, 13, **ODD_SIZES),
}
ODD_BATCH = {8: 5, 64: 61, 256: 251, 1024: 1021}
BATCHES = {"cuda": (256, 64, 1024, 8), "cpu": (8,)}  # most important first
CPU_MODELS = ("ViT-B", "ViT-S", "odd")
QUICK = {"cuda": 64, "cpu": 2}


def shapes(
    device: torch.device,
    *,
    models: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    quick: bool = False,
) -> list[Shape]:
    """In the order in which they are measured."""
    if quick:
        chosen, batches = models or ["ViT-B", "odd"], batches or [QUICK[device.type]]
    else:
        usual = list(MODELS) if device.type == "cuda" else CPU_MODELS
        chosen, batches = models or usual, batches or BATCHES[device.type]
    return [
        MODELS[model].at(ODD_BATCH.get(b, b) if model == "odd" else b)
        for b in batches
        for model in chosen
    ]
