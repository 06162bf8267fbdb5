"""`sssd-fast reproduce`: what each method, seed and split consists of, resume, and the tables."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sssd_fast.cli import main
from sssd_fast.data.index import DataIndex
from sssd_fast.data.manifest import read_manifest
from sssd_fast.data.split import split_csv
from sssd_fast.errors import CheckpointError, Interrupted
from sssd_fast.evaluation import pictures
from sssd_fast.loaders.prepare import joined
from sssd_fast.reproduce import reproduce as module
from sssd_fast.reproduce import table
from sssd_fast.reproduce.reproduce import Model, Plan, load_plan
from sssd_fast.run.files import atomic_write_bytes
from tests.sssd_fast.conftest import TINY

REPOSITORY = Path(__file__).resolve().parents[3]
SHORT = [*TINY, "pretrain.max_steps=1", "finetune.max_steps=1", "data.val_fraction=0.2"]
SHORT += ["finetune.layer_decay=0.75", "finetune.base_lr=1e-3"]  # whatever the recipe has
METHODS = ("sssd", "mae", "supervised")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def covid(slices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 synthetic slices under the names of COVID-CT, with an official split."""
    top = tmp_path_factory.mktemp("covid") / "covid-ct"
    rows = ["path,label,split"]
    folders = sorted(path for path in slices.iterdir() if path.is_dir())
    for source, label in zip(folders, ("CT_COVID", "CT_NonCOVID"), strict=True):
        shutil.copytree(source, top / "images" / label)
        names = sorted(path.name for path in (top / "images" / label).glob("*.png"))
        for i, name in enumerate(names):
            split = "test" if i < 8 else "val" if i < 12 else "train"
            rows.append(f"images/{label}/{name},{label},{split}")
    (top / "split_official.csv").write_text("\n".join(rows) + "\n")
    return top


@pytest.fixture(scope="module", autouse=True)
def _no_drawing() -> Iterator[None]:
    """Drawing would take most of the time of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save_figure", lambda figure, path: atomic_write_bytes(path, b"-"))
        yield


def run(covid: Path, out: Path, words: str) -> int:
    """`sssd-fast reproduce covid-ct` with one step per stage."""
    command = ["reproduce", "covid-ct", "--data", str(covid), "--out", str(out)]
    return main([*command, *words.split(), *SHORT])


def resume(out: Path, *words: str) -> int:
    return main(["reproduce", "--resume", str(out), *words])


@pytest.fixture(scope="module")
def done(covid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seed 3 on both splits with all methods that need no external images."""
    out = tmp_path_factory.mktemp("reproduced") / "covid"
    assert run(covid, out, "--seeds 3 --minutes 10") == 0
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def held_out(folder: Path) -> set[str]:
    return {row["path"] for row in read_manifest(folder / "split.csv") if row["split"] == "test"}


def checkpoints(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}


def official_test(covid: Path) -> set[str]:
    rows = read_manifest(covid / "split_official.csv")
    return {row["path"].removeprefix("images/") for row in rows if row["split"] == "test"}


@pytest.mark.parametrize("protocol", ["random", "controlled"])
def test_methods_differ_only_in_what_they_are_named_after(done: Path, protocol: str) -> None:
    place = done / protocol / "seed-3"
    folders = {path.name: path for path in place.iterdir()}
    assert set(folders) == {*METHODS, "pretrain-sssd", "pretrain-mae"}
    texts = {name: (path / "config.yaml").read_text() for name, path in folders.items()}
    settings = {name: yaml.safe_load(text) for name, text in texts.items()}
    assert settings["pretrain-sssd"]["objective"]["weight"] == 0.2
    assert settings["pretrain-mae"]["objective"]["weight"] == 0.0
    decay = {name: settings[name]["finetune"]["layer_decay"] for name in METHODS}
    assert decay == {"sssd": 0.75, "mae": 0.75, "supervised": 1.0}
    for one in settings.values():
        one["objective"]["weight"] = one["finetune"]["layer_decay"] = None
    assert all(one == settings["sssd"] for one in settings.values())
    for method in ("sssd", "mae"):
        log = (place / method / "train.log").read_text()
        assert f"pretrain-{method}/checkpoints/step-0000001.pt" in log
    assert "tensors loaded" not in (place / "supervised" / "train.log").read_text()


def test_splits_are_official_or_random_by_seed(done: Path, covid: Path) -> None:
    random = [held_out(done / "random" / "seed-3" / method) for method in METHODS]
    controlled = [held_out(done / "controlled" / "seed-3" / method) for method in METHODS]
    assert controlled == [official_test(covid)] * 3
    assert random[0] == random[1] == random[2] != controlled[0]
    index = DataIndex.load(done / "random" / "seed-3" / "sssd" / "index.json")
    assert len(random[0]) == sum(int(0.2 * n) for n in index.counts().values())
    config = load_plan(done).config_of(Model("random", 4, "supervised"), covid)
    assert (config.seed, config.data.split_seed) == (4, 4)


