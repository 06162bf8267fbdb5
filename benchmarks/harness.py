"""From calls to rows: correctness first, then first call and the race.

A provider that fails (an error, too little memory, a wrong result) keeps its row, with the reason
and without a time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.race import (
    PASSES,
    SAMPLES,
    Cache,
    Call,
    Load,
    allowed_error,
    error_of,
    first_call,
    race,
    summary,
    tensors,
    versus,
)
from benchmarks.results import NAMES, Results, Row
from benchmarks.shapes import Shape
from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console

OURS = "ours"  # the provider that the others are compared with
QUICK_SAMPLES = 10
FORWARD, BOTH = "forward", "forward+backward"


@dataclass
class Bench:
    """deadline: of time.monotonic(); then no new case starts. only: providers; empty = all."""

    device: torch.device
    console: Console
    results: Results
    cache: Cache
    quick: bool = False
    samples: int = SAMPLES
    passes: int = PASSES
    deadline: float | None = None
    only: Sequence[str] = field(default_factory=list)

    def time_is_up(self, case: str) -> bool:
        """Whether the deadline has passed; `case` is then listed as skipped."""
        up = self.deadline is not None and time.monotonic() >= self.deadline
        if up:
            self.results.head["skipped"].append(case)
            self.results.save()
        return up

    def wants(self, provider: str) -> bool:
        return not self.only or provider in self.only


def attempt(row: Row, what: Callable[[], object]) -> bool:
    """Whether `what` ran; if it raised, row.reason says what."""
    try:
        what()
    except Exception as error:  # noqa: BLE001 - a failing provider is a row, not the end of the run
        row.reason = reason(error)
        return False
    return True


def reason(error: BaseException) -> str:
    """One line; of an error that the compiler wrapped, the cause."""
    inner = getattr(error, "inner_exception", None) or error
    if isinstance(inner, SssdError):
        return str(inner)
    if isinstance(inner, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return ": ".join([f"fails: {type(inner).__name__}", *(line[:160] for line in lines[:1])])


class _Failed(Exception):
    """A provider raised during the race."""


def time_rows(
    bench: Bench, rows: Mapping[str, Row], calls: Mapping[str, Call], ours: str = OURS
) -> None:
    """Times the rows that have a call and no reason."""
    running = {name: call for name, call in calls.items() if rows[name].reason is None}
    while running:
        watched = {name: partial(_named, name, call) for name, call in running.items()}
        load = Load()
        try:
            more = {"samples": bench.samples, "passes": bench.passes}
            found = race(watched, bench.device, bench.cache, **more)
        except _Failed as failed:  # race again without it
            rows[failed.args[0]].reason = reason(failed.__cause__ or failed)
            del running[failed.args[0]]
            continue
        others = load.others()
        for name, samples in found.items():
            rows[name].time = summary(samples)
            rows[name].load = others
            if name != ours and ours in found:
                rows[name].versus = versus(samples, found[ours])
        return


def _named(name: str, call: Call) -> object:
    try:
        return call()
    except Exception as error:
        raise _Failed(name) from error


def forget(device: torch.device) -> None:
    """Frees compiled code, CUDA graphs and cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


