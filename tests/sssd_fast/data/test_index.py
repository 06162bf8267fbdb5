"""`check_data`: good files are indexed, bad ones are named, limits and manifests are enforced."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.config import DataConfig
from sssd_fast.data import index as index_module
from sssd_fast.data.index import DataIndex, check_data, identical_images
from sssd_fast.data.manifest import read_manifest
from sssd_fast.data.pixels import decode_record, store_key
from sssd_fast.data.split import Split, find_leaks, make_split, split_csv
from sssd_fast.errors import DataError
from sssd_fast.evaluation.predict import find_images, write_predictions
from sssd_fast.run.device import World
from sssd_fast.run.folder import Run

ODD_NAMES = [
    "with space.png",
    "per%20cent%0.png",
    "(brackets).png",
    "new\nline.png",
    "ünï.png",
    'a,comma"quote.png',
]


def image(seed: int, height: int = 20, width: int = 24) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for i, name in enumerate(ODD_NAMES):
        save(root / "covid" / name, i)
    for i in range(6):
        save(root / "normal" / "deeper" / f"{i}.png", 100 + i)
    return root


def test_folder_per_class_is_indexed_with_correct_facts(data: Path):
    (data / "covid" / ".DS_Store").write_text("hidden")
    (data / "covid" / "notes.txt").write_text("x")
    (data / "readme.md").write_text("x")
    index = check_data(data)
    assert index.classes == ["covid", "normal"]
    assert index.counts() == {"covid": 6, "normal": 6}
    assert {Path(r.path).name for r in index.records if r.label == 0} == set(ODD_NAMES)
    for i, record in enumerate(index.records):
        content = (data / record.path).read_bytes()
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        assert (record.height, record.width, record.mode) == (20, 24, "L")
        assert index.file(i) == data / record.path
    assert "ignored 2 files" in index.notes[0]
    assert ".DS_Store" not in index.summary()


def test_every_kind_of_bad_file_is_named_and_excluded(data: Path):
    folder = data / "covid"
    (folder / "truncated.png").write_bytes((folder / "with space.png").read_bytes()[:-60])
    (folder / "zero.png").touch()
    image(50).save(folder / "renamed.jpg", "PNG")
    image(51).save(folder / "gif (really).png", "GIF")
    (folder / "text.jpg").write_text("not an image")
    (folder / "line\nbreak.png").touch()
    index = check_data(data, max_bad_fraction=0.5, accept_wrong_extension=False)
    reasons = {Path(e.path).name: e.reason for e in index.excluded}
    assert "truncated or damaged PNG" in reasons.pop("truncated.png")
    assert "the content is GIF" in reasons.pop("gif (really).png")
    assert "not a known image format" in reasons.pop("text.jpg")
    assert reasons == {
        "zero.png": "empty file (0 bytes)",
        "line\nbreak.png": "empty file (0 bytes)",
        "renamed.jpg": "wrong extension: the name says JPEG, the content is PNG",
    }
    assert len(index) == 12
    assert "line\\nbreak.png: empty file" in index.summary()


def test_images_with_a_wrong_extension_are_kept_with_one_note(data: Path):
    names = [f"covid/renamed{i}.jpg" for i in range(3)]
    for i, name in enumerate(names):
        image(50 + i).save(data / name, "PNG")
    out = data.parent / "index.json"
    index = check_data(data, out=out)
    assert {*names} < {r.path for r in index.records}
    (note,) = index.notes
    assert note.startswith("3 images with a wrong extension kept, such as covid/renamed0.jpg")
    assert json.loads(out.read_text())["wrong_extension"] == names
    assert DataIndex.load(out) == index


def test_too_many_bad_files_are_an_error_that_lists_them_and_the_options(data: Path):
    (data / "covid" / "zero.png").touch()
    image(50).save(data / "covid" / "renamed.jpg", "PNG")
    with pytest.raises(DataError) as error:
        check_data(data, accept_wrong_extension=False)
    for text in (
        "2 of 14 images are unusable (14.3%); the limit is 1.0%",
        "covid/zero.png: empty file",
        "--max-bad-fraction",
        "--max-bad-fraction (data.max_bad_fraction) 0.143",
        "1 of them are good images with a wrong extension",
        "omit --reject-wrong-extension",
    ):
        assert text in str(error.value)
    assert len(check_data(data, max_bad_fraction=0.15)) == 13
    with pytest.raises(DataError, match=r"max_bad_fraction is 1\.5"):
        check_data(data, max_bad_fraction=1.5)


def test_sets_and_classes_without_images_report_what_was_found(data: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        check_data(tmp_path / "nowhere")
    (data / "third").mkdir()
    (data / "third" / "a.png").touch()
    with pytest.raises(DataError, match=r"(?s)image left in class third.*third/a.png: empty"):
        check_data(data, max_bad_fraction=0.5)
    other = tmp_path / "other"
    save(other / "loose.png", 0)
    (other / "a").mkdir()
    (other / "a" / "slice.dcm").write_text("x")
    match = r"no images found \(ignored 1 .dcm, 1 .png directly in the folder\)"
    with pytest.raises(DataError, match=match):
        check_data(other)


def test_unreadable_folder_is_an_error_and_not_a_smaller_set(data: Path, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deeper: folder cannot be read \(Permission denied\)"):
        check_data(data)


# ---- manifests ----


def manifest(root: Path, text: str) -> Path:
    path = root / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_manifest_gives_class_split_and_patient(data: Path):
    rows = [
        "\ufeffpath,label,split,patient,score",  # with the mark that Excel writes
        "normal/deeper/0.png,7,train,p1,1",
        "normal/deeper/1.png,ten,test,,2",
        "covid/gone.png,7,val,p2,3",
    ]
    path = manifest(data, "\n".join(rows))
    index = check_data(path, max_bad_fraction=0.5)
    assert index == check_data(data, path, max_bad_fraction=0.5)
    assert index.classes == ["7", "ten"]
    assert index.root == data
    found = [(r.label, r.split, r.patient) for r in index.records]
    assert found == [(0, "train", "p1"), (1, "test", None)]
    assert [(e.path, e.reason) for e in index.excluded] == [("covid/gone.png", "no such file")]
    assert any("score" in note for note in index.notes)


def test_manifest_errors_are_listed_all_at_once(data: Path):
    lines = {
        "a.png,x,train": "",
        "a.png,y,train": "line 3: path a.png was already in line 2",
        "./a.png,x,train": "line 4: path ./a.png was already",
        "../up.png,x,train": "line 5: path ../up.png leaves the data folder",
        "/etc/passwd,x,test": "line 6: path /etc/passwd leaves",
        "b.png,,train": "line 7: empty label",
        "c.png,x,training": "line 8: split 'training' is not one of train, val, test",
        ",x,val": "line 9: empty path",
        "d.png,x": "line 10: not 3 cells",
        "e/../../f.png,x,val": "line 11: path e/../../f.png leaves",
    }
    with pytest.raises(DataError, match="9 problems") as error:
        read_manifest(manifest(data, "\n".join(["path,label,split", *lines])))
    for problem in lines.values():
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file,label\na.png,x\n", "no column path; the header is 'file,label'"),
        ("path;label\na.png;x\n", "no column path and label.*separated by commas"),
        ("path,label\n", "no rows"),
    ],
)
def test_manifest_without_the_needed_columns_is_refused(data: Path, text: str, match: str):
    with pytest.raises(DataError, match=match):
        check_data(data, manifest(data, text))


# ---- names and encodings ----


def test_manifest_of_windows_or_macos_names_the_files_on_disk(tmp_path: Path):
    root = tmp_path / "ct"
    for i, name in enumerate(("caf\u00e9.png", "b.png", "c.png")):
        save(root / "images" / name, i)
    table = root / "list.csv"
    text = "path,label,split\r\nimages\\cafe\u0301.png,a,train\r\nimages\\b.png,b,test\r\n"
    table.write_bytes(text.encode("utf-16"))
    index = check_data(table)
    assert [r.path for r in index.records] == ["images/caf\u00e9.png", "images/b.png"]
    assert index.notes[0].startswith("2 paths of the manifest have \\ or another Unicode form")
    split = split_csv(index, table)
    assert (split.train, split.test) == ([0], [1])
    table.write_text("path,label\nimages/b.png,1\nimages/c.png,1.0\n")
    assert check_data(table).notes == ["separate classes with almost the same name: 1, 1.0"]
    table.write_text("path,label\nimages\\b.png,a\nimages/b.png,a\n")
    with pytest.raises(DataError, match="several rows of the manifest name one file"):
        check_data(table)
    table.write_text("path,label\nC:\\ct\\b.png,a\n")
    with pytest.raises(DataError, match="leaves the data folder; only relative paths"):
        check_data(table)


def test_names_that_are_not_utf8_are_kept_for_files_and_refused_for_classes(tmp_path: Path):
    odd = os.fsdecode(b"caf\xe9.png")
    root = tmp_path / "ct"
    save(root / "a" / odd, 1)
    save(root / "b" / "2.png", 2)
    (root / "b" / os.fsdecode(b"bad\xe9.png")).write_text("x")
    index = check_data(root, max_bad_fraction=0.5, out=tmp_path / "index.json")
    assert DataIndex.load(tmp_path / "index.json").records[0].path == f"a/{odd}"
    write_predictions(tmp_path / "p.csv", ["x", "y"], [root / "a" / odd], np.array([[0.25, 0.75]]))
    assert b"a/caf\xe9.png,y,0.25,0.75\n" in (tmp_path / "p.csv").read_bytes()
    excluded = [asdict(e) for e in index.excluded]
    run = cast(Any, SimpleNamespace(world=World(torch.device("cpu")), out=tmp_path))
    Run.write_json(run, "x.json", excluded)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == excluded
    save(root / os.fsdecode(b"n\xe3o") / "3.png", 3)
    with pytest.raises(DataError, match=r"class folder n\\udce3o is not UTF-8; rename it"):
        check_data(root)
    (root / "list.csv").write_bytes(b"path,label,patient\nb/2.png,n\xe3o,p\nb/2.png,b,J\xf6rg\n")
    with pytest.raises(DataError) as raised:
        check_data(root / "list.csv")
    assert "line 2: label n\\udce3o is not UTF-8; save the table as UTF-8" in str(raised.value)
    assert "line 3: patient J\\udcf6rg is not UTF-8" in str(raised.value)


# ---- layouts ----


def layout(root: Path, text: str) -> Path:
    """An image for each word A/B/N: N images in the folder A/B; N = 0 makes an empty folder."""
    for place, count in (word.rsplit("/", 1) for word in text.split()):
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(int(count)):
            save(root / place / f"{i}.png", hash((place, i)) % 2**32)
    return root


def test_split_folders_above_or_below_the_classes_are_read_as_the_split(tmp_path: Path):
    above = "Train/covid/6 train/normal/6 valid/covid/2 valid/normal/2 test_set/covid/3 "
    above += "test_set/normal/4"
    below = "covid/training/6 normal/training/6 covid/val/2 normal/val/2 covid/Test/3 normal/Test/4"
    for name, text in (("above", above), ("below", below)):
        index = check_data(layout(tmp_path / name, text))
        assert index.counts() == {"covid": 11, "normal": 12}
        split = make_split(DataConfig(), index)
        sizes = {s: index.counts(split.ids(s)) for s in ("train", "val", "test")}
        assert sizes["train"] == {"covid": 6, "normal": 6}
        assert sizes["val"] == {"covid": 2, "normal": 2}
        assert sizes["test"] == {"covid": 3, "normal": 4}
        assert "give the split; data.split=random draws another one" in index.notes[0]
        assert len(make_split(DataConfig(split="random"), index).test) == 4
    only = check_data(layout(tmp_path / "no test", "train/a/2 train/b/2 val/a/2 val/b/2"))
    with pytest.raises(DataError, match=r"no test images; .*data\.split=random"):
        make_split(DataConfig(), only)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("wrap/covid/2 wrap/normal/2", r"only folder, wrap, holds covid, normal; give .*wrap$"),
        ("d/train/a/2 d/train/b/2 d/test/a/2 d/test/b/2", r"only folder, d, holds test, train"),
        ("train/a/2 train/b/2", r"only folder, train, is a split, and a, b are its classes"),
        ("fold1/a/2 fold1/b/2 fold2/a/2 fold2/b/2", "folds of the classes a, b.*split=kfold"),
        ("train/2 test/2", "hold.* images that are in no class folder; needed: SPLIT/CLASS"),
        ("train/a/2 test/a/2 notes/2", "test, train are splits, but notes is none"),
        ("a/train/2 a/test/2 b/2", r"splits below them \(test, train\), but b also holds images"),
        ("covid/2 normal/0", "no file in the folder normal"),
    ],
)
def test_layout_that_would_be_misread_is_refused_with_what_was_seen(
    tmp_path: Path, text: str, reason: str
):
    with pytest.raises(DataError, match=reason):
        check_data(layout(tmp_path, text))
    # without labels every image counts
    files = sum(int(word.rsplit("/", 1)[1]) for word in text.split())
    assert len(check_data(tmp_path, labelled=False)) == files


def test_masks_helper_folders_and_almost_equal_classes_are_named(tmp_path: Path):
    text = "COVID/images/3 COVID/masks/3 covid/2 normal/2 normal/lung masks/2 docs/0 __MACOSX/a/1"
    root = layout(tmp_path, text.replace("lung masks", "Masks"))
    for helper in ("@eaDir", ".ipynb_checkpoints"):
        layout(root, f"{helper}/1 normal/{helper}/1")
    (root / "docs" / "readme.txt").write_text("x")
    index = check_data(root)
    assert index.counts() == {"COVID": 3, "covid": 2, "normal": 2}
    assert index.notes == [
        "ignored 6 files that are not images of a class: 1 .txt, 2 in folders named Masks, "
        "3 in folders named masks",
        "no image of a class in the folder docs",
        "separate classes with almost the same name: COVID, covid",
    ]
    found = find_images([str(root)], notes := [])
    assert sorted(found) == sorted(index.root / r.path for r in index.records)
    assert notes[0] == index.notes[0]
    patients = check_data(layout(tmp_path / "one", "all/p1/1 all/p2/1"))
    assert "1 class, all; if its 2 folders (p1, p2) are the classes, give" in patients.notes[0]


# ---- 16-bit images ----


def save_16_bit(folder: Path, offset: int, *extra: int) -> Path:
    """Four slices of air (-1000 HU) and tissue (40 HU) + `offset`; `extra`: pixels of one."""
    for i in range(4):
        hu = np.where(np.indices((20, 24))[1] < 12, -1000, 40 + i).astype(np.int64) + offset
        if i == 0:
            hu[0, : len(extra)] = extra
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(hu.astype(np.uint16)).save(path)
    return folder


def test_16_bit_images_of_a_set_have_one_grey_range(tmp_path: Path):
    """One metal pixel over 12 bits made its image 16 times darker than the others."""
    index = check_data(save_16_bit(tmp_path / "ct", 1024, 5000), out=tmp_path / "index.json")
    assert index.grey_range == (0, 4095)
    assert DataIndex.load(tmp_path / "index.json") == index
    first, third = (decode_record(index, i, 1) for i in (0, 1))
    assert (first[9, 20], third[9, 20]) == (66, 66)  # 1064 and 1066 of 4095, of 255
    assert (first[0, 0], first[9, 3]) == (255, 1)
    assert "values from 0 to 4095 are shown from black to white" in index.notes[0]
    assert len(index.notes) == 1
    # most of the pixels decide
    bright = check_data(save_16_bit(tmp_path / "bright", 9000))
    assert bright.grey_range == (0, 65535)
    # another set, such as additional images, is shown in the same range
    again = check_data(bright.root, grey_range=index.grey_range)
    assert (decode_record(again, 0, 1) == 255)[:, 12:].all()
    assert "more than 0.1 % of the pixels of 4 are above" in again.notes[0]
    assert store_key(bright, 1) != store_key(again, 1)
    assert check_data(save(tmp_path / "8" / "a" / "1.png", 0).parents[1]).grey_range is None


def test_16_bit_images_of_few_grey_levels_are_noted_with_the_setting_that_helps(tmp_path: Path):
    index = check_data(save_16_bit(tmp_path / "ct", 32768))
    note = index.notes[1]
    assert note.startswith("4 of the 16-bit images use fewer than 32 of 256 grey levels")
    lung = re.search(r"lung window is data.grey_range=\[(\d+),(\d+)\]", note)
    assert lung
    low, high = map(int, lung.groups())
    assert (low, high) == (32768 - 600 - 750, 32768 - 600 + 750)
    index = check_data(index.root, grey_range=(low, high))
    assert len(index.notes) == 1
    # (-1000 + 1350) / 1500 and (40 + 1350) / 1500, of 255
    assert [int(decode_record(index, 0, 1)[9, x]) for x in (3, 20)] == [60, 236]


# ---- saved index, duplicates ----


def test_index_round_trip_and_moved_data(data: Path, tmp_path: Path):
    out = tmp_path / "deep" / "index.json"
    index = check_data(data, out=out)
    assert DataIndex.load(out) == index
    moved = data.rename(tmp_path / "moved")
    assert index.moved_to(moved, "data.source") == replace(index, root=moved)
    (moved / index.records[3].path).unlink()
    with pytest.raises(DataError, match=r"1 of 12 are missing(.|\n)*no such file"):
        index.moved_to(moved, "data.source")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("}", ""),
        ('"version": 1', '"version": 99'),
        ('"label": 1', '"label": 2'),
        ('"sha256"', '"hash"'),
    ],
)
def test_damaged_index_is_refused(data: Path, tmp_path: Path, old: str, new: str):
    out = tmp_path / "index.json"
    check_data(data, out=out)
    text = out.read_text()
    assert old in text
    out.write_text(text.replace(old, new))
    with pytest.raises(DataError, match="make it again with `sssd-fast data check`"):
        DataIndex.load(out)


def test_fingerprint_depends_on_content_label_and_order(data: Path):
    index = check_data(data)
    assert index.fingerprint() == index.fingerprint(range(12))
    assert index.fingerprint() != index.fingerprint([1, 0, *range(2, 12)])
    index.file(0).write_bytes(index.file(1).read_bytes())
    assert check_data(data).fingerprint() != index.fingerprint()


def test_identical_images_are_found_across_formats_splits_and_labels(tmp_path: Path):
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        save(tmp_path / name, int(name[2]))
    image(1).convert("RGB").save(tmp_path / "a" / "copy.bmp")
    image(2).save(tmp_path / "b" / "other.png")
    index = check_data(tmp_path)
    groups = [[index.records[i].path for i in ids] for ids in identical_images(index)]
    assert groups == [["a/1.png", "a/copy.bmp"], ["a/2.png", "b/other.png"]]
    summary = index.summary()
    assert "identical images: 2 groups" in summary
    assert "identical images WITH DIFFERENT LABELS: 1 groups" in summary
    assert "a/2.png (a) = b/other.png (b)" in summary
    test = [i for i, r in enumerate(index.records) if r.path == "a/copy.bmp"]
    split = Split("x", [i for i in range(6) if i not in test], [], test, "by hand")
    leaks = find_leaks(index, split)
    assert leaks == ["identical images a/1.png (train) = a/copy.bmp (test)"]


# ---- index cache ----


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def old(data: Path) -> Path:
    """The same images, three minutes old."""
    for path in data.rglob("*.png"):
        age(path, 180)
    return data


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    names: list[str] = []
    real = index_module.decode_bytes
    monkeypatch.setattr(
        index_module, "decode_bytes", lambda data, name: names.append(name) or real(data, name)
    )
    return names


def test_index_cache_saves_the_second_decoding(old: Path, tmp_path: Path, decoded: list[str]):
    cache = tmp_path / "cache"
    first = check_data(old, index_cache=cache)
    assert len(decoded) == 12
    assert check_data(old, index_cache=cache) == first
    assert len(decoded) == 12
    moved = old.rename(tmp_path / "moved")
    check_data(moved, index_cache=cache)
    assert len(decoded) == 24


def test_index_cache_ignores_changed_recent_and_missing_files(
    old: Path, tmp_path: Path, decoded: list[str]
):
    cache = tmp_path / "cache"
    files = sorted((old / "normal" / "deeper").iterdir())
    os.utime(files[0])  # changed just now, so not stored
    before = check_data(old, index_cache=cache)
    image(900).save(files[1])
    files[2].write_bytes(files[2].read_bytes()[:-40])
    for path in files[1:4]:  # the last is only touched
        age(path, 60)
    files[4].unlink()
    decoded.clear()
    after = check_data(old, index_cache=cache, max_bad_fraction=0.5)
    assert sorted(decoded) == [f.relative_to(old).as_posix() for f in files[:4]]
    assert [Path(e.path).name for e in after.excluded] == ["2.png"]
    assert len(after) == 10
    sha256 = [{r.path: r.sha256 for r in index.records} for index in (before, after)]
    assert sha256[0]["normal/deeper/1.png"] != sha256[1]["normal/deeper/1.png"]


DAMAGED = ["", "[]", '{"version": 0, "files": {}}', '{"version": 2, "files": []}']


@pytest.mark.parametrize("content", DAMAGED)
def test_index_cache_that_is_damaged_or_not_writable_changes_nothing(
    old: Path, tmp_path: Path, decoded: list[str], content: str
):
    index = check_data(old, index_cache=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_text(content)
    decoded.clear()
    assert check_data(old, index_cache=tmp_path / "cache") == index
    assert len(decoded) == 12
    (tmp_path / "file").write_text("in the way")
    assert check_data(old, index_cache=tmp_path / "file" / "below") == index
