"""From calls to rows: correctness first, then first call and the race.

A provider that fails (an error, too little memory, a wrong result) keeps its row, with the reason
and without a time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mae_kernels
from benchmarks import race
from benchmarks.race import Cache, Call, Load, Name, allowed_error, error_of, first_call, tensors
from benchmarks.results import NAMES, Results, Row
from mae_kernels import Draw, Sample
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
    samples: int = race.SAMPLES
    deadline: float | None = None
    only: Sequence[str] = field(default_factory=list)
    replayed: bool = True  # see race.race

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
    bench: Bench, rows: Mapping[Name, Row], calls: Mapping[Name, Call], ours: Name | None
) -> None:
    """Times the rows that have a call and no reason."""
    running = {name: call for name, call in calls.items() if rows[name].reason is None}

    def named(name: Name, call: Call) -> object:
        try:
            return call()
        except Exception as error:
            raise _Failed(name) from error

    while running:
        load = Load()
        try:
            watched = {name: partial(named, name, call) for name, call in running.items()}
            found = race.race(watched, bench.device, bench.cache, bench.samples, bench.replayed)
        except _Failed as failed:  # race again without it
            rows[failed.args[0]].reason = reason(failed.__cause__ or failed)
            del running[failed.args[0]]
            continue
        others = load.others()
        for name, samples in found.items():
            rows[name].time = race.summary(samples)
            rows[name].load = others
            if ours in found and name != ours:
                rows[name].versus = race.versus(samples, found[ours])
        return


def forget(device: torch.device) -> None:
    """Frees compiled code, CUDA graphs and cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


# ---- an op and its providers ----


@dataclass(frozen=True)
class Provider:
    """call: takes the tensors and options of the sample; its first result is differentiated."""

    call: Callable[..., Any]
    backend: str | None = None  # of mae_kernels; None = the current one
    compiled: bool = False


@dataclass(frozen=True)
class Op:
    """One call of an op. absent: provider -> why there is none. tolerance: of the largest value,
    instead of race.allowed_error.
    """

    sample: Sample
    device: torch.device
    dtype: torch.dtype
    batch: int
    providers: dict[str, Provider]
    absent: dict[str, str] = field(default_factory=dict)
    tolerance: float | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if self.sample.gradients else (FORWARD,)

    @property
    def shape(self) -> str:
        return f"{self.sample.name}, {self.batch} images"

    def inputs(self) -> Inputs:
        draw = Draw(self.device, self.dtype, self.batch, torch.Generator().manual_seed(0))
        tensors, options = self.sample.make(draw)
        return Inputs(self, {**tensors, **options})


