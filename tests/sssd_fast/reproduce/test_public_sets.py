"""Public sets: found at any depth, splits read in every form, missing files named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd_fast.data.index import check_data
from sssd_fast.data.manifest import read_manifest
from sssd_fast.data.split import split_csv
from sssd_fast.errors import DataError
from sssd_fast.reproduce.public_sets import (
    COVID_CT,
    PUBLIC_SETS,
    SARS_COV_2_CT,
    image_root,
    write_official_split,
)

SPLITS = {"train": range(6), "val": range(6, 8), "test": range(8, 12)}


@pytest.fixture
def covid(tmp_path: Path) -> Path:
    """Twelve images of 32 x 32 per class in the published folders, with the authors' lists."""
    random = np.random.default_rng(3)
    top = tmp_path / "COVID-CT"
    for label, bright in (("CT_COVID", 120), ("CT_NonCOVID", 60)):
        place, lists = top / "Images-processed" / label, top / "Data-split" / label[3:]
        place.mkdir(parents=True)
        (lists / "old_split").mkdir(parents=True)
        for split_name, numbers in SPLITS.items():
            names = [f"scan-p{i}-100%{i}.png" for i in numbers]
            for name in names:
                pixels = np.clip(bright + random.integers(-50, 50, (32, 32)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / name)
            (lists / f"{split_name}{label}.txt").write_text("\n".join(names) + "\n")
            (lists / "old_split" / f"{split_name}{label}.txt").write_text("not-this.png\n")
    return top


def test_image_root_finds_the_classes_at_any_depth_or_names_them(covid: Path) -> None:
    root = covid / "Images-processed"
    assert image_root(COVID_CT, covid.parent) == image_root(COVID_CT, root) == root
    for place in (covid, covid / "nothing"):
        with pytest.raises(DataError, match="COVID and non-COVID, the classes of SARS-CoV-2 CT"):
            image_root(SARS_COV_2_CT, place)
    for name in COVID_CT.classes:
        (covid / "copy" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"several places .*Images-processed.*copy"):
        image_root(COVID_CT, covid)


def test_official_split_is_read_from_the_authors_lists(covid: Path, tmp_path: Path) -> None:
    out, root = tmp_path / "official.csv", covid / "Images-processed"
    write_official_split(COVID_CT, covid, out)
    test = {row["path"] for row in read_manifest(out) if row["split"] == "test"}
    assert test == {f"{k}/scan-p{i}-100%{i}.png" for k in COVID_CT.classes for i in range(8, 12)}
    split = split_csv(check_data(root), out)
    assert [len(split.ids(name)) for name in SPLITS] == [12, 4, 8]


def test_official_split_is_read_from_csv_with_other_folders(covid: Path, tmp_path: Path) -> None:
    given, out = covid / "split_official.csv", tmp_path / "official.csv"
    rows = ["images/CT_COVID/scan-p0-100%0.png,CT_COVID,test"]
    rows += ["x/scan-p1-100%1.png,CT_NonCOVID,train"]
    given.write_text("\n".join(["path,label,split", *rows]))
    write_official_split(COVID_CT, covid, out)
    assert read_manifest(out) == [
        {"path": "CT_COVID/scan-p0-100%0.png", "label": "CT_COVID", "split": "test"},
        {"path": "CT_NonCOVID/scan-p1-100%1.png", "label": "CT_NonCOVID", "split": "train"},
    ]


def test_official_split_with_missing_files_is_rejected(covid: Path, tmp_path: Path) -> None:
    out = tmp_path / "official.csv"
    (covid / "Images-processed" / "CT_COVID" / "scan-p3-100%3.png").unlink()
    missing = r"names 1 images that are not in .*\n +CT_COVID/scan-p3-100%3\.png"
    with pytest.raises(DataError, match=missing):
        write_official_split(COVID_CT, covid, out)
    (covid / "Data-split" / "COVID" / "valCT_COVID.txt").unlink()
    with pytest.raises(DataError, match=r"no files called valCT_COVID\.txt"):
        write_official_split(COVID_CT, covid, out)
    assert not out.exists()


@pytest.mark.realdata
@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_real_sets_are_the_published_ones(name: str, tmp_path: Path) -> None:
    which, folder = PUBLIC_SETS[name], Path(os.environ["SSSD_FAST_DATA"]) / name
    index = check_data(image_root(which, folder))
    assert which.departures(index.counts()) == []
    if which.controlled == "official":
        write_official_split(which, folder, tmp_path / "official.csv")
        split = split_csv(index, tmp_path / "official.csv")
        assert [len(split.ids(split_name)) for split_name in SPLITS] == [425, 118, 203]