# ---- an op and its providers ----

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Provider:
    """call: the results; the first one is differentiated.

    leaves: the tensors to differentiate, if not those of the op; own: from their gradients to the
    gradients of the op's leaves.
    """

    call: Callable[[Shape, Inputs], Any]
    leaves: tuple[str, ...] | None = None
    own: Callable[[Inputs, list[Tensor]], list[Tensor]] | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Op:
    """make: inputs in fp32. floats: inputs of the measured dtype besides the leaves.

    moved: the bytes that must be read and written once, of the forward and of the backward alone,
    from a shape, the bytes of a value, and the inputs. absent: provider -> why there is none.
    tolerance: of the largest value, instead of race.allowed_error. exact: the eager provider whose
    fp64 results are the reference, and whose matrix products give the FLOPs.
    """

    name: str
    make: Callable[[Shape, torch.device], Inputs]
    leaves: tuple[str, ...]
    moved: Callable[[Shape, int, Inputs], tuple[float, float]]
    providers: dict[str, Provider]
    floats: tuple[str, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    tolerance: float | None = None
    exact: str = "tuned"

    @property
    def phases(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if self.leaves else (FORWARD,)


def measure_all(bench: Bench, cases: Sequence[tuple[Op, Shape, torch.dtype]], title: str) -> None:
    """Adds the rows of all cases."""
    with bench.console.progress(len(cases), title) as progress:
        for number, (op, s, dtype) in enumerate(cases):
            label = f"{op.name}, {s.name}, {NAMES[dtype]}"
            if not bench.time_is_up(label):
                bench.results.add(*run_case(bench, op, s, dtype))
                forget(bench.device)
            progress.update(number + 1, case=label)


def run_case(bench: Bench, op: Op, s: Shape, dtype: torch.dtype) -> list[Row]:
    """The rows of one op at one shape: all providers and phases."""
    rows: dict[tuple[str, str], Row] = {}
    for name in [*op.providers, *op.absent]:
        if bench.wants(name):
            for phase in op.phases:
                rows[phase, name] = Row(
                    *(op.name, s.name, NAMES[dtype], phase, name),
                    sizes=asdict(s),
                    reason=op.absent.get(name),
                )
    try:
        torch.manual_seed(0)
        inputs = cast(op, op.make(s, bench.device), dtype)
        forward, backward = op.moved(s, dtype.itemsize, inputs)
        exact, eager = truth(op, s, inputs)
        needed = {phase: flops(op, s, inputs, phase) for phase in op.phases}
    except torch.OutOfMemoryError:
        for row in rows.values():
            row.reason = row.reason or "out of memory in the fp64 reference"
        return list(rows.values())
    for (phase, _), row in rows.items():
        row.bytes = forward + backward * (phase == BOTH)
        row.flops = needed[phase]
    allowed = allowed_error(eager, dtype) if op.tolerance is None else op.tolerance
    names = [name for name in op.providers if bench.wants(name)]
    calls = {name: Calls(op, s, inputs, op.providers[name]) for name in names}
    for name in names:
        mine = {phase: rows[phase, name] for phase in op.phases}
        gate(bench, mine, calls[name], exact, allowed)
    for phase in op.phases:
        timed = {name: calls[name].timed[phase] for name in names}
        time_rows(bench, {name: rows[phase, name] for name in names}, timed)
    return list(rows.values())


def cast(op: Op, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Leaves and `floats` of the op in `dtype`; the leaves of all providers require gradients."""
    leaves = {*op.leaves, *(name for p in op.providers.values() for name in p.leaves or ())}
    wanted = {*leaves, *op.floats}
    out = {name: t.detach().to(dtype) if name in wanted else t for name, t in inputs.items()}
    return {name: t.requires_grad_() if name in leaves else t for name, t in out.items()}


class Calls:
    """A provider on given inputs: what is timed and what is compared are the same function."""

    def __init__(self, op: Op, s: Shape, inputs: Inputs, provider: Provider) -> None:
        call = provider.call
        if provider.compiled:
            call = torch.compile(call, fullgraph=True, dynamic=False)
        self._provider = provider
        self._op = op
        self._inputs = inputs
        self._leaves = [inputs[name] for name in provider.leaves or op.leaves]
        self._call: Callable[[], Any] = partial(call, s, inputs)
        self._gradient: Tensor | None = None
        self.timed: dict[str, Call] = {FORWARD: self._call}
        if op.leaves:
            self.timed[BOTH] = self._both

    def _both(self) -> object:
        first = tensors(self._call())[0]
        if self._gradient is None:  # made once, by the call that is not timed
            self._gradient = upstream(first)
        return torch.autograd.grad(first, self._leaves, self._gradient)

    def results(self) -> list[Tensor]:
        """Results and the gradients of the op's leaves."""
        out = tensors(self._call())
        if not self._leaves:
            return out
        found = list(torch.autograd.grad(out[0], self._leaves, upstream(out[0])))
        found = found if self._provider.own is None else self._provider.own(self._inputs, found)
        return [*(t.detach() for t in out), *found]


def upstream(first: Tensor) -> Tensor:
    """Gradient of the first result: 1 for a loss, else a sine between -1 and 1."""
    if first.dim() == 0:
        return torch.ones_like(first)
    steps = torch.arange(first.numel(), device=first.device, dtype=torch.float32).mul_(0.7).sin_()
    return steps.view(first.shape).to(first.dtype)


def truth(op: Op, s: Shape, inputs: Inputs) -> tuple[list[Tensor], float]:
    """Results and gradients in fp64, and the error of the same code in the measured dtype."""
    provider = op.providers[op.exact]
    exact = Calls(op, s, cast(op, inputs, torch.float64), provider).results()
    return exact, error_of(Calls(op, s, inputs, provider).results(), exact)


def flops(op: Op, s: Shape, inputs: Inputs, phase: str) -> int:
    """Of matrix products, 2 per multiply-add, as torch counts them in the exact provider."""
    with FlopCounterMode(display=False) as counter:
        Calls(op, s, inputs, op.providers[op.exact]).timed[phase]()
    return int(counter.get_total_flops())


def gate(
    bench: Bench, rows: Mapping[str, Row], calls: Calls, exact: Sequence[Tensor], allowed: float
) -> None:
    """Makes the first call, which compiles, and compares; a wrong provider gets a reason."""

    def compare() -> None:
        for phase, call in calls.timed.items():
            rows[phase].first_call_s = first_call(call, bench.device)
        error = error_of(calls.results(), exact)
        for row in rows.values():
            row.error = error
            row.allowed = allowed
        if not error <= allowed:
            raise SssdError(
                f"wrong: its error is {error:.1e} of the largest value, allowed are {allowed:.1e}"
            )

    probe = next(iter(rows.values()))
    if not attempt(probe, compare):
        for row in rows.values():
            row.reason = probe.reason