def test_plan_puts_all_models_of_the_first_seed_first() -> None:
    models = Plan(dataset="covid-ct", data="data", config={}, seeds=(7, 8)).models()
    assert [model.seed for model in models] == [7] * 6 + [8] * 6
    assert {model[::2] for model in models[:6]} == {model[::2] for model in models[6:]}
    assert len(set(models)) == 12


def test_results_are_those_of_the_runs(done: Path) -> None:
    results = read(done / "results.json")
    assert results["planned"] == len(results["cells"]) == 6
    rows = table.tables(results)[0][2]
    for method, row in zip(METHODS, rows[2:5], strict=True):
        found = read(done / "random" / "seed-3" / method / "eval/test/metrics.json")
        for column, rate in ((1, "accuracy"), (3, "auc")):
            assert row[column] == f"{100 * found['image'][rate]:.2f} %"
    page = (done / "results.md").read_text()
    assert "| paper, no external data | 81.76 % | 80.00 % | 88.21 % |  |  |" in page
    assert page.count("81.76") == 1  # the paper used no other split
    assert "CT_COVID has 24 images, the published set has 349" in page
    assert str(done) not in page
    assert "reproduce covid-ct --data covid-ct" in page


def test_resume_computes_only_what_is_missing(done: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    before, results = checkpoints(out), read(out / "results.json")
    assert resume(out) == 0
    printed = capsys.readouterr().out
    assert "model 1 of" not in printed
    assert "paper, no external data" in printed
    # more seeds, but no time for a further model
    assert resume(out, "--seeds", "5", "--minutes", "0") == 0
    assert load_plan(out).seeds == (3, 5)
    assert "6 of 12 models are not trained yet" in (out / "results.md").read_text()
    # without its result, a finished model is evaluated again
    (out / "random" / "seed-3" / "mae" / "cell.json").unlink()
    assert resume(out, "--minutes", "0") == 0
    assert len(read(out / "results.json")["cells"]) == 5
    assert resume(out, "--minutes", "10", "--protocols", "random") == 0
    kept = [cell for cell in read(out / "results.json")["cells"] if cell["seed"] == 3]
    assert kept == results["cells"]
    assert before.items() <= checkpoints(out).items()


def test_resume_rejects_other_settings_and_folders(
    done: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert resume(done, "finetune.base_lr=0.5") == 2
    assert "finetune.base_lr was 0.001, is 0.5" in capsys.readouterr().err
    assert resume(done, "evaluate.crops=1") == 2  # all models are evaluated in the same way
    assert "evaluate.crops was 5, is 1" in capsys.readouterr().err
    assert resume(done, "threads=2", "--minutes", "0") == 0  # changes no result
    assert resume(tmp_path) == 2
    assert "no plan of `sssd-fast reproduce` there" in capsys.readouterr().err
    assert main(["reproduce", "sars-cov-2-ct", "--resume", str(done)]) == 2
    assert "continues covid-ct" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text('{"dataset": "covid-ct"}')
    with pytest.raises(CheckpointError, match="no plan"):
        load_plan(tmp_path)


def test_stop_in_the_middle_changes_no_result(
    done: Path, covid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    out, real, calls = tmp_path / "broken", module.finetune, [0]

    def stopped(run: Any, init: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise Interrupted(f"stopped. Continue with:\n  {run.resume_with}", signal.SIGTERM)
        return real(run, init)

    monkeypatch.setattr(module, "finetune", stopped)
    words = "--protocols controlled --methods sssd supervised --seeds 3"
    assert run(covid, out, words) == 143
    assert f"sssd-fast reproduce --resume {out}" in capsys.readouterr().err
    assert len(read(out / "results.json")["cells"]) == 1  # the finished one
    assert resume(out) == 0
    cells = read(done / "results.json")["cells"]
    wanted = {c["method"]: c["image"] for c in cells if c["protocol"] == "controlled"}
    del wanted["mae"]
    assert {c["method"]: c["image"] for c in read(out / "results.json")["cells"]} == wanted
    assert run(covid, out, words) == 2
    assert "holds a reproduction already" in capsys.readouterr().err


def test_dry_run_keeps_nothing(covid: Path, tmp_path: Path) -> None:
    words = "--dry-run --methods supervised --protocols random"
    assert run(covid, tmp_path / "dry", words) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_one_compiled_step_serves_all_models_of_a_process(covid: Path, tmp_path: Path) -> None:
    """With CUDA graphs: later models are not compiled again, and memory of earlier ones is free."""
    import torch

    words = "--protocols controlled --methods sssd device=cuda step.compile=true "
    words += "step.cuda_graphs=true pretrain.max_steps=8 finetune.max_steps=8 --seeds "
    reserved = []
    for seed in ("0", "1", "2"):
        command = ["reproduce", "covid-ct", "--data", str(covid), "--out", str(tmp_path / seed)]
        assert main([*command, *SHORT, *words.split(), seed]) == 0
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] <= 1.1 * reserved[1]
    lines = set()
    for seed in ("1", "2"):
        for log in (tmp_path / seed).glob("controlled/*/*/train.log"):
            lines |= {line for line in log.read_text().splitlines() if "graphs compiled" in line}
    assert len(lines) == 1


def test_external_images_are_used_without_labels_and_without_leaks(
    covid: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Three extra images: a new one, a copy of a test image as BMP, and an unreadable one."""
    other, out = tmp_path / "other", tmp_path / "out"
    (other / "COVID").mkdir(parents=True)
    official = read_manifest(covid / "split_official.csv")
    with Image.open(covid / official[0]["path"]) as image:
        image.save(other / "COVID" / "copy.bmp")
        Image.fromarray(255 - np.asarray(image)).save(other / "COVID" / "new.png")
    (other / "COVID" / "broken.png").write_bytes(b"not an image")
    words = "--seeds 0 --protocols controlled --methods external data.max_bad_fraction=0.5"
    assert run(covid, out, words) == 2
    assert "its folder with --external DIR" in capsys.readouterr().err.replace("\n", " ")
    assert run(covid, out, f"--external {other} {words}") == 0
    folder = out / "controlled" / "seed-0" / "pretrain-external"
    index = DataIndex.load(folder / "index.json")
    extra = DataIndex.load(folder / "extra.json")
    both = joined(index, split_csv(index, folder / "split.csv").train, extra)
    train = {str((covid / row["path"]).absolute()) for row in official if row["split"] == "train"}
    files = {str(both.file(i)) for i in range(len(both))}
    assert files == {*train, str(other / "COVID" / "new.png")}
    assert (both.classes, {record.label for record in both.records}) == (["no label"], {0})
    assert f"resident: {len(train) + 1} images" in (folder / "train.log").read_text()
    assert held_out(out / "controlled" / "seed-0" / "external") == official_test(covid)


def test_other_extra_images_are_another_run(tiny: list[str], tmp_path: Path) -> None:
    extra, out = tmp_path / "extra" / "any", tmp_path / "run"
    extra.mkdir(parents=True)
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(extra / "a.png")
    words = [*tiny, f"pretrain.extra={extra.parent}", "pretrain.max_steps=1"]
    assert main(["pretrain", "--out", str(out), *words]) == 0
    assert main(["pretrain", "--resume", str(out)]) == 0
    (out / "extra.json").unlink()
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(extra / "b.png")
    assert main(["pretrain", "--resume", str(out)]) == 2


def test_table_by_hand() -> None:
    """Invented accuracies of seeds 0 and 1: 90 and 80 (sssd), 70 and 80 (mae)."""
    rates = dict.fromkeys(("sensitivity", "specificity", "precision", "f1", "auc"), 0.5)
    shared = {"protocol": "random", "departures": [], "machine": "a card", "finetune_s": 30.0}
    shared |= {"pretrain_s": 60.0, "counts": {"train": 7, "val": 1, "test": 10}}
    shared["nearest"] = {**rates, "accuracy": 0.6}
    invented = [("mae", 1, 0.8), ("mae", 0, 0.7), ("sssd", 0, 0.9), ("sssd", 1, 0.8)]
    results = {
        "dataset": "sars-cov-2-ct",
        "title": "SARS-CoV-2 CT",
        "planned": 5,
        "settings": {"model": {"name": "small", "image_size": [64, 96]}},
        "commands": ["sssd-fast reproduce"],
        "published": {"paper, no external data": {"accuracy": 0.9778}},
        "cells": [
            {**shared, "method": method, "seed": seed, "image": {"accuracy": accuracy, **rates}}
            for method, seed, accuracy in invented
        ],
    }
    [(title, _, rows)] = table.tables(results)
    protocol = "stratified random 80/20, the paper's protocol"
    assert title == f"SARS-CoV-2 CT, {protocol}; 7 training and 10 test images"
    half = ["50.00 ± 0.00 %"] * 2
    assert rows == [
        ["paper, no external data", "97.78 %", "", "", "", ""],
        [table.METHODS["sssd"], "85.00 ± 7.07 %", *half, "2", "1.5"],
        [table.METHODS["mae"], "75.00 ± 7.07 %", *half, "2", "1.5"],
        ["nearest neighbour on 32 x 32 pixels", "60.00 ± 0.00 %", half[0], "", "2", ""],
    ]
    assert table.notes(results) == [
        "random: accuracy of sssd minus mae, seed by seed: +10.00 ± 14.14 points over 2 seeds",
        "1 of 5 models are not trained yet.",
    ]
    page = table.markdown(results)
    assert page.startswith("## SARS-CoV-2 CT: ViT 384x12 on 64 x 96 pixels")
    assert page.endswith("a card; `sssd-fast reproduce`\n")


def test_results_page_holds_the_tables_of_the_committed_files() -> None:
    page = (REPOSITORY / "docs" / "results.md").read_text()
    files = sorted((REPOSITORY / "benchmarks" / "results" / "paper").glob("*.json"))
    assert len(files) == 6
    assert [path.name for path in files if table.markdown(read(path)) not in page] == []
