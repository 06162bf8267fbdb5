"""What an entry of the registry is made of: cost by formula, providers, inputs. ops_tokens.py and ops_losses.py hold the entries.

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

from . import eager
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
    tolerance: float | None = (
        None  # of the largest value, in place of the rule of measure.allowed_error
    )
    exact: str = "published"  # the provider whose results in fp64 are the truth


def with_compiled(providers: dict[str, Provider]) -> dict[str, Provider]:
    """`tuned compiled` and `ours compiled` after what they compile."""
    out: dict[str, Provider] = {}
    for name, provider in providers.items():
        out[name] = provider
        if name in ("tuned", "ours"):
            out[f"{name} compiled"] = Provider(
                provider.call, provider.leaves, provider.own, compiled=True
            )
    return out


# ---- inputs ----


def pixels(s: Shape, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (s.batch, s.channels, *s.image), dtype=torch.uint8, device=device)


def noise(s: Shape, device: torch.device) -> Tensor:
    """Uniform ranks without a tie, which sorts that are not stable would break in their own way."""
    order = torch.rand(s.batch, s.patches, device=device).argsort(1)
    return (order.float() + 0.5) / s.patches


def ids(s: Shape, device: torch.device) -> Inputs:
    ids_keep, ids_restore, ids_masked, mask = eager.tuned_masking(noise(s, device), s.keep)
    found = {
        "ids_keep": ids_keep,
        "ids_restore": ids_restore,
        "ids_masked": ids_masked,
        "mask": mask,
    }
    return {name: t.contiguous() for name, t in found.items()}


def normal(*shape: int, device: torch.device, fan_in: int = 1) -> Tensor:
    return torch.randn(shape, device=device) / math.sqrt(fan_in)


def stats(s: Shape) -> dict[str, Any]:
    return {"mean": list(eager.MEAN[: s.channels]), "std": list(eager.STD[: s.channels])}


def of_masked(name: str) -> Callable[[Inputs, list[Tensor]], list[Tensor]]:
    """The first gradient is one of all patches: the masked rows of it, where the others must be 0, and the rest as it is."""

    def own(x: Inputs, gradients: list[Tensor]) -> list[Tensor]:
        picked = eager.rows(gradients[0], x["ids_masked"])
        return [picked, *gradients[1:]]

    return own
