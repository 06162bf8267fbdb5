"""Kernels and bytes of the compiled pre-training step, counted in the code that Inductor generates. No GPU is needed, and nothing is run.

    python -m benchmarks.compiled_step                       ViT-B/16, 256 images, the code for a GPU
    python -m benchmarks.compiled_step --code cpp            the code for the CPU

What is counted: for every kernel the size of each buffer it reads and writes, once, as Inductor's scheduler counts them; products of
matrices (which go to cuBLAS), kernels of mae_kernels (attention included) and the rest, which Inductor makes itself. What stays in
the cache is counted like the rest, so this is traffic between kernels, not a prediction of DRAM traffic.

How code for a GPU is had without one: the step is traced on the CPU in bf16 and Inductor's Triton scheduler is told to take it, with
a stub in place of a CUDA driver (sm_90), on torch 2.13. Decisions that depend on a GPU's own properties are those of the defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
import torch._inductor.scheduler as scheduler
from torch import nn
from torch._inductor.graph import GraphLowering

import mae_kernels
from mae_kernels import _runtime
from sssd_fast.config import Config, load_config
from sssd_fast.model import MLP, Blocks
from sssd_fast.objective import SSSD

KINDS = ("ours", "products", "Inductor's")
# what the step can be asked for, by name: (settings, MLP fused, share of activations kept)
VARIANTS: dict[str, tuple[torch.dtype, bool, float]] = {
    "fp32 residual, plain MLP": (torch.float32, False, 1.0),
    "fp32 residual, plain MLP, budget 0.8": (torch.float32, False, 0.8),
    "fp32 residual, fused MLP": (torch.float32, True, 1.0),
    "bf16 residual, plain MLP": (torch.bfloat16, False, 1.0),
    "bf16 residual, plain MLP, budget 0.8": (torch.bfloat16, False, 0.8),
    "bf16 residual, fused MLP": (torch.bfloat16, True, 1.0),
    "bf16 residual, fused MLP, budget 0.8": (torch.bfloat16, True, 0.8),
}


# Counting reads Inductor's inside, which other versions of torch have elsewhere.
COUNTABLE = hasattr(scheduler, "_is_gpu_triton_backend")


class Counted(Exception):
    """Ends a step whose backward has been counted."""


class Counts:
    """Of one forward and backward."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.saved_bytes = 0
        self.largest: dict[str, list[tuple[int, str]]] = defaultdict(
            list
        )  # of Inductor's own kernels, per pass

    def add(self, graph: GraphLowering) -> None:
        _, per_node, _ = graph.count_bytes()
        for node, elements in per_node:
            kind = _kind(node)
            if kind is None:
                continue
            size = 4 * int(elements)  # count_bytes gives a quarter of the bytes per node
            if (
                kind == KINDS[0]
            ):  # where it takes an output, which is an argument that is written, for one that is read as well
                inner: Any = node.node
                size = sum(
                    {
                        b.get_name(): int(b.get_numel()) * b.get_dtype().itemsize
                        for b in inner.inputs
                    }.values()
                )
            self.kernels[kind] += 1
            self.bytes[kind] += size
            if kind == KINDS[2]:
                self.largest["backward" if graph.is_backward else "forward"].append(
                    (size, str(node.get_name()))
                )
        if not graph.is_backward:
            outputs = [out for out in graph.graph_outputs if hasattr(out, "get_dtype")]
            inputs = set(graph.graph_inputs)
            self.saved_bytes = sum(
                int(out.get_numel()) * out.get_dtype().itemsize
                for out in outputs
                if out.get_name() not in inputs
            )


def _kind(node: Any) -> str | None:
    name = type(node).__name__
    if name == "NopKernelSchedulerNode":
        return None
    if name != "ExternKernelSchedulerNode":
        return KINDS[2]
    inner = type(node.node).__name__
    if inner == "MultiOutput":
        return None
    if inner == "UserDefinedTritonKernel":
        return KINDS[0]
    called = str(getattr(node.node, "python_kernel_name", ""))
    return (
        KINDS[1] if any(product in called for product in ("mm", "scaled_dot_product")) else KINDS[2]
    )


