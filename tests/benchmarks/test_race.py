"""Times against a fake clock and planted differences, memory against counted allocations."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import race as module
from benchmarks.race import (
    Cache,
    Call,
    Load,
    Sample,
    Versus,
    allowed_error,
    doubt,
    error_of,
    first_call,
    peak_bytes,
    race,
    summary,
    versus,
)

CPU = torch.device("cpu")
NO_CACHE = Cache(CPU, 0)


class Clock:
    """Replaces the module `time`; it moves only when `passes` is called."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def call(self, name: str, seconds: float, seen: list[str]) -> Call:
        def call() -> None:
            seen.append(name)
            self.passes(seconds)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_race_gives_each_call_its_own_time(clock: Clock) -> None:
    seen: list[str] = []
    calls = {name: clock.call(name, ms / 1e3, seen) for name, ms in (("a", 2), ("b", 4))}
    found = race(calls, CPU, NO_CACHE, samples=6)
    for name, us in (("a", 2000), ("b", 4000)):
        time_ = summary(found[name])
        for value in (time_.median_us, time_.p20_us, time_.p80_us, time_.host_us):
            assert value == pytest.approx(us)
        assert time_.n == 6 and time_.gap == pytest.approx(0)
    assert versus(found["b"], found["a"]).ratio == pytest.approx(2)


def test_race_excludes_first_call_and_warm_up(clock: Clock) -> None:
    calls = 0

    def slow_at_first() -> None:
        nonlocal calls
        calls += 1
        clock.passes(0.05 if calls == 1 else 0.01 if calls <= 1 + module.WARM_UP_CALLS else 0.002)

    assert first_call(slow_at_first, CPU) == pytest.approx(0.05)
    (found,) = race({"a": slow_at_first}, CPU, NO_CACHE, samples=5).values()
    assert [one.seconds for one in found] == pytest.approx([0.002] * 5)
    slow: list[str] = []
    race({"a": clock.call("a", 2.0, slow)}, CPU, NO_CACHE, samples=1)
    assert len(slow) == 2  # one call warms up what takes longer than a second


@pytest.mark.parametrize("providers", [1, 2, 3, 5])
def test_race_alternates_so_that_every_provider_comes_first_equally_often(
    clock: Clock, providers: int
) -> None:
    order: list[str] = []
    names = "abcde"[:providers]
    calls = {name: clock.call(name, 0.02, order) for name in names}
    race(calls, CPU, NO_CACHE, samples=4 * providers)
    measured = order[-4 * providers * providers :]
    starts = range(0, len(measured), providers)
    rounds = [tuple(measured[start : start + providers]) for start in starts]
    assert all(sorted(one) == list(names) for one in rounds)
    assert Counter(one[0] for one in rounds) == dict.fromkeys(names, 4)
    assert Counter(one[-1] for one in rounds) == dict.fromkeys(names, 4)
    for a, b in itertools.permutations(names, 2):
        assert sum(one.index(a) < one.index(b) for one in rounds) == 2 * providers


def test_race_flushes_the_cache_before_every_sample_and_outside_its_time(clock: Clock) -> None:
    seen: list[str] = []

    class Slow(Cache):
        def flush(self) -> None:
            seen.append("flush")
            clock.passes(7.0)

    calls = {name: clock.call(name, seconds, seen) for name, seconds in (("a", 0.02), ("b", 0.04))}
    found = race(calls, CPU, Slow(CPU, 0), samples=5)
    assert [one.seconds for one in found["a"]] == pytest.approx([0.02] * 5)
    flushed = [after for before, after in itertools.pairwise(seen) if before == "flush"]
    assert Counter(flushed) == {"a": 5, "b": 5}


def test_summary_reports_quantiles_and_the_gap_between_the_halves() -> None:
    found = summary([Sample(0.001 * n, 0.0005) for n in range(1, 12)])
    assert (found.p20_us, found.median_us, found.p80_us) == pytest.approx((3000, 6000, 9000))
    assert found.host_us == pytest.approx(500)
    assert found.gap == pytest.approx(9 / 3 - 1)


# ---- verdicts ----


def samples(seed: int, middle: float, noise: float) -> list[Sample]:
    """100 log-normal times."""
    rng = np.random.default_rng(seed)
    return [Sample(s, s) for s in middle * np.exp(noise * rng.standard_normal(100))]


