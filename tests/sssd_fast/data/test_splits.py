"""Splits: sizes, stratification and grouping of each protocol; leaks; files round-trip."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sssd_fast.data.index import DataIndex, Excluded, ImageRecord
from sssd_fast.data.manifest import read_manifest
from sssd_fast.data.split import (
    Split,
    carve_validation,
    find_leaks,
    natural_key,
    save_split,
    split_block,
    split_csv,
    split_kfold,
    split_manifest,
    split_patient,
    split_random,
    split_summary,
)
from sssd_fast.errors import DataError

SPLITS = ("train", "val", "test")


def make_index(
    counts: tuple[int, ...] = (349, 397), per_patient: int = 0, splits: tuple[str, ...] = ()
) -> DataIndex:
    classes = ["CT_COVID", "CT_NonCOVID"][: len(counts)]
    records = []
    for label, count in enumerate(counts):
        for i in range(count):
            patient = f"{label}-{i // per_patient}" if per_patient else None
            split = splits[i % len(splits)] if splits else None
            path = f"{classes[label]}/slice_{i + 1}.png"
            hashes = (f"{label}{i}", f"p{label}{i}")
            records.append(ImageRecord(path, label, *hashes, 9, 9, "L", split, patient))
    return DataIndex(Path("data"), classes, sorted(records, key=lambda r: r.path))


def with_record(index: DataIndex, i: int, **changes: str) -> DataIndex:
    records = list(index.records)
    records[i] = replace(records[i], **changes)
    return replace(index, records=records)


def assert_every_image_once(split: Split, index: DataIndex) -> None:
    assert sorted([*split.train, *split.val, *split.test]) == list(range(len(index)))


def patients(index: DataIndex, ids: list[int]) -> set[str | None]:
    return {index.records[i].patient for i in ids}


def test_random_split_has_the_148_test_images_of_the_published_protocol():
    index = make_index()
    split = split_random(index, 0.2, seed=3)
    assert index.counts(split.test) == {"CT_COVID": 69, "CT_NonCOVID": 79}
    assert split.val == []
    assert_every_image_once(split, index)
    assert split == split_random(index, 0.2, seed=3) != split_random(index, 0.2, seed=4)


def test_random_validation_is_taken_from_training():
    index = make_index()
    plain = split_random(index, 0.2, 1)
    split = split_random(index, 0.2, 1, val=0.1)
    assert split.test == plain.test
    assert set(split.val) < set(plain.train)
    # 10 % of all images, rounded down
    assert index.counts(split.val) == {"CT_COVID": 34, "CT_NonCOVID": 39}
    assert_every_image_once(split, index)


def test_block_split_takes_the_last_numbers_in_natural_order():
    index = make_index((12, 21))
    split = split_block(index, 0.25, val=0.2)

    def numbers(name: str, label: str) -> set[int]:
        paths = [index.records[i].path for i in split.ids(name)]
        return {int(p.split("_")[-1][:-4]) for p in paths if p.startswith(f"{label}/")}

    assert numbers("test", "CT_COVID") == {10, 11, 12}
    assert numbers("val", "CT_COVID") == {8, 9}
    assert numbers("test", "CT_NonCOVID") == set(range(17, 22))
    assert_every_image_once(split, index)
    names = ["a10.png", "a9.png", "b1.png", "a9-2.png", "a9-10.png", "a.png", "a09x.png"]
    ordered = ["a9-2.png", "a9-10.png", "a9.png", "a09x.png", "a10.png", "a.png", "b1.png"]
    assert sorted(names, key=natural_key) == ordered


@pytest.mark.parametrize("seed", range(4))
def test_patient_split_keeps_patients_whole_and_classes_balanced(seed: int):
    index = make_index((90, 160), per_patient=5)
    split = split_patient(index, 0.2, seed, val=0.2)
    train, val, test = (patients(index, split.ids(name)) for name in SPLITS)
    assert not train & val
    assert not train & test
    assert not val & test
    assert_every_image_once(split, index)
    assert abs(index.counts(split.test)["CT_COVID"] - 18) <= 5
    assert abs(index.counts(split.test)["CT_NonCOVID"] - 32) <= 5
    assert min(index.counts(split.val).values()) > 0
    assert find_leaks(index, split) == []
    assert split == split_patient(index, 0.2, seed, val=0.2)


@pytest.mark.parametrize("per_patient", [0, 4])
def test_kfold_tests_every_image_once_and_keeps_patients_whole(per_patient: int):
    index = make_index((60, 100), per_patient=per_patient)
    tested: Counter[int] = Counter()
    for fold in range(5):
        split = split_kfold(index, 5, fold, seed=2, val=0.1)
        assert_every_image_once(split, index)
        assert index.counts(split.test) == {"CT_COVID": 12, "CT_NonCOVID": 20}
        if per_patient:
            assert not patients(index, split.train + split.val) & patients(index, split.test)
            assert not patients(index, split.train) & patients(index, split.val)
        tested.update(split.test)
    assert tested == Counter(range(160))


def test_leaks_name_shared_patients_and_identical_images():
    index = make_index((20, 20), per_patient=5)
    split = split_random(index, 0.3)
    leaks = find_leaks(index, split)
    assert leaks
    assert all(leak.startswith("patient ") and "test, train" in leak for leak in leaks)
    assert "leak: patient 0-0 in test, train" in split_summary(split, index)
    index = make_index((10, 10))
    index = with_record(index, 0, pixel_hash=index.records[1].pixel_hash)
    split = Split("x", list(range(1, 20)), [], [0], "by hand")
    first, second = (r.path for r in index.records[:2])
    assert find_leaks(index, split) == [f"identical images {first} (test) = {second} (train)"]


@pytest.mark.parametrize("odd", ['odd, "name"\n%0 (1)\r.png', "return\r.png", " spaced .png"])
def test_saved_split_reads_back_as_csv_and_as_manifest(tmp_path: Path, odd: str):
    index = with_record(make_index((20, 20), per_patient=2), 5, path=f"CT_COVID/{odd}")
    split = split_patient(index, 0.25, val=0.25)
    save_split(split, tmp_path / "mine.csv", index)
    again = split_csv(index, tmp_path / "mine.csv")
    assert (again.train, again.val, again.test) == (split.train, split.val, split.test)
    rows = {row["path"]: row for row in read_manifest(tmp_path / "mine.csv")}
    for i, name in split.split_of().items():
        r = index.records[i]
        label = index.classes[r.label]
        expected = {"path": r.path, "label": label, "split": name, "patient": r.patient}
        assert rows[r.path] == expected


def test_csv_rows_that_do_not_match_the_index_are_listed(tmp_path: Path):
    index = replace(make_index((3, 3)), excluded=[Excluded("CT_COVID/bad.png", "truncated")])
    path = tmp_path / "s.csv"
    rows = "CT_COVID/slice_1.png,CT_COVID,train\nCT_COVID/bad.png,CT_COVID,train\n"
    wrong = "CT_NonCOVID/slice_1.png,CT_COVID,test\nnew.png,CT_COVID,val\n"
    path.write_text("path,label,split\n" + rows + wrong)
    with pytest.raises(DataError, match="2 rows do not match") as error:
        split_csv(index, path)
    assert "new.png is not in the index" in str(error.value)
    assert "CT_NonCOVID/slice_1.png: label CT_COVID, in the index CT_NonCOVID" in str(error.value)
    path.write_text("path,label,split\n" + rows)
    split = split_csv(index, path)
    assert split.train == [0]
    assert "not used: 5" in split_summary(split, index)
    path.write_text("path,label\nCT_COVID/slice_1.png,CT_COVID\n")
    with pytest.raises(DataError, match="no column split"):
        split_csv(index, path)


def test_manifest_split_and_validation_cut_from_it():
    index = make_index((20, 20), splits=("train", "train", "test", "train"))
    split = split_manifest(index)
    assert [len(split.ids(name)) for name in SPLITS] == [30, 0, 10]
    carved = carve_validation(index, split, 0.2, seed=1)
    assert carved.test == split.test
    assert len(carved.val) == 8
    assert set(carved.val) | set(carved.train) == set(split.train)
    with pytest.raises(DataError, match="no split column"):
        split_manifest(make_index((3, 3)))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda i: split_random(i, 0.4, val=0.6),
            r"data.val_fraction 0.6 of 10 images leaves none of the 6",
        ),
        (lambda i: split_block(i, 0.5, val=0.5), "leave no training images"),
        (lambda i: split_random(i, 0.05), r"data.test_fraction 0.05 leaves test without"),
        (lambda i: split_random(i, 0.4, val=0.1), r"data.val_fraction 0.1 leaves val without"),
        (lambda i: split_block(i, 0.05), "test would have no image of class CT_COVID, CT_NonCOVID"),
        (lambda i: split_block(i, 0.2, val=0.01), "val would have no image"),
        (lambda i: split_patient(i), "10 of 10 images have no patient.*set data.split=block"),
        (lambda i: split_kfold(i, 6, 0), "class CT_COVID has 5 images; 6 folds need 6"),
        (lambda i: Split("x", [0, 1], [], [1], ""), "1 images are listed twice"),
        (lambda i: Split("x", [], [], [1], ""), "train is empty"),
    ],
)
def test_impossible_splits_are_refused(call, match: str):
    with pytest.raises(DataError, match=match):
        call(make_index((5, 5)))


@pytest.mark.parametrize(
    ("counts", "match"), [((5, 5), "no image of class"), ((5,), "1 patient cannot be divided")]
)
def test_one_patient_per_class_cannot_be_split(counts: tuple[int, ...], match: str):
    with pytest.raises(DataError, match=match):
        split_patient(make_index(counts, per_patient=5))
