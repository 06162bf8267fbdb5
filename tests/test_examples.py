"""Each example runs on the CPU with small sizes and does what its text promises."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
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


def run(*words: str, where: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=where,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    examples = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(examples) == 5
    assert [name for name in examples if f'"{name}"' not in tested] == []


def test_train_your_ct_writes_three_runs_and_reports(tmp_path: Path) -> None:
    script = str(EXAMPLES / "train_your_ct.py")
    printed = run(script, "--out", "ct", "--set", *SETTINGS, where=tmp_path)
    metrics = json.loads((tmp_path / "ct" / "finetune" / "eval/test/metrics.json").read_text())
    shown = numbers(r"test: accuracy [\d.]+, AUC ([\d.]+)", printed)
    assert shown == pytest.approx([metrics["image"]["auc"]], abs=5e-4)
    assert "maps (32, 32) pixels to 32 features" in printed
    assert all(
        (tmp_path / "ct" / stage / "report.html").is_file() for stage in ("pretrain", "probe")
    )


def test_use_ops_in_your_mae_keeps_the_loss(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "use_ops_in_your_mae.py"), where=tmp_path)
    before, after = numbers(r"loss_\w+ +([\d.]+)", printed)
    assert after == pytest.approx(before, rel=1e-5)


def test_patch_facebook_mae_keeps_the_loss(tmp_path: Path) -> None:
    script = str(EXAMPLES / "patch_facebook_mae.py")
    sizes = ["--size", "32", "--width", "64", "--depth", "1", "--batch", "2", "--repeats", "1"]
    printed = run(script, *sizes, where=tmp_path)
    (before,), (after,) = (
        numbers(r"loss before: ([\d.]+)", printed),
        numbers(r"after: ([\d.]+)", printed),
    )
    assert after == pytest.approx(before, rel=1e-5)
    assert "0 left to the host" in printed


def test_custom_loss_is_logged_and_part_of_the_total(tmp_path: Path) -> None:
    script = str(EXAMPLES / "custom_loss.py")
    run(script, "--out", "run", "--set", *SETTINGS, "precision=fp32", where=tmp_path)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert {row["kind"] for row in rows} >= {"train", "val"}
    for row in rows:
        term = {
            name: float(row[f"loss_{name}"])
            for name in ("reconstruction", "distillation", "variance")
        }
        total = 0.8 * term["reconstruction"] + 0.2 * term["distillation"] + 0.1 * term["variance"]
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
        assert term["variance"] > 0


def test_quickstart_cells_run_in_order(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    (tmp_path / "cells.py").write_text(code, encoding="utf-8")
    printed = run("cells.py", where=tmp_path, QUICKSTART_SETTINGS=json.dumps(SMALL))
    assert (tmp_path / "runs" / "quick" / "finetune" / "report.html").is_file()
    assert len(numbers(r"(?:eager|fused): ([\d.]+) ms", printed)) == 2
