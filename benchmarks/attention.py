"""`bench attention`: self-attention at the lengths of masked autoencoders, against all backends.

All providers get the packed qkv [B, N, 3, H, d] that the linear layer of a ViT block writes, and
return the gradient with respect to it: the transposes and copies that a backend needs are part of
its time. Each SDPA backend is forced; "sdpa auto" is torch's choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mae_kernels as mk
from benchmarks import eager, shapes
from benchmarks.harness import Bench, Inputs, Op, measure_all
from benchmarks.ops import uses
from benchmarks.shapes import SEQUENCES, Shape
from sssd_fast.attention import AttentionShape, load_xformers, refusal

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes.add_arguments(parser, SEQUENCES)


def run(args: argparse.Namespace, bench: Bench) -> None:
    chosen = shapes.chosen(SEQUENCES, args, bench.device)
    dtypes = args.dtypes or [torch.bfloat16 if bench.device.type == "cuda" else torch.float32]
    cases = [(attention_op(s, bench.device, t), s, t) for s in chosen for t in dtypes]
    measure_all(bench, cases, "attention")


def attention_op(s: Shape, device: torch.device, dtype: torch.dtype) -> Op:
    """The op with the providers that can run this shape, and why the others cannot."""
    size = (s.batch, s.tokens, 3, s.heads, s.head_width)

    def make(s: Shape, device: torch.device) -> Inputs:
        return {"qkv": torch.randn(size, device=device)}

    def moved(s: Shape, b: int, inputs: Inputs) -> tuple[float, float]:
        """Forward: reads q, k, v, writes the result. Backward: reads them, the result and its
        gradient, writes three gradients."""
        values = s.batch * s.tokens * s.width * b
        return 4 * values, 8 * values

    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": eager.attention,
        "eager compiled": eager.attention,
        "sdpa auto": eager.sdpa,
        **{name: partial(_forced, backend) for name, backend in BACKENDS.items()},
        "xformers": _xformers,
        "ours": mk.attention,
        "ours compiled": mk.attention,
    }
    site = AttentionShape(device, dtype, s.tokens, s.heads, s.head_width)
    absent = {"xformers": why} if (why := refusal("xformers", site)) else {}
    if device.type == "cpu":
        absent |= dict.fromkeys(("sdpa cudnn", "sdpa efficient"), "torch has it for CUDA only")
    providers = {
        name: uses(call, "qkv", compiled=name.endswith("compiled"))
        for name, call in calls.items()
        if name not in absent
    }
    return Op("attention", make, ("qkv",), moved, providers, absent=absent, exact="eager")


def _forced(backend: SDPBackend, qkv_BN3Hd: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return eager.sdpa(qkv_BN3Hd)


def _xformers(qkv_BN3Hd: Tensor) -> Tensor:
    ops, problem = load_xformers()
    if ops is None:
        raise RuntimeError(problem)
    out_BNHd: Tensor = ops.memory_efficient_attention(*qkv_BN3Hd.unbind(2))
    return out_BNHd
