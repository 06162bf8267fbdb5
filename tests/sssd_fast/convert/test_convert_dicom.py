"""DICOM files to slices: values, order and direction against images computed by hand."""

from __future__ import annotations

import gzip
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, JPEGLosslessSV1, RLELossless

from sssd_fast.convert.window import Slice, parse_window, to_grey
from sssd_fast.errors import ConfigError, DataError
from tests.sssd_fast.ct_files import (
    LOCALIZER,
    assert_slices,
    convert,
    dataset,
    each,
    lung,
    noise,
    reasons,
    uid,
    write,
    write_nifti,
    write_series,
    write_slice,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "ct"


# ---- windows ----


@pytest.mark.parametrize(
    ("window", "hu", "grey"),
    [
        ("lung", [-3000, -1350, -1348, -1347, -601, -600], [0, 0, 0, 1, 127, 128]),
        ("lung", [146, 148, 149, 3000], [254, 255, 255, 255]),
        ("mediastinum", [-160, -159, 40, 239], [0, 1, 128, 255]),
        ("100,1", [99, 100], [0, 255]),
        ("0,256", [-128, -127, 0, 127], [0, 1, 128, 255]),
    ],
)
def test_window_levels_and_edges(window: str, hu: list[int], grey: list[int]):
    chosen = parse_window(window)
    values = np.array([hu], float)
    assert to_grey(Slice(values), chosen).tolist() == [grey]
    inverted = to_grey(Slice(values, inverted=True), chosen)
    assert inverted.tolist() == [[255 - g for g in grey]]
    outside = np.ones_like(values, bool)
    assert not to_grey(Slice(values, outside, inverted=True), chosen).any()


@pytest.mark.parametrize("text", ["bone", "1", "1,2,3", "0,0.5", "nan,400", "0,inf"])
def test_invalid_windows_are_refused(text: str):
    with pytest.raises(ConfigError, match="window is"):
        parse_window(text)


def test_file_window_is_the_first_and_files_without_one_are_excluded(source: Path):
    values = noise(5)
    tags = {"WindowCenter": [-500, 40], "WindowWidth": [1200, 400]}
    write_slice(source / "c" / "x", values, z=0, **tags)
    expected = [each(values, lambda v: lung(v, -500, 1200))]
    assert_slices(convert(source, window="file"), expected)
    write_slice(source / "c" / "y", values, z=5, number=2)
    tags = {"WindowCenter": 3, "WindowWidth": 50, "VOILUTFunction": "SIGMOID"}
    write_slice(source / "c" / "w", values, z=5, number=3, **tags)
    result = convert(source, "b", window="file", max_bad_fraction=0.7)
    assert_slices(result, expected)
    assert set(reasons(result.log.excluded)) == {"y", "w"}
    assert "no WindowCenter and WindowWidth" in reasons(result.log.excluded)["y"]


def test_minmax_spans_the_volume_and_accepts_values_that_are_not_hounsfield(source: Path):
    mr = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}
    low, high = noise(6, low=0, high=100), noise(7, low=100, high=200)
    low[0, 0], high[0, 0] = 0, 200
    for i, values in enumerate((low, high)):
        write_slice(source / "c" / str(i), values, number=i + 1, z=i, **mr)
    match = r"(?s)class c.*not in Hounsfield units \(MR Image Storage.*--window file or minmax"
    with pytest.raises(DataError, match=match):
        convert(source)
    expected = [each(values, lambda v: round(v * 255 / 200)) for values in (low, high)]
    assert_slices(convert(source, window="minmax"), expected)


# ---- values ----


UNSIGNED = np.random.default_rng(1).integers(0, 4096, (12, 10), dtype=np.uint16)
PADDED = noise(4, low=0, high=100).astype(np.uint16)
PADDED[0, :3] = [200, 205, 210]
NOT_PADDED = np.ones((12, 10), np.uint8)
NOT_PADDED[0, :3] = 0
SCALED = {"RescaleSlope": 0.5, "RescaleIntercept": -1400}
RANGE = {"PixelPaddingValue": 210, "PixelPaddingRangeLimit": 200, "RescaleIntercept": -600}
VALUES = {
    "slope and intercept": (UNSIGNED, SCALED, each(UNSIGNED * 0.5 - 1400)),
    "12 bits below others": (
        UNSIGNED | np.uint16(0xA000),
        {"BitsStored": 12, "HighBit": 11, **SCALED},
        each(UNSIGNED * 0.5 - 1400),
    ),
    "negative 12 bits": (
        noise(2) & np.int16(0x0FFF),
        {"BitsStored": 12, "HighBit": 11},
        each(noise(2)),
    ),
    "no rescaling": (noise(8), dict.fromkeys(SCALED), each(noise(8))),
    "padding range": (PADDED, RANGE, each(PADDED.astype(float) - 600) * NOT_PADDED),
}