class StubDriver:
    """Enough of a CUDA driver for Triton to generate code."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0


@contextmanager
def code_for(target: str) -> Iterator[None]:
    """Inside, Inductor generates "triton" (with the kernels of mae_kernels) or "cpp" code for tensors on the CPU."""
    with ExitStack() as stack:
        stack.enter_context(inductor.patch(cpu_backend=target, force_disable_caches=True))
        if target == "triton":
            import triton.runtime

            stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", StubDriver()))
            stack.enter_context(
                mock.patch.object(scheduler, "_is_gpu_triton_backend", return_value=True)
            )
            stack.enter_context(mock.patch.object(_runtime, "why_not_triton", return_value=None))
            for name, module in list(sys.modules.items()):
                if name.startswith("mae_kernels") and hasattr(module, "architecture"):
                    stack.enter_context(mock.patch.object(module, "architecture", return_value=90))
            stack.enter_context(mae_kernels.backend("triton"))
        yield


def count(
    config: Config,
    batch: int,
    *,
    residual: torch.dtype,
    fused_mlp: bool,
    budget: float,
    target: str,
) -> Counts:
    """Counts of the step on `batch` images under bf16 autocast; `budget` as torch's activation_memory_budget."""
    torch._dynamo.reset()
    model, counts = SSSD(config.model, config.objective), Counts()
    set_up(model, residual, fused_mlp)

    def record(graph: GraphLowering) -> Any:
        graph.codegen()
        counts.add(graph)
        shapes: list[Any] = (
            []
            if graph.is_backward
            else [
                (
                    *((int(n) for n in size) for size in (out.get_size(), out.get_stride())),
                    out.get_dtype(),
                )
                if hasattr(out, "get_dtype")
                else None
                for out in graph.graph_outputs
            ]
        )

        def call(args: list[Any]) -> tuple[Any, ...]:
            args.clear()
            if graph.is_backward:
                raise Counted
            return tuple(
                None if s is None else torch.empty_strided(tuple(s[0]), tuple(s[1]), dtype=s[2])
                for s in shapes
            )

        return SimpleNamespace(call=call, runner=None, __file__="")

    height, width = config.model.image_size
    images = torch.zeros(batch, config.model.in_channels, height, width, dtype=torch.uint8)
    budgets = functorch.patch(activation_memory_budget=budget, is_non_builtin_to_include=True)
    with code_for(target), budgets, mock.patch.object(GraphLowering, "compile_to_module", record):
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(images, torch.rand(batch, config.model.num_patches))
        with suppress(Counted):
            out.total.backward()
    return counts


def set_up(model: nn.Module, residual: torch.dtype, fused_mlp: bool) -> None:
    for module in model.modules():
        if isinstance(module, Blocks):
            module.residual = residual
        elif isinstance(module, MLP):
            module.fused = fused_mlp


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="as for sssd-fast; default: ViT-B/16 at 224")
    parser.add_argument("--batch", type=int, default=256, help="images (default 256)")
    parser.add_argument("--code", choices=("triton", "cpp"), default="triton")
    parser.add_argument(
        "--largest",
        type=int,
        default=0,
        metavar="N",
        help="also list the N largest of Inductor's kernels",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if not COUNTABLE:
        parser.error(
            f"counting needs the Inductor of torch 2.13; this is torch {torch.__version__}"
        )
    config = load_config(args.config, args.overrides)
    print(
        "| step | kernels: ours / products / Inductor's | MB per image: ours / products / Inductor's | kept for the backward, MB |"
    )
    print("|---|---|---|---|")
    for name, (residual, fused_mlp, budget) in VARIANTS.items():
        if fused_mlp and args.code == "cpp":
            continue  # the fused MLP is a kernel for GPUs
        counts = count(
            config,
            args.batch,
            residual=residual,
            fused_mlp=fused_mlp,
            budget=budget,
            target=args.code,
        )
        kernels = " / ".join(str(counts.kernels[kind]) for kind in KINDS)
        megabytes = " / ".join(f"{counts.bytes[kind] / args.batch / 1e6:.1f}" for kind in KINDS)
        print(
            f"| {name} | {kernels} | {megabytes} | {counts.saved_bytes / args.batch / 1e6:.1f} |",
            flush=True,
        )
        for direction, nodes in counts.largest.items():
            for size, node in sorted(nodes, reverse=True)[: args.largest]:
                print(f"    {direction} {size / args.batch / 1e6:.3f} MB {node}")


if __name__ == "__main__":
    main()
