"""Which part of the training step each moment belongs to: ranges put on the model while it is profiled, and the trace read back.

Ranges: hooks on the modules of an SSSD model open one record_function range at a time, on the thread that runs the step; training
code knows nothing of them. The backward of what ran in a range is found through autograd's sequence numbers: every node of the
graph carries the number that the forward operation which made it shows in the trace.

Reading: on the CPU a moment belongs to the outermost operation that runs then. On CUDA it belongs to what the device runs then, and
that to the range in which the host launched it. A moment in which nothing runs is data wait where the host is fetching a batch,
else a gap. So the parts add up to the wall time, whatever was measured.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from sssd_fast.errors import SssdError
from sssd_fast.loaders import Batch
from sssd_fast.step import Step

PREFIX = "sssd_fast: "  # of our ranges in a trace
DATA = "data wait"
TO_DEVICE = "host-to-device"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
GAPS, OTHER = "launch gaps / Python", "other"
EMBED = "masking + embed"
RESTORE = "decoder embed + restore"
HEADS = "heads + loss"
FORWARD = (
    EMBED, "encoder attention", "encoder MLP", "encoder norms + residual",
    RESTORE, "decoder attention", "decoder MLP", "decoder norms + residual", HEADS,
)  # fmt: skip
PARTS = (DATA, TO_DEVICE, *FORWARD, BACKWARD, OPTIMIZER, GAPS, OTHER)
ACCUMULATE = "gradient accumulation"  # second level of the backward, besides FORWARD and OTHER
WINDOW = "window"
THEN_NEXT, THEN_UPDATE = (
    "backward, then next",
    "backward, then update",
)  # a range that holds a backward and what follows it
AUTOGRAD_NODE = "autograd::engine::evaluate_function: "
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


class Ranges:
    """Marks where the steps of an SSSD model are; the hooks are gone after the `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._open: record_function | None = None
        self._in_forward = False
        self._micro_batches_left = 0

    def __enter__(self) -> Ranges:
        self._handles: list[Any] = []
        try:
            self._hook()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._switch(None)

    @contextmanager
    def data(self) -> Iterator[None]:
        """While the next batches are fetched."""
        self._switch(DATA)
        try:
            yield
        finally:
            self._switch(None)

    @contextmanager
    def step(self, micro_batches: int) -> Iterator[None]:
        """While a Step runs on so many micro-batches."""
        self._micro_batches_left = micro_batches
        self._switch(EMBED)  # the noise is drawn before the model is called
        try:
            yield
        finally:
            self._switch(None)

    def _hook(self) -> None:
        model, get = self._model, self._model.get_submodule
        self._before(model, self._begin_forward)
        for side in ("encoder", "decoder"):
            norms, end = f"{side} norms + residual", get(f"mae.{side}.norm")
            for block in get(f"mae.{side}.blocks").children():
                self._around(block, norms, norms)
                self._around(block.get_submodule("attn"), f"{side} attention", norms)
                self._around(block.get_submodule("mlp"), f"{side} MLP", norms)
            self._around(end, norms, HEADS)
        self._around(get("mae.decoder"), RESTORE, HEADS)
        self._handles.append(model.register_forward_hook(lambda *_: self._end_forward()))

    def _before(self, module: nn.Module, call: Callable[[], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda *_: call()))

    def _around(self, module: nn.Module, inside: str, after: str) -> None:
        self._before(module, lambda: self._move(inside))
        self._handles.append(module.register_forward_hook(lambda *_: self._move(after)))

    def _begin_forward(self) -> None:
        self._in_forward = True
        self._move(EMBED)

    def _end_forward(self) -> None:
        self._in_forward = False
        self._micro_batches_left -= 1
        self._switch(THEN_NEXT if self._micro_batches_left > 0 else THEN_UPDATE)

    def _move(self, name: str) -> None:
        if (
            self._in_forward
        ):  # modules also run in the backward, where activations are computed again
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None
        if name is not None:
            self._open = record_function(PREFIX + name)
            self._open.__enter__()


def profile_steps(
    step: Step,
    batches: Iterator[list[Batch]],
    steps: int,
    warmup: int,
    device: torch.device,
    lr: float,
) -> tuple[Timeline, float]:
    """(what torch.profiler saw in `steps` steps together, seconds of one by the host's clock). The step must not be compiled."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profiler

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with (
        _quiet_kineto(),
        Ranges(step.module) as ranges,
        torch_profiler(activities=activities) as profiler,
    ):

        def run(first: int, count: int) -> None:
            for i in range(first, first + count):
                with ranges.data():
                    micro_batches = next(batches)
                with ranges.step(len(micro_batches)):
                    step(micro_batches, i, lr)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        run(0, warmup)
        started = time.perf_counter()
        with record_function(PREFIX + WINDOW):
            run(warmup, steps)
        elapsed = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    return read_trace(events, cuda=device.type == "cuda"), elapsed / steps


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Without the lines that the profiler's library prints at every start and stop; it reads the variable at its first use."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


# ---- reading back -------------------------------------------------------------------------------------------------------------


@dataclass
class Timeline:
    """Microseconds. `parts` (all of PARTS) adds up to `wall`, `backward` to its part of that name, `gaps` likewise."""

    wall: float
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    backward: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*FORWARD, ACCUMULATE, OTHER), 0.0)
    )
    gaps: dict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # by what the host was in

    def add(self, part: str, below: str | None, microseconds: float) -> None:
        self.parts[part] += microseconds
        if part == BACKWARD:
            self.backward[below or OTHER] += microseconds
        elif part == GAPS:
            self.gaps[below or OTHER] += microseconds


def read_trace(events: Iterable[dict[str, Any]], *, cuda: bool) -> Timeline:
    """events: "traceEvents" of torch.profiler's Chrome trace. Raises SssdError where the trace holds no window or no GPU work."""
    spans = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: (e["ts"], -e["dur"]))
    host = _Host(spans)
    begin, end = host.window
    busy = _device_work(spans, host) if cuda else _host_work(spans, host)
    busy = [
        (max(a, begin), min(b, end), part, below)
        for a, b, part, below in busy
        if a < end and b > begin
    ]
    if cuda and not busy:
        raise SssdError(
            "the profiler recorded nothing on the GPU: another profiler may hold it, or the driver allows counters to "
            "administrators only (NVIDIA's ERR_NVGPUCTRPERM); profile with device=cpu to see the parts at all"
        )
    timeline, cursor = Timeline(end - begin), begin
    for start, stop, part, below in busy:
        host.add_idle(timeline, cursor, start)
        if (
            stop > cursor
        ):  # what overlaps, on several streams or inside another operation, counts once
            timeline.add(part, below, stop - max(start, cursor))
            cursor = stop
    host.add_idle(timeline, cursor, end)
    return timeline


Work = tuple[float, float, str, str | None]  # start, end, part, second level


class _Host:
    """What the host was doing when: our ranges, the nodes of the backward, and which range made which node."""

    def __init__(self, spans: Sequence[dict[str, Any]]) -> None:
        ours = [
            e for e in spans if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)
        ]
        frames = [e for e in ours if e["name"] == PREFIX + WINDOW]
        if len(frames) != 1:
            raise SssdError(
                f"the profiler's trace holds {len(frames)} measured windows, needs one; profile fewer steps"
            )
        self.window = frames[0]["ts"], frames[0]["ts"] + frames[0]["dur"]
        self.thread = frames[0]["tid"]
        self.regions = _Spans(
            [
                (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(PREFIX))
                for e in ours
                if e is not frames[0]
            ]
        )
        ops = [e for e in spans if e.get("cat") == "cpu_op"]
        makers: dict[
            int, str
        ] = {}  # sequence number -> range of the last operation that shows it, which made the node
        for e in ops:
            number, region = e["args"].get("Sequence number"), self.regions.at(e["ts"])
            if number is not None and e["tid"] == self.thread and region in FORWARD:
                makers[number] = region
        by_thread: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        ends = list[float]()
        for e in ops:
            if e["name"].startswith(AUTOGRAD_NODE):
                number = e["args"].get("Sequence number")
                accumulates = e["name"].endswith("AccumulateGrad")
                below = ACCUMULATE if accumulates else makers.get(number, OTHER)
                by_thread[e["tid"]].append((e["ts"], e["ts"] + e["dur"], below))
                ends.append(e["ts"] + e["dur"])
        self.nodes = {thread: _Spans(nodes) for thread, nodes in by_thread.items()}
        self._node_ends = sorted(ends)

    def place(self, thread: Any, time: float) -> tuple[str, str | None]:
        """(part, second level) of what this thread does at this time."""
        below = self.nodes[thread].at(time) if thread in self.nodes else None
        if below is not None:
            return BACKWARD, below
        region = self.regions.at(time)
        if region in (THEN_NEXT, THEN_UPDATE):
            if thread != self.thread or time < self._backward_end(time):
                return BACKWARD, OTHER
            return (OPTIMIZER if region == THEN_UPDATE else EMBED), None
        return (region if region is not None and thread == self.thread else OTHER), None

    def _backward_end(self, time: float) -> float:
        """End of the last node that ran up to the end of the range that holds `time`."""
        before = bisect_right(self._node_ends, self.regions.end(time))
        return self._node_ends[before - 1] if before else 0.0

    def add_idle(self, timeline: Timeline, start: float, end: float) -> None:
        """Books [start, end], in which nothing ran."""
        for a, b, region in self.regions.cut(start, end):
            if region == DATA:
                timeline.add(DATA, None, b - a)
            else:
                timeline.add(GAPS, self.place(self.thread, (a + b) / 2)[0], b - a)


class _Spans:
    """Named spans of one thread, sorted by start; of nested ones the outermost."""

    def __init__(self, spans: list[tuple[float, float, str]]) -> None:
        self._spans = list[tuple[float, float, str]]()
        for start, end, name in spans:
            if not self._spans or start >= self._spans[-1][1]:
                self._spans.append((start, end, name))
        self._starts = [start for start, _, _ in self._spans]

    def at(self, time: float) -> str | None:
        i = bisect_right(self._starts, time) - 1
        return self._spans[i][2] if i >= 0 and time < self._spans[i][1] else None

    def end(self, time: float) -> float:
        """Of the span that holds `time`."""
        return self._spans[bisect_right(self._starts, time) - 1][1]

    def cut(self, start: float, end: float) -> Iterator[tuple[float, float, str | None]]:
        """[start, end] in pieces that lie in one span or between spans."""
        i = max(0, bisect_right(self._starts, start) - 1)
        while start < end and i < len(self._spans):
            a, b, name = self._spans[i]
            if a >= end:
                break
            if b > start:
                if a > start:
                    yield start, a, None
                yield max(a, start), min(b, end), name
                start = min(b, end)
            i += 1
        if start < end:
            yield start, end, None


def _host_work(spans: Sequence[dict[str, Any]], host: _Host) -> list[Work]:
    """Operations of the step's thread. The loader's own count as waiting for data."""
    work = list[Work]()
    for e in spans:
        if e.get("cat") == "cpu_op" and e["tid"] == host.thread:
            part, below = host.place(e["tid"], e["ts"])
            if part != DATA:
                work.append((e["ts"], e["ts"] + e["dur"], part, below))
    return work


def _device_work(spans: Sequence[dict[str, Any]], host: _Host) -> list[Work]:
    """Kernels and copies, by the place of the call that launched them."""
    launches = {
        e["args"]["correlation"]: (e["tid"], e["ts"])
        for e in spans
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    work = list[Work]()
    for e in spans:
        if e.get("cat") in DEVICE_WORK:
            launch = launches.get(e["args"].get("correlation"))
            part, below = host.place(*launch) if launch else (OTHER, None)
            if part == DATA:
                part = TO_DEVICE if "HtoD" in e["name"] else OTHER
            work.append((e["ts"], e["ts"] + e["dur"], part, below))
    return work
