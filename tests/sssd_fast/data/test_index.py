"""`check_data`: good files are indexed, every bad one is named with its reason, limits and manifests are enforced."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd_fast.data.index import DataIndex, check_data, report_duplicates
from sssd_fast.data.manifest import read_manifest
from sssd_fast.data.split import Split
from sssd_fast.errors import DataError

ODD_NAMES = [
    "with space.png",
    "per%20cent%0.png",
    "(brackets).png",
    "new\nline.png",
    "ünï.png",
    'a,comma"quote.png',
]


def picture(seed: int, height: int = 20, width: int = 24) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    )


def save(path: Path, seed: int, **size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **size).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for i, name in enumerate(ODD_NAMES):
        save(root / "covid" / name, i)
    for i in range(6):
        save(root / "normal" / "deeper" / f"{i}.png", 100 + i)
    return root


def test_folder_per_class_is_indexed_with_true_facts(data: Path):
    (data / "covid" / ".DS_Store").write_text("hidden")
    (data / "covid" / "notes.txt").write_text("x")
    (data / "readme.md").write_text("x")
    index = check_data(data)
    assert index.classes == ["covid", "normal"]
    assert index.counts() == {"covid": 6, "normal": 6}
    assert {Path(r.path).name for r in index.records if r.label == 0} == set(ODD_NAMES)
    for i, record in enumerate(index.records):
        raw = (data / record.path).read_bytes()
        assert record.sha256 == hashlib.sha256(raw).hexdigest()
        assert (record.height, record.width, record.mode) == (20, 24, "L")
        assert index.file(i) == data / record.path
    assert "ignored 2 files" in index.notes[0]
    assert ".DS_Store" not in index.summary()
    assert "new\\nline.png" not in index.summary()  # only excluded files are listed
    index.print_summary(out := io.StringIO())
    assert out.getvalue() == index.summary() + "\n"


def test_every_kind_of_bad_file_is_named_and_excluded(data: Path):
    folder = data / "covid"
    whole = (folder / "with space.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[:-60])
    (folder / "zero.png").touch()
    picture(50).save(folder / "renamed.jpg", "PNG")
    picture(51).convert("RGB").save(folder / "gif (really).png", "GIF")
    (folder / "text.jpg").write_text("not an image")
    picture(52, 1, 1).save(folder / "dot.png")
    (folder / "line\nbreak.png").write_bytes(b"")
    index = check_data(data, max_bad_fraction=0.5)
    reasons = {Path(e.path).name: e.reason for e in index.excluded}
    assert set(reasons) == {
        "truncated.png", "zero.png", "renamed.jpg", "gif (really).png", "text.jpg", "dot.png", "line\nbreak.png"
    }  # fmt: skip
    assert "truncated or damaged PNG" in reasons["truncated.png"]
    assert reasons["zero.png"] == "empty file (0 bytes)"
    assert reasons["renamed.jpg"] == "wrong extension: the name says JPEG, the content is PNG"
    assert "GIF" in reasons["gif (really).png"]
    assert "no known image format" in reasons["text.jpg"]
    assert len(index) == 12
    assert "line\\nbreak.png: empty file" in index.summary()


def test_good_images_under_a_wrong_extension_are_kept_on_request_and_still_named(data: Path):
    picture(50).save(data / "covid" / "renamed.jpg", "PNG")
    (data / "covid" / "zero.png").touch()
    index = check_data(data, max_bad_fraction=0.1, accept_wrong_extension=True)
    assert "covid/renamed.jpg" in [r.path for r in index.records]
    assert (
        "covid/renamed.jpg: wrong extension: the name says JPEG, the content is PNG"
        in index.summary()
    )
    assert [e.path for e in index.excluded] == ["covid/zero.png"]


def test_over_the_limit_the_error_lists_files_and_says_how_to_go_on(data: Path):
    (data / "covid" / "zero.png").touch()
    picture(50).save(data / "covid" / "renamed.jpg", "PNG")
    with pytest.raises(DataError) as error:
        check_data(data)
    text = str(error.value)
    assert "2 of 14 images are unusable (14.3%); the limit is 1.0%" in text
    assert "covid/zero.png: empty file" in text
    assert "--max-bad-fraction" in text
    assert "above 0.143" in text
    assert "1 of them are good images under a wrong extension" in text
    assert "--accept-wrong-extension" in text
    assert len(check_data(data, max_bad_fraction=0.15)) == 12
    with pytest.raises(DataError, match=r"max_bad_fraction is 1\.5"):
        check_data(data, max_bad_fraction=1.5)


def test_a_class_that_loses_every_image_is_an_error(data: Path):
    (data / "third").mkdir()
    (data / "third" / "a.png").touch()
    with pytest.raises(DataError, match="no usable image left in class third"):
        check_data(data, max_bad_fraction=0.5)


def test_places_without_images_say_what_was_found(tmp_path: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        check_data(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "slice.dcm").write_text("x")
    save(tmp_path / "loose.png", 0)
    with pytest.raises(
        DataError, match=r"no images found \(ignored 1 .dcm, 1 .png directly in the folder\)"
    ):
        check_data(tmp_path)


def test_a_folder_that_cannot_be_listed_is_an_error_not_a_smaller_set(data: Path, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deeper: folder cannot be read \(Permission denied\)"):
        check_data(data)


def test_progress_counts_every_file_once(data: Path):
    seen: list[tuple[int, int]] = []
    check_data(data, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 12) for i in range(1, 13)]


def test_the_result_does_not_depend_on_threads(data: Path):
    assert check_data(data, threads=1) == check_data(data, threads=7)


def manifest(root: Path, text: str) -> Path:
    path = root / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_manifest_with_split_and_patient(data: Path):
    rows = "normal/deeper/0.png,7,train,p1,1\nnormal/deeper/1.png,ten,test,,2\ncovid/gone.png,7,val,p2,3\n"
    path = manifest(
        data, "\ufeffpath,label,split,patient,score\n" + rows
    )  # with the mark that Excel writes
    index = check_data(path, max_bad_fraction=0.5)
    assert index == check_data(data, path, max_bad_fraction=0.5)
    assert index.classes == ["7", "ten"]
    assert index.root == data
    assert [(r.label, r.split, r.patient) for r in index.records] == [
        (0, "train", "p1"),
        (1, "test", None),
    ]
    assert [(e.path, e.reason) for e in index.excluded] == [("covid/gone.png", "no such file")]
    assert any("score" in note for note in index.notes)


def test_manifest_lists_all_its_problems_at_once(data: Path):
    text = (
        "path,label,split\na.png,x,train\na.png,x,train\n./a.png,x,train\n../up.png,x,train\n/etc/passwd,x,test\n"
        "b.png,,train\nc.png,x,training\n,x,val\nd.png,x\ne/../../f.png,x,val\n"
    )
    with pytest.raises(DataError) as error:
        read_manifest(manifest(data, text))
    message = str(error.value)
    for part in (
        "line 3: path a.png was already in line 2",
        "line 4: path ./a.png was already",
        "line 5: path ../up.png leaves the data folder",
        "line 6: path /etc/passwd leaves",
        "line 7: empty label",
        "line 8: split 'training' is not one of train, val, test",
        "line 9: empty path",
        "line 10: not 3 cells",
        "line 11: path e/../../f.png leaves",
        "9 problems",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file,label\na.png,x\n", "no column path; the header is 'file,label'"),
        ("path;label\na.png;x\n", "no column path and label.*separated by commas"),
        ("", "no column path and label"),
        ("path,label\n", "no rows"),
    ],
)
def test_manifest_header_errors(data: Path, text: str, match: str):
    with pytest.raises(DataError, match=match):
        check_data(data, manifest(data, text))


def test_index_round_trip_and_moved_data(data: Path, tmp_path: Path):
    out = tmp_path / "deep" / "index.json"
    index = check_data(data, out=out)
    assert DataIndex.load(out) == index
    moved = data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="does not exist; pass the folder's new place"):
        DataIndex.load(out)
    assert DataIndex.load(out, root=moved).file(0).exists()


@pytest.mark.parametrize("damage", ["cut", "version", "label", "field", "list"])
def test_a_damaged_index_is_refused(data: Path, tmp_path: Path, damage: str):
    out = tmp_path / "index.json"
    check_data(data, out=out)
    body = json.loads(out.read_text())
    if damage == "version":
        body["version"] = 99
    elif damage == "label":
        body["records"][0]["label"] = 2
    elif damage == "field":
        del body["records"][0]["sha256"]
    elif damage == "list":
        body = []
    out.write_text(out.read_text()[:500] if damage == "cut" else json.dumps(body))
    with pytest.raises(DataError, match=r"sssd-fast data check|damaged index"):
        DataIndex.load(out)


def test_fingerprint_sees_content_label_and_order(data: Path):
    index = check_data(data)
    assert (
        index.fingerprint()
        == index.fingerprint(range(12))
        != index.fingerprint([1, 0, *range(2, 12)])
    )
    (data / index.records[0].path).write_bytes((data / index.records[1].path).read_bytes())
    assert check_data(data).fingerprint() != index.fingerprint()


def test_identical_pictures_are_found_across_formats_splits_and_labels(tmp_path: Path):
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        save(tmp_path / name, int(name[2]))
    picture(1).convert("RGB").save(
        tmp_path / "a" / "copy.bmp"
    )  # same pixels as a/1.png in another format
    picture(2).save(tmp_path / "b" / "other.png")  # same pixels as a/2.png under another label
    index = check_data(tmp_path)
    number = {r.path: i for i, r in enumerate(index.records)}
    found = report_duplicates(index)
    assert sorted(map(sorted, found.groups)) == [
        ["a/1.png", "a/copy.bmp"],
        ["a/2.png", "b/other.png"],
    ]
    assert found.conflicting == [["a/2.png (a)", "b/other.png (b)"]]
    assert found.across_splits == []
    test = [number["a/copy.bmp"]]
    split = Split("x", [i for i in range(6) if i not in test], [], test, "by hand")
    assert report_duplicates(index, split).across_splits == [
        ["a/1.png (train)", "a/copy.bmp (test)"]
    ]
    assert "identical pictures WITH DIFFERENT LABELS: 1 groups" in index.summary()


@pytest.mark.realdata
def test_real_sets_pass_the_check():
    """COVID-CT needs the switch for its 34 JPEGs named .png; SARS-CoV-2 CT holds two identical pairs."""
    root = Path(os.environ["SSSD_FAST_DATA"])
    covid = check_data(root / "covid-ct" / "split_official.csv", accept_wrong_extension=True)
    assert covid.counts() == {"CT_COVID": 349, "CT_NonCOVID": 397}
    assert not covid.excluded
    with pytest.raises(DataError, match=r"34 of 746 .*\n(.*\n)*.*--accept-wrong-extension"):
        check_data(root / "covid-ct" / "split_official.csv")
    sars = check_data(root / "sars-cov-2-ct" / "split_xdnn.csv")
    assert sars.counts() == {"COVID": 1252, "non-COVID": 1229}
    assert not sars.excluded
    pairs = [sorted(Path(p).stem for p in group) for group in report_duplicates(sars).groups]
    assert sorted(pairs) == [["Covid_128", "Covid_129"], ["Covid_134", "Covid_135"]]