@pytest.mark.parametrize("name", VALUES)
def test_stored_values_become_grey_by_the_formula(source: Path, name: str):
    stored, tags, expected = VALUES[name]
    write_slice(source / "c" / "x", stored, z=0, **tags)
    result = convert(source)
    assert_slices(result, [expected])
    note = "without RescaleSlope and RescaleIntercept, taken as 1 and 0 (1)"
    assert (note in result.summary()) == (name == "no rescaling")


def test_monochrome1_is_inverted_and_padding_stays_black(source: Path):
    values = noise(3)
    values[0, :4] = -2000
    # 63536 is how many scanners write -2000: an unsigned number for signed pixels
    ds = dataset(values, z=0, PhotometricInterpretation="MONOCHROME1")
    ds.add_new(0x00280120, "US", 63536)
    write(source / "c" / "x", ds)
    expected = 255 - each(values)
    expected[0, :4] = 0
    result = convert(source)
    assert_slices(result, [expected])
    assert "MONOCHROME1 slices, inverted (1)" in result.summary()


def test_files_without_preamble_big_endian_and_compressed(source: Path):
    values = [noise(seed) for seed in (13, 14, 15)]
    whole = write_slice(source / "c" / "0", values[0], z=0, number=1).read_bytes()
    (source / "c" / "0").write_bytes(whole[whole.index(b"\x08\x00\x08\x00CS") :])
    big = dataset(values[1].astype(">i2"), z=5, number=2)
    big.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    write(source / "c" / "1", big)
    packed = dataset(values[2], z=10, number=3)
    packed.compress(RLELossless, generate_instance_uid=False)
    write(source / "c" / "2", packed)
    assert_slices(convert(source), [each(v) for v in values])


# ---- order and direction ----


@pytest.mark.parametrize("positions", [True, False])
def test_slices_are_ordered_by_position_or_else_by_instance_number(source: Path, positions: bool):
    stored = noise(0, (4, 12, 10))
    for i, name in enumerate(["z", "10", "deep/er/a.dcm", "9"]):
        # with positions InstanceNumber runs the other way; 8, 9, 10, 11 is not the order of text
        tags = {"number": 9 - i, "z": -100 + 5.0 * i} if positions else {"number": 8 + i}
        write_slice(source / "covid" / name, stored[i], **tags)
    result = convert(source)
    assert_slices(result, [each(values) for values in stored])
    assert ("ordered by InstanceNumber (1)" in result.summary()) != positions


def hounsfield(x: np.ndarray, y: np.ndarray, z: np.ndarray | float) -> np.ndarray:
    """A body without any symmetry, at LPS coordinates in mm."""
    values = -1000 + 30 * x + 3 * y + 0.3 * y * y + 13 * z + 40 * (x > 6) * (y < 3)
    return np.rint(values).astype(np.int16)


X, Y, Z = np.arange(12.0), np.arange(9.0), np.arange(0.0, 12.0, 3.0)
# columns run to the left (x), rows to the back (y)
EXPECTED = [each(hounsfield(X[None, :], Y[:, None], z)) for z in Z]


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=2)))
def test_dicom_and_nifti_show_the_same_patient_in_the_same_direction(
    source: Path, axes: tuple[int, int], signs: tuple[int, int]
):
    """Right on the left and anterior up, for each of the 8 ways to store an axial plane."""
    lines = (X, Y)
    right, down = np.zeros(3), np.zeros(3)  # directions of rising column and row
    right[axes[0]], down[axes[1]] = signs
    corner = [0.0, 0.0]
    for axis, sign in zip(axes, signs, strict=True):
        corner[axis] = 0.0 if sign > 0 else lines[axis][-1]
    columns, rows = (lines[axis][::sign] for axis, sign in zip(axes, signs, strict=True))
    grid = (columns[None, :], rows[:, None])
    x, y = grid if axes == (0, 1) else grid[::-1]
    stored = [hounsfield(x, y, z) for z in Z]
    for i, z in enumerate(Z):
        tags = {"ImageOrientationPatient": [*right, *down], "ImagePositionPatient": [*corner, z]}
        write_slice(source / "dicom" / f"{9 - i}", stored[i], number=i + 1, **tags)
    # the same for NIfTI, slices from the head down, in RAS: x and y change their sign
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = right, down, [0, 0, -3]
    affine[:3, 3] = [*corner, Z[-1]]
    volume = np.stack([values.T for values in stored[::-1]], axis=2)
    write_nifti(source / "nifti" / "v.nii", volume, np.diag([-1, -1, 1, 1]) @ affine)
    result = convert(source)
    assert_slices(result, EXPECTED, "dicom")
    assert_slices(result, EXPECTED, "nifti")


