"""`data convert`: NIfTI, patients without their data, manifests, complete or no folder."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd_fast.cli import main
from sssd_fast.convert.convert import convert_volumes
from sssd_fast.data.index import check_data
from sssd_fast.data.split import split_patient
from sssd_fast.errors import ConfigError, DataError, DependencyError
from tests.sssd_fast.ct_files import (
    LOCALIZER,
    NAME,
    SECRETS,
    assert_slices,
    convert,
    dataset,
    each,
    lung,
    noise,
    reasons,
    slices,
    uid,
    write,
    write_nifti,
    write_series,
    write_slice,
)

RAS = np.eye(4)


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_patients(root: Path, names: str = "abbcd", last: int = 0) -> Path:
    """Five volumes of four patients, one of them in both classes."""
    for i, (label, name) in enumerate(zip(["covid"] * 2 + ["normal"] * 3, names, strict=True)):
        folder = root / label / f"case {abs(last - i)}"
        write_series(folder, i + 1, PatientID=f"KH-4711-{name}")
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_patients(tmp_path / "ct")


# ---- NIfTI ----


def test_nifti_values_are_scaled_and_slices_start_at_the_feet(tmp_path: Path):
    stored = noise(0, (10, 12, 3))
    write_nifti(tmp_path / "ct" / "c" / "v.nii.gz", stored, RAS, slope=0.5, inter=-700)
    # RAS: x rises to the right (left side of the image), y to the front (up)
    values = [stored[::-1, ::-1, k].T * 0.5 - 700 for k in range(3)]
    assert_slices(convert(tmp_path / "ct"), [each(v) for v in values])


def test_nifti_of_two_and_four_dimensions_other_names_and_damage(tmp_path: Path):
    folder = tmp_path / "ct" / "c"
    flat = noise(1, (10, 12)).astype(np.float32)
    flat[0, 0] = np.nan  # the last pixel of the slice
    packed = write_nifti(folder / "flat.nii.gz", flat, RAS)
    packed.rename(folder / "another name")
    write_nifti(folder / "one.nii", noise(2, (10, 12, 2, 1)), RAS)
    write_nifti(folder / "phases.nii", noise(3, (10, 12, 2, 5)), RAS)
    write_nifti(folder / "window.nii", noise(4, (10, 12, 2), 0, 255), RAS)
    whole = write_nifti(folder / "cut.nii", noise(5, (10, 12, 2)), RAS).read_bytes()
    (folder / "cut.nii").write_bytes(whole[:-9])
    (folder / "cut.nii.gz").write_bytes(gzip.compress(whole)[:-200])
    (folder / "letter.gz").write_bytes(gzip.compress(b"dear"))
    result = convert(tmp_path / "ct", max_bad_fraction=0.9)
    found = {name: text.split(";")[0] for name, text in reasons(result.log.excluded).items()}
    assert found.pop("window.nii").startswith("less than 0.1% of the values are air")
    assert found == {
        "phases.nii": "a NIfTI of 4 dimensions (10 x 12 x 2 x 5)",
        "cut.nii": "truncated or damaged NIfTI",
        "cut.nii.gz": "truncated or damaged NIfTI",
    }
    assert result.log.ignored == {"GZIP": 1}
    written = {w.path.name: w for w in result.written if w.path}
    assert {name: w.slices for name, w in written.items()} == {"another name": 1, "one.nii": 2}
    expected = each(np.nan_to_num(flat[::-1, ::-1].T, nan=-2000))
    (path,) = (result.out / "c" / written["another name"].name).iterdir()
    np.testing.assert_array_equal(np.array(Image.open(path)), expected)


def test_values_that_are_not_hounsfield_need_minmax_or_an_explicit_window(tmp_path: Path):
    stored = noise(6, (10, 12, 2), 0, 201)
    stored[0, 0, 0], stored[1, 1, 1] = 0, 200
    write_nifti(tmp_path / "ct" / "c" / "v.nii", stored, RAS)
    with pytest.raises(DataError, match="not in Hounsfield units"):
        convert(tmp_path / "ct")
    values = [stored[::-1, ::-1, k].T for k in range(2)]
    scaled = [each(v, lambda x: round(x * 255 / 200)) for v in values]
    assert_slices(convert(tmp_path / "ct", "a", window="minmax"), scaled)
    windowed = [each(v, lambda x: lung(x, 100, 201)) for v in values]
    assert_slices(convert(tmp_path / "ct", "b", window="100,201"), windowed)


# ---- patients ----


def test_converted_folder_passes_the_check_and_a_split_keeps_patients_whole(source: Path):
    result = convert(source)
    index = check_data(result.out / "manifest.csv")
    assert index == check_data(result.out, result.out / "manifest.csv")
    assert index.counts() == {"covid": 6, "normal": 9}
    assert {r.mode for r in index.records} == {"L"}
    of_class = [{r.patient for r in index.records if r.label == label} for label in (0, 1)]
    assert len(of_class[0] | of_class[1]) == 4
    assert len(of_class[0] & of_class[1]) == 1
    split = split_patient(index, 0.3, 0)
    train, test = ({index.records[i].patient for i in ids} for ids in (split.train, split.test))
    assert train
    assert test
    assert not train & test


def test_numbers_depend_on_the_pixels_alone(source: Path):
    """Other names, order of names, identifiers and window give the same patient numbers."""
    first = convert(source, "first")
    again = write_patients(source.parent / "again", "zyyxw", last=9)
    assert rows(convert(again, "second", window="mediastinum").out) == rows(first.out)
    order = {w.identity: w.patient for w in first.written}
    assert sorted(order, key=order.__getitem__) != sorted(order)


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Every way in which a name could leak: odd values, bad files, notes, NIfTI headers."""
    root = tmp_path / "ct"
    covid = root / "covid"
    write_series(covid, 1, BurnedInAnnotation="YES")
    write_series(root / "normal", 2, PatientID="other")
    write_slice(covid / "scout", noise(3), z=0, series=3, **LOCALIZER)
    odd = dataset(noise(4), z=0, series=4, number=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd.add_new(0x00080060, "CS", NAME)  # Modality
        odd.add_new(0x0020000E, "UI", "Quastenflosser")  # SeriesInstanceUID
    write(covid / "odd", odd)
    bad = write_slice(covid / "bad", noise(5), z=0, series=5)
    bad.write_bytes(bad.read_bytes().replace(b"DS\x02\x001 ", b"DS\x02\x00x ")[:-20])
    cut = write_slice(covid / "cut", noise(5), z=5, series=5, number=2)
    cut.write_bytes(cut.read_bytes()[:-20])
    write_slice(covid / "private", noise(6), z=0, series=6, SOPClassUID=uid(66), Modality="XX")
    syntax = write_slice(covid / "syntax", noise(7), z=0, series=7)
    private = uid(99).ljust(19, "1")[:19].encode() + b"\0"
    syntax.write_bytes(syntax.read_bytes().replace(b"1.2.840.10008.1.2.1\0", private))
    write_nifti(root / "normal" / "v.nii", noise(8, (10, 12, 2)), RAS)
    return root


def test_nothing_written_or_printed_identifies_the_patient(
    leaky: Path, capfd: pytest.CaptureFixture[str]
):
    out = leaky.parent / "out"
    command = ["data", "convert", str(leaky), "--out", str(out), "--max-bad-fraction"]
    with warnings.catch_warnings(record=True) as warned:
        # pytest would catch them before they reach the terminal
        warnings.simplefilter("always")
        assert main([*command, "0.9"]) == 0
    assert [str(w.message) for w in warned] == []
    files = tree(out)
    assert {"manifest.csv", "convert.json"} < set(files)
    for secret in SECRETS:
        assert not [name for name in files if secret in name]
        assert not [name for name, content in files.items() if secret.encode() in content]
        # the search finds them in the source
        assert any(secret.encode() in content for content in tree(leaky).values())
    printed = "".join(capfd.readouterr())
    assert [secret for secret in SECRETS if secret in printed] == []
    assert "burned-in text" in printed
    # the user has to find the file, so the terminal names it; the record does not
    assert f"{leaky}/covid/cut" in printed
    record = files["convert.json"].decode()
    assert "covid/cut" not in record
    assert str(leaky) not in record
    assert json.loads(record)["excluded"]["truncated or damaged DICOM"] >= 1
    images = list(out.rglob("*.png"))
    assert all(Image.open(path).info == {} for path in images)
    assert len({path.stat().st_mtime for path in images}) == 1
    command[4] = str(leaky.parent / "b")
    assert main([*command, "0.01"]) == 2
    assert [secret for secret in SECRETS if secret in "".join(capfd.readouterr())] == []


# ---- manifests, options ----


def test_manifest_gives_class_split_and_patient_of_files_and_folders(source: Path):
    write_nifti(source / "loose.nii", noise(60, (10, 12, 2)), RAS)
    table = source / "list.csv"
    table.write_text(
        "path,label,split,patient\ncovid/case 0,ill,train,Ernst\ncovid/case 1,ill,test,Anna\n"
        "normal/case 2,well,test,Anna\nloose.nii,well,train,Ernst\n"
    )
    result = convert(source, manifest=table)
    assert tree(convert_volumes(table, source.parent / "b").out) == tree(result.out)
    assert result.record["classes"] == {
        "ill": {"patients": 2, "volumes": 2, "slices": 6},
        "well": {"patients": 2, "volumes": 2, "slices": 5},
    }
    index = check_data(result.out / "manifest.csv")
    of_split = {(r.split, r.patient) for r in index.records}
    assert len(of_split) == len({patient for _, patient in of_split}) == 2
    for content in tree(result.out).values():
        assert b"Ernst" not in content
        assert b"Anna" not in content


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
def test_manifest_errors(source: Path, text: str, match: str):
    table = source.parent / "list.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=match):
        convert(source, manifest=table)


def test_every_and_size(tmp_path: Path):
    corners = np.array([[-1350, 150], [150, -1350]], np.int16)
    steps = corners.repeat(16, 0).repeat(24, 1)  # 32 x 48
    for i in range(7):
        write_slice(tmp_path / "ct" / "c" / str(i), steps + np.int16(i), number=i + 1, z=i)
    result = convert(tmp_path / "ct", every=3, size=8)
    names = sorted(path.name for path in result.out.rglob("*.png"))
    assert names == ["0000.png", "0003.png", "0006.png"]
    first = slices(result)[0]
    assert first.shape == (8, 12)
    assert first[:3, :4].max() < 8
    assert first[:3, 8:].min() > 247
    assert first[5:, :4].min() > 247
    assert slices(convert(tmp_path / "ct", "b", size=64))[0].shape == (64, 96)
    for options in ({"every": 0}, {"size": 7}, {"window": "bone"}, {"max_bad_fraction": 2}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            convert(tmp_path / "ct", "c", **options)


def test_command_prints_counts_and_records_settings(
    source: Path, capsys: pytest.CaptureFixture[str]
):
    (source / "readme.pdf").write_bytes(b"%PDF-1.4")  # in no class
    (source / "covid" / "readme.pdf").write_bytes(b"%PDF-1.4")
    (source / "papers").mkdir()
    (source / "papers" / "a.pdf").write_bytes(b"%PDF-1.4")
    (source.parent / "png").mkdir()  # an empty folder may be the target
    out = source.parent / "png"
    command = ["data", "convert", str(source), "--out", str(out), "--every", "2"]
    assert main([*command, "--window=-500,1400"]) == 0
    text = capsys.readouterr().out
    for line in (
        f"10 slices of 5 volumes of 4 patients under {out}",
        "covid: 4 slices, 2 volumes, 2 patients",
        "window: custom (level -500, width 1400 HU)",
        "other files: 2 PDF",
        "class folders without DICOM or NIfTI (1)",
        f"data.manifest={out}/manifest.csv",
    ):
        assert line in text
    record = json.loads((out / "convert.json").read_text())
    assert record["window"] == {"name": "custom", "level_hu": -500.0, "width_hu": 1400.0}
    assert record["classes"]["normal"] == {"patients": 3, "volumes": 3, "slices": 6}
    assert {"pydicom", "nibabel", "sssd_fast"} < set(record["versions"])


# ---- refusals ----


@pytest.fixture
def untouched(source: Path) -> Iterator[Path]:
    """The source does not change, and nothing appears next to it."""
    before = tree(source.parent)
    yield source
    assert tree(source.parent) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["ct"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_interrupted_conversion_leaves_nothing(
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
        assert "No space left" in str(raised.value)
        assert "GiB free" in str(raised.value)


def test_targets_that_cannot_be_written_are_refused(untouched: Path, tmp_path: Path):
    for inside in (untouched / "covid", untouched / "covid" / "new"):
        with pytest.raises(DataError, match="is in the source"):
            convert_volumes(untouched, inside)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="exists and is not empty"):
        convert_volumes(untouched, file)
    with pytest.raises(DataError, match=r"cannot write .*(Not a directory|File exists)"):
        convert_volumes(untouched, file / "x" / "y")
    file.unlink()


@pytest.mark.parametrize("package", ["pydicom", "nibabel"])
def test_missing_package_is_named(source: Path, package: str, monkeypatch: pytest.MonkeyPatch):
    write_nifti(source / "covid" / "a.nii", noise(1, (10, 12, 2)), RAS)
    monkeypatch.setitem(sys.modules, package, None)
    match = rf"needs {package}: pip install 'sssd-fast\[volumes\]'"
    with pytest.raises(DependencyError, match=match):
        convert(source)
    assert not (source.parent / "out").exists()


def test_sources_with_nothing_to_convert_are_refused(tmp_path: Path):
    source = tmp_path / "ct"
    with pytest.raises(DataError, match="no such file"):
        convert(source)
    (source / "c").mkdir(parents=True)
    with pytest.raises(DataError, match="one folder per class"):
        convert(source)
    (source / "c" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="no DICOM or NIfTI file was found"):
        convert(source)
    with pytest.raises(DataError, match="is a file"):
        convert_volumes(source / "c" / "x.txt", tmp_path / "out")
    write_slice(source / "c" / "scout", noise(0), **LOCALIZER)
    write_slice(source / "d" / "good", noise(0), z=0)
    match = r"(?s)nothing to convert in class c.*1: localizer.*c/scout"
    with pytest.raises(DataError, match=match):
        convert(source)
