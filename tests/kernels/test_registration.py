"""The registered ops on the CPU: opcheck, gradcheck, one compiled graph.

The public functions use torch's own autograd on the CPU; the backend "registered" makes them call
the op and its own backward, past the dispatcher as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor

import mae_kernels as mk
from mae_kernels import Sample
from tests.kernels import calls
from tests.kernels.calls import Tensors, made, with_leaves

# the second backward of one graph is tested by calls.check_accuracy
IDS = torch.arange(4).expand(2, 4)
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


@FIRST
def test_eager_call_has_the_results_of_the_registered_op(sample: Sample) -> None:
    tensors, options = made(sample)
    eager = calls.results(sample, tensors, options)
    with calls.RecordOps() as recorded:
        dispatched = calls.results(sample, tensors, options)
    assert recorded.ops
    assert all(torch.equal(a, b) for a, b in zip(eager, dispatched, strict=True))
    with mk.backend("auto"), torch.autocast("cpu", torch.bfloat16):
        assert all(torch.isfinite(x).all() for x in calls.results(sample, tensors, options))


class Subclass(TwoTensor):
    """A tensor subclass of torch's own tests; records the ops that it gets."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        cls.seen.append(func.name())
        return super().__torch_dispatch__(func, types, args, kwargs)


def in_subclass(x: Tensor) -> list[str]:
    Subclass.seen.clear()
    losses(Subclass(x, x.clone()))
    return Subclass.seen


def in_profile(x: Tensor) -> list[str]:
    with torch.autograd.profiler.profile() as profile:
        losses(x)
    return [event.name for event in profile.function_events or ()]


def in_dispatch_mode(x: Tensor) -> list[str]:
    with calls.RecordOps() as recorded:
        losses(x)
    return [op.name() for op in recorded.ops]


def in_fake_mode(x: Tensor) -> list[str]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, calls.RecordOps() as recorded:
        assert isinstance(losses(mode.from_tensor(x)), FakeTensor)
    return [op.name() for op in recorded.ops]


def in_graph(module: torch.fx.GraphModule) -> list[str]:
    return [
        str(node.target).removesuffix(".default").replace(".", "::") for node in module.graph.nodes
    ]


def in_make_fx(x: Tensor) -> list[str]:
    return in_graph(make_fx(losses)(x))


def in_pre_dispatch(x: Tensor) -> list[str]:
    return in_graph(make_fx(losses, pre_dispatch=True)(x))


def in_export(x: Tensor) -> list[str]:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return losses(x)

    return in_graph(torch.export.export(Module(), (x,)).graph_module)


def losses(x: Tensor) -> Tensor:
    return mk.attention(x).square().sum()


WAYS = [in_subclass, in_profile, in_dispatch_mode, in_fake_mode]


@pytest.mark.parametrize("way", [*WAYS, in_make_fx, in_pre_dispatch, in_export])
def test_registered_op_is_what_tools_of_torch_see(way: Callable[[Tensor], list[str]]) -> None:
    assert "mae_kernels::attention" in way(torch.randn(2, 5, 3, 2, 16))


def test_eager_call_refuses_what_the_registered_op_refuses() -> None:
    """A second derivative and torch.func; torch.library has no formula for them."""
    pred, images = torch.randn(2, 4, 16, requires_grad=True), torch.rand(2, 1, 8, 8)

    def loss(pred: Tensor) -> Tensor:
        return mk.masked_reconstruction_loss(pred, images, patch_size=4, ids=IDS)

    assert "defaultBackward" not in str(loss(pred).grad_fn)  # of torch.library
    first = torch.autograd.grad(loss(pred), pred, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(pred.detach())
