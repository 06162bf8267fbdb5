"""Run the samples of the ops, and check the rules that hold for every op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mae_kernels as mk
from mae_kernels import Draw, Sample, _runtime, backend
from mae_kernels._runtime import INTERPRET, record_launches

Tensors = dict[str, Any]
SMALL = [sample for sample in mk.samples() if sample.size == "small"]
MODEL = [sample for sample in mk.samples() if sample.size == "model"]
# the first small sample of each op
FIRST = list({sample.op: sample for sample in reversed(SMALL)}.values())


def made(
    sample: Sample,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 3,
    seed: int = 0,
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and options of a sample, the same values for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return sample.make(Draw(device, dtype, batch, generator))


def in_fp64(tensors: Tensors, options: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    floating = {k for k, t in tensors.items() if t is not None and t.is_floating_point()}
    wide = {k: t.double() if k in floating else t for k, t in tensors.items()}
    return wide, {k: torch.float64 if k == "dtype" else v for k, v in options.items()}


def outputs(sample: Sample, tensors: Tensors, options: dict[str, Any]) -> list[Tensor]:
    out = sample.function(**tensors, **options)
    return [out] if isinstance(out, Tensor) else [x for x in out if x is not None]


def with_leaves(sample: Sample, tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    """The tensors with new leaves for those that get a gradient, and these leaves."""
    tensors = dict(tensors)
    for name in sample.gradients:
        tensors[name] = tensors[name].detach().requires_grad_()
    return tensors, [tensors[name] for name in sample.gradients]


def results(
    sample: Sample, tensors: Tensors, options: dict[str, Any], upstream: Tensor | None = None
) -> list[Tensor]:
    """All outputs, then the gradients of the first output."""
    tensors, leaves = with_leaves(sample, tensors)
    out = outputs(sample, tensors, options)
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        upstream = torch.ones_like(out[0]) if upstream is None else upstream.to(out[0].dtype)
        gradients = torch.autograd.grad(out[0], leaves, upstream)
    return [*(t.detach() for t in out), *gradients]


def run(
    op: Callable[..., Any], leaves: Sequence[Tensor | None], upstream: Tensor | None = None
) -> list[Tensor]:
    """The outputs of op(*leaves), and the gradients of the first one times `upstream` (3)."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    out = op(*leaves)
    outs = [out] if isinstance(out, Tensor) else [t for t in out if t is not None]
    upstream = torch.tensor(3.0) if upstream is None else upstream
    upstream = upstream.to(outs[0]).expand_as(outs[0])
    given = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(outs[0], given, upstream, materialize_grads=True)
    return [*(t.detach() for t in outs), *gradients]


def assert_close(
    got: list[Tensor],
    exact: list[Tensor],
    eager: list[Tensor],
    atol: float | Callable[[int], float] = 1e-6,
) -> None:
    """The error against fp64 is at most twice the eager reference's, plus a small absolute term:
    atol times the largest value, if it is a number.
    """
    for i, (g, x, e) in enumerate(zip(got, exact, eager, strict=True)):
        assert (g.shape, g.dtype) == (x.shape, e.dtype), f"result {i}"
        if g.dtype == torch.uint8:
            # torch's own resize on the CPU has weights of 16 bits
            difference = (g.short() - e.short()).abs()
            assert difference.max() <= 2
            assert difference.float().mean() < 0.02
        elif not g.is_floating_point():
            assert torch.equal(g, e), f"result {i}"
        elif x.numel():
            error, allowed = ((t.double() - x.to(t.device)).abs().max().item() for t in (g, e))
            small = atol(i) if callable(atol) else atol * max(1.0, x.abs().max().item())
            limit = 2 * allowed + small
            assert error <= limit, f"result {i}: error {error:.3e} against fp64, limit {limit:.3e}"


def assert_equals_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    leaves: Sequence[Tensor | None],
    upstream: Tensor | None = None,
    atol: float = 1e-6,
) -> list[Tensor]:
    """Outputs and gradients, which are returned, against a reference in fp64; inputs unchanged."""
    before = [None if t is None else t.clone() for t in leaves]
    got = run(op, leaves, upstream)
    wide = [None if t is None else t.double() for t in leaves]
    exact, eager = run(reference, wide, upstream), run(reference, leaves, upstream)
    assert_close(got, exact, eager, atol)
    for old, now in zip(before, leaves, strict=True):
        assert old is None or torch.equal(old, now), "an input was changed"
    return got


def upstream_of(sample: Sample, tensors: Tensors, options: dict[str, Any]) -> Tensor:
    """Random; 1024 for a scalar, so that half precision does not lose small gradients."""
    with torch.no_grad(), backend("reference"):
        first = outputs(sample, tensors, options)[0]
    if first.dim():
        return torch.randn_like(first, dtype=torch.float32)
    return torch.full_like(first, 1024.0, dtype=torch.float32)


def assert_gradients_are_never_overwritten(
    sample: Sample, tensors: Tensors, options: dict[str, Any]
) -> None:
    """Three backwards through one graph: nothing kept or returned is updated in place."""
    tensors, leaves = with_leaves(sample, tensors)
    first = outputs(sample, tensors, options)[0]
    upstream = torch.full_like(first, 3.0)
    gradients = torch.autograd.grad(first, leaves, upstream, retain_graph=True)
    copies = [g.clone() for g in gradients]
    torch.autograd.grad(first, leaves, upstream * -0.5, retain_graph=True)
    again = torch.autograd.grad(first, leaves, upstream)
    for returned, copy, repeated in zip(gradients, copies, again, strict=True):
        assert torch.equal(returned, copy), "a later backward changed a returned gradient"
        assert torch.equal(repeated, copy), "a second backward differs from the first"


