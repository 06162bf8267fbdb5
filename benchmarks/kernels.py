"""`bench kernels`: each op of mae_kernels against the ways people compute it today.

Per op, shape and dtype: the results and gradients of every provider are compared with fp64 first (measure.allowed_error); one that is
further off than twice plain eager PyTorch in the same dtype (as published, where there is such a form) gets no time. The rest are timed
together, the forward of a training step (with what autograd keeps) and forward with backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sssd_fast.errors import SssdError

from .bench import Bench, attempt, forget, time_rows
from .machine import NAMES, sources_hash
from .measure import Call, allowed_error, error_of, first_call, tensors
from .op import Cost, Inputs, Op, Provider
from .registry import OPS
from .results import Row
from .shapes import MODELS, Shape, shapes

FORWARD, BOTH = "forward", "forward+backward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", nargs="+", choices=list(OPS), metavar="OP", help=f"of: {', '.join(OPS)}"
    )
    parser.add_argument(
        "--shape", nargs="+", choices=list(MODELS), metavar="SHAPE", help=f"of: {', '.join(MODELS)}"
    )
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="images")


def run(args: argparse.Namespace, bench: Bench) -> None:
    chosen = shapes(bench.device, models=args.shape, batches=args.batch, quick=bench.quick)
    ops = [OPS[name] for name in args.op or OPS]
    dtypes = args.dtypes or [torch.bfloat16 if bench.device.type == "cuda" else torch.float32]
    measure_all(
        bench, [(op, s, dtype) for s in chosen for dtype in dtypes for op in ops], "kernels"
    )


def measure_all(bench: Bench, cases: Sequence[tuple[Op, Shape, torch.dtype]], title: str) -> None:
    """Rows of all cases that are not in the results yet."""
    done = {(row["case"], row["shape"], row["dtype"]) for row in bench.results.rows}
    left = [case for case in cases if (case[0].name, case[1].name, NAMES[case[2]]) not in done]
    with bench.console.progress(len(left), title) as progress:
        for number, (op, s, dtype) in enumerate(left):
            label = f"{op.name}, {s.name}, {NAMES[dtype]}"
            if bench.time_is_up():
                bench.leave_out(label)
            else:
                bench.take_up(label)
                bench.results.add(*run_case(bench, op, s, dtype))
                forget(bench.device)
            progress.update(number + 1, case=label)


def run_case(bench: Bench, op: Op, s: Shape, dtype: torch.dtype) -> list[Row]:
    """The rows of one op at one shape: every provider, forward and, where there is one, forward with backward."""
    phases = [FORWARD, BOTH] if op.leaves else [FORWARD]
    names = [name for name in op.providers if bench.wants(name)]
    rows = {(phase, name): _row(op, s, dtype, phase, name) for phase in phases for name in names}
    for name, why in op.absent.items():
        if bench.wants(name):
            rows |= {(phase, name): _row(op, s, dtype, phase, name, why) for phase in phases}
    try:
        torch.manual_seed(0)
        inputs = cast(op, op.make(s, bench.device), dtype)
        costs = costs_of(op.cost(s, dtype.itemsize, inputs), phases)
        exact, eager = truth(op, s, inputs)
    except torch.OutOfMemoryError:
        for row in rows.values():
            row.reason = row.reason or "out of memory in the fp64 reference"
        return list(rows.values())
    for (phase, _), row in rows.items():
        row.bytes, row.flops = costs[phase]
    allowed = allowed_error(eager, dtype) if op.tolerance is None else op.tolerance
    calls = {name: _calls(op, s, inputs, op.providers[name]) for name in names}
    for name in names:
        mine = {phase: rows[phase, name] for phase in phases}
        _gate(bench, mine, calls[name], exact, allowed)
    for phase in phases:
        time_rows(
            bench,
            {name: rows[phase, name] for name in names},
            {name: calls[name].timed[phase] for name in names},
        )
    return list(rows.values())


def _row(
    op: Op, s: Shape, dtype: torch.dtype, phase: str, provider: str, why: str | None = None
) -> Row:
    dtype_name, sources = NAMES[dtype], sources_hash(op.name)
    return Row(
        op.name, s.name, dtype_name, phase, provider, sizes=s.sizes(), reason=why, sources=sources
    )


def costs_of(cost: Cost, phases: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(bytes, FLOPs) of each phase."""
    found = {FORWARD: (cost.forward_bytes, cost.forward_flops)}
    found[BOTH] = (
        cost.forward_bytes + cost.backward_bytes,
        cost.forward_flops + cost.backward_flops,
    )
    return {phase: found[phase] for phase in phases}


