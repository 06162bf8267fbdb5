"""README, docs and pictures from result files, and that those of this repository are up to date."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import plots, report, results
from sssd_fast.errors import SssdError
from tests.benchmarks.documents import CPU, GPU, kernels, loader, memory, save, step


def readme(body: str = "old") -> str:
    return "# Title\n\nbefore\n" + "".join(
        f"\n<!-- bench:{name} -->\n{body}\n<!-- /bench:{name} -->\n" for name in report.NAMES
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(readme() + "\nafter <!-- a comment -->\n", encoding="utf-8")
    save(kernels(GPU), tmp_path / "results" / "kernels-gpu.json")
    save(step(), tmp_path / "results" / "step-gpu.json")
    save(memory(), tmp_path / "results" / "memory-gpu.json")
    save(loader(), tmp_path / "results" / "loader-cpu.json")
    return tmp_path


def run(root: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.main(parser.parse_args(["--results", str(root / "results"), *words]), root)


def test_only_what_stands_between_markers_changes_and_only_once() -> None:
    sections = {"a": "new A", "b": "new B"}
    text = "x\n<!-- bench:b -->\n<!-- /bench:b -->\ny <!-- z -->\n<!-- bench:a -->\nold\nold\n<!-- /bench:a -->\nend"
    first = report.replace(text, sections)
    assert first == (
        "x\n<!-- bench:b -->\nnew B\n<!-- /bench:b -->\ny <!-- z -->\n<!-- bench:a -->\nnew A\n<!-- /bench:a -->\nend"
    )
    assert report.replace(first, sections) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:a -->\n<!-- /bench:a -->", "marker <!-- bench:b --> is missing"),
        ("<!-- bench:a -->\n<!-- /bench:a -->\n<!-- bench:b -->", "marker <!-- bench:b --> is not closed"),
        ("<!-- bench:a -->\n<!-- bench:b -->\n<!-- /bench:b -->\n<!-- /bench:a -->", "<!-- bench:b --> stands where <!-- /bench:a -->"),
        ("<!-- /bench:a -->\n<!-- bench:a -->", "marker <!-- /bench:a --> stands where an opening marker"),
        ("<!-- bench:a -->\n<!-- /bench:a -->\n" * 2 + "<!-- bench:b -->\n<!-- /bench:b -->", "there more than once"),
        ("<!-- bench:c -->\n<!-- /bench:c -->", "names no section"),
    ],
)  # fmt: skip
def test_markers_that_are_missing_or_unbalanced_are_named(text: str, message: str) -> None:
    with pytest.raises(SssdError) as error:
        report.replace(text, {"a": "", "b": ""})
    assert message in str(error.value)


def test_check_writes_nothing_and_names_what_differs(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / "README.md").read_text(encoding="utf-8")
    assert run(root, "--check") == 1
    told = capsys.readouterr().err
    for name in (
        "README.md",
        "docs/benchmarks.md",
        "docs/results.md",
        "docs/benchmarks/kernels-made-up-gpu-80gb.md",
    ):
        assert f"{name} is not what the files in results give" in told
    assert (root / "README.md").read_text(encoding="utf-8") == before
    assert not (root / "docs").exists()
    assert run(root) == 0
    assert run(root, "--check") == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nbefore\n")
    assert text.endswith("\nafter <!-- a comment -->\n")
    assert "old" not in text
    (root / "docs" / "benchmarks.md").write_text("edited by hand", encoding="utf-8")
    assert run(root, "--check") == 1
    told = capsys.readouterr().err
    assert "docs/benchmarks.md" in told
    assert "README.md is not" not in told


def test_the_page_names_pictures_and_pages_that_exist_and_are_small(root: Path) -> None:
    assert run(root) == 0
    page = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    pictures = sorted((root / "docs" / "benchmarks").glob("*.png"))
    names = [path.name.removesuffix("-made-up-gpu-80gb.png") for path in pictures]
    assert names == ["memory", "roofline-kernels", "time-kernels", "waterfall-mae"]
    for path in (*pictures, root / "docs" / "benchmarks" / "kernels-made-up-gpu-80gb.md"):
        assert f"(benchmarks/{path.name})" in page
        assert path.stat().st_size < 150_000
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    first = [path.read_bytes() for path in pictures]
    plots.write(report.find(root / "results").documents, root / "docs" / "benchmarks")
    assert [path.read_bytes() for path in pictures] == first


def test_the_newest_of_each_kind_and_device_counts_and_quick_runs_never_do(root: Path) -> None:
    folder = root / "results"
    save(kernels(GPU, started="2026-04-01T00:00:00+00:00", finished=False), folder / "a.json")
    save(kernels(GPU, started="2026-02-01T00:00:00+00:00"), folder / "z.json")
    save(kernels(CPU), folder / "cpu.json")
    save(kernels(GPU, started="2026-05-01T00:00:00+00:00", quick=True), folder / "quick.json")
    (folder / "old.json").write_text(
        '{"schema": "sssd_fast.benchmarks.loader/1"}', encoding="utf-8"
    )
    found = report.find(folder)
    assert [one["file"] for one in found.documents] == [
        "a.json",
        "step-gpu.json",
        "memory-gpu.json",
        "cpu.json",
        "loader-cpu.json",
    ]
    for name, why in (
        ("old.json", "its schema is sssd_fast.benchmarks.loader/1"),
        ("quick.json", "quick"),
        ("a.json", "unfinished"),
    ):
        assert sum(name in line and why in line for line in found.warnings) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_that_is_no_result_is_an_error_that_names_it(root: Path, text: str) -> None:
    (root / "results" / "broken.json").write_text(text, encoding="utf-8")
    with pytest.raises(SssdError, match=r"broken\.json"):
        run(root, "--check")


def test_readme_and_docs_agree_with_the_committed_results(tmp_path: Path) -> None:
    """`sssd-fast bench report` writes them; a change to the sources of a measured op needs it again, too.

    What was measured here and is not committed yet does not count; outside of a git checkout all files do.
    """
    files = [
        str(path.relative_to(results.FOLDER))
        for path in results.FOLDER.rglob("*.json")
        if "quick" not in path.parts
    ]
    listed = subprocess.run(
        ["git", "ls-files", "*.json"], cwd=results.FOLDER, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        files = listed.stdout.split()
    assert files
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(results.FOLDER / name, tmp_path / name)
    assert report.differing(report.ROOT, tmp_path) == []
