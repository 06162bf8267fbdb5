"""The stopwatch against what is known beforehand: a made-up clock, planted slow and noisy providers, counted allocations."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Cache, Call, Versus, race, summary, versus

CPU = torch.device("cpu")
NO_CACHE = Cache(CPU, 0)


class Clock:
    """Stands for the module `time`: it moves only when something says that it took a while."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def call(self, name: str, seconds: float, seen: list[str]) -> Call:
        """A provider that takes so long, and notes each of its calls."""

        def call() -> None:
            seen.append(name)
            self.passes(seconds)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


# ---- time ----


def test_each_call_gets_its_own_time(clock: Clock) -> None:
    calls = {
        name: (lambda ms=ms: clock.passes(ms / 1000))
        for name, ms in (("a", 2), ("b", 4), ("c", 0.5))
    }
    found = race(calls, CPU, NO_CACHE, samples=6, passes=3)
    assert {name: [len(one) for one in passes] for name, passes in found.items()} == {
        name: [6, 6, 6] for name in "abc"
    }
    for name, us in (("a", 2000), ("b", 4000), ("c", 500)):
        time_ = summary(found[name])
        for value in (time_.median_us, time_.p20_us, time_.p80_us, time_.again_us):
            assert value == pytest.approx(us)
        assert time_.n == 6
        assert time_.gap == pytest.approx(0)
    assert versus(found["b"], found["a"]).ratio == pytest.approx(2)
    assert versus(found["c"], found["a"]).ratio == pytest.approx(0.25)


def test_a_real_sleep_is_not_shorter_than_it_was() -> None:
    """With the machine's own clock: in microseconds, and at least as long as asked for."""
    found = race(
        {"a": lambda: time.sleep(0.002), "b": lambda: time.sleep(0.004)},
        CPU,
        NO_CACHE,
        samples=4,
        passes=2,
    )
    for name, us in (("a", 2000), ("b", 4000)):
        assert us <= summary(found[name]).p20_us < 1e6
        assert min(found[name][1]) >= us / 1e6


def test_the_first_call_and_the_warm_up_are_in_no_figure(clock: Clock) -> None:
    calls = 0

    def slow_at_first() -> None:
        nonlocal calls
        calls += 1
        clock.passes(
            0.050 if calls == 1 else 0.010 if calls <= 1 + measure.WARM_UP_CALLS else 0.002
        )

    assert measure.first_call(slow_at_first, CPU) == pytest.approx(0.050)
    (passes,) = race({"a": slow_at_first}, CPU, NO_CACHE, samples=5, passes=2).values()
    assert [value for one in passes for value in one] == pytest.approx([0.002] * 10)


@pytest.mark.parametrize(("ms", "calls"), [(25, 3), (2, 15)])
def test_the_warm_up_lasts_for_some_calls_and_some_time(
    clock: Clock, ms: float, calls: int
) -> None:
    assert (measure.WARM_UP_CALLS, measure.WARM_UP_S) == (3, 0.03)
    made = 0

    def call() -> None:
        nonlocal made
        made += 1
        clock.passes(ms / 1000 + 1e-9)

    measure.warm_up(call, CPU)
    assert made == calls


@pytest.mark.parametrize("providers", [1, 2, 3, 4, 5])
def test_every_provider_comes_first_equally_often(clock: Clock, providers: int) -> None:
    """And last, before and after each other one, and once in every round: what the one before leaves behind meets all alike."""
    order: list[str] = []
    names = "abcde"[:providers]
    race(
        {name: clock.call(name, 0.02, order) for name in names},
        CPU,
        NO_CACHE,
        samples=4 * providers,
        passes=1,
    )
    measured = order[len(order) - 4 * providers * providers :]
    rounds = [
        tuple(measured[start : start + providers]) for start in range(0, len(measured), providers)
    ]
    assert all(sorted(one) == list(names) for one in rounds)
    assert Counter(one[0] for one in rounds) == dict.fromkeys(names, 4)
    assert Counter(one[-1] for one in rounds) == dict.fromkeys(names, 4)
    for a, b in itertools.permutations(names, 2):
        assert sum(one.index(a) < one.index(b) for one in rounds) == 2 * providers


