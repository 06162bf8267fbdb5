"""The registered ops on the CPU: opcheck, gradcheck, one compiled graph.

The public functions use torch's own autograd on the CPU; the backend "registered" makes them call
the registered op and its own backward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import mae_kernels as mk
from mae_kernels import Sample
from tests.kernels import calls
from tests.kernels.calls import Tensors, made, with_leaves

# the second backward of one graph is tested by calls.check_accuracy
DIFFERENTIABLE = pytest.mark.parametrize(
    "sample", [sample for sample in calls.SMALL if sample.gradients], ids=str
)
FIRST = pytest.mark.parametrize("sample", calls.FIRST, ids=str)


@pytest.fixture(autouse=True)
def _registered() -> Any:
    with mk.backend("registered"):
        yield


@FIRST
def test_opcheck_of_the_op_and_its_backward(sample: Sample) -> None:
    with calls.RecordOps() as recorded:
        calls.results(sample, *made(sample))
    assert recorded.ops
    # the compiled graph is tested below, with gradients
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, args in recorded.ops.items():
        opcheck(op, args, test_utils=checks)


@DIFFERENTIABLE
def test_gradcheck_of_the_registered_backward(sample: Sample) -> None:
    tensors, options = made(sample, dtype=torch.float64, batch=2)
    tensors, leaves = with_leaves(sample, tensors)

    def call(*leaves: Tensor) -> list[Tensor]:
        given = tensors | dict(zip(sample.gradients, leaves, strict=True))
        return [out for out in calls.outputs(sample, given, options) if out.requires_grad]

    # fast: random projections instead of one difference per element
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@FIRST
def test_one_compiled_graph_for_every_batch_size(sample: Sample) -> None:
    torch._dynamo.reset()
    options = made(sample)[1]

    def call(tensors: Tensors) -> Tensor:
        return calls.outputs(sample, tensors, options)[0].float() * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # 11 is not another size of any sample: equal sizes would be compiled as one
        for batch in (11, 3, 5):
            tensors, leaves = with_leaves(sample, made(sample, batch=batch)[0])
            if batch == 11:
                for tensor in tensors.values():
                    if tensor is not None and tensor.shape[0] == batch:
                        # raises if the graph makes the batch a constant
                        torch._dynamo.mark_dynamic(tensor, 0)
            found = []
            for function in (compiled, call):
                out = function(tensors)
                found.append([out.detach()])
                if leaves:
                    found[-1] += torch.autograd.grad(out.square().sum(), leaves)
            torch.testing.assert_close(*found)
