"""`sssd-fast data convert` as a whole: NIfTI, patients without their data, manifests, and a folder that is whole or absent."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd_fast.cli import main
from sssd_fast.convert.convert import Converted, convert_volumes
from sssd_fast.data.index import check_data
from sssd_fast.data.splits import split_patient
from sssd_fast.errors import ConfigError, DataError, DependencyError
from tests.sssd_fast.ct_files import (
    NAME,
    SECRETS,
    dataset,
    each,
    lung,
    noise,
    uid,
    write,
    write_nifti,
    write_series,
    write_slice,
)

RAS = np.eye(4)


def convert(source: Path, out: str = "out", **options: object) -> Converted:
    return convert_volumes(source, source.parent / out, **options)  # type: ignore[arg-type]


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(folder.rglob("*.png"))]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four patients, one of them in both classes."""
    root = tmp_path / "ct"
    for seed, (label, patient) in enumerate(
        [("covid", "a"), ("covid", "b"), ("normal", "b"), ("normal", "c"), ("normal", "d")]
    ):
        write_series(root / label / f"case {seed}", seed + 1, PatientID=f"KH-4711-{patient}")
    return root


# ---- NIfTI ----


def test_nifti_values_are_scaled_and_slices_come_from_the_feet(source: Path):
    stored = noise(0, (10, 12, 3))
    write_nifti(source / "covid" / "vol.nii.gz", stored, RAS, slope=0.5, inter=-700)
    shutil.rmtree(source / "normal")
    for path in list((source / "covid").glob("case*")):
        shutil.rmtree(path)
    got = pictures(convert(source).out)
    for k in range(3):
        # RAS: x rises to the right, which is on the left of the picture; y rises to the front, which is up
        want = np.array(
            [
                [lung(stored[9 - col, 11 - row, k] * 0.5 - 700) for col in range(10)]
                for row in range(12)
            ]
        )
        np.testing.assert_array_equal(got[k], want)


def test_nifti_of_two_and_four_dimensions_other_names_and_damage(tmp_path: Path):
    folder = tmp_path / "ct" / "c"
    flat = noise(1, (10, 12)).astype(np.float32)
    flat[0, 0] = np.nan
    packed = write_nifti(folder / "flat.nii.gz", flat, RAS)
    packed.rename(folder / "named by nobody")
    write_nifti(folder / "one.nii", noise(2, (10, 12, 2, 1)), RAS)
    write_nifti(folder / "phases.nii", noise(3, (10, 12, 2, 5)), RAS)
    write_nifti(folder / "window.nii", noise(4, (10, 12, 2), 0, 255), RAS)
    whole = write_nifti(folder / "cut.nii", noise(5, (10, 12, 2)), RAS).read_bytes()
    (folder / "cut.nii").write_bytes(whole[:-9])
    (folder / "cut.nii.gz").write_bytes(gzip.compress(whole)[:-200])
    (folder / "letter.gz").write_bytes(gzip.compress(b"dear"))
    result = convert(tmp_path / "ct", max_bad_fraction=0.9)
    assert {
        path.name: reason.partition(";")[0].partition(",")[0]
        for path, reason in result.log.excluded
    } == {
        "phases.nii": "a NIfTI of 4 dimensions (10 x 12 x 2 x 5)",
        "window.nii": "no value of -500 or less",
        "cut.nii": "truncated or damaged NIfTI",
        "cut.nii.gz": "truncated or damaged NIfTI",
    }
    assert result.log.ignored == {"GZIP": 1}
    assert {w.volume.path.name: w.slices for w in result.written if w.volume.path} == {
        "named by nobody": 1,
        "one.nii": 2,
    }
    (picture,) = (
        p
        for p in pictures(result.out)
        if p[-1, -1] == 0 and p.shape == (12, 10) and p[0, 0] == lung(flat[9, 11])
    )
    np.testing.assert_array_equal(picture[1:-1], each(flat[::-1, ::-1].T[1:-1], lung))


