"""Each example runs on the CPU with small sizes and does what its text promises."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = {
    "data.synthetic_images": 48,
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.decoder_width": 16,
    "model.decoder_depth": 1,
    "objective.prototypes": 24,
    "pretrain.max_steps": 2,
    "pretrain.image_epochs": 0,
    "finetune.max_steps": 2,
    "evaluate.bootstrap": 100,
    "tensorboard": False,
    "device": "cpu",
}
SETTINGS = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a file with command-line words as a program in `tmp_path`; returns what it printed."""

    def call(file: Path, *words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(file), *words])
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out

    return call


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    examples = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(examples) == 5
    assert [name for name in examples if f'"{name}"' not in tested] == []


def test_train_your_ct_writes_three_runs_and_reports(run: Run, tmp_path: Path) -> None:
    printed = run(EXAMPLES / "train_your_ct.py", "--out", "ct", "--set", *SETTINGS)
    metrics = json.loads((tmp_path / "ct" / "finetune" / "eval/test/metrics.json").read_text())
    shown = numbers(r"test: accuracy [\d.]+, AUC ([\d.]+)", printed)
    assert shown == pytest.approx([metrics["image"]["auc"]], abs=5e-4)
    assert "maps (32, 32) pixels to 32 features" in printed
    for stage in ("pretrain", "probe"):
        assert (tmp_path / "ct" / stage / "report.html").is_file()


def test_use_ops_in_your_mae_keeps_the_loss(run: Run) -> None:
    before, after = numbers(r"loss_\w+ +([\d.]+)", run(EXAMPLES / "use_ops_in_your_mae.py"))
    assert after == pytest.approx(before, rel=1e-5)


def test_patch_facebook_mae_keeps_the_loss(run: Run) -> None:
    sizes = ["--size", "32", "--width", "64", "--depth", "1", "--batch", "2", "--repeats", "1"]
    printed = run(EXAMPLES / "patch_facebook_mae.py", *sizes)
    (before,) = numbers(r"loss before: ([\d.]+)", printed)
    (after,) = numbers(r"after: ([\d.]+)", printed)
    assert after == pytest.approx(before, rel=1e-5)
    assert "0 left to the host" in printed


def test_custom_loss_is_logged_and_part_of_the_total(run: Run, tmp_path: Path) -> None:
    run(EXAMPLES / "custom_loss.py", "--out", "run", "--set", *SETTINGS, "precision=fp32")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert {row["kind"] for row in rows} >= {"train", "val"}
    weights = {"reconstruction": 0.8, "distillation": 0.2, "variance": 0.1}
    for row in rows:
        total = sum(weight * row[f"loss_{name}"] for name, weight in weights.items())
        assert row["loss"] == pytest.approx(total, rel=1e-4)
        assert row["loss_variance"] > 0


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_quickstart_cells_run_in_order(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    file = tmp_path / "cells.py"
    file.write_text("\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    monkeypatch.setenv("QUICKSTART_SETTINGS", json.dumps(SMALL))
    printed = run(file)
    assert (tmp_path / "runs" / "quick" / "finetune" / "report.html").is_file()
    assert len(numbers(r"(?:eager|fused): ([\d.]+) ms", printed)) == 2
