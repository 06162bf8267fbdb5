"""The registered ops on the CPU: opcheck, fp64 gradcheck of their own backward, one compiled graph, bytes kept.

The public functions take torch's own autograd on the CPU, so these tests call the registered ops themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import mae_kernels  # noqa: F401  (registers the ops)

OPS = torch.ops.mae_kernels


class Case(NamedTuple):
    make: Callable[[int, torch.dtype], tuple[Any, ...]]  # batch, dtype -> arguments
    first: Callable[[Any], Tensor] = lambda out: out[0] if isinstance(out, (tuple, list)) else out


def floats(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def ids_of(batch: int, patches: int, listed: int) -> Tensor:
    return torch.stack([torch.randperm(patches) for _ in range(batch)])[:, :listed].contiguous()


def pixels(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)


def embed_arguments(batch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = floats(5, 3, 4, 4, dtype=dtype)
    bias = floats(5, dtype=dtype)
    pos = floats(6, 5, dtype=dtype)
    return (
        pixels(batch, 3, 8, 12),
        ids_of(batch, 6, 4),
        weight,
        bias,
        pos,
        [0.5, 0.4, 0.3],
        [0.2, 0.3, 0.4],
        dtype,
    )


def loss_arguments(batch: int, dtype: torch.dtype, use_mask: bool = False) -> tuple[Any, ...]:
    ids = ids_of(batch, 6, 4)
    mask = torch.zeros(batch, 6, dtype=torch.bool).scatter_(1, ids, True)
    select = (None, mask) if use_mask else (ids, None)
    pred = floats(batch, 6 if use_mask else 4, 48, dtype=dtype)
    return (
        pred,
        pixels(batch, 3, 8, 12),
        *select,
        4,
        "channel" if use_mask else "patch",
        1e-6,
        [0.5],
        [0.2],
    )


def linear_arguments(batch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    hidden = floats(batch, 2, 5, dtype=dtype)
    weight = floats(48, 5, dtype=dtype)
    bias = floats(48, dtype=dtype)
    rest = (4, "patch", 1e-6, [0.5], [0.2], dtype, True)
    return hidden, weight, bias, pixels(batch, 3, 8, 12), ids_of(batch, 6, 2), *rest


def restore_arguments(batch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    visible = floats(batch, 3, 5, dtype=dtype)
    token = floats(5, dtype=dtype)
    pos = floats(7, 5, dtype=dtype)
    return visible, ids_of(batch, 6, 6), token, pos, 1


def gelu_arguments(batch: int, dtype: torch.dtype, recompute: bool = True) -> tuple[Any, ...]:
    x, bias = floats(batch, 2, 6, dtype=dtype), floats(6, dtype=dtype)
    return x, bias, floats(4, 6, dtype=dtype), floats(4, dtype=dtype), recompute


def sssd_arguments(batch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    pred, images, ids, mask, *options = loss_arguments(batch, dtype)
    tensors = (
        pred,
        images,
        floats(batch, 9, dtype=dtype),
        floats(batch, 9, dtype=dtype),
        ids,
        mask,
        torch.rand(9),
    )
    return *tensors, *options, 0.2, False, 0.2, 0.1


def crop_arguments(batch: int) -> tuple[Any, ...]:
    places = torch.tensor([7, 9, 13, 1, 2, 7, 9, 1]).repeat(
        batch, 1
    )  # offset, image, box, mirror: columns of one tensor
    pixels_T = torch.randint(0, 256, (400,), dtype=torch.uint8)
    return (
        pixels_T,
        places[:, 0],
        places[:, 1:3],
        places[:, 3:7],
        torch.rand(batch) < 0.5,
        [6, 5],
        3,
    )


CASES = {
    "gather_patches": Case(lambda b, t: (pixels(b, 3, 8, 12), ids_of(b, 6, 4), 4, [0.5], [0.2], t)),
    "embed_patches": Case(embed_arguments),
    "distillation_loss": Case(
        lambda b, t: (floats(b, 9, dtype=t), floats(b, 9, dtype=t), torch.rand(9), False, 0.2, 0.1)
    ),
    "sssd_loss": Case(sssd_arguments, lambda out: out[0] * 2 + out[1] + out[2] * 3),
    "attention": Case(lambda b, t: (floats(b, 9, 3, 2, 4, dtype=t), 0.4)),
    "random_masking": Case(lambda b, t: (torch.rand(b, 9, dtype=t), 4)),
    "crop_resize": Case(lambda b, t: crop_arguments(b)),
    "crop_resize_reference": Case(lambda b, t: crop_arguments(b)),
    "restore_tokens": Case(restore_arguments),
    "gelu_linear": Case(gelu_arguments),
    "gelu_linear/kept": Case(lambda b, t: gelu_arguments(b, t, recompute=False)),
    "linear_reconstruction_loss": Case(linear_arguments),
    "masked_reconstruction_loss": Case(loss_arguments),
    "masked_reconstruction_loss/mask": Case(lambda b, t: loss_arguments(b, t, use_mask=True)),
}


def op_of(name: str) -> Any:
    return getattr(OPS, name.split("/")[0])


def leaves_of(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "/" not in name:  # once for each op: the slow one
        tests.append("test_aot_dispatch_dynamic")
    opcheck(op_of(name).default, CASES[name].make(3, torch.float32), test_utils=tests)


@pytest.mark.parametrize("name", [n for n in CASES if leaves_of(CASES[n].make(1, torch.float64))])
def test_gradcheck_of_the_registered_backward(name: str) -> None:
    arguments = CASES[name].make(2, torch.float64)
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def call(*leaves: Tensor) -> Tensor:
        full = list(arguments)
        for place, leaf in zip(places, leaves, strict=True):
            full[place] = leaf
        return CASES[name].first(op_of(name)(*full))

    assert torch.autograd.gradcheck(call, [arguments[p] for p in places])


@pytest.mark.parametrize("name", [n for n in CASES if leaves_of(CASES[n].make(1, torch.float64))])
def test_a_second_backward_through_one_graph_is_the_first(name: str) -> None:
    """Protects gradients from in-place scaling: of what the graph keeps, and of what an earlier backward returned."""
    arguments = CASES[name].make(3, torch.float32)
    leaves = leaves_of(arguments)
    out = CASES[name].first(op_of(name)(*arguments))
    upstream = torch.full_like(out, 3.0)
    gradients = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    copies = [g.clone() for g in gradients]
    torch.autograd.grad(out, leaves, upstream * -0.5, retain_graph=True)
    again = torch.autograd.grad(out, leaves, upstream)
    for returned, copy, repeated in zip(gradients, copies, again, strict=True):
        assert torch.equal(returned, copy) and torch.equal(repeated, copy)


@pytest.mark.parametrize("name", CASES)
def test_one_compiled_graph_for_every_batch_size(name: str) -> None:
    torch._dynamo.reset()
    op, first = op_of(name), CASES[name].first
    compiled = torch.compile(
        lambda *a: first(op(*a)).float() * 2, fullgraph=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (11, 3, 5):  # 11 is no other size here: equal sizes would be compiled as one
            arguments = CASES[name].make(batch, torch.float32)
            for tensor in arguments:
                if isinstance(tensor, Tensor) and tensor.shape[0] == batch == 11:
                    torch._dynamo.mark_dynamic(
                        tensor, 0
                    )  # an error if the trace makes the batch a constant
            results = []
            for call in (compiled, lambda *a: first(op(*a)).float() * 2):
                out = call(*arguments)
                leaves = leaves_of(arguments)
                results.append(
                    [
                        out.detach(),
                        *(torch.autograd.grad(out.square().sum(), leaves) if leaves else []),
                    ]
                )
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want)


def kept_bytes(call: Callable[[], Tensor], inputs: tuple[Any, ...]) -> int:
    """Bytes of the tensors that autograd keeps for the backward and that are not inputs."""
    given = {a.untyped_storage().data_ptr() for a in inputs if isinstance(a, Tensor)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


# beyond the inputs: nothing; gelu(x + bias); out and log-sum-exp; the number of masked patches as one fp32; the gradients of
# hidden, weight and bias
KEPT = {
    "embed_patches": 0,
    "restore_tokens": 0,
    "gelu_linear": 0,
    "gelu_linear/kept": 4 * (2 * 2 * 6),
    "attention": 0,
    "distillation_loss": 0,
    "sssd_loss": 4,
    "linear_reconstruction_loss": 4 * (2 * 2 * 5 + 48 * 5 + 48),
    "masked_reconstruction_loss": 4,
    "masked_reconstruction_loss/mask": 4,
}


@pytest.mark.parametrize(("name", "stated"), KEPT.items())
def test_bytes_kept_for_the_backward(name: str, stated: int) -> None:
    arguments = CASES[name].make(2, torch.float32)
    assert kept_bytes(lambda: CASES[name].first(op_of(name)(*arguments)), arguments) == stated