def cast(op: Op, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Leaves and other floating point inputs of the op in `dtype`; the leaves, of all providers, require gradients."""
    leaves = {*op.leaves, *(name for p in op.providers.values() for name in p.leaves or ())}
    wanted = {*leaves, *op.floats}
    out = {name: t.detach().to(dtype) if name in wanted else t for name, t in inputs.items()}
    return {name: t.requires_grad_() if name in leaves else t for name, t in out.items()}


# ---- correctness ----


def results_of(
    op: Op, s: Shape, inputs: Inputs, provider: Provider, call: Callable[..., Any]
) -> list[Tensor]:
    """Results and the op's gradients for an upstream gradient that depends on nothing but the first result's shape."""
    out = tensors(call(s, inputs))
    return [*(t.detach() for t in out), *gradients_of(op, inputs, provider, out[0])]


def gradients_of(op: Op, inputs: Inputs, provider: Provider, first: Tensor) -> list[Tensor]:
    if not op.leaves:
        return []
    names = provider.leaves or op.leaves
    found = list(torch.autograd.grad(first, [inputs[name] for name in names], upstream(first)))
    return found if provider.own is None else provider.own(inputs, found)


def upstream(first: Tensor) -> Tensor:
    """1 for a loss; else values between -1 and 1 that no two neighbours share."""
    if first.dim() == 0:
        return torch.ones_like(first)
    steps = torch.arange(first.numel(), device=first.device, dtype=torch.float32).mul_(0.7).sin_()
    return steps.view(first.shape).to(first.dtype)


def truth(op: Op, s: Shape, inputs: Inputs) -> tuple[list[Tensor], float]:
    """Results and gradients in fp64, and how far the same code is off in the dtype of `inputs`: by rounding alone."""
    provider = op.providers[op.exact]
    exact = results_of(op, s, cast(op, inputs, torch.float64), provider, provider.call)
    return exact, error_of(results_of(op, s, inputs, provider, provider.call), exact)


def _gate(
    bench: Bench, rows: dict[str, Row], calls: Calls, exact: Sequence[Tensor], allowed: float
) -> None:
    """Makes the first call, which compiles, and compares; rows of a provider that fails or is wrong get the reason."""

    def compare() -> None:
        for phase, call in calls.timed.items():
            rows[phase].first_call_s = first_call(call, bench.device)
        error = error_of(calls.check(), exact)
        for row in rows.values():
            row.error = error
            row.allowed = allowed
        if not error <= allowed:
            raise SssdError(
                f"its results are off by {error:.1e} of the largest value, {allowed:.1e} are allowed"
            )

    probe = next(iter(rows.values()))
    if not attempt(probe, compare):
        for row in rows.values():
            row.reason = probe.reason


@dataclass(frozen=True)
class Calls:
    timed: dict[str, Call]  # by phase
    check: Callable[[], list[Tensor]]  # results and gradients


def _calls(op: Op, s: Shape, inputs: Inputs, provider: Provider) -> Calls:
    """What is timed and what is compared are the same function, compiled once for both."""
    call = (
        torch.compile(provider.call, fullgraph=True, dynamic=False)
        if provider.compiled
        else provider.call
    )
    leaves = [inputs[name] for name in provider.leaves or op.leaves]
    gradient: list[Tensor] = []  # of the first result, made once and outside the timed calls

    def both() -> object:
        first = tensors(call(s, inputs))[0]
        if not gradient:
            gradient.append(upstream(first))
        return torch.autograd.grad(first, leaves, gradient[0])

    timed: dict[str, Call] = {FORWARD: partial(call, s, inputs)}
    if op.leaves:
        timed[BOTH] = both
    return Calls(timed, lambda: results_of(op, s, inputs, provider, call))
