"""What every benchmark gets: the device, the display, the file of results, and the way from calls to rows.

A provider that fails (an error, too little memory, a wrong result) keeps its row, with the reason and without a time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console

from .measure import PASSES, SAMPLES, Cache, Call, first_call, peak_bytes, race, summary, versus
from .results import Results, Row

OURS = "ours"  # the provider that the others are compared with
QUICK_SAMPLES = 10


@dataclass
class Bench:
    """deadline: of time.monotonic(), after which nothing new is begun; None = no limit."""

    device: torch.device
    console: Console
    results: Results
    cache: Cache
    quick: bool = False
    samples: int = SAMPLES
    passes: int = PASSES
    deadline: float | None = None
    only: Sequence[str] = field(default_factory=list)  # providers asked for; empty = all

    def time_is_up(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def leave_out(self, what: str) -> None:
        """Notes what is not measured because time is up."""
        if what not in self.results.head["left_out"]:
            self.results.head["left_out"].append(what)
            self.results.save()

    def take_up(self, what: str) -> None:
        """Measured after all: in a later stage of `bench all`."""
        self.results.head["left_out"] = [
            item for item in self.results.head["left_out"] if item != what
        ]

    def wants(self, provider: str) -> bool:
        return not self.only or provider in self.only


def attempt(row: Row, what: Callable[[], object]) -> bool:
    """Whether `what` ran; where it raised, the row's reason says what."""
    try:
        what()
    except Exception as error:  # noqa: BLE001 - one provider's failure is a row, not the end of the run
        row.reason = reason(error)
        return False
    return True


def reason(error: BaseException) -> str:
    """One line. What the compiler wraps is told by its cause."""
    inner = getattr(error, "inner_exception", None) or error
    if isinstance(inner, SssdError):
        return str(inner)
    if isinstance(inner, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return (
        f"fails: {type(inner).__name__}: {lines[0][:160]}"
        if lines
        else f"fails: {type(inner).__name__}"
    )


def time_rows(
    bench: Bench, rows: Mapping[str, Row], calls: Mapping[str, Call], ours: str = OURS
) -> None:
    """Fills first_call_s, peak_bytes, time and versus of the rows whose provider has a call and no reason against it."""
    for name, call in calls.items():
        if rows[name].reason is None:
            attempt(rows[name], lambda name=name, call=call: _first(bench, rows[name], call))  # type: ignore[misc]
    running = {name: call for name, call in calls.items() if rows[name].reason is None}
    seconds: dict[str, list[list[float]]] = {}
    while running and not seconds:
        watched = {name: _named(name, call) for name, call in running.items()}
        try:
            seconds = race(
                watched, bench.device, bench.cache, samples=bench.samples, passes=bench.passes
            )
        except _Failed as failed:  # the others race again without it
            rows[failed.name].reason = reason(failed.error)
            del running[failed.name]
    for name, passes in seconds.items():
        rows[name].time = summary(passes)
        if name != ours and ours in seconds:
            rows[name].versus = versus(passes, seconds[ours])


class _Failed(Exception):
    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name = name
        self.error = error


def _named(name: str, call: Call) -> Call:
    def named() -> object:
        try:
            return call()
        except Exception as error:
            raise _Failed(name, error) from error

    return named


def _first(bench: Bench, row: Row, call: Call) -> None:
    seconds = first_call(call, bench.device)
    if row.first_call_s is None:  # the gate may have made the first call already
        row.first_call_s = seconds
    call()
    row.peak_bytes = peak_bytes(call, bench.device)


def forget(device: torch.device) -> None:
    """Frees what a case left: compiled code, graphs, cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