def verdicts(pairs: int, ratio: float, noise: float) -> list[Versus]:
    """Of pairs whose true ratio is known."""
    return [
        versus(samples(2 * n, 1e-3 * ratio, noise), samples(2 * n + 1, 1e-3, noise))
        for n in range(pairs)
    ]


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [(2.0, 0.05, "slower"), (0.5, 0.05, "faster"), (1.05, 0.01, "slower"), (0.95, 0.01, "faster")],
)
def test_versus_finds_a_planted_difference_with_its_sign(
    ratio: float, noise: float, verdict: str
) -> None:
    found = verdicts(20, ratio, noise)
    assert {one.verdict for one in found} == {verdict}
    assert sum(one.low <= ratio <= one.high for one in found) >= 16  # 95 % of 20, and some luck


def test_versus_interval_contains_the_truth_in_about_95_percent() -> None:
    found = verdicts(200, 1.0, 0.1)
    assert sum(one.verdict != "same" for one in found) <= 20
    assert 180 <= sum(one.low <= 1 <= one.high for one in found) < 200


def test_versus_is_same_within_two_percent_or_within_the_gap() -> None:
    def flat(*halves: float) -> list[Sample]:
        return [Sample(half, half) for half in halves for _ in range(50)]

    assert versus(flat(1.015, 1.015), flat(1, 1)).verdict == "same"
    assert versus(flat(1.03, 1.03), flat(1, 1)).verdict == "slower"
    assert versus(flat(1.1, 1.2), flat(1, 1)).verdict == "slower"
    assert versus(flat(1.1, 1.4), flat(1, 1)).verdict == "same"  # its own halves differ by 27 %


# ---- load ----


def test_load_counts_other_processes_on_the_usable_cpus(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Two of four CPUs are usable; others use 3 s and this process 1 s of 2 x 10 s."""
    hertz = os.sysconf("SC_CLK_TCK")
    busy = iter([(0, 0), (250, 150)])
    own = iter([0.0, 1.0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(os, "times", lambda: os.times_result((next(own), 0, 0, 0, 0)))

    def stat(self: Path) -> str:
        a, b = (ticks * hertz // 100 for ticks in next(busy))
        lines = [f"cpu0 {a} 0 0 9 9 0 0 0 0 0", "cpu1 99999 0 0 0 0 0 0 0 0 0"]
        return "\n".join([*lines, f"cpu2 0 0 {b} 9 9 0 0 0 0 0", "intr 1"])

    monkeypatch.setattr(Path, "read_text", stat)
    load = Load()
    clock.passes(10)
    assert load.others() == pytest.approx(0.15)


def test_load_is_unknown_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert Load().others() is None


def test_doubt_names_a_busy_machine_and_wide_quantiles() -> None:
    calm, wide = ({"p20_us": p20, "p80_us": p80} for p20, p80 in ((9.5, 11), (5, 50)))
    assert doubt(0.02, [calm]) is None and doubt(None, []) is None
    assert "used 40% of the CPUs" in str(doubt(0.4, [calm]))
    assert "10.0 times" in str(doubt(0.0, [calm, wide]))


# ---- memory and correctness ----


def test_peak_bytes_counts_what_is_alive_at_the_same_time() -> None:
    held = torch.ones(1 << 18)  # 1 MiB, allocated before
    assert peak_bytes(lambda: (held * 2).exp(), CPU) == 2 * held.nbytes
    assert peak_bytes(lambda: (held * 2).exp().log().neg(), CPU) == 2 * held.nbytes
    assert peak_bytes(lambda: held.add_(1), CPU) < 64  # a scalar


def test_error_is_relative_to_the_largest_value_of_each_tensor() -> None:
    exact = [torch.tensor([100.0, 1.0]), torch.tensor([0.01])]
    assert error_of([torch.tensor([100.0, 2.0]), exact[1]], exact) == pytest.approx(0.01)
    assert error_of([exact[0], torch.tensor([-0.01])], exact) == pytest.approx(2)
    assert error_of([torch.tensor([float("nan"), 1.0]), exact[1]], exact) == float("inf")
    for wrong in ([exact[0]], [exact[0][:1], exact[1]]):
        with pytest.raises(ValueError, match="results of shapes"):
            error_of(wrong, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_allowed_error_is_twice_eager_plus_roundings(dtype: torch.dtype) -> None:
    roundings = 32 * (2**-52 if dtype == torch.float64 else 2**-23)
    assert allowed_error(0.01, dtype) == pytest.approx(0.02 + roundings)
    assert allowed_error(float("inf"), dtype) == pytest.approx(roundings)
