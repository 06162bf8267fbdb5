"""README's table and docs/results.md from the files of `sssd-fast reproduce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import experiments
from sssd_fast.errors import SssdError
from tests.sssd_fast.reproductions import made_up


def save(folder: Path, name: str, **changes: Any) -> None:
    (folder / experiments.FOLDER).mkdir(exist_ok=True)
    (folder / experiments.FOLDER / name).write_text(json.dumps(made_up(**changes)))


def test_without_files_nothing_is_claimed(tmp_path: Path) -> None:
    assert experiments.section([]) == "NVIDIA GPU: not measured."
    page = experiments.page([])
    assert page.rstrip().endswith("Not measured.")
    assert "|" not in page.split("```")[0]  # no table
    assert experiments.draw([], tmp_path) == []


def test_every_file_is_shown_gpus_first(tmp_path: Path) -> None:
    machine = made_up()["machines"][0]
    save(tmp_path, "a.json", machines=[{**machine, "type": "cpu", "device": "a processor"}])
    save(tmp_path, "b.json")
    found = experiments.find(tmp_path)
    assert [one["file"] for one in found] == ["b.json", "a.json"]
    text = experiments.section(found)
    assert "not measured" not in text
    assert "64 x 96 pixels, a card" in text
    assert "a processor" not in text
    assert "| paper, no external data | 97.78 % |" in text
    assert "| SSSD: masked autoencoder with self-distillation | 85.00 ± 7.07 % |" in text
    assert "|  | stratified random 80/20, the paper's protocol |" in text
    page = experiments.page(found)
    assert "## SARS-CoV-2 CT: ViT 384x12 on 64 x 96 pixels\n" in page
    assert "## SARS-CoV-2 CT: ViT 384x12 on 64 x 96 pixels, CPU\n" in page
    assert "higher in 1, equal in 1 of 2 seeds" in page
    for path in experiments.draw(found, tmp_path):
        assert f"](results/{path.name})" in page
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (
        experiments.section(found[1:])
        == "NVIDIA GPU: not measured. Small models on a processor: docs/results.md."
    )


def test_a_column_for_each_split(tmp_path: Path) -> None:
    cells = made_up()["cells"]
    cells += [
        {**cell, "protocol": "controlled", "image": {**cell["image"], "accuracy": 0.5}}
        for cell in cells[:2]
    ]
    save(tmp_path, "a.json", cells=cells)
    rows = [
        line
        for line in experiments.section(experiments.find(tmp_path)).splitlines()
        if line.startswith("| ")
    ]
    assert rows[0].count("|") == 4
    assert "| the same without distillation | 75.00 ± 7.07 % | 50.00 ± 0.00 % |" in rows
    assert "| paper, no external data | 97.78 % |  |" in rows
    assert rows[-1] == "| nearest neighbour on 32 x 32 pixels | 60.00 % | 60.00 % |"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a results.json"),
        ("{}", "not a results.json"),
        (json.dumps(made_up(schema="other/1")), "its schema is 'other/1'"),
        (
            json.dumps(made_up(dataset="other")),
            "its data set is 'other', known are covid-ct, sars-cov-2-ct",
        ),
        (json.dumps(made_up(part="val")), "evaluated on val images"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    save(tmp_path, "good.json")
    (tmp_path / experiments.FOLDER / "bad.json").write_text(text)
    with pytest.raises(SssdError, match=message) as error:
        experiments.find(tmp_path)
    assert "bad.json" in str(error.value)
