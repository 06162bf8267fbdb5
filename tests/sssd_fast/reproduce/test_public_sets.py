"""Public sets: found at any depth, splits read in every form, missing files named."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

from sssd_fast.data.index import check_data, positive_class
from sssd_fast.data.split import split_csv, split_random
from sssd_fast.errors import DataError
from sssd_fast.reproduce.nearest import nearest_rates
from sssd_fast.reproduce.public_sets import (
    COVID_CT,
    PUBLIC_SETS,
    SARS_COV_2_CT,
    departures,
    image_root,
    write_official_split,
)

SPLITS = ("train", "val", "test")


@pytest.fixture
def covid(tmp_path: Path) -> Path:
    """Twelve images of 32 x 32 per class in the published folders, with the authors' lists."""
    random = np.random.default_rng(3)
    top = tmp_path / "COVID-CT"
    for label, short, bright in (("CT_COVID", "COVID", 120), ("CT_NonCOVID", "NonCOVID", 60)):
        place, lists = top / "Images-processed" / label, top / "Data-split" / short
        place.mkdir(parents=True)
        (lists / "old_split").mkdir(parents=True)
        for split_name, numbers in zip(SPLITS, (range(6), range(6, 8), range(8, 12)), strict=True):
            names = [f"scan-p{i}-100%{i}.png" for i in numbers]
            for name in names:
                noise = random.integers(-50, 50, (32, 32))
                Image.fromarray(np.clip(bright + noise, 0, 255).astype(np.uint8)).save(place / name)
            (lists / f"{split_name}CT_{short}.txt").write_text("\n".join(names) + "\n")
            (lists / "old_split" / f"{split_name}CT_{short}.txt").write_text("not-this.png\n")
    return top


def splits_of(path: Path) -> dict[str, set[str]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["path"].startswith(row["label"] + "/") for row in rows)
    return {
        split_name: {row["path"] for row in rows if row["split"] == split_name}
        for split_name in SPLITS
    }


def test_image_root_finds_the_classes_at_any_depth_or_names_them(
    covid: Path, tmp_path: Path
) -> None:
    root = covid / "Images-processed"
    assert image_root(COVID_CT, covid.parent) == image_root(COVID_CT, root) == root
    with pytest.raises(DataError, match="COVID and non-COVID, the classes of SARS-CoV-2 CT"):
        image_root(SARS_COV_2_CT, covid)
    with pytest.raises(DataError, match="is not a folder"):
        image_root(COVID_CT, tmp_path / "nothing")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "CT_COVID.zip").touch()
    with pytest.raises(DataError, match=r"unpack CT_COVID\.zip first"):
        image_root(COVID_CT, tmp_path / "packed")
    for name in COVID_CT.classes:
        (covid / "copy" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"several places .*Images-processed.*copy"):
        image_root(COVID_CT, covid)


def test_the_official_split_from_the_authors_lists(covid: Path, tmp_path: Path) -> None:
    out, root = tmp_path / "official.csv", covid / "Images-processed"
    assert write_official_split(COVID_CT, covid, root, None, out) == "the authors' lists of names"
    assert "CT_NonCOVID/scan-p9-100%9.png" in splits_of(out)["test"]
    split = split_csv(check_data(root), out)
    assert [len(split.ids(split_name)) for split_name in SPLITS] == [12, 4, 8]


def test_the_official_split_from_csv_with_other_folders(covid: Path, tmp_path: Path) -> None:
    root, given = covid / "Images-processed", covid / "split_official.csv"
    rows = [
        ("images/CT_COVID/scan-p0-100%0.png", "CT_COVID", "test"),
        ("x/scan-p1-100%1.png", "CT_NonCOVID", "train"),
    ]
    given.write_text("path,label,split\n" + "".join(",".join(row) + "\n" for row in rows))
    out = tmp_path / "official.csv"
    assert write_official_split(COVID_CT, covid, root, None, out) == "split_official.csv"
    assert splits_of(out) == {
        "train": {"CT_NonCOVID/scan-p1-100%1.png"},
        "val": set(),
        "test": {"CT_COVID/scan-p0-100%0.png"},
    }
    moved = given.rename(tmp_path / "my split.csv")
    assert write_official_split(COVID_CT, covid, root, moved, out) == "my split.csv"
    moved.write_text("path,label\nCT_COVID/scan-p0-100%0.png,CT_COVID\n")
    with pytest.raises(DataError, match="no column split"):
        write_official_split(COVID_CT, covid, root, moved, out)


def test_a_split_that_does_not_fit_is_refused(covid: Path, tmp_path: Path) -> None:
    root, out = covid / "Images-processed", tmp_path / "official.csv"
    (root / "CT_COVID" / "scan-p3-100%3.png").unlink()
    missing = r"names 1 images that are not in .*\n +CT_COVID/scan-p3-100%3\.png"
    with pytest.raises(DataError, match=missing):
        write_official_split(COVID_CT, covid, root, None, out)
    (covid / "Data-split" / "COVID" / "valCT_COVID.txt").unlink()
    with pytest.raises(DataError, match=r"no files called valCT_COVID\.txt.*--official-split"):
        write_official_split(COVID_CT, covid, root, None, out)
    assert not out.exists()


def test_departures_from_the_published_set() -> None:
    assert departures(COVID_CT, {"CT_COVID": 349, "CT_NonCOVID": 397}) == []
    assert departures(COVID_CT, {"CT_COVID": 348}) == [
        "CT_COVID has 348 images, the published set has 349",
        "CT_NonCOVID has 0 images, the published set has 397",
    ]


@pytest.mark.parametrize("split_name", ["test", "val"])
def test_nearest_neighbour_is_scikit_learns(covid: Path, split_name: str) -> None:
    index = check_data(covid / "Images-processed")
    split = split_random(index, 0.34, 1, val=0.25)
    pixels = np.stack(
        [np.asarray(Image.open(index.file(i))).ravel() / 255 for i in range(len(index))]
    )
    labels = np.array(index.labels)
    known = split.train + (split.val if split_name == "test" else [])
    model = KNeighborsClassifier(1, algorithm="brute").fit(pixels[known], labels[known])
    wanted = model.predict(pixels[split.ids(split_name)])
    got = nearest_rates(index, split, split_name, {})
    positive = positive_class(index.classes)
    truth = labels[split.ids(split_name)]
    assert got["confusion"] == confusion_matrix(truth == positive, wanted == positive).tolist()
    assert got["accuracy"] == pytest.approx((wanted == truth).mean())


@pytest.mark.realdata
@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_the_real_sets_are_the_published_ones(name: str, tmp_path: Path) -> None:
    which, folder = PUBLIC_SETS[name], Path(os.environ["SSSD_FAST_DATA"]) / name
    root = image_root(which, folder)
    index = check_data(root, accept_wrong_extension=True)
    assert departures(which, index.counts()) == []
    if which.controlled == "official":
        write_official_split(which, folder, root, None, tmp_path / "official.csv")
        split = split_csv(index, tmp_path / "official.csv")
        assert [len(split.ids(split_name)) for split_name in SPLITS] == [425, 118, 203]