def test_values_that_are_not_hounsfield_go_through_minmax_or_an_explicit_window(tmp_path: Path):
    stored = noise(6, (10, 12, 2), 0, 201)
    stored[0, 0, 0], stored[1, 1, 1] = 0, 200
    write_nifti(tmp_path / "ct" / "c" / "v.nii", stored, RAS)
    with pytest.raises(DataError, match="not in Hounsfield units"):
        convert(tmp_path / "ct")
    for out, window, scale in (
        ("a", "minmax", lambda v: round(v * 255 / 200)),
        ("b", "100,201", lambda v: lung(v, 100, 201)),
    ):
        got = pictures(convert(tmp_path / "ct", out, window=window).out)
        for k in range(2):
            np.testing.assert_array_equal(got[k], each(stored[::-1, ::-1, k].T, scale))


# ---- patients ----


def test_check_reads_the_folder_and_a_split_keeps_patients_whole(source: Path):
    result = convert(source)
    for index in (
        check_data(result.out, result.out / "manifest.csv"),
        check_data(result.out / "manifest.csv"),
    ):
        assert index.counts() == {"covid": 6, "normal": 9}
        assert len({r.patient for r in index.records}) == 4
        assert {r.mode for r in index.records} == {"L"}
        split = split_patient(index, 0.3, 0)
        parts = [{index.records[i].patient for i in ids} for ids in (split.train, split.test)]
        assert all(parts)
        assert not parts[0] & parts[1]
    shared = {r["patient"] for r in rows(result.out) if r["label"] == "covid"}
    assert len(shared & {r["patient"] for r in rows(result.out) if r["label"] == "normal"}) == 1