def test_tilted_gantry_is_axial_and_a_coronal_series_is_skipped(source: Path):
    tilt = [1, 0, 0, 0, float(np.cos(0.4)), float(np.sin(0.4))]
    values = noise(10)
    write_slice(source / "c" / "tilted", values, z=0, ImageOrientationPatient=tilt)
    coronal = {"number": 2, "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
    write_slice(source / "c" / "coronal", noise(11), z=0, **coronal)
    result = convert(source)
    assert_slices(result, [each(values)])
    assert reasons(result.log.skipped) == {"coronal": "coronal or sagittal"}


def functional_group(**sequences: dict[str, object]) -> Dataset:
    group = Dataset()
    for name, values in sequences.items():
        item = Dataset()
        for key, value in values.items():
            setattr(item, key, value)
        setattr(group, name, Sequence([item]))
    return group


def test_enhanced_multi_frame_file(source: Path):
    """Positions, slopes and windows of each frame, stored from the head down."""
    stored = noise(12, (3, 12, 10), low=0, high=900)
    tags = dict.fromkeys(("RescaleSlope", "RescaleIntercept", "ImageOrientationPatient"))
    ds = dataset(stored, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", **tags)
    orientation = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    shared = functional_group(PlaneOrientationSequence=orientation)
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        functional_group(
            PlanePositionSequence={"ImagePositionPatient": [0, 0, -4.0 * i]},
            PixelValueTransformationSequence={
                "RescaleSlope": i + 1,
                "RescaleIntercept": -1000,
                "RescaleType": "HU",
            },
            FrameVOILUTSequence={"WindowCenter": -100 * i, "WindowWidth": 900},
        )
        for i in range(3)
    )
    write(source / "c" / "enhanced", ds)
    values = [stored[i] * (i + 1.0) - 1000 for i in range(3)]
    assert_slices(convert(source), [each(values[i]) for i in (2, 1, 0)])
    expected = [each(values[i], lambda v, i=i: lung(v, -100 * i, 900)) for i in (2, 0)]
    assert_slices(convert(source, "b", window="file", every=2), expected)


# ---- files that are not CT slices, volumes ----


def test_files_that_are_not_ct_slices_are_named_with_the_reason(source: Path):
    folder = source / "covid"
    write_series(folder / "good", 1, count=4)
    whole = (folder / "good" / "IM00").read_bytes()
    storage = "1.2.840.10008.5.1.4.1.1."
    not_slices = {
        "scout": LOCALIZER,
        "seg": {"SOPClassUID": storage + "66.4"},
        "screen": {"SOPClassUID": storage + "7"},
        "pet": {"SOPClassUID": storage + "128", "Modality": "PT"},
        "report": {
            **dict.fromkeys(("Rows", "Columns", "PixelData")),
            "SOPClassUID": storage + "88.11",
        },
        "rgb": {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
        "perfusion": {"PixelPresentation": "COLOR"},
        "cut": {},
        "empty": {"PixelData": None},
    }
    for i, (name, tags) in enumerate(not_slices.items()):
        write_slice(folder / name, noise(i), series=2, z=i, number=11 + i, **tags)
    (folder / "cut").write_bytes((folder / "cut").read_bytes()[:-30])
    (folder / "copy").write_bytes(whole)
    (folder / "bare report").write_bytes((folder / "report").read_bytes()[132:])  # no preamble
    (folder / "header.dcm").write_bytes(whole[:400])
    (folder / ".hidden").write_bytes(whole)
    (folder / "zero.nii").touch()
    (folder / "notes.txt").write_text("hello")
    jpeg = dataset(noise(8), number=30, z=3)
    jpeg.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    jpeg["PixelData"].is_undefined_length = True
    item, end = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
    jpeg.PixelData = item + b"\0\0\0\0" + item + b"\x04\0\0\0abcd" + end
    write(folder / "jpeg", jpeg)
    with pytest.raises(DataError, match=r"(?s)unusable.*--max-bad-fraction"):
        convert(source)
    assert not (source.parent / "out").exists()
    result = convert(source, max_bad_fraction=0.7)
    assert result.record["classes"] == {"covid": {"patients": 1, "volumes": 1, "slices": 4}}
    skipped, excluded = reasons(result.log.skipped), reasons(result.log.excluded)
    hu = "not in Hounsfield units"
    assert skipped.pop("screen").startswith(f"{hu} (Secondary Capture Image Storage)")
    assert skipped.pop("pet").startswith(f"{hu} (Positron Emission Tomography Image Storage)")
    assert skipped == {
        "scout": "localizer",
        "seg": "not an image: Segmentation Storage",
        "report": "not an image: Basic Text SR Storage",
        "bare report": "not an image: Basic Text SR Storage",
        "rgb": "colour",
        "perfusion": "values for a colour map, not Hounsfield units",
        "IM00": "copy of another slice",  # the copy whose name comes first is kept
    }
    assert excluded.pop("jpeg").startswith("compressed (JPEG Lossless, Non-Hierarchical")
    assert excluded == {
        "cut": "truncated or damaged DICOM",
        "empty": "DICOM without pixel data (truncated?)",
        "zero.nii": "empty file",
        "header.dcm": "DICOM header without rows and columns (truncated?)",
    }
    summary = result.summary()
    assert "install one of: gdcm - requires gdcm>=3.0.10; pylibjpeg - requires" in summary
    assert "other files: 1 unknown content" in summary


def test_series_in_one_folder_become_volumes_of_their_patients(source: Path):
    write_series(source / "covid", 1)
    for i in range(2):
        tags = {"number": i + 1, "z": i}
        nameless = {"PatientID": "", "StudyInstanceUID": uid(6)}
        write_slice(source / "covid" / f"b{i}", noise(30 + i), series=2, PatientID="B", **tags)
        write_slice(source / "normal" / f"b{i}", noise(40 + i), series=3, PatientID="B", **tags)
        write_slice(source / "normal" / f"c{i}", noise(50 + i), series=4, **nameless, **tags)
    result = convert(source)
    assert result.record["classes"] == {
        "covid": {"patients": 2, "volumes": 2, "slices": 5},
        "normal": {"patients": 2, "volumes": 2, "slices": 4},
    }
    assert result.record["patients"] == 3
    assert "slices without PatientID, whose study counts as the patient (2)" in result.summary()


ONE_SERIES = {"SeriesInstanceUID": uid(77)}


def test_one_equal_identifier_neither_joins_patients_nor_drops_slices(source: Path):
    """Programs that make data anonymous write one UID into every file."""
    for patient in (1, 2, 3):
        tags = {"PatientID": f"P{patient}", "StudyInstanceUID": uid(5, patient)}
        write_series(source / "covid" / f"p{patient}", 10 * patient, **tags, **ONE_SERIES)
    result = convert(source)
    sizes = {"patients": 3, "volumes": 3, "slices": 9}
    assert result.record["classes"] == {"covid": sizes}
    # one patient and study for all: folders with slices at the same positions stay apart
    for patient in (1, 2):
        write_series(source / "all" / f"p{patient}", 40 + patient, **ONE_SERIES)
    result = convert(source, "b")
    assert result.record["classes"]["all"] == {"patients": 1, "volumes": 2, "slices": 6}
    assert "slices at the same positions, one volume each (1)" in result.summary()


@pytest.mark.parametrize("known", [True, False])
def test_copy_of_a_slice_has_its_position_or_its_pixels(source: Path, known: bool):
    same = {"SOPInstanceUID": "1.2.3.4"}
    for i in range(4):
        z = {"z": 5.0 * i} if known else {}
        write_slice(source / "c" / f"{i}", noise(i), number=i + 1, **z, **same)
    shutil.copy(source / "c" / "2", source / "c" / "again")
    result = convert(source)
    assert_slices(result, [each(noise(i)) for i in range(4)])
    assert reasons(result.log.skipped) == {"again": "copy of another slice"}
    assert "slices that share SOPInstanceUID with another one, kept (3)" in result.summary()


@pytest.mark.parametrize(
    ("tags", "factor", "offset", "note"),
    [
        ({"RescaleSlope": None, "RescaleIntercept": -1024}, 1, -1024, "RescaleSlope, taken as 1"),
        ({"RescaleSlope": 2, "RescaleIntercept": None}, 2, 0, "RescaleIntercept, taken as 0"),
    ],
)
def test_rescaling_uses_what_is_present(
    source: Path, tags: dict[str, Any], factor: int, offset: int, note: str
):
    stored = noise(3, low=-700, high=700)
    write_slice(source / "c" / "a", stored, **tags)
    result = convert(source)
    assert_slices(result, [each(stored * float(factor) + offset)])
    assert f"slices of CT without {note} (1)" in result.summary()


def test_senseless_rescaling_is_refused(source: Path):
    write_series(source / "c", 1)
    write_slice(source / "c" / "zero", noise(2), series=2, RescaleSlope=0)
    # pydicom cannot write 1e400: the text of the tag is replaced, in the same length
    huge = write_slice(source / "c" / "huge", noise(2), series=3, RescaleSlope="1.2345")
    huge.write_bytes(huge.read_bytes().replace(b"1.2345", b"1.e400"))
    result = convert(source, max_bad_fraction=0.5)
    assert reasons(result.log.excluded) == {
        "zero": "RescaleSlope is 0",
        "huge": "RescaleSlope is not finite",
    }


PADDED = np.where(np.indices((12, 10))[0] < 4, -2000, 24 + noise(5, low=0, high=1000))
VALUES_NOT_IN_HU = {
    "HU + 1024 inside of padding": (PADDED, "air (-1500 to -500 HU)"),
    "0 to 2000": (noise(6, low=0, high=2000), "air (-1500 to -500 HU)"),
    "MR": (noise(7, low=-610, high=30393), "of the values are above 3100"),
}


@pytest.mark.parametrize(("values", "reason"), VALUES_NOT_IN_HU.values(), ids=VALUES_NOT_IN_HU)
@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_values_that_cannot_be_hounsfield_units_are_refused(
    source: Path, kind: str, values: np.ndarray, reason: str
):
    write_series(source / "c", 1)
    if values.max() > 3100:
        values = values.copy()
        values[0, :3] = -600  # some air
    if kind == "dicom":
        bad = write_slice(source / "c" / "bad", values.astype(np.int16), series=2, z=0)
    else:
        bad = write_nifti(source / "c" / "bad.nii", values.astype(np.int16)[:, :, None], np.eye(4))
    result = convert(source, max_bad_fraction=0.5)
    [(path, found)] = result.log.excluded
    assert path == bad
    assert reason in found
    assert "use --window minmax, or --window=LEVEL,WIDTH" in found
    assert result.record["classes"]["c"]["slices"] == 3
    assert len(list(result.out.rglob("*.png"))) == 3
    # any other window shows them
    assert convert(source, "b", window="500,1000").record["classes"]["c"]["volumes"] == 2


def test_what_is_no_plain_ct_slice_is_named(source: Path):
    newer = "1.2.840.10008.5.1.4.1.1.66.999"  # a class that pydicom does not know
    write_slice(source / "c" / "seg", noise(1), series=9, SOPClassUID=newer, Modality="SEG")
    for series in (1, 2):  # a lung and a soft kernel
        for i in range(3):
            path = source / "c" / f"{series}{i}"
            write_slice(path, noise(10 * series + i), series=series, number=i + 1, z=5.0 * i)
    for i, kind in enumerate((["DERIVED", "SECONDARY"], ["DERIVED", "PRIMARY", "AXIAL", "MIP"])):
        write_slice(source / "c" / f"d{i}", noise(40 + i), series=3, z=100 + i, ImageType=kind)
    (source / "c" / "a.dcm.gz").write_bytes(gzip.compress((source / "c" / "10").read_bytes()))
    (source / "c" / "b.mha").write_bytes(b"ObjectType = Image\nNDims = 3\n")
    result = convert(source, window="minmax")
    assert reasons(result.log.skipped) == {"seg": "not an image: Modality SEG"}
    text = result.summary()
    for line in (
        "another one of their study (another kernel or phase?), kept (2)",
        "according to ImageType (screen save, MIP or reformat): look at them (2)",
        "1 MetaImage (.mha, convert it to NIfTI)",
        "1 packed DICOM (.dcm.gz, unpack them with gunzip)",
        "window: minmax\n",
    ):
        assert line in text
