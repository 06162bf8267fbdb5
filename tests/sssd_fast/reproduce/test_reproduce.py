"""`sssd-fast reproduce`: what each method, seed and split is made of, the table beside the paper's, and going on after a stop."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sssd_fast.cli import main
from sssd_fast.data.index import DataIndex
from sssd_fast.data.manifest import read_manifest
from sssd_fast.errors import CheckpointError, ConfigError, Interrupted
from sssd_fast.reproduce import reproduce as module
from sssd_fast.reproduce.plan import Cell, Plan, cells_of, load_plan, variants_of
from sssd_fast.reproduce.table import lines, markdown, picture, tables
from tests.sssd_fast.conftest import TINY
from tests.sssd_fast.reproductions import made_up

SHORT = [*TINY, "pretrain.max_steps=2", "finetune.max_steps=2", "data.val_fraction=0.2"]


@pytest.fixture(scope="session")
def covid(slices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 synthetic slices under the names of COVID-CT, with an official split."""
    top = tmp_path_factory.mktemp("covid") / "covid-ct"
    rows = ["path,label,split"]
    for source, label in zip(
        sorted(p for p in slices.iterdir() if p.is_dir()), ("CT_COVID", "CT_NonCOVID"), strict=True
    ):
        shutil.copytree(source, top / "images" / label)
        names = sorted(path.name for path in (top / "images" / label).glob("*.png"))
        for i, name in enumerate(names):
            rows.append(
                f"images/{label}/{name},{label},{'test' if i < 8 else 'val' if i < 12 else 'train'}"
            )
    (top / "split_official.csv").write_text("\n".join(rows) + "\n")
    return top


