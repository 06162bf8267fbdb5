"""From calls to rows: who fails keeps a row with the reason, who is wrong is refused, and the others are timed all the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.bench import OURS, QUICK_SAMPLES, Bench, attempt, forget, reason, time_rows
from benchmarks.measure import PASSES, SAMPLES, Cache, allowed_error, error_of
from benchmarks.results import Results, Row
from sssd_fast.run.log import Console

from .test_measure import Clock

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    results = Results("kernels", CPU, [], words=["kernels"], path=tmp_path / "x.json", ceilings={})
    return Bench(CPU, Console(False), results, Cache(CPU, 0), samples=4)


def rows_of(*names: str) -> dict[str, Row]:
    return {name: Row("an op", "a shape", "fp32", "forward", name) for name in names}


class Provider:
    """Takes a while on the made-up clock, longer at its first call, fails at a given call, and counts its calls."""

    def __init__(
        self, clock: Clock, seconds: float, first: float | None = None, fails_at: int | None = None
    ) -> None:
        self.clock = clock
        self.seconds = seconds
        self.fails_at = fails_at
        self.calls = 0
        self.first = seconds if first is None else first

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the kernel does not compile\nsecond line")
        self.clock.passes(self.first if self.calls == 1 else self.seconds)
        return torch.empty(1 << 20)


# ---- rows ----


def test_a_row_gets_its_time_the_first_call_apart_and_the_comparison(
    bench: Bench, clock: Clock
) -> None:
    rows = rows_of(OURS, "slow", "fast")
    known = {OURS: (0.002, 0.050), "slow": (0.004, 0.004), "fast": (0.0005, 3.0)}
    time_rows(bench, rows, {name: Provider(clock, *seconds) for name, seconds in known.items()})
    for name, (seconds, first) in known.items():
        row = rows[name]
        assert row.reason is None
        assert row.first_call_s == pytest.approx(first)
        assert row.time is not None
        assert row.time.n == 4
        for value in (row.time.median_us, row.time.p20_us, row.time.p80_us, row.time.again_us):
            assert value == pytest.approx(seconds * 1e6)
        assert row.peak_bytes == 4 << 20
        if name != OURS:
            assert row.versus is not None
            assert row.versus.ratio == pytest.approx(seconds / 0.002)
            assert row.versus.verdict == {"slow": "slower", "fast": "faster"}[name]
    assert rows[OURS].versus is None


def test_the_first_call_of_the_gate_is_kept(bench: Bench, clock: Clock) -> None:
    rows = rows_of(OURS)
    rows[OURS].first_call_s = 12.5
    time_rows(bench, rows, {OURS: Provider(clock, 0.02, first=0.05)})
    assert rows[OURS].first_call_s == 12.5


@pytest.mark.parametrize(
    "fails_at", [1, 2, 3, 5, 8], ids=["first", "second", "counted", "warming up", "timed"]
)
def test_who_fails_keeps_its_row_and_the_others_are_timed(
    bench: Bench, clock: Clock, fails_at: int
) -> None:
    rows = rows_of("eager", "broken", OURS)
    calls = {
        name: Provider(clock, 0.02, fails_at=fails_at if name == "broken" else None)
        for name in rows
    }
    time_rows(bench, rows, calls)
    assert rows["broken"].reason == "fails: RuntimeError: the kernel does not compile"
    assert rows["broken"].time is None
    assert rows["broken"].versus is None
    for name in ("eager", OURS):
        assert rows[name].reason is None
        assert rows[name].time is not None
    assert rows["eager"].versus is not None


def test_too_little_memory_is_a_reason(bench: Bench, clock: Clock) -> None:
    def greedy() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    rows = rows_of("eager", OURS)
    time_rows(bench, rows, {"eager": greedy, OURS: Provider(clock, 0.02)})
    assert rows["eager"].reason == "out of memory"
    assert rows["eager"].time is None
    assert rows[OURS].time is not None


def test_without_ours_there_are_times_and_no_comparison(bench: Bench, clock: Clock) -> None:
    rows = rows_of("eager", OURS)
    time_rows(
        bench, rows, {"eager": Provider(clock, 0.02), OURS: Provider(clock, 0.02, fails_at=1)}
    )
    assert rows["eager"].time is not None
    assert rows["eager"].versus is None
    assert rows[OURS].reason is not None


def test_who_has_a_reason_already_is_not_called(bench: Bench, clock: Clock) -> None:
    rows, refused = rows_of("wrong", OURS), Provider(clock, 0.02)
    rows["wrong"].reason = "wrong: error 1.0, allowed 0.001"
    time_rows(bench, rows, {"wrong": refused, OURS: Provider(clock, 0.02)})
    assert refused.calls == 0
    assert rows["wrong"].reason == "wrong: error 1.0, allowed 0.001"
    assert rows["wrong"].time is None
    assert rows[OURS].time is not None
    time_rows(bench, {"wrong": rows["wrong"]}, {"wrong": refused})  # nobody is left
    assert refused.calls == 0


def test_samples_and_passes_are_those_of_the_bench(bench: Bench, clock: Clock) -> None:
    bench.samples = 3
    bench.passes = 3
    rows, ours = rows_of(OURS), Provider(clock, 0.02)
    time_rows(bench, rows, {OURS: ours})
    taken = rows[OURS].time
    assert taken is not None
    assert taken.n == 3
    assert ours.calls == 3 + 3 * (measure.WARM_UP_CALLS + 3)
    assert (SAMPLES, PASSES) == (50, 2)
    assert QUICK_SAMPLES < SAMPLES


# ---- reasons ----


def test_reasons_are_one_line() -> None:
    assert (
        reason(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
        == "out of memory"
    )
    assert (
        reason(ValueError("  \n  width 100 is not a power of 2  \nmore"))
        == "fails: ValueError: width 100 is not a power of 2"
    )
    assert reason(ValueError()) == "fails: ValueError"
    assert len(reason(ValueError("x" * 1000))) < 200
    wrapped = RuntimeError("backend failed")
    wrapped.inner_exception = torch.OutOfMemoryError("...")  # type: ignore[attr-defined]
    assert reason(wrapped) == "out of memory"
    wrapped.inner_exception = TypeError("no such layout")  # type: ignore[attr-defined]
    assert reason(wrapped) == "fails: TypeError: no such layout"


def test_an_attempt_lets_the_user_interrupt() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    row = Row("an op", "a shape", "fp32", "forward", OURS)
    with pytest.raises(KeyboardInterrupt):
        attempt(row, interrupted)
    assert attempt(row, lambda: 3)
    assert row.reason is None
    assert not attempt(row, lambda: 1 / 0)
    assert row.reason == "fails: ZeroDivisionError: division by zero"


# ---- time limit, choice ----


def test_time_is_up_at_the_deadline(bench: Bench) -> None:
    assert not bench.time_is_up()
    bench.deadline = time.monotonic() + 1000
    assert not bench.time_is_up()
    bench.deadline = time.monotonic()
    assert bench.time_is_up()


def test_what_is_left_out_is_in_the_file_at_once(bench: Bench) -> None:
    bench.leave_out("attention at 1024 tokens")
    assert '"attention at 1024 tokens"' in bench.results.path.read_text()


def test_an_empty_choice_is_every_provider(bench: Bench) -> None:
    assert bench.wants("eager")
    bench.only = ["sdpa", OURS]
    assert [bench.wants(name) for name in ("eager", "sdpa", OURS)] == [False, True, True]


def test_compiled_code_is_forgotten() -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        nonlocal compilations
        compilations += 1
        return graph.forward

    @torch.compile(backend=backend)
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    for _ in range(2):
        twice(torch.ones(3))
    assert compilations == 1
    forget(CPU)
    twice(torch.ones(3))
    assert compilations == 2
    forget(CPU)


# ---- correctness ----


def test_errors_are_relative_to_the_largest_value_of_their_own_tensor() -> None:
    exact = [torch.tensor([1.0, -4.0]), torch.tensor([[1000.0]])]
    assert error_of(exact, exact) == 0
    assert error_of([torch.tensor([1.2, -4.0]), exact[1]], exact) == pytest.approx(0.05)
    assert error_of([exact[0], torch.tensor([[1001.0]])], exact) == pytest.approx(0.001)
    assert error_of([torch.tensor([]), *exact], [torch.tensor([]), *exact]) == 0
    half = torch.tensor([1.0, -4.0], dtype=torch.bfloat16)
    assert error_of([half, exact[1]], [e.double() for e in exact]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_result_is_over_the_allowed_error(dtype: torch.dtype) -> None:
    """Twice what plain PyTorch errs by in the same dtype lets a rounding through, not a sign, a missing term or a NaN."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(64, 64, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    exact = [a.double() @ b.double()]
    eager = a @ b
    allowed = allowed_error(error_of([eager], exact), dtype)
    other = torch.stack([row @ b for row in a])  # the same, summed in another order
    assert error_of([other], exact) <= allowed
    assert error_of([eager], exact) <= allowed < 0.1
    nan, inf = eager.clone(), eager.clone()
    nan[3, 5], inf[3, 5] = float("nan"), float("inf")
    short = a[:, :-1] @ b[:-1]
    for wrong in (-eager, eager.T, short, torch.zeros_like(eager), 1.5 * eager):
        assert error_of([wrong], exact) > allowed
    assert error_of([nan], exact) == error_of([inf], exact) == math.inf
    assert error_of([exact[0].float()], [nan.double()]) == math.inf


def test_the_allowance_is_that_of_the_dtype() -> None:
    assert allowed_error(0.0, torch.float64) == 32 * 2.0**-52
    assert allowed_error(0.0, torch.float32) == 32 * 2.0**-23
    assert allowed_error(0.0, torch.bfloat16) == 32 * 2.0**-23  # eager has rounded to bf16 already
    assert allowed_error(0.01, torch.float16) == pytest.approx(0.02, rel=1e-3)


def test_another_shape_or_number_of_results_is_refused() -> None:
    with pytest.raises(ValueError, match=r"result 1 has shape \(3, 2\), the reference \(2, 3\)"):
        error_of([torch.zeros(1), torch.zeros(3, 2)], [torch.zeros(1), torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="1 results where there are 2"):
        error_of([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)])


def test_the_results_of_a_call_as_a_flat_list() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    found = measure.tensors((a, None, [b, (c,)], "text", 3))
    assert [t.numel() for t in found] == [1, 2, 3]
    assert measure.tensors(None) == []
