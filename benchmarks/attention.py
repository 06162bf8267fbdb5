"""`bench attention`: self-attention at the lengths of masked autoencoders, against all backends.

All providers get the packed qkv [B, N, 3, H, d] that the linear layer of a ViT block writes, and
return the gradient with respect to it: the transposes and copies that a backend needs are part of
its time. Each SDPA backend is forced; "sdpa auto" is torch's choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mae_kernels as mk
from benchmarks import eager
from benchmarks.harness import Bench, Cost, Inputs, Op, Provider, measure_all
from benchmarks.ops import uses
from benchmarks.shapes import MODELS, Shape
from sssd_fast.attention import AttentionShape, load_xformers, refusal

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
BATCHES = {"cuda": (256, 64, 1024, 8), "cpu": (8,)}
QUICK_BATCH = {"cuda": 64, "cpu": 2}


@dataclass(frozen=True)
class SequenceShape(Shape):
    """A shape that is known by its tokens and heads."""

    tokens: int = 0
    head_width: int = 0

    @property
    def name(self) -> str:
        return f"{self.model} [{self.batch}, {self.tokens}, {self.heads}x{self.head_width}]"

    def sizes(self) -> dict[str, Any]:
        names = ("batch", "tokens", "heads", "head_width")
        return {name: getattr(self, name) for name in names}


def sequence_shape(model: str, block: str) -> SequenceShape:
    """block: "encoder" (visible tokens), "decoder" or "classifier" (all tokens, encoder width)."""
    s = MODELS[model]
    width, heads = (s.decoder, s.decoder_heads) if block == "decoder" else (s.width, s.heads)
    tokens = 1 + (s.keep if block == "encoder" else s.patches)
    more: dict[str, Any] = {"tokens": tokens, "head_width": width // heads}
    return SequenceShape(f"{model} {block}", 1, width, heads, **more)


SHAPES = {
    f"{model} {block}": sequence_shape(model, block)
    for model, block in (
        ("ViT-B", "encoder"),
        ("ViT-B", "decoder"),
        ("ViT-L", "encoder"),
        ("ViT-B", "classifier"),
        ("ViT-S", "encoder"),
        ("ViT-S", "decoder"),
        ("odd", "encoder"),
        ("odd", "decoder"),
    )
}
CPU_SHAPES = ("ViT-B encoder", "ViT-B decoder", "ViT-S encoder", "odd decoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(SHAPES)
    parser.add_argument(
        "--shape", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=f"of: {names}"
    )
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="images")


def run(args: argparse.Namespace, bench: Bench) -> None:
    kind = bench.device.type
    batches: Sequence[int] = args.batch or ([QUICK_BATCH[kind]] if bench.quick else BATCHES[kind])
    usual: Sequence[str] = list(SHAPES) if kind == "cuda" else CPU_SHAPES
    names = args.shape or (usual[:2] if bench.quick else usual)
    dtypes = args.dtypes or [torch.bfloat16 if kind == "cuda" else torch.float32]
    chosen = [replace(SHAPES[name], batch=batch) for batch in batches for name in names]
    cases = [(attention_op(s, bench.device, t), s, t) for s in chosen for t in dtypes]
    measure_all(bench, cases, "attention")


def attention_op(s: SequenceShape, device: torch.device, dtype: torch.dtype) -> Op:
    """The op with the providers that can run this shape, and why the others cannot."""

    def make(shape: Shape, device: torch.device) -> Inputs:
        return {"qkv": torch.randn(s.batch, s.tokens, 3, s.heads, s.head_width, device=device)}

    def cost(shape: Shape, b: int, inputs: Inputs) -> Cost:
        """Forward: reads q, k, v, writes the result. Backward: reads them, the result and its
        gradient, writes three gradients."""
        values = s.batch * s.tokens * s.heads * s.head_width * b
        products = 4.0 * s.batch * s.heads * s.tokens**2 * s.head_width
        return Cost(4 * values, 8 * values, products, 2 * products)

    providers = {
        "eager": uses(eager.attention, "qkv"),
        "eager compiled": uses(eager.attention, "qkv", compiled=True),
        "sdpa auto": uses(eager.sdpa, "qkv"),
        **{name: uses(_forced(backend), "qkv") for name, backend in BACKENDS.items()},
        "xformers": uses(_xformers, "qkv"),
        "ours": uses(mk.attention, "qkv"),
        "ours compiled": uses(mk.attention, "qkv", compiled=True),
    }
    site = AttentionShape(device, dtype, s.tokens, s.heads, s.head_width)
    absent = {"xformers": why} if (why := refusal("xformers", site)) else {}
    if device.type == "cpu":
        absent |= dict.fromkeys(("sdpa cudnn", "sdpa efficient"), "torch has it for CUDA only")
    available: dict[str, Provider] = {n: p for n, p in providers.items() if n not in absent}
    return Op("attention", make, ("qkv",), cost, available, absent=absent, exact="eager")


def _forced(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    def call(qkv_BN3Hd: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return eager.sdpa(qkv_BN3Hd)

    return call


def _xformers(qkv_BN3Hd: Tensor) -> Tensor:
    ops, problem = load_xformers()
    if ops is None:
        raise RuntimeError(problem)
    out_BNHd: Tensor = ops.memory_efficient_attention(*qkv_BN3Hd.unbind(2))
    return out_BNHd
