"""Reports: one safe HTML file, missing files named, synthetic data announced, all results."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from sssd_fast.data.index import check_data
from sssd_fast.errors import DataError
from sssd_fast.evaluation.evaluate import write_evaluation
from sssd_fast.evaluation.plots import PLOTS
from sssd_fast.report.report import write_report

NASTY = '<script>alert("x")</script> & `a|b`.png'
EVALUATIONS = {}  # what write_evaluation leaves, made once per kind: drawing is slow
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting while it reads; collects tags with attributes, and visible text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words.append(data)

    def pictures(self):
        """The embedded files."""
        found = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(source.partition(",")[2]) for source in found]


def read(folder, runs=()):
    """report.html, parsed, and the text of report.md."""
    markdown, page = write_report(folder, runs)
    return Page(page.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8")


def make_run(folder, *, source="ct", evaluated=True, shift=0, patients=None):
    """A run folder as the trainer leaves it, with 10 images of two classes and 3 mistakes."""
    (folder / "images").mkdir(parents=True)
    stage = next((s for s in ("pretrain", "probe") if folder.name.startswith(s)), "finetune")
    config = {"seed": 3, "data": {"source": source}, "model": {"patch_size": 16}}
    config |= {"pretrain": {"epochs": 4, "warmup_epochs": 1}}
    config |= {"finetune": {"epochs": 2, "warmup_epochs": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "command.txt").write_text(f"sssd-fast {stage} --out '{folder.name}'\n")
    env = {"torch": {"version": "2.99"}, "memory": {"available_gib": shift}}
    (folder / "env.json").write_text(json.dumps(env))
    data = {
        "source": source,
        "synthetic": False,
        "classes": ["CT_COVID", "CT_NonCOVID"],
        "counts": {
            "train": {"CT_COVID": 1234, "CT_NonCOVID": 20},
            "test": {"CT_COVID": 5, "CT_NonCOVID": 5},
        },
        "excluded": [{"path": NASTY, "reason": "zero bytes"}],
        "duplicates": ["  identical images: 0 groups"],
        "leaks": [],
        "notes": [],
        "split_protocol": "by patient",
    }
    (folder / "data.json").write_text(json.dumps(data))
    records = [{"kind": "val", "step": 10, "epoch": 2.0, "loss": 0.5, "accuracy": 0.7}]
    for s in range(1, 11):
        record = {"kind": "train", "step": s, "epoch": s / 5, "loss": 2 / s}
        records.append(record | {"images_per_s": 10.0 * s, "time_s": 65.0 * s})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind in ("attention", "reconstruction"):
        for epoch in (2, 10):
            if stage == "pretrain" or kind == "attention":
                grey = 20 * epoch + len(kind)
                Image.new("L", (8, 8), grey).save(folder / "images" / f"{kind}-e{epoch}.png")
    if evaluated:
        key = (shift, patients is not None)
        if key not in EVALUATIONS:
            labels = np.arange(10) % 2
            covid = np.where(labels == 0, 0.9, 0.1)
            covid[[0, 1, 2]] = [0.2, 0.7 + shift, 0.4]
            paths = [NASTY, *(f"{i}.png" for i in range(1, 10))]
            evaluate(folder, labels, covid, paths, patients)
            EVALUATIONS[key] = {
                path.relative_to(folder): path.read_bytes() for path in folder.glob("eval/**/*.*")
            }
        for name, content in EVALUATIONS[key].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def evaluate(folder, labels, covid, paths, patients=None):
    write_evaluation(
        folder,
        labels=labels,
        probabilities=np.stack([covid, 1 - np.asarray(covid)], axis=1),
        paths=paths,
        classes=["CT_COVID", "CT_NonCOVID"],
        positive=0,
        split="test",
        patients=patients,
        baselines={"most frequent class": np.eye(2)[[0] * len(labels)]},
        resamples=100,
        load_image=lambda path: np.full((40, 40), 10, dtype=np.uint8),
    )


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """(run folder, text of report.md, text of report.html) of one fine-tuning."""
    folder = make_run(tmp_path_factory.mktemp("report") / "finetune")
    markdown, page = write_report(folder)
    return folder, markdown.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")


def test_finetune_report_holds_the_results(finetuned):
    """The page shows the numbers of metrics.json, counts, mistakes, command and settings."""
    folder, plain, page = finetuned
    stored = json.loads((folder / "eval/test/metrics.json").read_text())
    html = Page(page)
    assert stored["image"]["accuracy"] == 0.7
    interval = stored["image"]["intervals"]["sensitivity"]
    bounds = f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}"
    assert f"Sensitivity (recall) 60.0 % ({bounds}) 100.0 %" in html.text
    assert f"| Sensitivity (recall) | 60.0 % ({bounds}) | 100.0 % " in plain
    shown = ["1,234", "by patient", "3 of 10 images are wrong", "finetune.epochs", "10:50"]
    shown += ["sssd-fast finetune --out 'finetune'", "55.0 (median)"]
    shown += ["too narrow"]  # the data name no patients
    shown += ["most frequent class", "2 epochs of fine-tuning, 10:50 in total"]
    shown += [
        "ct: 1,264 images; CT_COVID 1,239, CT_NonCOVID 25; train 1,254, test 10",
        "ViT, 12 blocks",
    ]
    hidden = ["pretrain.epochs", "Synthetic", "SYNTHETIC"]
    for text in (html.text, plain):
        assert text.count("70.0 %") == 1
        text = text.replace("\\_", "_")
        assert [one for one in shown if one not in text] == []
        assert [one for one in hidden if one in text] == []
    assert "zero bytes" in html.text
    assert NASTY in html.text  # readable as written, through entities
    places = [html.text.index(f"score {score}") for score in ("0.200", "0.700", "0.400")]
    assert places == sorted(places)


def test_html_is_one_file_without_script_or_network(finetuned):
    """No script (not even from a file name), no outside address, every picture embedded intact."""
    folder, _, text = finetuned
    html = Page(text)
    assert not {"script", "link"} & {tag for tag, _ in html.tags}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.split("data:image")[0])
    attributes = [item for _, found in html.tags for item in found.items()]
    addresses = [value for name, value in attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert not [name for name, _ in attributes if name.startswith("on")]
    files = [f"eval/test/{name}.png" for name in PLOTS]
    files += [f"eval/test/mistakes/{place:02d}.png" for place in range(3)]
    files += [f"eval/test/correct/{place:02d}.png" for place in range(4)]
    files += ["images/curves.png", "images/attention-e10.png"]
    assert html.pictures() == [(folder / name).read_bytes() for name in files]
    assert all(found["alt"] for tag, found in html.tags if tag == "img")
    # details come last and are closed; a checkbox enlarges each picture
    folded = text[text.index("<details>") :]
    for name in ("Attention of sample images", "Files", "Commands and settings", "Environment"):
        assert f"<details><summary>{name}</summary>" in folded
    assert folded.count("<img") == 1
    assert text.count("<img") == len(re.findall(r'<input type="checkbox"[^>]*><img', text)) == 15


def test_markdown_links_exist_and_names_are_escaped(finetuned):
    folder, plain, _ = finetuned
    links = re.findall(r"!\[[^\n]*?\]\(([^)]+)\)", plain)
    assert len(links) == 15
    assert all((folder / link).is_file() for link in links)
    assert "<script>" not in plain
    row = next(line for line in plain.splitlines() if "alert" in line and line.startswith("|"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # the bar in the name opens no column


def test_pretraining_report_shows_the_latest_pictures(tmp_path):
    """Epoch 10 comes after epoch 2 by number; a pre-training has no result section."""
    folder = make_run(tmp_path / "pretrain", evaluated=False)
    html, _ = read(folder)
    names = ("curves.png", "reconstruction-e10.png", "attention-e10.png")
    assert html.pictures() == [(folder / "images" / name).read_bytes() for name in names]
    assert "No evaluation" not in html.text
    assert "pretrain.epochs" in html.text


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "evaluate", "some run"])
def test_report_of_an_empty_folder_names_what_is_missing(tmp_path, stage):
    (tmp_path / stage).mkdir()
    text = read(tmp_path / stage)[0].text
    assert ("No evaluation yet" in text) == (stage != "pretrain")
    assert ("no training records" in text) == (stage != "evaluate")
    for name in ("No data.json", "no command.txt", "No env.json", "No config.yaml"):
        assert name in text


def test_report_names_damaged_files(tmp_path):
    """Half a JSON, a line cut by a kill, a list for a table: the rest is shown."""
    folder = make_run(tmp_path / "finetune")
    (folder / "env.json").write_text('{"torch": ')
    (folder / "config.yaml").write_text("- a\n- b\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    text = read(folder)[0].text
    assert "env.json could not be read" in text
    assert "config.yaml holds a list" in text
    assert "10:50" in text


def test_report_rejects_an_incomplete_evaluation(tmp_path):
    """Of another version or written by hand: named with the command that repairs it."""
    folder = make_run(tmp_path / "finetune")
    path = folder / "eval/test/metrics.json"
    content = json.loads(path.read_text())
    del content["mistakes"], content["patient"]
    path.write_text(json.dumps(content))
    text = read(folder)[0].text
    assert "eval/test/metrics.json lacks patient, mistakes; write it again with:" in text
    assert f"sssd-fast evaluate {folder} --split test" in text
    assert "No evaluation yet" in text


def test_report_shows_samples_and_sizes_of_the_data(tmp_path, slices):
    """Drawn once; if the images are gone, the reason is written."""
    folder = make_run(tmp_path / "finetune", evaluated=False)
    index = check_data(slices)
    index.save(folder / "index.json")
    pictures = read(folder)[0].pictures()
    drawn = [folder / "images" / name for name in ("samples.png", "sizes.png")]
    assert [path.read_bytes() in pictures for path in drawn] == [True, True]
    times = [path.stat().st_mtime_ns for path in drawn]
    read(folder)
    assert times == [path.stat().st_mtime_ns for path in drawn]
    drawn[0].unlink()
    replace(index, root=tmp_path / "gone").save(folder / "index.json")
    assert "No sample images: " in read(folder)[0].text


def test_report_shows_the_test_split_unless_only_another_exists(tmp_path):
    folder = make_run(tmp_path / "finetune")
    result = json.loads((folder / "eval/test/metrics.json").read_text())
    shutil.copytree(folder / "eval/test", folder / "eval/val")
    (folder / "eval/val/metrics.json").write_text(json.dumps(result | {"split": "val"}))
    assert "Test split, 10 images" in read(folder)[0].text
    shutil.rmtree(folder / "eval/test")
    assert "Val split, 10 images" in read(folder)[0].text


@pytest.mark.parametrize("sign", ["source", "data", "classes"])
def test_report_announces_synthetic_data(tmp_path, sign):
    """Any sign is enough: the source in the settings, data.json, or class names."""
    folder = make_run(tmp_path / "finetune", source="synthetic" if sign == "source" else "ct")
    data = json.loads((folder / "data.json").read_text())
    if sign == "data":
        data["synthetic"] = True
    if sign == "classes":
        data["classes"] = ["synthetic_covid", "synthetic_normal"]
    (folder / "data.json").write_text(json.dumps(data))
    html, plain = read(folder)
    assert "Synthetic data These images were drawn by a program." in html.text
    assert "> **SYNTHETIC DATA**" in plain


def test_report_announces_leaks_and_a_single_class(tmp_path):
    folder = make_run(tmp_path / "finetune")
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(data | {"leaks": ["patient 7 in test, train"]}))
    evaluate(folder, [0, 0], [0.9, 0.2], ["a", "b"])
    text = read(folder)[0].text
    assert "The split leaks 1 patients or groups" in text
    assert "patient 7 in test, train" in text
    assert "undefined: images of one class only" in text
    assert "No ROC curve: images of one class only." in text


def test_report_of_several_runs_averages_over_seeds(tmp_path):
    """Fine-tunings are averaged, pre-training is not; equal data and settings are shown once."""
    for seed in (0, 1):
        patients = [str(i // 2) for i in range(10)]
        folder = tmp_path / f"seed-{seed}" / "finetune"
        make_run(folder, shift=-0.3 if seed else 0, patients=patients)
    make_run(tmp_path / "seed-0" / "pretrain", evaluated=False)
    names = ("seed-0/pretrain", "seed-0/finetune", "seed-1/finetune")
    html, plain = read(tmp_path, [tmp_path / name for name in names])
    assert "over 2 runs" in html.text
    assert "| Accuracy | 75.0 % ± 7.1 | 70.0 %" in plain  # 7 and 8 of 10
    assert "Per patient: mean ± sample deviation" in html.text
    titles = "Pre-training: seed-0, Fine-tuning: seed-0, Fine-tuning: seed-1"
    assert f"Files {titles} ct Unusable files" in html.text
    assert html.text.count("1,234") == html.text.count("torch.version") == 1
    assert "memory.available_gib 0 / -0.3" in html.text
    links = re.findall(r"!\[[^\n]*?\]\(([^)]+)\)", plain)
    assert all((tmp_path / link).is_file() for link in links)
    assert len(links) == len(html.pictures())


def test_report_rejects_missing_folders(tmp_path):
    for runs in ((), (tmp_path / "nowhere",)):
        with pytest.raises(DataError, match=r"no run folder at .*nowhere"):
            write_report(tmp_path if runs else tmp_path / "nowhere", runs)
