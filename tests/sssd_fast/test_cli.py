"""The commands as a user types them: what they print, write, and return when something is wrong."""

from __future__ import annotations

import argparse
import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from sssd_fast import commands
from sssd_fast.cli import main
from sssd_fast.errors import ConfigError, Interrupted, NumericsError
from sssd_fast.evaluation.predict import load_trained, predict_files


@pytest.fixture(scope="module")
def trained(slices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short pre-training and fine-tuning run."""
    from tests.sssd_fast.conftest import TINY

    out = tmp_path_factory.mktemp("trained")
    settings = [*TINY, f"data.source={slices}", "pretrain.max_steps=2", "finetune.max_steps=4"]
    assert main(["pretrain", "--out", str(out / "pretrain"), *settings]) == 0
    assert (
        main(
            ["finetune", "--init", str(out / "pretrain"), "--out", str(out / "finetune"), *settings]
        )
        == 0
    )
    return out


def test_predict_scores_files_as_evaluate_did(trained: Path, slices: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    assert main(["predict", str(trained / "finetune"), str(slices), "--out", str(out)]) == 0
    with open(out, newline="") as file:
        mine = {
            str(Path(r["path"]).relative_to(slices)): float(r["score_synthetic_covid"])
            for r in csv.DictReader(file)
        }
    with open(trained / "finetune" / "eval" / "predictions.csv", newline="") as file:
        theirs = {r["path"]: float(r["score"]) for r in csv.DictReader(file)}
    assert len(mine) == 48
    assert len(theirs) == 8
    for path, score in theirs.items():
        assert mine[path] == pytest.approx(score, abs=1e-6)


def test_predict_names_unreadable_files_and_scores_the_rest(
    trained: Path, slices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next((slices / "synthetic_covid").glob("*.png"))
    folder = tmp_path / "mixed (1) 100%"
    folder.mkdir()
    (folder / "good.png").write_bytes(good.read_bytes())
    (folder / "torn.png").write_bytes(good.read_bytes()[:100])
    out = tmp_path / "scores.csv"
    assert main(["predict", str(trained / "finetune"), str(folder), "--out", str(out)]) == 2
    assert "torn.png" in capsys.readouterr().err
    rows = list(csv.DictReader(out.open(newline="")))
    assert [row["prediction"] != "" for row in rows] == [True, False]


def test_evaluate_another_part(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained / "finetune"), "--part", "train"]) == 0
    assert "36 train images" in capsys.readouterr().out
    result = json.loads((trained / "finetune" / "eval" / "metrics.json").read_text())
    assert result["split"] == "train"
    assert result["positive_class"] == "synthetic_covid"
    assert (
        main(["evaluate", str(trained / "finetune")]) == 0
    )  # the test part again, for the other tests


def test_a_pretraining_run_is_no_classifier(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(trained / "pretrain"), "x.png"]) == 2
    assert "sssd-fast finetune --init" in capsys.readouterr().err


def test_finetune_takes_the_model_of_the_run_it_starts_from(
    trained: Path, slices: Path, tmp_path: Path
) -> None:
    """No --config: a new user does not have to repeat the model's settings."""
    out = tmp_path / "again"
    assert (
        main(
            [
                "finetune",
                "--init",
                str(trained / "pretrain"),
                "--out",
                str(out),
                "finetune.max_steps=1",
            ]
        )
        == 0
    )
    assert (
        load_trained(
            out, next(load_trained(out, _cpu()).model.parameters()).device
        ).config.model.width
        == 32
    )


def _cpu() -> torch.device:
    return torch.device("cpu")


def test_probe_is_logistic_regression_on_frozen_features(
    trained: Path, slices: Path, tmp_path: Path
) -> None:
    """The folded head gives scikit-learn's own probabilities, and the encoder is the pre-trained one."""
    from sssd_fast.data.index import DataIndex
    from sssd_fast.data.splits import split_csv
    from sssd_fast.run.checkpoint import find_checkpoint, load_checkpoint

    out = tmp_path / "probe"
    assert (
        main(
            [
                "probe",
                "--init",
                str(trained / "pretrain"),
                "--out",
                str(out),
                "probe.inverse_penalties=[0.1]",
            ]
        )
        == 0
    )
    probe = load_trained(out, torch.device("cpu"))
    before = load_checkpoint(find_checkpoint(trained / "pretrain", "last"))["model"]
    for name, value in probe.model.state_dict().items():
        if name.startswith("encoder.blocks."):
            assert torch.equal(value, before[f"mae.{name}"])
    index = DataIndex.load(out / "index.json")
    split = split_csv(index, out / "split.csv")

    def features(ids: list[int]) -> np.ndarray:
        images = np.stack([np.asarray(Image.open(index.file(i))) for i in ids])[:, None]
        with torch.no_grad():
            return probe.model.features(torch.from_numpy(images)).double().numpy()

    train, test = features(split.train), features(split.test)
    mean, std = train.mean(0), train.std(0) + 1e-6
    labels = [index.records[i].label for i in split.train]
    fitted = LogisticRegression(C=0.1, max_iter=5000).fit((train - mean) / std, labels)
    want = fitted.predict_proba((test - mean) / std)
    got, bad = predict_files(
        probe, [index.file(i) for i in split.test], batch_size=4, precision="fp32"
    )
    assert not bad
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_run_over_folds_reports_mean_and_deviation(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folds"
    short = [
        "pretrain.max_steps=1",
        "finetune.max_steps=2",
        "data.folds=2",
        "finetune.base_lr=0.05",
    ]
    assert main(["run", "--folds", "--out", str(out), *tiny, *short]) == 0
    summary = json.loads((out / "summary.json").read_text())
    values = [
        json.loads((out / f"fold-{k}" / "finetune" / "eval" / "metrics.json").read_text())["image"][
            "auc"
        ]
        for k in (0, 1)
    ]
    assert summary["image"]["auc"]["mean"] == pytest.approx(np.mean(values))
    assert summary["image"]["auc"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    tested = [
        {
            r["path"]
            for r in csv.DictReader((out / f"fold-{k}" / "finetune" / "split.csv").open())
            if r["split"] == "test"
        }
        for k in (0, 1)
    ]
    assert not tested[0] & tested[1]
    assert len(tested[0] | tested[1]) == 48
    assert "over 2 runs, per image" in capsys.readouterr().out
    assert main(["run", "--folds", "--resume", str(out)]) == 0  # complete: nothing is trained again
    assert "resuming from step-0000002.pt" in capsys.readouterr().out


def test_run_without_pretraining_is_the_supervised_control(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "scratch"
    assert main(["run", "--from-scratch", "--out", str(out), *tiny, "finetune.max_steps=1"]) == 0
    assert not (out / "pretrain").exists()
    assert (out / "report.html").exists()


def test_data_check_and_split(
    slices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, splits = tmp_path / "index.json", tmp_path / "split.csv"
    assert main(["data", "check", str(slices), "--out", str(index)]) == 0
    assert "48 images in 2 classes" in capsys.readouterr().out
    assert (
        main(
            ["data", "split", str(index), "--protocol", "block", "--val", "0", "--out", str(splits)]
        )
        == 0
    )
    rows = list(csv.DictReader(splits.open()))
    tested = sorted(
        r["path"] for r in rows if r["split"] == "test" and r["label"] == "synthetic_covid"
    )
    every = sorted(r["path"] for r in rows if r["label"] == "synthetic_covid")
    assert tested == every[-4:]  # the last 20 % of 24
    assert (
        main(
            [
                "data",
                "split",
                str(index),
                "--protocol",
                "kfold",
                "--folds",
                "3",
                "--out",
                str(splits),
            ]
        )
        == 0
    )
    assert all((tmp_path / f"split.fold{k}.csv").exists() for k in range(3))


def test_errors_are_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, message in (
        (
            ["pretrain", "--out", str(tmp_path / "a"), "data.source=/no/such/folder"],
            "no such file or folder",
        ),
        (["pretrain", "pretrain.epoch=1"], "did you mean 'epochs'"),
        (["pretrain", "--config", "cpu_smok"], "did you mean 'cpu_smoke'"),
        (["evaluate", str(tmp_path)], "no run folder"),
        (["predict", str(tmp_path), "x.png"], "neither a checkpoint file nor a run folder"),
        (["report", str(tmp_path / "none")], "none"),
        (["pretrain", "device=cuda:99", "--out", str(tmp_path / "b")], "cuda:99"),
        (["data", "check", str(tmp_path)], ""),
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert error.startswith("error: "), (command, error)
        assert message in error, (command, error)
        assert "Traceback" not in error, (command, error)


def test_configs_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    assert "paper_covid_ct" in capsys.readouterr().out.split()
    assert main(["configs", "8gb", "model.name=tiny"]) == 0
    assert "name: tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        (None, 0, ""),
        (ConfigError("a bad setting"), 2, "error: a bad setting\n"),
        (NumericsError("the loss is not finite"), 3, "error: the loss is not finite\n"),
        (Interrupted("saved", signal.SIGTERM), 143, "error: saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory\nmuch more"),
            2,
            "error: out of memory (CUDA out of memory). Lower ",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_how_a_command_ends_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: BaseException | None,
    status: int,
    says: str,
) -> None:
    def doctor(args: argparse.Namespace) -> None:
        assert args.command == "sssd-fast doctor --json"
        if end is not None:
            raise end

    monkeypatch.setattr(commands, "doctor", doctor)
    assert main(["doctor", "--json"]) == status
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert "Traceback" not in error
    assert "much more" not in error


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor(args: argparse.Namespace) -> None:
        raise ZeroDivisionError("a mistake in the program")

    monkeypatch.setattr(commands, "doctor", doctor)
    with pytest.raises(ZeroDivisionError, match="a mistake in the program"):
        main(["doctor"])


def test_a_command_that_is_unknown_or_missing_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in ([], ["benchmark"], ["data"], ["probe"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert "usage: sssd-fast" in capsys.readouterr().err