def test_numbers_depend_on_the_pictures_alone(source: Path):
    """Other names, order of names, identifiers and window: the same picture keeps its patient number."""
    first = rows(convert(source, "first").out)
    again = source.parent / "again"
    for seed, (label, patient) in enumerate(
        [("covid", "z"), ("covid", "y"), ("normal", "y"), ("normal", "x"), ("normal", "w")]
    ):
        write_series(again / label / f"case {9 - seed}", seed + 1, PatientID=patient)
    assert rows(convert(again, "second", window="mediastinum").out) == first
    # and not on the order of identifiers: of 4 patients a to d, numbered by content
    order = {w.volume.patient: w.patient for w in convert(source, "third").written}
    assert sorted(order, key=order.__getitem__) != sorted(order)


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Every way in which a name could get out: odd values that parsers warn about, bad files, notes, NIfTI headers."""
    root = tmp_path / "ct"
    write_series(root / "covid", 1, BurnedInAnnotation="YES")
    write_series(root / "normal", 2, PatientID="other")
    write_slice(
        root / "covid" / "scout",
        noise(3),
        z=0,
        series=3,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    odd = dataset(noise(4), z=0, series=4, number=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd.add_new(0x00080060, "CS", NAME)  # Modality
        odd.add_new(0x0020000E, "UI", "Quastenflosser")  # SeriesInstanceUID
    write(root / "covid" / "odd", odd)
    whole = write_slice(root / "covid" / "bad", noise(5), z=0, series=5, Modality="CT").read_bytes()
    (root / "covid" / "bad").write_bytes(whole.replace(b"DS\x02\x001 ", b"DS\x02\x00x ")[:-20])
    cut = write_slice(root / "covid" / "cut", noise(5), z=5, series=5, number=2)
    cut.write_bytes(cut.read_bytes()[:-20])
    private = dataset(noise(6), z=0, series=6, SOPClassUID=uid(66), Modality="XX")
    write(root / "covid" / "private", private)
    unknown = dataset(noise(7), z=0, series=7)
    write(root / "covid" / "syntax", unknown)
    data = (root / "covid" / "syntax").read_bytes()
    (root / "covid" / "syntax").write_bytes(
        data.replace(b"1.2.840.10008.1.2.1\0", uid(99).ljust(19, "1")[:19].encode() + b"\0")
    )
    write_nifti(root / "normal" / "v.nii", noise(8, (10, 12, 2)), RAS)
    return root


def test_nothing_written_or_printed_tells_who_the_patient_is(
    leaky: Path, capfd: pytest.CaptureFixture[str]
):
    out = leaky.parent / "out"
    with warnings.catch_warnings(
        record=True
    ) as warned:  # pytest would catch them before they reach the terminal
        warnings.simplefilter("always")
        assert (
            main(["data", "convert", str(leaky), "--out", str(out), "--max-bad-fraction", "0.9"])
            == 0
        )
    assert [str(w.message) for w in warned] == []
    files = tree(out)
    assert {"manifest.csv", "convert.json"} < set(files)
    for name, content in files.items():
        for secret in SECRETS:
            assert secret not in name
            assert secret.encode() not in content, name
    printed = "".join(capfd.readouterr())
    assert [secret for secret in SECRETS if secret in printed] == []
    assert "burned-in text" in printed
    assert (
        "covid/cut: truncated or damaged DICOM" in printed
    )  # the person at the terminal must find the file
    record = files["convert.json"].decode()
    assert "covid/cut" not in record
    assert str(leaky) not in record
    assert json.loads(record)["excluded"]["truncated or damaged DICOM"] >= 1
    for path in out.rglob("*.png"):
        assert Image.open(path).info == {}
    assert len({path.stat().st_mtime for path in out.rglob("*.png")}) == 1
    # the search itself finds them where they are
    assert all(
        any(secret.encode() in content for content in tree(leaky).values()) for secret in SECRETS
    )
    assert main(["data", "convert", str(leaky), "--out", str(leaky.parent / "b")]) == 2
    assert [secret for secret in SECRETS if secret in "".join(capfd.readouterr())] == []


# ---- manifests, options ----


def test_a_manifest_gives_class_split_and_patient_of_files_and_folders(source: Path):
    write_nifti(source / "loose.nii", noise(60, (10, 12, 2)), RAS)
    table = source / "list.csv"
    table.write_text(
        "path,label,split,patient\ncovid/case 0,ill,train,Ernst\ncovid/case 1,ill,test,Anna\n"
        "normal/case 2,well,test,Anna\nloose.nii,well,train,Ernst\n"
    )
    for result in (convert(source, manifest=table), convert_volumes(table, source.parent / "b")):
        assert result.counts() == {
            "ill": {"patients": 2, "volumes": 2, "slices": 6},
            "well": {"patients": 2, "volumes": 2, "slices": 5},
        }
        index = check_data(result.out / "manifest.csv")
        by_split = {
            s: {r.patient for r in index.records if r.split == s} for s in ("train", "test")
        }
        assert [len(by_split[s]) for s in ("train", "test")] == [1, 1]
        assert by_split["train"] != by_split["test"]
        assert not any(
            name in content for content in tree(result.out).values() for name in (b"Ernst", b"Anna")
        )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("path,label\ngone,x\nnormal,y\n", "gone: no such file or folder"),
        ("path,label\nnormal,x\nnormal/case 2,y\n", "named by two rows"),
        ("path,label\nnormal,a/b\n", "cannot be named a/b"),
        ("path,label\nnormal,..\n", r"cannot be named \.\."),
        ("path\nnormal\n", "no column label"),
    ],
)
def test_manifests_that_cannot_be_followed(source: Path, text: str, match: str):
    table = source.parent / "list.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=match):
        convert(source, manifest=table)


def test_every_and_size(tmp_path: Path):
    steps = np.repeat(
        np.repeat(np.array([[-1350, 150], [150, -1350]], np.int16), 16, 0), 24, 1
    )  # 32 x 48
    for i in range(7):
        write_slice(tmp_path / "ct" / "c" / str(i), steps + np.int16(i), number=i + 1, z=i)
    result = convert(tmp_path / "ct", every=3, size=8)
    assert [path.name for path in sorted(result.out.rglob("*.png"))] == [
        "0000.png",
        "0003.png",
        "0006.png",
    ]
    first = pictures(result.out)[0]
    assert first.shape == (8, 12)
    assert (first[:3, :4] < 8).all()
    assert (first[:3, 8:] > 247).all()
    assert (first[5:, :4] > 247).all()
    assert pictures(convert(tmp_path / "ct", "b", size=64).out)[0].shape == (64, 96)
    for options in ({"every": 0}, {"size": 7}, {"window": "bone"}, {"max_bad_fraction": 2}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            convert(tmp_path / "ct", "c", **options)


def test_the_command_prints_what_it_did(source: Path, capsys: pytest.CaptureFixture[str]):
    (source / "readme.pdf").write_bytes(b"%PDF-1.4")
    (source / "covid" / "readme.pdf").write_bytes(b"%PDF-1.4")
    (source / "papers").mkdir()
    (source / "papers" / "a.pdf").write_bytes(b"%PDF-1.4")
    out = source.parent / "new place" / "png"
    assert (
        main(
            [
                "data",
                "convert",
                str(source),
                "--out",
                str(out),
                "--window=-500,1400",
                "--every",
                "2",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert f"10 slices of 5 volumes of 4 patients under {out}" in text
    assert "covid: 4 slices, 2 volumes, 2 patients" in text
    assert "window: custom (level -500, width 1400 HU)" in text
    assert "ignored 2 other files: 2 PDF" in text
    assert "class folders without DICOM or NIfTI (1)" in text
    assert f"data.manifest='{out}/manifest.csv'" in text
    record = json.loads((out / "convert.json").read_text())
    assert record["window"] == {"name": "custom", "level_hu": -500.0, "width_hu": 1400.0}
    assert record["classes"]["normal"] == {"patients": 3, "volumes": 3, "slices": 6}
    assert {"pydicom", "nibabel", "sssd_fast"} < set(record["versions"])
    assert main(["data", "check", str(out / "manifest.csv")]) == 0


# ---- refusals ----


@pytest.fixture
def untouched(source: Path) -> Iterator[Path]:
    """Whatever happens, the source stays as it is and nothing appears beside it."""
    before = tree(source.parent)
    yield source
    assert tree(source.parent) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["ct"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_an_interrupted_run_leaves_nothing(
    untouched: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    saved: list[Path] = []
    save = Image.Image.save

    def fail(image: Image.Image, path: Path) -> None:
        if len(saved) == 4:
            raise error
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises((DataError, KeyboardInterrupt)) as raised:
        convert(untouched)
    assert len(saved) == 4
    if isinstance(error, OSError):
        assert "No space left on device" in str(raised.value)
        assert "GiB free" in str(raised.value)


def test_places_that_cannot_be_written_to(untouched: Path):
    with pytest.raises(DataError, match="exists and is not empty"):
        convert_volumes(untouched, untouched / "covid")
    with pytest.raises(DataError, match="lies in the source"):
        convert_volumes(untouched, untouched / "covid" / "new")
    file = untouched.parent / "file"
    file.touch()
    with pytest.raises(DataError, match=r"cannot write .*(Not a directory|File exists)"):
        convert_volumes(untouched, file / "x" / "y")
    file.unlink()


def test_an_empty_folder_may_be_the_target(source: Path):
    (source.parent / "out").mkdir()
    assert len(pictures(convert(source).out)) == 15


@pytest.mark.parametrize("package", ["pydicom", "nibabel"])
def test_a_missing_package_is_named(source: Path, package: str, monkeypatch: pytest.MonkeyPatch):
    write_nifti(source / "covid" / "a.nii", noise(1, (10, 12, 2)), RAS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        DependencyError, match=rf"needs {package}: pip install 'sssd-fast\[volumes\]'"
    ):
        convert(source)
    assert not (source.parent / "out").exists()


def test_sources_with_nothing_to_convert(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        convert(tmp_path / "gone")
    (tmp_path / "ct" / "c").mkdir(parents=True)
    with pytest.raises(DataError, match="one folder per class"):
        convert(tmp_path / "ct")
    (tmp_path / "ct" / "c" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="no DICOM or NIfTI file was found"):
        convert(tmp_path / "ct")
    with pytest.raises(DataError, match="is a file"):
        convert(tmp_path / "ct" / "c" / "x.txt")
    write_slice(
        tmp_path / "ct" / "c" / "scout", noise(0), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    write_slice(tmp_path / "ct" / "d" / "good", noise(0), z=0)
    with pytest.raises(
        DataError, match=r"(?s)nothing to convert in class c.*1: localizer.*c/scout"
    ):
        convert(tmp_path / "ct")
