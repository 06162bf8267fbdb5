"""Tables, pictures, pages and comparisons of made-up results, and the committed pages."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as comparing
from benchmarks import report, results
from benchmarks.compare import BETTER, FAILS, RUNS, WORSE, compare, ratio_of
from benchmarks.tables import tables
from sssd_fast.errors import SssdError
from tests.benchmarks.helpers import document, row

BOTH = "forward+backward"


def ops(device: str = "cpu", **more: Any) -> dict[str, Any]:
    """gelu_linear: ours 100 us, published 2x slower, tuned 1.25x faster; library fails."""
    fields: dict[str, Any] = {"phase": BOTH, "bytes": 1e7, "flops": 1e7}
    rows = [
        row("gelu_linear", "published", 200, 100, **fields),
        row("gelu_linear", "tuned", 80, 100, **fields),
        row("gelu_linear", "library", None, reason="fails: RuntimeError: no kernel", **fields),
        row("gelu_linear", "ours", 100, **fields),
        row("gelu_linear", "ours", 60, **{**fields, "phase": "forward"}),
    ]
    return document("ops", rows, device, **more)


def table(found: dict[str, Any], number: int = 0) -> list[dict[str, str]]:
    one = list(tables(found))[number]
    return [dict(zip(one.columns, line, strict=True)) for line in one.cells]


# ---- tables ----


def test_table_has_every_row_with_verdict_error_and_reason() -> None:
    lines = table(ops())
    assert [line["provider"] for line in lines] == ["published", "tuned", "library", "ours", "ours"]
    assert lines[0]["time / ours (95 %)"] == "2.00 (1.94 to 2.06) slower"
    assert lines[1]["time / ours (95 %)"] == "0.800 (0.776 to 0.824) faster"
    assert lines[0]["error / allowed"] == "1.0e-07 / 3.0e-06"
    assert lines[2]["note"] == "fails: RuntimeError: no kernel" and lines[2]["median"] == "-"
    assert lines[3]["rate, of ceiling"] == "100 GB/s, 10.0 % copy"
    assert "host time" not in lines[0]  # on a CPU it is the same as the time
    assert table(ops("cuda"))[0]["host time"] == "200 µs"


def test_doubtful_verdicts_are_listed_with_the_table() -> None:
    found = ops()
    assert next(tables(found)).doubts == []
    found["rows"][0]["load"] = 0.5
    (doubt,) = next(tables(found)).doubts
    assert "other processes used 50% of the CPUs" in doubt and BOTH in doubt
    assert "doubtful" in "".join(report.section([found]))


def test_overview_has_geometric_means_and_counts_losses() -> None:
    found = ops()
    found["rows"].append({**found["rows"][0], "versus": {"ratio": 0.5, "verdict": "faster"}})
    text = "\n".join(report.overview([found]))
    assert "| published | fp32 | 1.00× | 1 of 2 |" in text
    assert "| tuned | fp32 | 0.800× | 1 of 1 |" in text


def step_document() -> dict[str, Any]:
    """Ours in bf16 at 40 images/s, a rival in fp32 at 20, at two image sizes, and a third case."""
    rows = []
    for case, shape in (("MAE", "ViT-T-128"), ("MAE", "ViT-T-224"), ("finetune", "ViT-T-224")):
        fields: dict[str, Any] = {"phase": "step", "shape": shape}
        more = {"mfu": 0.5, "p20": 39.0, "p80": 42.0}
        rates = [{"images_per_s": rate, **more} for rate in (20.0, 40.0)]
        rows += [
            row(case, "transformers, eager", 400, 200, more=rates[0], **fields),
            row(case, "ours", 200, more=rates[1], **{**fields, "dtype": "bf16"}),
        ]
    return document("step", rows)


def test_step_and_memory_and_loader_have_their_columns() -> None:
    lines = table(step_document())
    assert lines[1]["images/s"] == "40.0" and lines[1]["MFU"] == "50.0 %"
    assert lines[1]["p20 to p80"] == "39.0 to 42.0 images/s" and lines[1]["dtype"] == "bf16"
    assert [one.title for one in tables(step_document())][1:] == [
        "MAE, ViT-T-224, step",
        "finetune, ViT-T-224, step",
    ]
    more = {"images_per_s": 300.0, "p20": 290.0, "p80": 310.0, "n": 5, "x_baseline": 2.0}
    loader = document("loader", [row("ct", "dali", None, phase="epoch", more=more)])
    (line,) = table(loader)
    assert line["p20 to p80"] == "290 to 310 images/s" and line["x baseline"] == "2.00"


# ---- pages ----


def save(folder: Path, name: str, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {key: value for key, value in found.items() if key != "file"}
    (folder / name).write_text(json.dumps(found))


def run_report(folder: Path, root: Path, check: bool = False) -> int:
    return report.main(argparse.Namespace(results=folder, check=check), root)


def test_report_writes_the_page_and_pictures_and_check_finds_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, root = tmp_path / "results", tmp_path / "root"
    save(folder, "ops.json", ops("cuda"))
    save(folder, "step.json", step_document())
    peaks = [row("MAE", "ours", None, shape=f"ViT, {n} images", peak_bytes=8) for n in (8, 16)]
    save(folder, "memory.json", document("memory", peaks))
    assert run_report(folder, root, check=True) == 1
    assert not (root / "docs").exists()
    assert run_report(folder, root) == 0
    assert run_report(folder, root, check=True) == 0
    page = (root / report.PAGE).read_text()
    (picture,) = (root / report.FOLDER).glob("*.png")
    assert f"(benchmarks/{picture.name})" in page and picture.name == "step-made-up-cpu-2-cores.png"
    png = picture.read_bytes()
    assert png.startswith(b"\x89PNG") and 5_000 < len(png) < 300_000
    assert "CPU: not measured." in page and "NVIDIA GPU: not measured." in page
    (root / report.PAGE).write_text(page + "x")
    assert run_report(folder, root, check=True) == 1
    assert "docs/benchmarks.md is out of date" in capsys.readouterr().err


def test_newest_rows_of_a_kind_and_device_are_used_and_quick_runs_never(tmp_path: Path) -> None:
    save(tmp_path, "a.json", ops(started="2026-01-01T00:00:00+00:00"))
    save(tmp_path, "b.json", ops(started="2026-02-01T00:00:00+00:00", finished=False))
    save(tmp_path, "c.json", ops(started="2026-03-01T00:00:00+00:00", quick=True))
    save(tmp_path, "d.json", ops("cuda"))
    found, warned = report.find(tmp_path)
    assert [one["file"] for one in found] == ["d.json", "b.json"] and len(warned) == 3
    assert any("a.json: later runs measured all of it" in text for text in warned)
    assert "**Unfinished" in report.caption(found[1])
    save(tmp_path, "e.json", document("cooking", []))
    with pytest.raises(SssdError, match=r"e\.json: kind 'cooking'"):
        report.find(tmp_path)


def test_cases_measured_in_several_runs_share_one_section(tmp_path: Path) -> None:
    def part(started: str, *shapes: str) -> dict[str, Any]:
        rows = [one for one in step_document()["rows"] if one["shape"] in shapes]
        return {**document("step", rows, started=started), "command": f"bench {started}"}

    save(tmp_path, "a.json", part("2026-01-01", "ViT-T-128", "ViT-T-224"))
    save(tmp_path, "b.json", part("2026-02-01", "ViT-T-224"))
    found, warned = report.find(tmp_path)
    assert [{row["shape"] for row in one["rows"]} for one in found] == [
        {"ViT-T-128"},
        {"ViT-T-224"},
    ]
    assert not warned
    page = report.page(found)
    assert page.count("### Made-up CPU") == 1 and page.count("ViT-T-224, step") == 2
    assert page.index("bench 2026-01-01") < page.index("ViT-T-128, step")
    assert page.index("ViT-T-128, step") < page.index("bench 2026-02-01")
    assert list(report.pictured(found)) == ["ViT-T-128", "ViT-T-224"]


def test_picture_has_the_first_two_cases_of_mae() -> None:
    rates = {"transformers, eager, fp32": 20.0, "ours, bf16": 40.0}
    expected = {"ViT-T-128": rates, "ViT-T-224": rates}
    assert report.pictured([step_document()]) == expected
    assert report.pictured([ops()]) == {}


def test_ops_of_the_page_are_those_of_one_shape(tmp_path: Path) -> None:
    found = ops()
    other = [{**one, "shape": "ViT-S, 8 images"} for one in found["rows"]]
    text = "\n".join(report.section([{**found, "rows": [*found["rows"], *other]}]))
    assert "5 of the 10 rows" in text and "ViT-S" not in text


def test_committed_page_agrees_with_the_committed_results() -> None:
    found, _ = report.find(results.FOLDER)
    committed = (report.ROOT / report.PAGE).read_text(encoding="utf-8")
    assert committed == report.page(found), "run `sssd-fast bench report`"
    for one in filter(report.pictured, report.by_device(found, "step")):
        assert (report.ROOT / report.FOLDER / report.picture_name(one)).is_file()


# ---- compare ----


def pair(before: float, after: float | None, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    reason = None if after is not None else "fails now"
    made = row("op", "ours", after, reason=reason)
    return document("ops", [row("op", "ours", before)], **more), document("ops", [made], **more)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (1000, 1100, WORSE),
        (1000, 900, BETTER),
        (1000, 1040, ""),
        (40, 44, ""),  # 10 %, but less than the margin of 5 us
        (40, 46, WORSE),
        (1000, None, FAILS),
    ],
)
def test_regression_needs_the_ratio_and_the_margin(
    before: float, after: float | None, verdict: str
) -> None:
    a, b = pair(before, after)
    (line,) = compare(a, b, 0.05)
    assert line.verdict == verdict
    if after is None:
        assert compare(b, a, 0.05)[0].verdict == RUNS
    if after == 44:  # the margin of a GPU is 2 us
        assert compare(*pair(40, 44, device="cuda"), 0.05)[0].verdict == WORSE


def test_memory_and_loaders_are_compared_by_their_own_cost() -> None:
    def memory(peak: int) -> dict[str, Any]:
        rows = [row("SSSD", "ours", None, phase="memory", peak_bytes=peak)]
        return document("memory", [*rows, row("MAE", "ours", None, peak_bytes=10**8)])

    def loader(rate: float) -> dict[str, Any]:
        more = {"images_per_s": rate, "p20": 0.9 * rate, "p80": 1.1 * rate}
        return document("loader", [row("ct", "dali", None, more=more)])

    found = compare(memory(10**8), memory(2 * 10**8), 0.05)
    assert [(line.ratio, line.verdict) for line in found] == [(2.0, WORSE), (1.0, "")]
    assert compare(memory(10**6), memory(2 * 10**6), 0.05)[0].verdict == ""  # below 1 MiB
    assert compare(loader(100.0), loader(80.0), 0.05)[0].ratio == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "step"}, "kind is ops in A and step in B"),
        ({"quick": True}, "quick is False in A"),
        ({"device": {"type": "cpu", "name": "other"}}, "device is Made-up"),
        ({"rows": [row("another", "ours", 1.0)]}, "no row in common"),
        ({"rows": [row("op", "ours", 1.0, sizes={"batch": 9})]}, "size of"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], message: str) -> None:
    a, b = pair(100, 100)
    with pytest.raises(SssdError, match=message):
        compare(a, {**b, **change}, 0.05)


def test_compare_command_prints_a_table_and_returns_1_for_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, found in zip(("a.json", "b.json"), pair(1000, 1200), strict=True):
        save(tmp_path, name, found)
    args = argparse.Namespace(a=tmp_path / "a.json", b=tmp_path / "b.json")
    args.fail_over = "5%"
    assert comparing.main(args) == 1
    assert "1 of 1 rows regressed" in capsys.readouterr().out
    args.fail_over = "30%"
    assert comparing.main(args) == 0


@pytest.mark.parametrize("text", ["5", "five", "-5%", "", "nan", "5%%"])
def test_ratio_refuses_nonsense(text: str) -> None:
    assert (ratio_of("5%"), ratio_of("0.05"), ratio_of("150 %")) == (0.05, 0.05, 1.5)
    with pytest.raises(SssdError, match="fail-over"):
        ratio_of(text)