@pytest.fixture(scope="module")
def done(covid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds, both splits, three methods."""
    out = tmp_path_factory.mktemp("reproduced") / "covid"
    words = [
        "reproduce",
        "covid-ct",
        "--data",
        str(covid),
        "--out",
        str(out),
        "--seeds",
        "3",
        "4",
        *SHORT,
    ]
    assert main(words) == 0
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def held_out(folder: Path) -> set[str]:
    return {row["path"] for row in read_manifest(folder / "split.csv") if row["split"] == "test"}


def checkpoints(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}


# ---- what is trained ----


def test_each_method_is_what_it_says(done: Path) -> None:
    for protocol in ("random", "controlled"):
        place = done / protocol / "seed-3"
        assert {path.name for path in place.iterdir()} == {
            "sssd",
            "mae",
            "supervised",
            "pretrain-sssd",
            "pretrain-mae",
        }
        settings = {
            path.name: yaml.safe_load((path / "config.yaml").read_text())
            for path in place.iterdir()
        }
        assert settings["pretrain-sssd"]["objective"]["weight"] == 0.2
        assert settings["pretrain-mae"]["objective"]["weight"] == 0.0
        assert settings["supervised"]["finetune"]["layer_decay"] == 1.0
        assert (
            settings["sssd"]["finetune"]["layer_decay"]
            == settings["mae"]["finetune"]["layer_decay"]
            == 0.75
        )
        for one in settings.values():  # nothing else differs between the methods
            one["objective"]["weight"] = one["finetune"]["layer_decay"] = None
        assert all(one == settings["sssd"] for one in settings.values())
        for method in ("sssd", "mae"):
            log = (place / method / "train.log").read_text()
            assert f"pretrain-{method}/checkpoints/step-0000002.pt" in log
        assert "tensors loaded" not in (place / "supervised" / "train.log").read_text()


def test_each_split_is_what_it_says(done: Path, covid: Path) -> None:
    official = {
        row["path"].removeprefix("images/")
        for row in read_manifest(covid / "split_official.csv")
        if row["split"] == "test"
    }
    methods = ("sssd", "mae", "supervised")
    for seed in (3, 4):
        assert all(
            held_out(done / "controlled" / f"seed-{seed}" / method) == official
            for method in methods
        )
    random = {
        seed: [held_out(done / "random" / f"seed-{seed}" / method) for method in methods]
        for seed in (3, 4)
    }
    assert random[3][0] == random[3][1] == random[3][2] != random[4][0] == random[4][1]
    index = DataIndex.load(done / "random" / "seed-3" / "sssd" / "index.json")
    assert len(random[3][0]) == sum(int(0.2 * n) for n in index.counts().values())


def test_seeds_differ_in_their_weights(done: Path) -> None:
    losses = [
        [
            json.loads(line)["loss"]
            for line in (done / "controlled" / f"seed-{s}" / "supervised" / "metrics.jsonl").open()
        ]
        for s in (3, 4)
    ]
    assert losses[0][0] != losses[1][0]


# ---- what comes out ----


def test_results_are_those_of_the_runs(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = read(done / "results.json")
    assert results["planned"] == len(results["cells"]) == 12
    header, rows = tables(results)[0][1:]
    assert header == ["", "Accuracy", "F1", "AUC", "runs", "minutes each"]
    for method, row in zip(("sssd", "mae", "supervised"), rows[2:5], strict=True):
        places = [done / "random" / f"seed-{seed}" / method for seed in (3, 4)]
        runs = [read(place / "eval" / "metrics.json") for place in places]
        assert all(run["split"] == "test" for run in runs)
        for column, rate in ((1, "accuracy"), (3, "auc")):
            values = 100 * np.array([run["image"][rate] for run in runs])
            assert row[column] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f} %"
        assert row[4] == "2"
    page = (done / "results.md").read_text()
    assert "| paper, no external data | 81.76 % | 80.00 % | 88.21 % |  |  |" in page
    assert "| paper, with external knowledge | 95.27 % |" in page
    assert page.count("81.76") == 1  # the paper used no other split
    assert "CT_COVID has" in page
    assert "the published set has 349" in page
    assert str(done) not in page
    assert "reproduce covid-ct --data covid-ct" in page
    with Image.open(done / "results.png") as image:
        assert image.width > 600


def test_a_finished_reproduction_is_not_computed_again(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoints(done)
    assert main(["reproduce", "--resume", str(done)]) == 0
    printed = capsys.readouterr().out
    assert checkpoints(done) == before
    assert "model 1 of" not in printed
    assert "paper, no external data" in printed


def test_seeds_may_be_added(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    before = checkpoints(out)
    assert (
        main(
            [
                "reproduce",
                "--resume",
                str(out),
                "--seeds",
                "5",
                "--protocols",
                "random",
                "--minutes",
                "0",
            ]
        )
        == 0
    )
    assert checkpoints(out) == before  # no time for a further model
    assert load_plan(out).seeds == (3, 4, 5)
    assert "6 of 18 models are not trained yet" in (out / "results.md").read_text()


def test_other_settings_are_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--resume", str(done), "finetune.base_lr=0.5"]) == 2
    assert "finetune.base_lr was 0.001, is 0.5" in capsys.readouterr().err
    assert main(["reproduce", "--resume", str(done), "--part", "val"]) == 2
    assert "evaluated on test, now asked for val" in capsys.readouterr().err
    assert (
        main(["reproduce", "--resume", str(done), "threads=2", "--minutes", "0"]) == 0
    )  # changes no result


# ---- stopping and going on ----


def test_a_stop_in_the_middle_changes_nothing(
    done: Path,
    covid: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, real, calls = tmp_path / "broken", module.finetune, [0]

    def stopped(run: Any, init: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise Interrupted(f"stopped. Continue with:\n  {run.resume_with}", signal.SIGTERM)
        return real(run, init)

    monkeypatch.setattr(module, "finetune", stopped)
    words = [
        "reproduce",
        "covid-ct",
        "--data",
        str(covid),
        "--out",
        str(out),
        "--protocols",
        "controlled",
        *SHORT,
    ]
    assert main([*words, "--seeds", "3"]) == 143
    assert f"sssd-fast reproduce --resume {out}" in capsys.readouterr().err
    assert len(read(out / "results.json")["cells"]) == 1  # what was finished is there
    assert main(["reproduce", "--resume", str(out)]) == 0
    wanted = [
        c
        for c in read(done / "results.json")["cells"]
        if c["protocol"] == "controlled" and c["seed"] == 3
    ]
    got = read(out / "results.json")["cells"]
    assert [cell["image"] for cell in got] == [cell["image"] for cell in wanted]
    assert main([*words, "--seeds", "3"]) == 2
    assert "holds a reproduction already" in capsys.readouterr().err


def test_resume_of_something_else(
    tmp_path: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "--resume", str(tmp_path)]) == 2
    assert "no plan of `sssd-fast reproduce` there" in capsys.readouterr().err
    assert main(["reproduce", "sars-cov-2-ct", "--resume", str(done)]) == 2
    assert "goes on with covid-ct" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text('{"dataset": "covid-ct"}')
    with pytest.raises(CheckpointError, match="no plan"):
        load_plan(tmp_path)


def test_a_dry_run_keeps_nothing(
    covid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry"
    words = [
        "reproduce",
        "covid-ct",
        "--dry-run",
        "--methods",
        "supervised",
        "--data",
        str(covid),
        "--out",
        str(out),
    ]
    assert main([*words, *TINY]) == 0
    assert "dry run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_one_compiled_step_serves_all_models_of_a_process(covid: Path, tmp_path: Path) -> None:
    """On a GPU with CUDA graphs: later models are not compiled again, and what earlier ones took is free."""
    import torch

    words = [
        "reproduce",
        "covid-ct",
        "--data",
        str(covid),
        "--protocols",
        "controlled",
        "--methods",
        "sssd",
        *SHORT,
    ]
    words += [
        "device=cuda",
        "step.compile=true",
        "step.cuda_graphs=true",
        "pretrain.max_steps=8",
        "finetune.max_steps=8",
    ]
    reserved = []
    for seed in (0, 1, 2):
        assert main([*words, "--seeds", str(seed), "--out", str(tmp_path / str(seed))]) == 0
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] <= 1.1 * reserved[1]
    logs = [
        (tmp_path / str(seed) / "controlled" / f"seed-{seed}" / stage / "train.log").read_text()
        for seed in (1, 2)
        for stage in ("pretrain-sssd", "sssd")
    ]
    assert (
        len({line for log in logs for line in log.splitlines() if "graphs compiled" in line}) == 1
    )


# ---- choosing settings ----


def test_settings_are_compared_on_validation_images_alone(
    covid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tried"
    words = [
        "reproduce",
        "covid-ct",
        "--data",
        str(covid),
        "--out",
        str(out),
        "--seeds",
        "0",
        "--protocols",
        "controlled",
    ]
    words += [
        "--methods",
        "sssd",
        "--try",
        "finetune.base_lr=[1e-4, 1e-1]",
        "--try",
        "pretrain.base_lr=[0.001]",
    ]
    assert main([*words, *SHORT]) == 2
    assert "test images must not choose" in capsys.readouterr().err
    assert main([*words, "--part", "val", *SHORT]) == 0
    place = out / "controlled" / "seed-0"
    pretrained = [path.name for path in place.glob("pretrain-*")]
    assert pretrained == [
        "pretrain-sssd-pretrain.base_lr=0.001"
    ]  # shared: fine-tuning alone differs
    tuned = [path for path in place.iterdir() if path.name not in pretrained]
    assert len(tuned) == 2
    for path in tuned:
        result = read(path / "eval" / "metrics.json")
        assert (result["split"], result["image"]["n"]) == ("val", 8)
        assert yaml.safe_load((path / "config.yaml").read_text())["pretrain"]["base_lr"] == 0.001
    rows = tables(read(out / "results.json"))[0][2]
    assert all("paper" not in row[0] for row in rows)
    assert {row[0].split(", ", 1)[1] for row in rows[:2]} == {
        f"finetune.base_lr={lr}, pretrain.base_lr=0.001" for lr in ("1e-4", "1e-1")
    }
    assert float(rows[0][1].split()[0]) >= float(rows[1][1].split()[0])
    assert "only for choosing settings" in (out / "results.md").read_text()


def test_tries_are_lists() -> None:
    assert variants_of(["a.b=[1e-3, true]", "c=[x, [0.2, 1.0]]"]) == (
        ("a.b=1e-3", "c=x"),
        ("a.b=1e-3", "c=[0.2, 1.0]"),
        ("a.b=true", "c=x"),
        ("a.b=true", "c=[0.2, 1.0]"),
    )
    for wrong in ("a.b", "a.b=3", "=[1]", "a.b=[]", "a.b=[1"):
        with pytest.raises(ConfigError, match="needs the form"):
            variants_of([wrong])


# ---- external images ----


def test_external_images_are_pretrained_on_without_labels_or_leaks(
    covid: Path, tmp_path: Path
) -> None:
    """Three extra images: a new one, a copy of a test image as BMP, and one that cannot be read."""
    other, out = tmp_path / "other", tmp_path / "out"
    (other / "COVID").mkdir(parents=True)
    test_image = (
        covid
        / "images"
        / read_manifest(covid / "split_official.csv")[0]["path"].removeprefix("images/")
    )
    with Image.open(test_image) as image:
        image.save(other / "COVID" / "copy.bmp")
        Image.fromarray(255 - np.asarray(image)).save(other / "COVID" / "new.png")
    (other / "COVID" / "broken.png").write_bytes(b"no image")
    words = [
        "reproduce",
        "covid-ct",
        "--data",
        str(covid),
        "--external",
        str(other),
        "--out",
        str(out),
        "--seeds",
        "0",
    ]
    words += [
        "--protocols",
        "controlled",
        "--methods",
        "external",
        "data.max_bad_fraction=0.5",
        *SHORT,
    ]
    assert main(words) == 0
    folder = out / "controlled" / "seed-0" / "pretrain-external"
    both = DataIndex.load(folder / "extra.json")
    official = read_manifest(covid / "split_official.csv")
    train = {str((covid / row["path"]).absolute()) for row in official if row["split"] == "train"}
    assert {str(both.file(i)) for i in range(len(both))} == {
        *train,
        str(other / "COVID" / "new.png"),
    }
    assert (both.classes, {record.label for record in both.records}) == (["no label"], {0})
    log = (folder / "train.log").read_text()
    assert f"pre-training reads {len(train)} images of the training part and 1 from" in log
    assert "1 images there have the pixels of an image of" in log
    assert f"resident: {len(train) + 1} images" in log
    assert held_out(out / "controlled" / "seed-0" / "external") == {
        row["path"].removeprefix("images/") for row in official if row["split"] == "test"
    }


def test_other_extra_images_are_another_run(tiny: list[str], slices: Path, tmp_path: Path) -> None:
    extra, out = tmp_path / "extra" / "any", tmp_path / "run"
    extra.mkdir(parents=True)
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(extra / "a.png")
    words = [*tiny, f"pretrain.extra={extra.parent}", "pretrain.max_steps=2"]
    assert main(["pretrain", "--out", str(out), *words]) == 0
    assert main(["pretrain", "--resume", str(out)]) == 0
    (out / "extra.json").unlink()
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(extra / "b.png")
    assert main(["pretrain", "--resume", str(out)]) == 2


# ---- the table ----


def test_the_table_by_hand(tmp_path: Path) -> None:
    results = made_up()
    [(title, _, rows)] = tables(results)
    assert (
        title
        == "SARS-CoV-2 CT, stratified random 80/20, the paper's protocol; 7 training and 10 test images"
    )
    assert rows[0] == ["paper, no external data", "97.78 %", "", "", "", ""]
    assert rows[1] == [
        "SSSD: masked autoencoder with self-distillation",
        "85.00 ± 7.07 %",
        "50.00 ± 0.00 %",
        "50.00 ± 0.00 %",
        "2",
        "1.5",
    ]
    assert rows[2][:2] == ["the same without distillation", "75.00 ± 7.07 %"]
    assert rows[3] == ["nearest neighbour on 32 x 32 pixels", "60.00 %", "50.00 %", "", "1", ""]
    assert lines(results) == [
        "random: accuracy of sssd minus mae, seed by seed: +10.00 ± 14.14 points; higher in 1, equal in 1 of 2 seeds",
        "1 of 5 models are not trained yet.",
    ]
    page = markdown(results)
    assert "| paper, no external data | 97.78 % |" in page
    assert "a card, torch 2, python 3, commit c (modified), d; `sssd-fast reproduce`" in page
    assert picture(made_up(cells=[]), path=tmp_path / "none.png") is None


# ---- the command ----


def test_the_first_seed_comes_first_with_everything() -> None:
    cells = cells_of(Plan("covid-ct", "data", {}, seeds=(7, 8)))
    assert [c.seed for c in cells] == [7] * 6 + [8] * 6
    assert cells[0] == Cell("random", 7, "sssd")
    assert {(c.protocol, c.method) for c in cells[:6]} == {
        (c.protocol, c.method) for c in cells[6:]
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["covid", "--data", "x"], "reproduce needs a name"),
        (
            ["covid-ct"],
            "reproduce needs a name .covid-ct, sars-cov-2-ct. and its folder: --data DIR",
        ),
        (
            ["covid-ct", "--data", "x", "data.split=block"],
            "data.split=block: reproduce sets this itself",
        ),
        (
            ["covid-ct", "--data", "x", "--methods", "external"],
            "name its folder with --external DIR",
        ),
        (["covid-ct", "--data", "no such folder"], "no such folder is no folder"),
        (["covid-ct", "--data", "x", "pretrain.epoch=3"], "did you mean 'epochs'"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_settings_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    from sssd_fast.cli import _parse

    args = _parse(
        ["reproduce", "covid-ct", "a.b=1", "--seeds", "0", "2", "c.d=2", "--part", "val", "e=3"]
    )
    assert (args.dataset, args.seeds, args.part) == ("covid-ct", [0, 2], "val")
    assert sorted(args.overrides) == ["a.b=1", "c.d=2", "e=3"]
    assert _parse(["run", "--seeds", "5", "a=1"]).overrides == ["a=1"]
    for words, message in (
        (["reproduce", "--seeds", "1.5"], "got 1.5, needs whole numbers"),
        (["reproduce", "--methods", "dino"], "got dino, needs one or more of sssd, mae"),
        (["reproduce", "--seeds", "a=1"], "got nothing"),
        (["reproduce", "covid-ct", "--part", "val", "word"], "unrecognized arguments: word"),
        (["doctor", "a=1"], "unrecognized arguments: a=1"),
    ):
        with pytest.raises(SystemExit) as ended:
            _parse(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
