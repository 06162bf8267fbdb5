"""`bench ops` and `bench attention`: each op of mae_kernels against other ways to compute it.

The calls are those of `mae_kernels.samples()` with the sizes of real models; attention also has the
lengths of ViT-T. "plain" is the op's own plain PyTorch implementation, which a CPU may run anyway.
Attention gets the packed qkv [B, N, 3, H, d] that the linear layer of a ViT block writes, and
returns the gradient with respect to it: the transposes and copies that a backend needs are part of
its time. Each SDPA backend is forced; "sdpa auto" is torch's choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mae_kernels as mk
from benchmarks import eager
from benchmarks.harness import Bench, Op, Provider, measure_all
from mae_kernels import Draw, Sample
from sssd_fast.attention import AttentionShape, load_xformers, refusal

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# Tokens, heads and head width of ViT-T: encoder at 128, classifier at 128 and at 224 pixels.
TINY = ((17, 3, 64), (65, 3, 64), (197, 3, 64))
BATCHES = {"cuda": 256, "cpu": 8}
# Two grey levels; the largest value is rarely 255. One or two passes round differently.
TOLERANCES = {"crop_resize": 2.5 / 255}


def samples(kind: str) -> Iterator[Sample]:
    """kind: "ops" or "attention"."""
    if kind == "attention":
        yield from (attention_sample(*size) for size in TINY)
    for sample in mk.samples():
        if sample.size == "model" and (sample.op == "attention") == (kind == "attention"):
            yield sample


def attention_sample(tokens: int, heads: int, width: int) -> Sample:
    def make(draw: Draw) -> tuple[dict[str, Tensor | None], dict[str, object]]:
        return {"qkv": draw.normal(draw.batch, tokens, 3, heads, width)}, {}

    name = f"{tokens} x {heads} x {width}"
    return Sample("attention", name, mk.attention, make, ("qkv",), "model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = sorted({sample.op for sample in mk.samples()})
    add = parser.add_argument
    add("--op", nargs="+", choices=names, metavar="OP", help=f"of: {', '.join(names)}")
    add("--sample", nargs="+", metavar="S", help="by name: '197 x 3 x 64', 'encoder B/16', ...")
    add("--batch", type=int, metavar="N", help=f"images (default {BATCHES})")


def run(args: argparse.Namespace, bench: Bench) -> None:
    chosen = [s for s in samples(args.kind) if not args.op or s.op in args.op]
    chosen = [s for s in chosen if not args.sample or s.name in args.sample]
    if args.quick or (args.kind == "ops" and bench.device.type == "cpu" and not args.sample):
        chosen = list({sample.op: sample for sample in reversed(chosen)}.values())[::-1]
    batch = args.batch or BATCHES[bench.device.type]
    cases = [op_of(s, bench.device, dtype, batch) for s in chosen for dtype in args.dtypes]
    measure_all(bench, cases, args.kind)


def op_of(sample: Sample, device: torch.device, dtype: torch.dtype, batch: int) -> Op:
    ours = Provider(sample.function)
    published = Provider(getattr(eager, sample.op))
    absent: dict[str, str] = {}
    if sample.op == "crop_resize":  # not compiled: its plain forms loop over the images
        found = {"published": published, "ours": ours}
    elif sample.op == "attention":
        found, absent = attention_rivals(sample, device, dtype)
        found = {"published": published, **found, "ours": ours}
    else:
        plain = Provider(sample.function, backend="reference")
        found = {"published": published, "plain": plain, "ours": ours}
    for name, provider in [*found.items()]:
        if name in ("published", "plain", "ours") and sample.op != "crop_resize":
            found[f"{name} compiled"] = Provider(provider.call, provider.backend, compiled=True)
    return Op(sample, device, dtype, batch, found, absent, TOLERANCES.get(sample.op))


def attention_rivals(
    sample: Sample, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Provider], dict[str, str]]:
    """Providers of attention, and why some cannot run this shape."""
    calls = {"sdpa auto": eager.sdpa, "xformers": _xformers}
    calls |= {name: partial(_forced, backend) for name, backend in BACKENDS.items()}
    tokens, heads, width = (int(word) for word in sample.name.split(" x "))
    site = AttentionShape(device, dtype, tokens, heads, width)
    absent = {"xformers": why} if (why := refusal("xformers", site)) else {}
    if device.type == "cpu":
        absent |= dict.fromkeys(("sdpa cudnn", "sdpa efficient"), "torch has it for CUDA only")
    return {n: Provider(call) for n, call in calls.items() if n not in absent}, absent


def _forced(backend: SDPBackend, qkv: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return eager.sdpa(qkv)


def _xformers(qkv: Tensor) -> Tensor:
    ops, problem = load_xformers()
    if ops is None:
        raise RuntimeError(problem)
    out_BNHd: Tensor = ops.memory_efficient_attention(*qkv.unbind(2))
    return out_BNHd
