"""The commands as a user types them: what they print, write and return, also for mistakes."""

from __future__ import annotations

import ast
import csv
import errno
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sssd_fast
from sssd_fast import config
from sssd_fast.cli import app, main
from sssd_fast.errors import ConfigError, EndedByMain, Interrupted, NumericsError
from sssd_fast.evaluation.metrics import best_threshold
from sssd_fast.run import environment

Captured = pytest.CaptureFixture[str]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((run / "eval/test/metrics.json").read_text())
    return found


def test_predict_gives_the_scores_of_evaluate(
    trained: Path, slices: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "scores.csv"
    # the run was trained and evaluated in fp32
    command = ["predict", str(trained), str(slices), "--out", str(out), "--precision", "fp32"]
    assert main(command) == 0
    mine = {str(Path(r["path"]).relative_to(slices)): r for r in rows(out)}
    theirs = rows(trained / "finetune" / "eval/test/predictions.csv")
    assert len(mine) == 48
    assert len(theirs) == 8
    for row in theirs:
        score = float(mine[row["path"]]["score_synthetic_covid"])
        assert score == pytest.approx(float(row["score"]), abs=1e-6)
    assert "synthetic_covid 0." in capsys.readouterr().out
    before = out.read_bytes()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_predict_names_unreadable_files_and_scores_the_rest(
    trained: Path, slices: Path, tmp_path: Path, capsys: Captured
) -> None:
    good = next((slices / "synthetic_covid").glob("*.png"))
    folder = tmp_path / "mixed (1) 100%"
    folder.mkdir()
    (folder / "good.png").write_bytes(good.read_bytes())
    (folder / "torn.png").write_bytes(good.read_bytes()[:100])
    out = tmp_path / "scores.csv"
    assert main(["predict", str(trained / "finetune"), str(folder), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert "torn.png" in captured.err
    assert "good.png: synthetic_" in captured.out
    assert [row["prediction"] != "" for row in rows(out)] == [True, False]


def test_evaluate_accepts_split_and_settings_in_any_order(
    trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "finetune", run)
    assert main(["evaluate", "evaluate.threshold=0.25", str(run), "--split", "train"]) == 0
    assert "36 train images" in capsys.readouterr().out
    assert metrics(run) == metrics(trained / "finetune")  # of the test images
    assert (
        "evaluate.threshold" not in (run / "config.yaml").read_text()
    )  # the run keeps its settings


def test_automatic_threshold_is_chosen_on_the_validation_images(
    trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "finetune", run)
    assert main(["evaluate", str(run), "--split", "val"]) == 0
    val = rows(run / "eval/val/predictions.csv")
    positive = json.loads((run / "eval/val/metrics.json").read_text())["positive_class"]
    truth = [row["label"] == positive for row in val]
    scores = [float(row["score"]) for row in val]
    assert main(["evaluate", str(run), "evaluate.threshold=auto"]) == 0
    found = json.loads((run / "eval/test/metrics.json").read_text())
    assert found["threshold"] == pytest.approx(best_threshold(truth, scores))
    assert f"of the {len(val)} validation images" in capsys.readouterr().out
    test = rows(run / "eval/test/predictions.csv")
    for row in test:
        assert (row["prediction"] == positive) == (float(row["score"]) >= found["threshold"])


def test_automatic_threshold_without_validation_images_is_refused_before_training(
    slices: Path, tiny: list[str], tmp_path: Path, capsys: Captured
) -> None:
    none = ["data.val_fraction=0", "evaluate.threshold=auto"]
    assert main(["run", *tiny, *none, "--out", str(tmp_path / "run")]) == 2
    assert "set data.val_fraction=0.1 or a number" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_predict_rejects_a_pretraining_run(trained: Path, capsys: Captured) -> None:
    assert main(["predict", str(trained / "pretrain"), "x.png"]) == 2
    assert main(["predict", str(trained / "pretrain"), str(trained)]) == 2
    assert "sssd-fast finetune --init" in capsys.readouterr().err


def test_finetune_uses_the_model_of_the_run_in_init(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    init = str(trained / "pretrain")
    assert main(["finetune", "--init", init, "finetune.max_steps=1", "--out", str(out)]) == 0
    assert "width: 32" in (out / "config.yaml").read_text()
    command = (out / "command.txt").read_text()
    assert command == f"sssd-fast finetune --init {init} finetune.max_steps=1 --out {out}\n"


def test_run_over_folds_reports_mean_and_deviation(
    tiny: list[str], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "folds"
    short = ["finetune.max_steps=2", "data.folds=2", "finetune.base_lr=0.05"]
    assert main(["run", "--folds", "--from-scratch", "--out", str(out), *tiny, *short]) == 0
    assert not (out / "fold-0" / "pretrain").exists()
    summary = json.loads((out / "summary.json").read_text())
    folds = [out / f"fold-{k}" / "finetune" for k in (0, 1)]
    values = [metrics(fold)["image"]["auc"] for fold in folds]
    assert summary["image"]["auc"]["mean"] == pytest.approx(np.mean(values))
    assert summary["image"]["auc"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    tested = [{r["path"] for r in rows(f / "split.csv") if r["split"] == "test"} for f in folds]
    assert not tested[0] & tested[1]
    assert len(tested[0] | tested[1]) == 48
    assert "over 2 runs, per image" in capsys.readouterr().out
    # complete: nothing is trained again
    assert main(["run", "--folds", "--from-scratch", "--resume", str(out)]) == 0
    assert "resuming from step-0000002.pt" in capsys.readouterr().out


def test_data_check_and_split(slices: Path, tmp_path: Path, capsys: Captured) -> None:
    index, out = tmp_path / "index.json", tmp_path / "split.csv"
    assert main(["data", "check", str(slices), "--out", str(index)]) == 0
    assert "48 images in 2 classes" in capsys.readouterr().out
    split = ["data", "split", str(index), "--out", str(out)]
    assert main([*split, "data.split=block", "data.val_fraction=0"]) == 0
    covid = [r for r in rows(out) if r["label"] == "synthetic_covid"]
    tested = sorted(r["path"] for r in covid if r["split"] == "test")
    assert tested == sorted(r["path"] for r in covid)[-4:]  # the last 20 % of 24
    assert main([*split, "data.split=kfold", "data.folds=3"]) == 0
    assert all((tmp_path / f"split.fold{k}.csv").exists() for k in range(3))
    assert main([*split, "data.test_fraction=1.5"]) == 2
    assert "data.test_fraction: got 1.5, needs to be less than 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pretrain --out OUT/a data.source=/no/such/folder", "no such file or folder"),
        ("pretrain pretrain.epoch=1", "did you mean 'pretrain.epochs'"),
        ("pretrain --config cpu_smok", "did you mean 'cpu_smoke'"),
        ("pretrain --resume OUT", "config.yaml is missing"),
        ("pretrain device=cuda:99 --out OUT/b", "cuda:99"),
        ("run --seeds 0 1 --folds", "exclude each other"),
        ("evaluate OUT", "config.yaml is missing"),
        ("predict OUT x.png", "x.png does not exist"),
        ("report OUT/none", "none"),
        ("data check OUT", ""),
        ("reproduce mnist", "needs a name (covid-ct, sars-cov-2-ct)"),
        ("reproduce covid-ct --data OUT --methods sssd mea", "methods is sssd, mea, needs some of"),
        ("reproduce covid-ct --data OUT seed=3", "seed=3: reproduce sets this itself"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(
    tmp_path: Path, capsys: Captured, command: str, message: str
) -> None:
    assert main(command.replace("OUT", str(tmp_path)).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "Usage: sssd-fast [OPTIONS] COMMAND"),
        ("benchmark", "No such command 'benchmark'"),
        ("data", "Usage: sssd-fast data"),
        ("probe", "Missing option '--init'"),
        ("pretrain --epochs 3", "No such option: --epochs"),
        ("finetune --split tset", "'tset' is not one of"),
        ("run --seeds 0 one", "unable to parse string as an integer"),
        ("export x --format onnx", "Missing option '--out'"),
    ],
)
def test_wrong_arguments_print_the_usage_and_exit_code_2(
    capsys: Captured, command: str, message: str
) -> None:
    assert main(command.split()) == 2
    assert message in "".join(capsys.readouterr())


def test_options_with_several_values_end_at_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from sssd_fast import api

    calls: list[dict[str, object]] = []
    monkeypatch.setattr(api, "reproduce", lambda **given: calls.append(given))
    line = "reproduce seed=1 covid-ct --seeds 0 1 threads=2 --methods sssd mae --data d"
    assert main(line.split()) == 0
    assert calls[0] == {
        "dataset": "covid-ct",
        "settings": ["seed=1", "threads=2"],
        "seeds": [0, 1],
        "methods": ["sssd", "mae"],
        "data": "d",
        "dry_run": False,
        "command": f"sssd-fast {line}",
    }


def test_configs_lists_prints_and_exports_a_schema(capsys: Captured) -> None:
    assert main(["configs"]) == 0
    purpose = "Pre-train and fine-tune ViT-S/16 at 224 pixels on a GPU with 8 GB."
    assert re.search(rf"^8gb +{re.escape(purpose)}$", capsys.readouterr().out, re.MULTILINE)
    assert main(["configs", "model.name=tiny", "8gb"]) == 0
    printed = capsys.readouterr().out
    assert "  # Side of a patch in pixels.\n  patch_size: 16\n" in printed
    assert "  name: tiny\n" in printed
    assert main(["configs", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["ModelConfig"]["properties"]["mask_ratio"]["exclusiveMaximum"] == 1.0


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        (None, 0, ""),
        (ConfigError("a bad setting"), 2, "error: a bad setting\n"),
        (NumericsError("the loss is not finite"), 3, "error: the loss is not finite\n"),
        (Interrupted("saved", signal.SIGTERM), 143, "error: saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        # printed by the main process of several
        (EndedByMain(2), 2, ""),
        (OSError(errno.EROFS, "Read-only", "/"), 2, "error: /: Read-only ("),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device: "),
        (torch.OutOfMemoryError("CUDA out of memory\nmuch more"), 2, "error: out of memory (CUDA"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_main_maps_exceptions_to_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    end: BaseException | None,
    status: int,
    message: str,
) -> None:
    def collect(probe: bool) -> dict[str, str]:
        if end is not None:
            raise end
        return {}

    monkeypatch.setattr(environment, "collect_environment", collect)
    assert main(["doctor", "--json"]) == status
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert message or not error
    assert "Traceback" not in error
    assert "much more" not in error


@pytest.mark.parametrize("kind", [ZeroDivisionError, FileNotFoundError])
def test_unexpected_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def collect(probe: bool) -> None:
        raise kind("a mistake in the program")

    monkeypatch.setattr(environment, "collect_environment", collect)
    with pytest.raises(kind, match="a mistake in the program"):
        main(["doctor", "--json"])


@pytest.mark.parametrize(
    "command",
    ["pretrain", "run", "run --dry-run", "finetune data.source=synthetic", "data split SLICES"],
)
def test_place_that_cannot_be_written_is_one_line(
    command: str, slices: Path, tiny: list[str], tmp_path: Path, capsys: Captured
) -> None:
    """A folder below a file stands for a read-only one, which does not stop root."""
    (tmp_path / "file").touch()
    words = [str(slices) if word == "SLICES" else word for word in command.split()]
    assert main([*words, *tiny, "--out", str(tmp_path / "file" / "new")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(tmp_path / "file") in error
    assert "GiB free" in error


# ---- advice in messages ----


def strings() -> Iterator[tuple[str, str]]:
    """(file, text) of every string of the package but docstrings; values become a word."""
    package = Path(sssd_fast.__file__).parent
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        skipped = {id(n.body[0]) for n in ast.walk(tree) if isinstance(n, documented) and n.body}
        inside = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and id(node) in skipped:
                inside.add(id(node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "X" for v in node.values)
                yield path.name, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and id(node) not in inside:
                yield path.name, str(node.value)


def options(command: Any) -> set[str]:
    """The options of a command and of the commands below it."""
    own = {name for p in command.params for name in p.opts}
    return own.union(*(options(c) for c in getattr(command, "commands", {}).values()))


def test_every_command_option_and_setting_in_a_message_exists() -> None:
    """Advice that cannot be followed as printed is worse than none."""
    import typer

    root: Any = typer.main.get_command(app)
    known = options(root) | {"--help", "--raw"}  # --raw: of gdcmconv
    settings = {*config._keys(), *config.Config.model_fields, *config.REMOVED}
    settings |= {key.rpartition(".")[0] for key in settings}
    sections = "|".join(config.Config.model_fields)
    wrong, commands = [], 0
    for place, text in strings():
        for line in re.findall(r"sssd-fast ([a-z][^`;:\n]*)", text):
            command, words = root, line.split()
            while words and getattr(command, "commands", {}) and words[0].isalpha():
                command = command.commands.get(words.pop(0))
                if command is None:
                    wrong.append(f"{place}: sssd-fast {line}")
                    break
            commands += 1
            unknown = {w.rstrip(".,)") for w in words if w.startswith("--")} - {"--help"}
            if command is not None and not unknown <= options(command):
                wrong.append(f"{place}: sssd-fast {line}")
        if place != "environment.py":  # has the options of git
            named = re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)
            wrong += [f"{place}: {name}" for name in named if name not in known]
        for key in re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*\b(?!\()", text):
            if key not in settings and not key.endswith((".json", ".png", ".safetensors")):
                wrong.append(f"{place}: {key}")
    assert wrong == []
    assert commands >= 12


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    from sssd_fast.__main__ import main as command

    monkeypatch.delitem(sys.modules, "sssd_fast.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    assert command() == 2
    assert "the package typer is missing; install" in capsys.readouterr().err


def test_every_option_has_a_help_text() -> None:
    import typer

    def parameters(command: object, name: str) -> list[str]:
        commands = getattr(command, "commands", {})
        missing = [f"{name} {p.name}" for p in getattr(command, "params", ()) if not p.help]
        return missing + [m for k, sub in commands.items() for m in parameters(sub, f"{name} {k}")]

    assert parameters(typer.main.get_command(app), "sssd-fast") == []


@pytest.mark.parametrize("line", ["--help", "pretrain --help", "pretrain pretrain.epoch=3"])
def test_help_and_typos_need_no_slow_imports(line: str) -> None:
    code = (
        "import sys; from sssd_fast.cli import main; main(sys.argv[1:]); "
        "sys.exit([name for name in ('torch', 'numpy') if name in sys.modules] or 0)"
    )
    command = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_data_cache_is_listed_and_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = [tmp_path / "sssd_fast" / name for name in ("pixels/a", "pixels/b", "inductor/x/c")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2**20))
    other = tmp_path / "other"
    other.touch()
    assert main(["data", "cache"]) == 0
    text = capsys.readouterr().out
    assert "2.0 MiB in 2 files: pixels (decoded images" in text
    assert "3.0 MiB in all" in text
    assert all(path.is_file() for path in files)
    assert main(["data", "cache", "--empty"]) == 0
    assert not any(path.is_file() for path in files)
    assert other.is_file()
