"""Splits: sizes, stratification and grouping against what each protocol promises; leaks are found; files round-trip."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sssd_fast.data.index import DataIndex, Excluded, ImageRecord
from sssd_fast.data.manifest import read_manifest
from sssd_fast.data.split import Split
from sssd_fast.data.splits import (
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


def make_index(
    counts: tuple[int, ...] = (349, 397), per_patient: int = 0, splits: tuple[str, ...] = ()
) -> DataIndex:
    classes = ["CT_COVID", "CT_NonCOVID", "Other"][: len(counts)]
    records = []
    for label, count in enumerate(counts):
        for i in range(count):
            patient = f"{label}-{i // per_patient}" if per_patient else None
            split = splits[i % len(splits)] if splits else None
            path = f"{classes[label]}/slice_{i + 1}.png"
            records.append(
                ImageRecord(path, label, f"{label}{i}", f"p{label}{i}", 9, 9, "L", split, patient)
            )
    return DataIndex(Path("data"), classes, sorted(records, key=lambda r: r.path))


def parts(split: Split) -> list[list[int]]:
    return [split.train, split.val, split.test]


def assert_partition(split: Split, index: DataIndex) -> None:
    assert sorted(i for part in parts(split) for i in part) == list(range(len(index)))


def patients(index: DataIndex, ids: list[int]) -> set[str | None]:
    return {index.records[i].patient for i in ids}


def test_random_gives_the_148_images_of_the_published_protocol():
    index = make_index()
    split = split_random(index, 0.2, seed=3)
    assert index.counts(split.test) == {"CT_COVID": 69, "CT_NonCOVID": 79}
    assert split.val == []
    assert_partition(split, index)
    assert split == split_random(index, 0.2, seed=3) != split_random(index, 0.2, seed=4)


def test_random_validation_comes_out_of_training_only():
    index = make_index()
    plain = split_random(index, 0.2, 1)
    split = split_random(index, 0.2, 1, val=0.1)
    assert split.test == plain.test
    assert set(split.val) < set(plain.train)
    assert index.counts(split.val) == {
        "CT_COVID": 34,
        "CT_NonCOVID": 39,
    }  # 10 % of all images, rounded down
    assert_partition(split, index)


def test_block_takes_the_last_numbers_in_natural_order():
    index = make_index((12, 21))
    split = split_block(index, 0.25, val=0.2)
    names = [[index.records[i].path for i in part] for part in parts(split)]
    assert {n for n in names[2] if "NonCOVID" not in n} == {
        f"CT_COVID/slice_{i}.png" for i in (10, 11, 12)
    }
    assert {n for n in names[1] if "NonCOVID" not in n} == {
        f"CT_COVID/slice_{i}.png" for i in (8, 9)
    }
    assert {n for n in names[2] if "NonCOVID" in n} == {
        f"CT_NonCOVID/slice_{i}.png" for i in range(17, 22)
    }
    assert_partition(split, index)


def test_natural_order():
    names = ["a10.png", "a9.png", "b1.png", "a9-2.png", "a9-10.png", "a.png", "a09x.png"]
    assert sorted(names, key=natural_key) == [
        "a9-2.png",
        "a9-10.png",
        "a9.png",
        "a09x.png",
        "a10.png",
        "a.png",
        "b1.png",
    ]


@pytest.mark.parametrize("seed", range(4))
def test_patient_split_keeps_patients_whole_and_classes_balanced(seed: int):
    index = make_index((90, 160), per_patient=5)
    split = split_patient(index, 0.2, seed, val=0.2)
    sets = [patients(index, part) for part in parts(split)]
    assert not (sets[0] & sets[1])
    assert not (sets[0] & sets[2])
    assert not (sets[1] & sets[2])
    assert_partition(split, index)
    assert abs(index.counts(split.test)["CT_COVID"] - 18) <= 5
    assert abs(index.counts(split.test)["CT_NonCOVID"] - 32) <= 5
    assert index.counts(split.val) != {"CT_COVID": 0, "CT_NonCOVID": 0}
    assert find_leaks(index, split) == []
    assert split == split_patient(index, 0.2, seed, val=0.2)


def test_random_split_of_patients_is_reported_as_a_leak():
    index = make_index((20, 20), per_patient=5)
    leaks = find_leaks(index, split_random(index, 0.3))
    assert leaks
    assert all(leak.startswith("patient ") and "test, train" in leak for leak in leaks)
    assert "leak: patient 0-0 in test, train" in split_summary(split_random(index, 0.3), index)


def test_identical_pictures_in_two_parts_are_a_leak():
    index = make_index((10, 10))
    records = list(index.records)
    records[0] = ImageRecord(**{**vars(records[0]), "pixel_hash": records[1].pixel_hash})
    index = DataIndex(index.root, index.classes, records)
    split = Split("x", list(range(1, 20)), [], [0], "by hand")
    assert find_leaks(index, split) == [
        f"identical pictures {records[0].path} (test) = {records[1].path} (train)"
    ]


@pytest.mark.parametrize("per_patient", [0, 4])
def test_kfold_tests_every_image_once_and_keeps_patients_whole(per_patient: int):
    index = make_index((60, 100), per_patient=per_patient)
    tested: Counter[int] = Counter()
    for fold in range(5):
        split = split_kfold(index, 5, fold, seed=2, val=0.1)
        assert_partition(split, index)
        assert index.counts(split.test) == {"CT_COVID": 12, "CT_NonCOVID": 20}
        if per_patient:
            assert not patients(index, split.train + split.val) & patients(index, split.test)
            assert not patients(index, split.train) & patients(index, split.val)
        tested.update(split.test)
    assert tested == Counter(range(160))


@pytest.mark.parametrize("odd", ['odd, "name"\n%0 (1)\r.png', "return\r.png", " spaced .png"])
def test_saved_split_reads_back_as_csv_and_as_manifest(tmp_path: Path, odd: str):
    index = make_index((20, 20), per_patient=2)
    records = list(index.records)
    records[5] = ImageRecord(**{**vars(records[5]), "path": f"CT_COVID/{odd}"})
    index = DataIndex(index.root, index.classes, records)
    split = split_patient(index, 0.25, val=0.25)
    save_split(split, tmp_path / "mine.csv", index)
    again = split_csv(index, tmp_path / "mine.csv")
    assert (again.train, again.val, again.test) == (split.train, split.val, split.test)
    rows = {row["path"]: row for row in read_manifest(tmp_path / "mine.csv")}
    for name in ("train", "val", "test"):
        for i in split.ids(name):
            r = records[i]
            assert rows[r.path] == {
                "path": r.path, "label": index.classes[r.label], "split": name, "patient": r.patient
            }  # fmt: skip


def test_csv_that_does_not_fit_the_index_lists_every_row(tmp_path: Path):
    index = make_index((3, 3))
    index = DataIndex(
        index.root, index.classes, index.records, [Excluded("CT_COVID/bad.png", "truncated")]
    )
    path = tmp_path / "s.csv"
    rows = "CT_COVID/slice_1.png,CT_COVID,train\nCT_COVID/bad.png,CT_COVID,train\n"
    path.write_text(
        "path,label,split\n"
        + rows
        + "CT_NonCOVID/slice_1.png,CT_COVID,test\nnew.png,CT_COVID,val\n"
    )
    with pytest.raises(DataError) as error:
        split_csv(index, path)
    assert "2 rows do not fit" in str(error.value)
    assert "new.png is not in the index" in str(error.value)
    assert "CT_NonCOVID/slice_1.png: label CT_COVID, in the index CT_NonCOVID" in str(error.value)
    path.write_text("path,label,split\n" + rows)
    split = split_csv(
        index, path
    )  # the excluded image is passed over, the others are left out by choice
    assert split.train == [0]
    assert split.unused == [1, 2, 3, 4, 5]
    assert "not used: 5" in split_summary(split, index)
    path.write_text("path,label\nCT_COVID/slice_1.png,CT_COVID\n")
    with pytest.raises(DataError, match="no column split"):
        split_csv(index, path)


def test_manifest_split_and_a_validation_part_cut_from_it():
    index = make_index((20, 20), splits=("train", "train", "test", "train"))
    split = split_manifest(index)
    assert len(split.train) == 30
    assert len(split.test) == 10
    assert split.val == []
    carved = carve_validation(index, split, 0.2, seed=1)
    assert carved.test == split.test
    assert len(carved.val) == 8
    assert set(carved.val) | set(carved.train) == set(split.train)
    with pytest.raises(DataError, match="already has a validation part"):
        carve_validation(index, carved, 0.2)
    with pytest.raises(DataError, match="no split column"):
        split_manifest(make_index((3, 3)))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda i: split_random(i, 0.0), "test is 0.0; a fraction above 0"),
        (lambda i: split_random(i, 1.0), "test is 1.0"),
        (lambda i: split_random(i, 0.5, val=0.5), "leave nothing to train on"),
        (lambda i: split_random(i, 0.2, val=-0.1), "val is -0.1"),
        (lambda i: split_random(i, 0.05), "leaves a class without one in the test part"),
        (
            lambda i: split_block(i, 0.05),
            "test part would hold no image of class CT_COVID, CT_NonCOVID",
        ),
        (lambda i: split_block(i, 0.2, val=0.01), "val part would hold no image"),
        (lambda i: split_patient(i), "10 of 10 images have no patient.*use split_block"),
        (lambda i: split_kfold(i, 6, 0), "class CT_COVID has 5 images; 6 folds need at least 6"),
        (lambda i: split_kfold(i, 5, 5), "fold 5 of k = 5"),
        (lambda i: split_kfold(i, 1, 0), "k >= 2"),
        (lambda i: carve_validation(i, split_random(i), 0.0), "val is 0.0"),
    ],
)
def test_impossible_requests_are_refused(call, match: str):
    with pytest.raises(DataError, match=match):
        call(make_index((5, 5)))


def test_one_patient_per_class_cannot_be_split():
    with pytest.raises(DataError, match="no image of class"):
        split_patient(make_index((5, 5), per_patient=5))
    with pytest.raises(DataError, match="1 patient cannot be divided"):
        split_patient(make_index((5,), per_patient=5))


def test_parts_may_not_overlap_and_train_may_not_be_empty():
    with pytest.raises(DataError, match="1 images lie in two parts"):
        Split("x", [0, 1], [], [1], "by hand")
    with pytest.raises(DataError, match="train part is empty"):
        Split("x", [], [], [1], "by hand")
    with pytest.raises(DataError, match="no part 'dev'"):
        Split("x", [0], [], [1], "by hand").ids("dev")
