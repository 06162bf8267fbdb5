"""What torch.compile sees of the ops on a GPU, traced with fake CUDA tensors on any machine.

Every launch must be captured, and the compiler must know exactly which buffers its kernel writes.
A written buffer that it does not know is treated as an unchanged input: results are silently wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple

import mae_kernels as mk
from mae_kernels import Draw, Sample
from tests.kernels import calls

pytest.importorskip("triton", reason="the kernels need it")
# it launches the kernels of masked_reconstruction_loss; a build of torch without CUDA cannot trace
# its slices
SAMPLES = [
    sample
    for sample in calls.MODEL
    if sample.op != "linear_reconstruction_loss" or torch.version.cuda
]


def traced(sample: Sample) -> list[torch.fx.Node]:
    """The kernel launches of the sample's op and its backward op, as nodes of their graphs."""
    found = []
    for op, args in calls.ops_of(sample):
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

        def call(*tensors: Tensor, op: Any = op, args: Any = args, places: Any = places) -> Any:
            given = list(args)
            for i, tensor in zip(places, tensors, strict=True):
                given[i] = tensor
            out = op(*given)
            return (out,) if isinstance(out, Tensor) else tuple(out)

        with calls.fake_cuda(), mk.backend("triton"):
            inputs = [
                torch.empty_strided(
                    args[i].shape, args[i].stride(), dtype=args[i].dtype, device="cuda"
                )
                for i in places
            ]
            graph = aot_export_joint_simple(call, inputs, trace_joint=False).graph
        found += [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    return found


def is_fresh(node: Any) -> bool:
    """True for memory that was allocated in the graph and not written by a launch yet."""
    if not isinstance(node, torch.fx.Node) or node.op == "placeholder":
        return False
    if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].numel() == 0:
        return False
    return "triton_kernel" not in str(node.target) and all(map(is_fresh, node.all_input_nodes))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_compiler_knows_what_each_launch_writes(sample: Sample) -> None:
    """Ops are functional, so a launch writes all memory that was allocated for it, and no other."""
    launches = traced(sample)
    assert len(launches) >= (2 if sample.gradients else 1)
    for node in launches:
        fresh = {name for name, value in node.kwargs["kwargs"].items() if is_fresh(value)}
        assert fresh
        assert set(node.kwargs["tensors_to_clone"]) == fresh


ATTENTION = [sample for sample in SAMPLES if sample.op == "attention"]


@pytest.mark.parametrize("sample", ATTENTION, ids=str)
def test_compiler_knows_the_flops_of_attention(sample: Sample) -> None:
    """torch's partitioner uses them when a memory budget makes it choose what to recompute."""
    from torch._functorch.partitioners import estimate_runtime

    batch, tokens, _, heads, width = sample.make(Draw("meta", batch=8))[0]["qkv"].shape
    forward, backward = map(estimate_runtime, traced(sample))
    # forward: Q K^T and P V; the backward repeats the first and has four more
    product = 2 * batch * heads * tokens * tokens * width
    assert (forward, backward) == (2 * product, 5 * product)
