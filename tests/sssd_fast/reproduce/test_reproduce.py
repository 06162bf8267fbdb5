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
from sssd_fast.errors import CheckpointError, ConfigError, Interrupted, SssdError
from sssd_fast.evaluation import pictures
from sssd_fast.reproduce import reproduce as module
from sssd_fast.reproduce import table
from sssd_fast.reproduce.plan import Plan, PlannedModel, load_plan, variants_of
from sssd_fast.run.files import atomic_write_bytes
from tests.sssd_fast.conftest import TINY

REPOSITORY = Path(__file__).resolve().parents[3]
STEPS = ["pretrain.max_steps=1", "finetune.max_steps=1"]
SHORT = [*TINY, *STEPS, "data.val_fraction=0.2"]
METHODS = ("sssd", "mae", "supervised")


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


def run(covid: Path, out: Path, words: str) -> int:
    """`sssd-fast reproduce covid-ct` with one step per stage."""
    command = ["reproduce", "covid-ct", "--data", str(covid), "--out", str(out)]
    return main([*command, *words.split(), *SHORT])


def resume(out: Path, *words: str) -> int:
    return main(["reproduce", "--resume", str(out), *words])


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[list[Any]]:
    """Figures are collected and not drawn, which would take most of the time of these runs."""
    drawn: list[Any] = []

    def save(figure: Any, path: str | Path) -> Path:
        drawn.append(figure)
        atomic_write_bytes(path, b"not drawn")
        return Path(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save_figure", save)
        yield drawn


@pytest.fixture(scope="module")
def done(covid: Path, figures: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
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


# ---- models and splits ----


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
    config = PlannedModel("random", 4, "supervised").config(load_plan(done), covid, covid)
    assert (config.seed, config.data.split_seed) == (4, 4)


def test_plan_puts_all_models_of_the_first_seed_first() -> None:
    models = Plan("covid-ct", "data", {}, seeds=(7, 8)).models()
    assert [model.seed for model in models] == [7] * 6 + [8] * 6
    assert models[0] == PlannedModel("random", 7, "sssd")
    pairs = [(model.protocol, model.method) for model in models]
    assert len(set(pairs[:6])) == 6
    assert pairs[:6] == pairs[6:]


# ---- results ----


def test_results_are_those_of_the_runs(done: Path) -> None:
    results = read(done / "results.json")
    assert results["planned"] == len(results["cells"]) == 6
    header, rows = table.tables(results)[0][1:]
    assert header == ["", "Accuracy", "F1", "AUC", "runs", "minutes each"]
    for method, row in zip(METHODS, rows[2:5], strict=True):
        found = read(done / "random" / "seed-3" / method / "eval/test/metrics.json")
        assert found["split"] == "test"
        for column, rate in ((1, "accuracy"), (3, "auc")):
            assert row[column] == f"{100 * found['image'][rate]:.2f} %"
        assert row[4] == "1"
    page = (done / "results.md").read_text()
    assert "| paper, no external data | 81.76 % | 80.00 % | 88.21 % |  |  |" in page
    assert "| paper, with external knowledge | 95.27 % |" in page
    assert page.count("81.76") == 1  # the paper used no other split
    assert "CT_COVID has 24 images, the published set has 349" in page
    assert str(done) not in page
    assert "reproduce covid-ct --data covid-ct" in page
    assert (done / "results.png").is_file()


# ---- resume ----


def test_resume_computes_only_what_is_missing(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    before = checkpoints(out)
    assert resume(out) == 0
    printed = capsys.readouterr().out
    assert "model 1 of" not in printed
    assert "paper, no external data" in printed
    # more seeds, but no time for a further model
    assert resume(out, "--seeds", "5", "--minutes", "0") == 0
    assert checkpoints(out) == before
    assert load_plan(out).seeds == (3, 5)
    assert "6 of 12 models are not trained yet" in (out / "results.md").read_text()


def test_deleted_results_are_evaluated_again(done: Path, capsys: Any) -> None:
    path, before = done / "results.json", checkpoints(done)
    first = read(path)["cells"]
    path.write_text('{"cells": [')
    assert resume(done) == 2
    assert "results.json is damaged" in capsys.readouterr().err
    path.unlink()
    assert resume(done) == 0
    for key in ("method", "image", "counts", "nearest"):
        assert [cell[key] for cell in read(path)["cells"]] == [cell[key] for cell in first]
    assert checkpoints(done) == before


def test_resume_rejects_other_settings(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(done, "finetune.base_lr=0.5") == 2
    assert "finetune.base_lr was 0.001, is 0.5" in capsys.readouterr().err
    assert resume(done, "--split", "val") == 2
    assert "evaluated on test, val is requested now" in capsys.readouterr().err
    assert resume(done, "threads=2", "--minutes", "0") == 0  # changes no result


def test_resume_rejects_other_folders(
    tmp_path: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(tmp_path) == 2
    assert "no plan of `sssd-fast reproduce` there" in capsys.readouterr().err
    assert main(["reproduce", "sars-cov-2-ct", "--resume", str(done)]) == 2
    assert "continues covid-ct" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text('{"dataset": "covid-ct"}')
    with pytest.raises(CheckpointError, match="no plan"):
        load_plan(tmp_path)


def test_stop_in_the_middle_changes_no_result(
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
    words = "--protocols controlled --methods sssd supervised --seeds 3"
    assert run(covid, out, words) == 143
    assert f"sssd-fast reproduce --resume {out}" in capsys.readouterr().err
    assert len(read(out / "results.json")["cells"]) == 1  # the finished one
    assert resume(out) == 0
    wanted = {
        cell["method"]: cell["image"]
        for cell in read(done / "results.json")["cells"]
        if cell["protocol"] == "controlled" and cell["method"] != "mae"
    }
    assert {c["method"]: c["image"] for c in read(out / "results.json")["cells"]} == wanted
    assert run(covid, out, words) == 2
    assert "holds a reproduction already" in capsys.readouterr().err


def test_dry_run_keeps_nothing(
    covid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--dry-run --methods supervised --protocols random"
    assert run(covid, tmp_path / "dry", words) == 0
    assert "dry run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_one_compiled_step_serves_all_models_of_a_process(covid: Path, tmp_path: Path) -> None:
    """With CUDA graphs: later models are not compiled again, and memory of earlier ones is free."""
    import torch

    words = ["--protocols", "controlled", "--methods", "sssd"]
    settings = [*SHORT, "device=cuda", "step.compile=true", "step.cuda_graphs=true"]
    settings += ["pretrain.max_steps=8", "finetune.max_steps=8"]
    reserved = []
    for seed in ("0", "1", "2"):
        out = ["--data", str(covid), "--seeds", seed, "--out", str(tmp_path / seed)]
        assert main(["reproduce", "covid-ct", *words, *out, *settings]) == 0
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] <= 1.1 * reserved[1]
    lines = set()
    for seed in ("1", "2"):
        for log in (tmp_path / seed).glob("controlled/*/*/train.log"):
            lines |= {line for line in log.read_text().splitlines() if "graphs compiled" in line}
    assert len(lines) == 1


# ---- comparing settings ----


def test_settings_are_compared_on_validation_images_only(
    covid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tried"
    words = "--seeds 0 --protocols controlled --methods sssd "
    words += "--try finetune.base_lr=[1e-4,1e-1] --try pretrain.base_lr=[0.001]"
    assert run(covid, out, words) == 2
    assert "test images must not choose" in capsys.readouterr().err
    assert run(covid, out, f"{words} --split val") == 0
    place = out / "controlled" / "seed-0"
    pretrained = [path.name for path in place.glob("pretrain-*")]
    # shared by both, which differ only in fine-tuning
    assert pretrained == ["pretrain-sssd-pretrain.base_lr=0.001"]
    tuned = [path for path in place.iterdir() if path.name not in pretrained]
    assert len(tuned) == 2
    for path in tuned:
        result = read(path / "eval/val/metrics.json")
        assert (result["split"], result["image"]["n"]) == ("val", 8)
        assert yaml.safe_load((path / "config.yaml").read_text())["pretrain"]["base_lr"] == 0.001
    rows = table.tables(read(out / "results.json"))[0][2]
    assert all("paper" not in row[0] for row in rows)
    wanted = {f"finetune.base_lr={lr}, pretrain.base_lr=0.001" for lr in ("1e-4", "1e-1")}
    assert {row[0].split(", ", 1)[1] for row in rows[:2]} == wanted
    assert float(rows[0][1].split()[0]) >= float(rows[1][1].split()[0])
    assert "only for choosing settings" in (out / "results.md").read_text()


def test_variants_are_all_combinations() -> None:
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


def test_external_images_are_used_without_labels_and_without_leaks(
    covid: Path, tmp_path: Path
) -> None:
    """Three extra images: a new one, a copy of a test image as BMP, and an unreadable one."""
    other, out = tmp_path / "other", tmp_path / "out"
    (other / "COVID").mkdir(parents=True)
    official = read_manifest(covid / "split_official.csv")
    with Image.open(covid / official[0]["path"]) as image:
        image.save(other / "COVID" / "copy.bmp")
        Image.fromarray(255 - np.asarray(image)).save(other / "COVID" / "new.png")
    (other / "COVID" / "broken.png").write_bytes(b"not an image")
    words = f"--external {other} --seeds 0 --protocols controlled --methods external"
    assert run(covid, out, f"{words} data.max_bad_fraction=0.5") == 0
    folder = out / "controlled" / "seed-0" / "pretrain-external"
    both = DataIndex.load(folder / "extra.json")
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


# ---- tables ----

MACHINE = {"type": "cuda", "device": "a card", "torch": "2", "python": "3"}
MACHINE |= {"commit": "c", "modified": True, "date": "d"}


def made_up(**changes: Any) -> dict[str, Any]:
    """Invented results.json: accuracies 90 and 80 (sssd), 70 and 80 (mae) of seeds 0 and 1."""
    rates = dict.fromkeys(("sensitivity", "specificity", "precision", "f1", "auc"), 0.5)

    def cell(method: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {
            "protocol": "random",
            "seed": seed,
            "method": method,
            "variant": [],
            "departures": [],
            "pretrain_s": 60.0,
            "finetune_s": 30.0,
            "counts": {"train": 7, "val": 1, "test": 10},
            "image": {"accuracy": accuracy, **rates},
            "nearest": {**rates, "accuracy": 0.6, "confusion": [[3, 2], [2, 3]]},
        }

    cells = [cell("mae", 1, 0.8), cell("mae", 0, 0.7), cell("sssd", 0, 0.9), cell("sssd", 1, 0.8)]
    return {
        "dataset": "sars-cov-2-ct",
        "title": "SARS-CoV-2 CT",
        "split": "test",
        "planned": 5,
        "schema": table.SCHEMA,
        "settings": {"model": {"name": "small", "image_size": [64, 96]}},
        "commands": ["sssd-fast reproduce"],
        "published": {"paper, no external data": {"accuracy": 0.9778}},
        "machines": [MACHINE],
        "cells": cells,
        **changes,
    }


def test_table_by_hand() -> None:
    results = made_up()
    [(title, _, rows)] = table.tables(results)
    protocol = "stratified random 80/20, the paper's protocol"
    assert title == f"SARS-CoV-2 CT, {protocol}; 7 training and 10 test images"
    half = ["50.00 ± 0.00 %"] * 2
    assert rows == [
        ["paper, no external data", "97.78 %", "", "", "", ""],
        [table.METHODS["sssd"], "85.00 ± 7.07 %", *half, "2", "1.5"],
        [table.METHODS["mae"], "75.00 ± 7.07 %", *half, "2", "1.5"],
        ["nearest neighbour on 32 x 32 pixels", "60.00 %", "50.00 %", "", "1", ""],
    ]
    assert table.notes(results) == [
        "random: accuracy of sssd minus mae, seed by seed: +10.00 ± 14.14 points; higher in 1, "
        "equal in 1 of 2 seeds",
        "1 of 5 models are not trained yet.",
    ]
    sources = "a card, torch 2, python 3, commit c (modified), d; `sssd-fast reproduce`"
    assert sources in table.markdown(results)


def test_picture_has_dots_means_and_published_lines(tmp_path: Path, figures: list[Any]) -> None:
    assert table.picture(made_up(cells=[]), path=tmp_path / "none.png") is None
    table.picture(made_up(), path=tmp_path / "a.png")
    [axes] = figures[-1].axes
    dots, means = axes.lines[:6:2], axes.lines[1:6:2]
    values = [sorted(line.get_xdata()) for line in dots]
    assert values == pytest.approx(np.array([[80, 90], [70, 80], [60, 60]]))
    assert [line.get_xdata()[0] for line in means] == pytest.approx([85, 75, 60])
    assert axes.lines[6].get_xdata()[0] == pytest.approx(97.78)


def test_page_lists_results_of_gpus_first() -> None:
    text = "intro\n\n<!-- results -->\nold\n<!-- /results -->\nend\n"
    cpu = made_up(machines=[{**MACHINE, "type": "cpu", "device": "a processor"}])
    both = table.page(text, {"a": cpu, "b": made_up()})
    assert both.startswith("intro\n\n<!-- results -->\n\n## SARS-CoV-2 CT: ViT 384x12 on 64 x 96")
    assert both.index("a card") < both.index("a processor")
    assert both.count(", CPU\n") == 1
    assert "Not measured" not in both
    assert "old" not in both
    assert both.endswith("<!-- /results -->\nend\n")
    assert table.page(both, {"a": cpu}).count("Not measured.") == 1


def test_results_page_is_that_of_the_committed_files(tmp_path: Path) -> None:
    docs, folder = tmp_path / "docs", tmp_path / "paper"
    shutil.copytree(REPOSITORY / "docs", docs)
    shutil.copytree(REPOSITORY / "benchmarks" / "results" / "paper", folder)
    table.main(folder, docs)
    text = (REPOSITORY / "docs" / "results.md").read_text()
    assert (docs / "results.md").read_text() == text, "run: python -m sssd_fast.reproduce.table"
    (folder / "bad.json").write_text(json.dumps(made_up(split="val")))
    with pytest.raises(SssdError, match=r"bad\.json: needs .* test images"):
        table.main(folder, docs)


def test_external_method_needs_a_folder(covid: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(covid, tmp_path / "out", "--methods external") == 2
    assert "its folder with --external DIR" in capsys.readouterr().err.replace("\n", " ")