class Inputs:
    """The arguments of a call; the tensors that get a gradient require it."""

    def __init__(self, op: Op, given: Mapping[str, Any]) -> None:
        self.op = op
        self.given = dict(given)
        leaves = [n for n in op.sample.gradients if given[n] is not None]
        self.leaves: list[Tensor] = [given[n].detach().requires_grad_() for n in leaves]
        self.given |= dict(zip(leaves, self.leaves, strict=True))

    def exact(self) -> Inputs:
        """In fp64."""

        def wide(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return torch.float64
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.double() if floating else value

        return Inputs(self.op, {name: wide(value) for name, value in self.given.items()})

    def bytes(self) -> int:
        return sum(t.nbytes for t in self.given.values() if isinstance(t, Tensor))


def measure_all(bench: Bench, ops: Sequence[Op], title: str) -> None:
    """Adds the rows of all ops."""
    with bench.console.progress(len(ops), title) as progress:
        for number, op in enumerate(ops):
            label = f"{op.sample}, {op.batch} images, {NAMES[op.dtype]}"
            if not bench.time_is_up(label):
                bench.results.add(*run_op(bench, op))
                forget(bench.device)
            progress.update(number + 1, case=label)


def run_op(bench: Bench, op: Op) -> list[Row]:
    """The rows of one op: all providers and phases."""
    rows: dict[tuple[str, str], Row] = {}
    for name in filter(bench.wants, [*op.providers, *op.absent]):
        for phase in op.phases:
            row = Row(op.sample.op, op.shape, NAMES[op.dtype], phase, name, {"batch": op.batch})
            row.reason = op.absent.get(name)
            rows[phase, name] = row
    try:
        inputs = op.inputs()
        exact, allowed = truth(op, inputs)
        needed = {phase: costs(op, inputs, phase) for phase in op.phases}
    except Exception as error:  # noqa: BLE001 - a failing op is some rows, not the end of the run
        for row in rows.values():
            row.reason = row.reason or f"fp64 reference: {reason(error)}"
        return list(rows.values())
    for (phase, _), row in rows.items():
        row.bytes, row.flops = needed[phase]
    calls = {n: Calls(inputs, p) for n, p in op.providers.items() if bench.wants(n)}
    for name, call in calls.items():
        gate(bench, {phase: rows[phase, name] for phase in op.phases}, call, exact, allowed)
    for phase in op.phases:
        timed = {name: call.timed[phase] for name, call in calls.items()}
        time_rows(bench, {name: rows[phase, name] for name in calls}, timed, OURS)
    return list(rows.values())


class Calls:
    """A provider on given inputs: what is timed and what is compared are the same function."""

    def __init__(self, inputs: Inputs, provider: Provider) -> None:
        call = provider.call
        if provider.compiled:
            call = torch.compile(call, fullgraph=True, dynamic=False)
        self._call = call
        self._backend = provider.backend
        self._inputs = inputs
        self._gradient: Tensor | None = None
        self.timed: dict[str, Call] = {FORWARD: self._forward}
        if inputs.leaves:
            self.timed[BOTH] = lambda: self.gradients(tensors(self._forward())[0])

    def _forward(self) -> Any:
        chosen = nullcontext() if self._backend is None else mae_kernels.backend(self._backend)
        with chosen:
            return self._call(**self._inputs.given)

    def gradients(self, first: Tensor) -> list[Tensor]:
        if self._gradient is None:  # made once, by the call that is not timed
            self._gradient = upstream(first)
        return list(torch.autograd.grad(first, self._inputs.leaves, self._gradient))

    def results(self) -> list[Tensor]:
        """Results and gradients."""
        out = tensors(self._forward())
        gradients = self.gradients(out[0]) if self._inputs.leaves else []
        return [*(t.detach() for t in out), *gradients]


def upstream(first: Tensor) -> Tensor:
    """Gradient of the first result: 1 for a loss, else a sine, the same numbers in all dtypes."""
    if first.dim() == 0:
        return torch.ones_like(first)
    steps = torch.arange(first.numel(), device=first.device, dtype=torch.float32).mul_(0.7).sin_()
    return steps.view(first.shape).bfloat16().to(first.dtype)


def truth(op: Op, inputs: Inputs) -> tuple[list[Tensor], float]:
    """Results and gradients of the published form in fp64, and the allowed error."""
    published = op.providers["published"]
    exact = Calls(inputs.exact(), published).results()
    if op.tolerance is not None:
        return exact, op.tolerance
    eager = error_of(Calls(inputs, published).results(), exact)
    return exact, allowed_error(eager, op.dtype)


def costs(op: Op, inputs: Inputs, phase: str) -> tuple[int, int]:
    """Bytes of arguments and results, each once per pass, and the FLOPs of matrix products, 2 per
    multiply-add, as torch counts them in plain code.
    """
    calls = Calls(inputs, op.providers.get("plain", op.providers["published"]))
    with FlopCounterMode(display=False) as counter:
        calls.timed[phase]()
    out = tensors(calls.timed[FORWARD]())
    moved = inputs.bytes() + sum(t.nbytes for t in out)
    if phase == BOTH:
        moved += inputs.bytes() + out[0].nbytes + sum(t.nbytes for t in inputs.leaves)
    return moved, int(counter.get_total_flops())


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
            found = f"{error:.1e} of the largest value"
            raise SssdError(f"wrong: its error is {found}, allowed are {allowed:.1e}")

    probe = next(iter(rows.values()))
    if not attempt(probe, compare):
        for row in rows.values():
            row.reason = probe.reason
