"""`bench attention`: self-attention at the lengths of masked autoencoders, against every backend that can be named.

All take the packed qkv [B, N, 3, H, d] that the linear layer of a ViT block writes, and give the gradient with respect to it: what a
backend needs in transposes and copies before and after is part of its time. Each SDPA backend is forced; "sdpa auto" is torch's choice.
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
from sssd_fast.attention import AttentionShape, load_xformers, refusal

from . import eager
from .bench import Bench
from .kernels import measure_all
from .op import Cost, Inputs, Op, Provider
from .shapes import MODELS, Shape

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
BATCHES = {"cuda": (256, 64, 1024, 8), "cpu": (8,)}
QUICK_BATCH = {"cuda": 64, "cpu": 2}


@dataclass(frozen=True)
class Attention(Shape):
    """A Shape that is known by its tokens and heads."""

    tokens: int = 0
    head_width: int = 0

    @property
    def name(self) -> str:
        return f"{self.model} [{self.batch}, {self.tokens}, {self.heads}x{self.head_width}]"

    def sizes(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "tokens": self.tokens,
            "heads": self.heads,
            "head_width": self.head_width,
        }


def _site(model: str, block: str) -> Attention:
    """block: "encoder" (visible tokens), "decoder" or "classifier" (all tokens in the encoder's width)."""
    s = MODELS[model]
    width, heads = (s.decoder, s.decoder_heads) if block == "decoder" else (s.width, s.heads)
    tokens = 1 + (s.keep if block == "encoder" else s.patches)
    return Attention(f"{model} {block}", 1, width, heads, tokens=tokens, head_width=width // heads)


SITES = {
    s.model: s
    for s in (
        _site("ViT-B", "encoder"), _site("ViT-B", "decoder"), _site("ViT-L", "encoder"), _site("ViT-B", "classifier"),
        _site("ViT-S", "encoder"), _site("ViT-S", "decoder"), _site("odd", "encoder"), _site("odd", "decoder"),
    )
}  # fmt: skip
CPU_SITES = ("ViT-B encoder", "ViT-B decoder", "ViT-S encoder", "odd decoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", nargs="+", choices=list(SITES), metavar="SHAPE", help=f"of: {', '.join(SITES)}"
    )
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="images")


def run(args: argparse.Namespace, bench: Bench) -> None:
    kind = bench.device.type
    batches: Sequence[int] = args.batch or ([QUICK_BATCH[kind]] if bench.quick else BATCHES[kind])
    names = args.shape or (
        list(SITES)[:2] if bench.quick else SITES if kind == "cuda" else CPU_SITES
    )
    dtypes = args.dtypes or [torch.bfloat16 if kind == "cuda" else torch.float32]
    sites = [replace(SITES[name], batch=batch) for batch in batches for name in names]
    measure_all(
        bench,
        [(attention_op(s, bench.device, dtype), s, dtype) for s in sites for dtype in dtypes],
        "attention",
    )


def attention_op(s: Attention, device: torch.device, dtype: torch.dtype) -> Op:
    """The op with the providers that can run at this site, and why the others cannot."""

    def plain(function: Callable[[Tensor], Tensor], *, compiled: bool = False) -> Provider:
        return Provider(lambda _, x: function(x["qkv"]), compiled=compiled)

    def make(shape: Shape, device: torch.device) -> Inputs:
        return {"qkv": torch.randn(s.batch, s.tokens, 3, s.heads, s.head_width, device=device)}

    def cost(shape: Shape, b: int, inputs: Inputs) -> Cost:
        """Forward reads q, k, v and writes the result; backward reads them, the result and its gradient, writes three gradients."""
        values = s.batch * s.tokens * s.heads * s.head_width * b
        products = 4.0 * s.batch * s.heads * s.tokens**2 * s.head_width
        return Cost(4 * values, 8 * values, products, 2 * products)

    providers = {
        "eager": plain(eager.attention),
        "eager compiled": plain(eager.attention, compiled=True),
        "sdpa auto": plain(eager.sdpa),
        **{name: plain(_forced(backend)) for name, backend in BACKENDS.items()},
        "xformers": plain(_xformers),
        "ours": plain(mk.attention),
        "ours compiled": plain(mk.attention, compiled=True),
    }
    site = AttentionShape(device, dtype, s.tokens, s.heads, s.head_width)
    absent = {"xformers": why} if (why := refusal("xformers", site)) else {}
    if device.type == "cpu":
        absent |= dict.fromkeys(
            ("sdpa cudnn", "sdpa efficient"), "torch has no such backend for the CPU"
        )
    return Op(
        "attention",
        make,
        ("qkv",),
        cost,
        {name: provider for name, provider in providers.items() if name not in absent},
        absent=absent,
        exact="eager",
    )


def _forced(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    def call(qkv_BN3Hd: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return eager.sdpa(qkv_BN3Hd)

    return call


def _xformers(qkv_BN3Hd: Tensor) -> Tensor:
    ops, problem = load_xformers()
    if ops is None:
        raise RuntimeError(problem)
    q_BNHd, k_BNHd, v_BNHd = qkv_BN3Hd.unbind(2)
    out_BNHd: Tensor = ops.memory_efficient_attention(q_BNHd, k_BNHd, v_BNHd)
    return out_BNHd