def test_the_cache_is_emptied_before_every_sample_and_outside_its_time(clock: Clock) -> None:
    seen: list[str] = []

    class Slow(Cache):
        def flush(self) -> None:
            seen.append("flush")
            clock.passes(7.0)

    calls = {name: clock.call(name, seconds, seen) for name, seconds in (("a", 0.02), ("b", 0.04))}
    found = race(calls, CPU, Slow(CPU, 0), samples=5, passes=2)
    assert found["a"] == [pytest.approx([0.02] * 5)] * 2
    assert found["b"] == [pytest.approx([0.04] * 5)] * 2
    flushes = [after for before, after in itertools.pairwise(seen) if before == "flush"]
    assert Counter(flushes) == {"a": 10, "b": 10}
    assert seen.count("flush") == 20


def test_flushing_writes_the_whole_buffer() -> None:
    cache = Cache(CPU, 1 << 20)
    cache._buffer.fill_(3)
    cache.flush()
    assert cache.bytes == cache._buffer.numel() == 1 << 20
    assert not cache._buffer.any()
    assert Cache(CPU, 0).bytes == 0
    assert Cache(CPU).bytes == measure.cache_bytes(CPU)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (["48K", "2048K", "36864K"], 72 << 20),
        (["48K", "512K"], 8 << 20),
        (["32M"], 64 << 20),
        (["300M"], 256 << 20),
        ([], measure.UNKNOWN_CACHE),
    ],
    ids=["twice the largest", "at least 8 MiB", "in MiB", "at most 256 MiB", "unknown"],
)
def test_the_buffer_is_twice_the_last_cache(
    monkeypatch: pytest.MonkeyPatch, sizes: list[str], expected: int
) -> None:
    files = [SimpleNamespace(read_text=lambda text=text: f"{text}\n") for text in sizes]
    monkeypatch.setattr(measure, "Path", lambda name: SimpleNamespace(glob=lambda pattern: files))
    assert measure.cache_bytes(CPU) == expected


def test_the_figures_are_those_of_the_first_pass() -> None:
    found = summary([[value / 1e6 for value in range(11)], [6 / 1e6] * 3])
    assert found.median_us == pytest.approx(5)
    assert found.p20_us == pytest.approx(2)
    assert found.p80_us == pytest.approx(8)
    assert found.n == 11
    assert found.again_us == pytest.approx(6)
    assert found.gap == pytest.approx(0.2)
    once = summary([[1e-6, 3e-6]])
    assert (once.again_us, once.gap) == (None, None)


# ---- one provider against another, on made-up samples ----

Samples = list[list[float]]


def samples(seed: int, middle: float, noise: float, drift: float = 0.0) -> Samples:
    """Two passes of 50 seconds each, log-normal as times are; the second slower by `drift`."""
    rng = np.random.default_rng(seed)
    return [
        list(middle * (1 + drift * number) * np.exp(noise * rng.standard_normal(50)))
        for number in range(2)
    ]


def verdicts(
    pairs: int, ratio: float, noise: float, *, drift_a: float = 0.0, drift_b: float = 0.0
) -> list[Versus]:
    """Of providers whose true ratio is known, each pair with its own noise."""
    return [
        versus(
            samples(2 * n, 1e-3 * ratio, noise, drift_a), samples(2 * n + 1, 1e-3, noise, drift_b)
        )
        for n in range(pairs)
    ]


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(2.0, "slower"), (0.5, "faster"), (1.3, "slower"), (1 / 1.3, "faster")]
)
def test_a_planted_difference_is_found_with_its_sign(ratio: float, verdict: str) -> None:
    found = verdicts(20, ratio, 0.05)
    assert {one.verdict for one in found} == {verdict}
    for one in found:
        assert one.low < one.ratio < one.high
        assert one.ratio == pytest.approx(ratio, rel=0.05)
    assert sum(one.low <= ratio <= one.high for one in found) >= 16  # 95 % of 20, and some luck


def test_a_small_difference_is_found_where_the_noise_is_smaller() -> None:
    assert {one.verdict for one in verdicts(20, 1.05, 0.01)} == {"slower"}
    assert {one.verdict for one in verdicts(20, 0.95, 0.01)} == {"faster"}


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_equal_providers_are_seldom_told_apart(noise: float) -> None:
    found = verdicts(200, 1.0, noise)
    assert sum(one.verdict != "same" for one in found) <= 20
    held = sum(one.low <= 1 <= one.high for one in found)
    assert (
        180 <= held < 200
    )  # a 95 % interval holds the truth in about 190 of 200, and is not so wide that it always does


def test_a_strong_noise_hides_a_small_difference() -> None:
    assert sum(one.verdict == "same" for one in verdicts(20, 1.03, 0.5)) >= 18


def test_what_differs_by_less_than_two_percent_is_the_same_however_sure() -> None:
    exact = versus([[1.015e-3] * 50] * 2, [[1e-3] * 50] * 2)
    assert exact.low == exact.high == pytest.approx(1.015)
    assert exact.verdict == "same"
    assert versus([[1.03e-3] * 50] * 2, [[1e-3] * 50] * 2).verdict == "slower"
    assert versus([[1e-3] * 50] * 2, [[1.03e-3] * 50] * 2).verdict == "faster"


def test_a_drift_between_the_passes_widens_the_margin() -> None:
    """5 % of difference says nothing where a provider differs by 10 % from itself, whichever of the two it is."""
    assert {one.verdict for one in verdicts(10, 1.05, 0.002, drift_a=0.1, drift_b=0.1)} == {"same"}
    # 5 % apart in the first pass and 1 % in the second: 3 % over both, more than 2 % but less than the drift
    assert {one.verdict for one in verdicts(10, 1.05, 0.002, drift_a=-0.04)} == {"same"}
    assert {one.verdict for one in verdicts(10, 1.05, 0.002, drift_b=0.04)} == {"same"}
    assert {one.verdict for one in verdicts(10, 1.5, 0.002, drift_a=0.1, drift_b=0.1)} == {"slower"}


def test_one_pass_is_enough_for_a_verdict() -> None:
    assert versus([[2e-3] * 5], [[1e-3] * 5]) == Versus(2.0, 2.0, 2.0, "slower")


# ---- memory ----


def test_the_peak_is_that_of_what_lives_at_the_same_time() -> None:
    mib = 1 << 20

    def call() -> torch.Tensor:
        a = torch.empty(3 * mib, dtype=torch.uint8)
        b = torch.empty(2 * mib, dtype=torch.uint8)  # 5 MiB with a
        del a
        c = torch.empty(1 * mib, dtype=torch.uint8)  # 3 MiB with b
        del b
        return c

    assert measure.peak_bytes(call, CPU) == 5 * mib
    assert (
        measure.peak_bytes(lambda: torch.empty(7 * mib, dtype=torch.uint8), CPU) == 7 * mib
    )  # only its result
    assert measure.peak_bytes(lambda: None, CPU) == 0


def test_what_was_there_before_the_call_does_not_count() -> None:
    before = torch.ones(1 << 20)
    out = torch.empty_like(before)
    assert measure.peak_bytes(lambda: torch.mul(before, before, out=out), CPU) == 0
    assert measure.peak_bytes(lambda: before * before, CPU) == 4 << 20


def test_the_peak_of_a_chain_is_two_of_its_tensors() -> None:
    x = torch.ones(1 << 18)
    assert measure.peak_bytes(lambda: ((x + x) * x).sin(), CPU) == 2 * (4 << 18)


def test_compiled_code_counts_like_any_other() -> None:
    """Fused, the chain has no intermediate: its result alone is left."""
    x = torch.ones(1 << 18)
    compiled = torch.compile(lambda x: ((x + x) * x).sin())
    torch.testing.assert_close(compiled(x), torch.full_like(x, math.sin(2)))
    try:
        assert measure.peak_bytes(lambda: compiled(x), CPU) == 4 << 18
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("eager", [float("inf"), float("nan")])
def test_an_eager_error_that_is_no_number_excuses_nobody(eager: float) -> None:
    assert measure.allowed_error(eager, torch.float32) == measure.allowed_error(0.0, torch.float32)