def kernels_of(sample: Sample, dtype: torch.dtype, device: torch.device) -> str:
    """The backend under test: the kernels if they run here, else the registered op."""
    if device.type == "cpu" and not INTERPRET:
        return "registered"
    # fp32 attention runs scaled_dot_product_attention by its own rule
    return "auto" if sample.half_only and dtype == torch.float32 else "triton"


def absolute_term(sample: Sample, tensors: Tensors, i: int, exact: list[Tensor]) -> float:
    atol = 4e-6 * exact[i].abs().max().item()
    if sample.op in ("distillation_loss", "sssd_loss"):
        # Logits / temperature reach 100, where one fp32 rounding is 4e-6: the relative error of
        # a softmax. The teacher's gradient P (-log Q - loss) / temperature is a difference of
        # numbers as large as the loss; the upstream gradient is 1024.
        rows = tensors["student"].shape[:-1].numel()
        atol = 5 * atol + 2**-23 * 1024 * exact[0].item() / (0.04 * rows)
    return atol


@contextmanager
def enough_memory() -> Iterator[None]:
    """A reference in fp64 that does not fit this GPU skips the test; an op that does not fit fails
    it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        gib = torch.cuda.mem_get_info()[1] / 2**30
        pytest.skip(f"the reference in fp64 needs more than the {gib:.0f} GiB of this GPU")


def check_accuracy(
    sample: Sample, dtype: torch.dtype, device: torch.device | str = "cpu", batch: int = 3
) -> None:
    """Accuracy; bitwise equal reruns; inputs and returned gradients unchanged."""
    device = torch.device(device)
    kernels = kernels_of(sample, dtype, device)
    tensors, options = made(sample, device, dtype, batch)
    before = {k: None if t is None else t.clone() for k, t in tensors.items()}
    upstream = upstream_of(sample, tensors, options)
    # the interpreter is slow, and runs the programs of a launch one after the other; torch's
    # memory-efficient attention, which "auto" may take, is documented to add in any order
    rerun = not INTERPRET and kernels != "auto"
    with backend(kernels):
        got = results(sample, tensors, options, upstream)
        again = results(sample, tensors, options, upstream) if rerun else got
        if sample.gradients and rerun:
            assert_gradients_are_never_overwritten(sample, tensors, options)
    with backend("reference"), enough_memory():
        eager = results(sample, tensors, options, upstream)
        exact = results(sample, *in_fp64(tensors, options), upstream)
    for name, t in tensors.items():
        assert t is None or torch.equal(t, before[name]), f"input {name} was changed"
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    assert_close(got, exact, eager, lambda i: absolute_term(sample, tensors, i, exact))


def check_autocast(
    sample: Sample, device: torch.device | str = "cpu", batch: int = 3
) -> list[Tensor]:
    """The results for fp32 leaves under bf16 autocast, as close to fp64 as the reference's."""
    device = torch.device(device)
    tensors, options = made(sample, device, torch.float32, batch)
    found = []
    for kernels in (kernels_of(sample, torch.float32, device), "reference"):
        with backend(kernels), torch.autocast(device.type, torch.bfloat16):
            found.append(results(sample, tensors, options))
    with backend("reference"):
        exact = results(sample, *in_fp64(tensors, options))
    got, eager = found
    assert_close(got, exact, eager, lambda i: 2e-5 * exact[i].abs().max().item())
    return got


def check_compiled(
    sample: Sample, dtype: torch.dtype, device: torch.device | str, batch: int, compiler: str
) -> None:
    """torch.compile(fullgraph=True), forward and backward, gives what eager gives."""
    device = torch.device(device)
    tensors, options = made(sample, device, dtype, batch)
    upstream = upstream_of(sample, tensors, options)
    torch._dynamo.reset()
    compiled = torch.compile(sample.function, fullgraph=True, backend=compiler)
    with backend(kernels_of(sample, dtype, device)):
        want = results(sample, tensors, options, upstream)
        got = results(replace(sample, function=compiled), tensors, options, upstream)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        # sums and products around the kernels may have another order
        scale = 1e-6 + torch.finfo(w.dtype).eps if w.is_floating_point() else 0
        limit = 4 * scale * w.abs().max().double()
        assert (g.double() - w.double()).abs().max() <= limit, f"result {i}"


class RecordOps(TorchDispatchMode):
    """Calls of this package's ops, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mae_kernels":
            self.ops.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def ops_of(sample: Sample, arch: int = 90) -> list[tuple[Any, tuple[Any, ...]]]:
    """The op and its backward op, with the meta tensors that they get on sm_<arch>."""
    tensors, options = sample.make(Draw("meta", torch.bfloat16, 8))
    with backend("triton"), record_launches(arch), RecordOps() as recorded:
        results(sample, tensors, options)
    return list(recorded.ops.items())


class StubDriver:
    """The part of a Triton driver that is needed to analyse kernels for an H200."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """New tensors on "cuda" are fake ones of an sm_90; needs triton, but no GPU."""
    import triton

    with (
        mock.patch.object(_runtime, "_capability", return_value=(9, 0)),
        mock.patch.object(triton.runtime.driver, "_active", StubDriver()),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield
