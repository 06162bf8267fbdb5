"""`bench compare`: what counts as a regression, what cannot be compared, and what the command says and returns."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import BETTER, FAILS, RUNS, WORSE, margin_of, ratio_of
from sssd_fast.errors import SssdError
from tests.benchmarks.documents import CPU, GPU, document, row, save


def pair(
    a_us: float | None, b_us: float | None, device: dict[str, Any] = CPU
) -> tuple[dict[str, Any], dict[str, Any]]:
    return tuple(
        document("kernels", [row("restore_tokens", "ours", us)], device) for us in (a_us, b_us)
    )  # type: ignore[return-value]


def verdict(
    a: dict[str, Any], b: dict[str, Any], fail_over: float = 0.05, margin_us: float | None = None
) -> str:
    (line,) = compare.compare(a, b, fail_over, margin_us).lines
    return line.verdict


# ---- regressions ----


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (100.0, 104.0, ""),  # neither 5 % nor 5 us
        (20.0, 24.0, ""),  # 20 % but only 4 us
        (1000.0, 1040.0, ""),  # 40 us but only 4 %
        (100.0, 106.0, WORSE),
        (106.0, 100.0, BETTER),
        (24.0, 20.0, ""),
        (None, 100.0, RUNS),
        (100.0, None, FAILS),
        (None, None, ""),
    ],
)
def test_a_regression_needs_the_ratio_and_the_margin(
    a: float | None, b: float | None, expected: str
) -> None:
    assert verdict(*pair(a, b)) == expected


def test_the_margin_is_5_us_on_a_cpu_and_2_on_a_gpu_unless_given() -> None:
    assert verdict(*pair(20.0, 24.0, GPU)) == WORSE
    assert verdict(*pair(20.0, 21.9, GPU)) == ""
    assert verdict(*pair(20.0, 24.0), margin_us=1.0) == WORSE
    assert verdict(*pair(20.0, 24.0, GPU), margin_us=10.0) == ""


def test_overlapping_quantiles_are_called_noise_and_change_nothing() -> None:
    """Quantiles are 4 % off the median here: 100 reaches to 104, and 107 from 102.7; 110 from 105.6."""
    near, far = (compare.compare(*pair(100.0, b), 0.05).lines[0] for b in (107.0, 110.0))
    assert (near.verdict, near.note) == (WORSE, "within noise")
    assert (far.verdict, far.note) == (WORSE, "")


def test_memory_is_compared_by_peak_and_by_the_largest_batch() -> None:
    def memory(peak: int, batch: int) -> dict[str, Any]:
        more = {"cap_gb": 12, "largest_batch": batch}
        rows = [row("MAE", "ours", None, phase="memory", peak_bytes=peak)]
        return document(
            "memory",
            [
                *rows,
                row(
                    "largest batch MAE",
                    "ours",
                    None,
                    phase="memory, 12 GB",
                    sizes={"batch": batch},
                    more=more,
                ),
            ],
        )

    mib = 2**20
    verdicts = {
        line.name[0]: line.verdict
        for line in compare.compare(memory(100 * mib, 96), memory(120 * mib, 80), 0.05).lines
    }
    assert verdicts == {"MAE": WORSE, "largest batch MAE": WORSE}
    verdicts = {
        line.name[0]: line.verdict
        for line in compare.compare(memory(mib, 80), memory(int(1.9 * mib), 96), 0.05).lines
    }
    assert verdicts == {"MAE": "", "largest batch MAE": BETTER}, "0.9 MiB more is below the margin"


def test_loaders_are_compared_by_images_per_second() -> None:
    def loader(rate: float) -> dict[str, Any]:
        figures = {"median": rate, "p20": rate, "p80": rate, "n": 5, "gap": 0.0}
        rows = [
            {
                "data": "ct",
                "channels": 1,
                "provider": "resident",
                "figures": figures,
                "reason": None,
                "ratio": 1.0,
            }
        ]
        return document("loader-speed", rows)

    (line,) = compare.compare(loader(1000.0), loader(500.0), 0.05).lines
    assert (line.verdict, line.ratio) == (WORSE, 2.0)
    assert verdict(loader(500.0), loader(1000.0)) == BETTER


def test_the_worst_comes_first_and_rows_of_one_file_are_listed() -> None:
    times = {
        "tuned": (100.0, 90.0),
        "ours": (100.0, 150.0),
        "library": (100.0, 120.0),
        "published": (100.0, None),
    }
    a, b = (
        document("kernels", [row("restore_tokens", name, us[i]) for name, us in times.items()])
        for i in (0, 1)
    )
    a["rows"].append(row("sssd_loss", "ours", 1.0))
    b["rows"].append(row("gelu_linear", "ours", 1.0))
    found = compare.compare(a, b, 0.05)
    assert [line.name[4] for line in found.lines] == ["published", "ours", "library", "tuned"]
    assert [name[0] for name in found.only_a] == ["sssd_loss"]
    assert [name[0] for name in found.only_b] == ["gelu_linear"]
    assert found.failed


# ---- what is refused, what is said ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "attention"}, "kind is kernels in A and attention in B"),
        ({"device": GPU}, "Made-up CPU, 2 cores in A and Made-up GPU 80GB in B"),
        ({"quick": True}, "--quick is False in A and True in B"),
        ({"schema": "other/1"}, "schema is"),
        ({"rows": [row("sssd_loss", "ours", 1.0)]}, "no row in common"),
        ({"rows": [row("restore_tokens", "ours", 100.0, dtype="bf16")]}, "fp32 in A and bf16 in B"),
        (
            {"rows": [row("restore_tokens", "ours", 100.0, sizes={"batch": 9})]},
            "stands for {'batch': 8} in A",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], message: str) -> None:
    a, b = pair(100.0, 100.0)
    with pytest.raises(SssdError, match="cannot compare") as error:
        compare.compare(a, {**b, **change}, 0.05)
    assert message in str(error.value)


def test_loader_parity_has_nothing_to_compare() -> None:
    with pytest.raises(SssdError, match="no cost"):
        compare.compare(document("loader-parity", []), document("loader-parity", []), 0.05)


def test_what_differs_without_being_refused_is_a_warning() -> None:
    a, b = pair(100.0, 100.0, GPU)
    b = copy.deepcopy(b)
    b["versions"]["triton"] = "3.8.0"
    b["device"]["driver"] = "590.2"
    b["clocks"]["before"]["clocks.sm"] = "1200 MHz"
    b["finished"] = False
    warnings = compare.compare(a, b, 0.05).warnings
    assert warnings == [
        "triton: 3.7.1 in A, 3.8.0 in B",
        "driver: 580.1 in A, 590.2 in B",
        "clocks.sm: 1980 MHz before A, 1200 MHz before B",
        "B is unfinished: its run ended before its last row",
    ]
    assert compare.compare(a, a, 0.05).warnings == []


# ---- command line ----


def run(folder: Path, a: dict[str, Any], b: dict[str, Any], *more: str) -> int:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    paths = [str(save(found, folder / name)) for name, found in (("a.json", a), ("b.json", b))]
    return compare.main(parser.parse_args([*paths, *more]))


def test_the_command_prints_a_table_and_returns_1_for_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *pair(100.0, 112.3)) == 1
    printed = capsys.readouterr().out
    assert "restore_tokens" in printed
    assert "1.123" in printed
    assert (
        printed.strip().splitlines()[-1].startswith("1 of 1 rows regressed, 0 fail now, 0 better")
    )
    assert run(tmp_path, *pair(100.0, 112.3), "--fail-over", "20%") == 0
    assert run(tmp_path, *pair(100.0, 112.3), "--margin", "0.1ms") == 0


def test_a_provider_that_fails_now_is_a_failure_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair(100.0, None)
    b["rows"][0]["reason"] = "fails: RuntimeError: no kernel"
    assert run(tmp_path, a, b) == 1
    printed = capsys.readouterr().out
    assert FAILS in printed
    assert "no kernel" in printed


@pytest.mark.parametrize(
    ("text", "value"),
    [("5%", 0.05), ("0.05", 0.05), (" 12.5 % ", 0.125), ("150%", 1.5), ("0", 0.0)],
)
def test_shares(text: str, value: float) -> None:
    assert ratio_of(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5", "five", "-5%", "", "nan", "5%%", "1e-2"])
def test_nonsense_for_a_share_is_one_line(text: str) -> None:
    with pytest.raises(SssdError, match="needs a share such as 5%") as error:
        ratio_of(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"), [("5us", 5.0), ("5", 5.0), ("0.1ms", 100.0), ("2 µs", 2.0), ("1s", 1e6)]
)
def test_margins(text: str, value: float) -> None:
    assert margin_of(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5%", "-1us", "us", "5ns"])
def test_nonsense_for_a_margin_is_refused(text: str) -> None:
    with pytest.raises(SssdError, match="needs a time"):
        margin_of(text)
