"""DICOM files to slices: values, order and direction against pictures computed by hand; what is no CT slice is named."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, JPEGLosslessSV1, RLELossless

from sssd_fast.convert.convert import Converted, convert_volumes
from sssd_fast.convert.window import Slice, parse_window, to_grey
from sssd_fast.errors import ConfigError, DataError
from tests.sssd_fast.ct_files import (
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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "ct"


def convert(source: Path, **options: object) -> Converted:
    return convert_volumes(source, source.parent / "out", **options)  # type: ignore[arg-type]


def pictures(result: Converted) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(result.out.rglob("*.png"))]


def only(result: Converted) -> np.ndarray:
    (picture,) = pictures(result)
    return picture


def reasons(entries: list[tuple[Path, str]]) -> dict[str, str]:
    return {path.name: reason for path, reason in entries}


@pytest.mark.parametrize(
    ("window", "value", "grey"),
    [
        ("lung", -3000, 0), ("lung", -1350, 0), ("lung", -1348, 0), ("lung", -1347, 1), ("lung", -601, 127),
        ("lung", -600, 128), ("lung", 146, 254), ("lung", 148, 255), ("lung", 149, 255), ("lung", 3000, 255),
        ("mediastinum", -160, 0), ("mediastinum", -159, 1), ("mediastinum", 40, 128), ("mediastinum", 239, 255),
        ("100,1", 99, 0), ("100,1", 100, 255), ("0,256", 0, 128), ("0,256", -128, 0), ("0,256", -127, 1), ("0,256", 127, 255),
    ],
)  # fmt: skip
def test_window_levels_and_edges(window: str, value: int, grey: int):
    chosen = parse_window(window)
    assert to_grey(Slice(np.full((2, 3), float(value))), chosen).tolist() == [[grey] * 3] * 2
    assert to_grey(Slice(np.full((2, 3), float(value)), inverted=True), chosen)[0, 0] == 255 - grey
    outside = np.array([[True, False, False]])
    for inverted in (False, True):
        assert to_grey(Slice(np.full((1, 3), float(value)), outside, inverted), chosen)[0, 0] == 0


@pytest.mark.parametrize("text", ["bone", "1", "1,2,3", "0,0.5", "nan,400", "0,inf"])
def test_windows_that_make_no_sense(text: str):
    with pytest.raises(ConfigError, match="window is"):
        parse_window(text)


def test_signed_hounsfield_slices_in_order_of_position_whatever_their_names(source: Path):
    stored = noise(0, (4, 12, 10))
    for name, i in {"z": 0, "10": 1, "a.dcm": 2, "9": 3}.items():
        # InstanceNumber runs the other way, and one slice lies deeper
        write_slice(
            source / "covid" / ("deep/er" if i == 2 else "") / name,
            stored[i],
            number=9 - i,
            z=-100 + 5.0 * i,
        )
    got = pictures(convert(source))
    assert len(got) == 4
    for picture, values in zip(got, stored, strict=True):
        np.testing.assert_array_equal(picture, each(values, lung))


def test_slope_intercept_twelve_bits_and_rubbish_above_them(source: Path):
    values = np.random.default_rng(1).integers(0, 4096, (12, 10), dtype=np.uint16)
    rubbish = values | np.uint16(0xA000)
    write_slice(
        source / "c" / "x",
        rubbish,
        z=0,
        BitsStored=12,
        HighBit=11,
        RescaleSlope=0.5,
        RescaleIntercept=-1400,
    )
    np.testing.assert_array_equal(only(convert(source)), each(values * 0.5 - 1400, lung))


def test_negative_twelve_bit_values_are_sign_extended(source: Path):
    values = noise(2, low=-1400, high=250)
    write_slice(source / "c" / "x", values & np.int16(0x0FFF), z=0, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(only(convert(source)), each(values, lung))


def test_monochrome1_is_inverted_and_padding_stays_black(source: Path):
    values = noise(3)
    values[0, :4] = -2000
    want = 255 - each(values, lung)
    want[0, :4] = 0
    # 63536 is how many scanners write -2000: an unsigned number for signed pixels
    ds = dataset(values, z=0, PhotometricInterpretation="MONOCHROME1")
    ds.add_new(0x00280120, "US", 63536)
    write(source / "c" / "x", ds)
    result = convert(source)
    np.testing.assert_array_equal(only(result), want)
    assert "MONOCHROME1 slices, inverted (1)" in result.summary()


def test_a_range_of_padding_is_black(source: Path):
    values = noise(4, low=0, high=100).astype(np.uint16)
    values[0, :3] = [200, 205, 210]
    write_slice(
        source / "c" / "x",
        values,
        z=0,
        PixelPaddingValue=210,
        PixelPaddingRangeLimit=200,
        RescaleIntercept=-600,
    )
    want = each(values.astype(float) - 600, lung)
    want[0, :3] = 0
    np.testing.assert_array_equal(only(convert(source)), want)


def test_the_first_window_of_the_file_and_files_without_one(source: Path):
    values = noise(5)
    write_slice(source / "c" / "x", values, z=0, WindowCenter=[-500, 40], WindowWidth=[1200, 400])
    np.testing.assert_array_equal(
        only(convert(source, window="file")), each(values, lambda v: lung(v, -500, 1200))
    )
    write_slice(source / "c" / "y", values, z=5, number=2)
    write_slice(
        source / "c" / "w",
        values,
        z=5,
        number=3,
        WindowCenter=3,
        WindowWidth=50,
        VOILUTFunction="SIGMOID",
    )
    result = convert_volumes(source, source.parent / "b", window="file", max_bad_fraction=0.7)
    assert "names no window" in reasons(result.log.excluded)["y"]
    assert set(reasons(result.log.excluded)) == {"y", "w"}


def test_minmax_spans_the_volume_and_takes_what_is_not_hounsfield(source: Path):
    mr = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}
    low, high = noise(6, low=0, high=100), noise(7, low=100, high=200)
    low[0, 0], high[0, 0] = 0, 200
    for i, values in enumerate((low, high)):
        write_slice(source / "c" / str(i), values, number=i + 1, z=i, **mr)
    with pytest.raises(
        DataError,
        match=r"(?s)class c.*not in Hounsfield units \(MR Image Storage.*--window file or minmax",
    ):
        convert(source)
    for got, values in zip(pictures(convert(source, window="minmax")), (low, high), strict=True):
        np.testing.assert_array_equal(got, each(values, lambda v: round(v * 255 / 200)))


def test_ct_without_rescaling_counts_as_hounsfield_with_a_note(source: Path):
    values = noise(8)
    write_slice(source / "c" / "x", values, z=0, RescaleSlope=None, RescaleIntercept=None)
    result = convert(source)
    np.testing.assert_array_equal(only(result), each(values, lung))
    assert "without RescaleSlope and RescaleIntercept, taken as 1 and 0 (1)" in result.summary()


def test_without_position_the_instance_number_orders(source: Path):
    stored = noise(9, (3, 12, 10))
    for name, i in {"a": 2, "b": 0, "c": 1}.items():
        write_slice(source / "c" / name, stored[i], number=i + 9)  # 9, 10, 11: not as text
    result = convert(source)
    for got, values in zip(pictures(result), stored, strict=True):
        np.testing.assert_array_equal(got, each(values, lung))
    assert "ordered by InstanceNumber (1)" in result.summary()


def hounsfield(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """A body without any symmetry, at LPS coordinates in mm: what is where, whoever samples it."""
    return np.rint(-1000 + 30 * x + 3 * y + 0.3 * y * y + 13 * z + 40 * (x > 6) * (y < 3)).astype(
        np.int16
    )


X, Y, Z = np.arange(12.0), np.arange(9.0), np.arange(0.0, 12.0, 3.0)
EXPECTED = [
    each(hounsfield(X[None, :], Y[:, None], np.array(z)), lung) for z in Z
]  # left, back: rows y, columns x


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=2)))
def test_both_routes_show_the_same_patient_the_same_way_up(
    source: Path, axes: tuple[int, int], signs: tuple[int, int]
):
    """Right on the left and anterior up: as stored in each of the 8 ways an axial plane can lie, DICOM and NIfTI."""
    lines, ends = (X, Y), (X[-1], Y[-1])
    right, down = np.zeros(3), np.zeros(3)  # directions of rising column and row
    right[axes[0]], down[axes[1]] = signs
    corner = [0.0, 0.0]
    for axis, sign in zip(axes, signs, strict=True):
        corner[axis] = 0.0 if sign > 0 else ends[axis]
    columns, rows = (lines[axis][::sign] for axis, sign in zip(axes, signs, strict=True))
    for i, z in enumerate(Z):
        x, y = (
            (columns[None, :], rows[:, None])
            if axes == (0, 1)
            else (rows[:, None], columns[None, :])
        )
        stored = hounsfield(x, y, np.array(z))
        tags = {"ImageOrientationPatient": [*right, *down], "ImagePositionPatient": [*corner, z]}
        write_slice(source / "dicom" / f"{9 - i}", stored, number=i + 1, **tags)
    # the same for NIfTI, slices from the head down, in RAS: x and y change their sign
    volume = np.stack(
        [hounsfield(*np.broadcast_arrays(x.T, y.T, np.array(z))) for z in Z[::-1]], axis=2
    )
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = right, down, [0, 0, -3]
    affine[:3, 3] = [*corner, Z[-1]]
    write_nifti(source / "nifti" / "v.nii", volume, np.diag([-1, -1, 1, 1]) @ affine)
    result = convert(source)
    for label in ("dicom", "nifti"):
        files = sorted((result.out / label).rglob("*.png"))
        assert len(files) == len(Z)
        for path, want in zip(files, EXPECTED, strict=True):
            np.testing.assert_array_equal(
                np.array(Image.open(path)), want, err_msg=f"{label} {path.name}"
            )


def test_a_tilted_gantry_is_axial_and_a_coronal_series_is_not(source: Path):
    tilt = [1, 0, 0, 0, float(np.cos(0.4)), float(np.sin(0.4))]
    write_slice(source / "c" / "tilted", noise(10), z=0, ImageOrientationPatient=tilt)
    write_slice(
        source / "c" / "coronal",
        noise(11),
        z=0,
        number=2,
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
    )
    result = convert(source)
    assert len(pictures(result)) == 1
    assert reasons(result.log.passed) == {"coronal": "coronal or sagittal"}


def test_an_enhanced_multi_frame_file(source: Path):
    """Positions, slopes and windows of each frame, stored from the head down; orientation shared."""
    stored = noise(12, (3, 12, 10), low=0, high=900)
    tags = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1",
        "RescaleSlope": None,
        "RescaleIntercept": None,
    }
    ds = dataset(stored, **tags, ImageOrientationPatient=None)

    def group(**sequences: dict[str, object]) -> Dataset:
        item = Dataset()
        for name, values in sequences.items():
            inner = Dataset()
            for key, value in values.items():
                setattr(inner, key, value)
            setattr(item, name, Sequence([inner]))
        return item

    ds.SharedFunctionalGroupsSequence = Sequence(
        [group(PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]})]
    )
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        group(
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
    for got, i in zip(pictures(convert(source)), (2, 1, 0), strict=True):
        np.testing.assert_array_equal(got, each(values[i], lung))
    result = convert_volumes(source, source.parent / "b", window="file", every=2)
    for got, i in zip(pictures(result), (2, 0), strict=True):
        np.testing.assert_array_equal(got, each(values[i], lambda v, i=i: lung(v, -100 * i, 900)))


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
    for got, want in zip(pictures(convert(source)), values, strict=True):
        np.testing.assert_array_equal(got, each(want, lung))


def test_what_is_no_ct_slice_is_left_out_by_name(source: Path):
    folder = source / "covid"
    write_series(folder / "good", 1, count=4)
    whole = (folder / "good" / "IM00").read_bytes()
    plain = {"series": 2, "z": 0}
    write_slice(
        folder / "scout",
        noise(1),
        **plain,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        number=11,
    )
    write_slice(
        folder / "seg", noise(2), **plain, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4", number=12
    )
    write_slice(
        folder / "screen", noise(3), **plain, SOPClassUID="1.2.840.10008.5.1.4.1.1.7", number=13
    )
    write_slice(
        folder / "pet",
        noise(4),
        **plain,
        SOPClassUID="1.2.840.10008.5.1.4.1.1.128",
        Modality="PT",
        number=14,
    )
    report = dataset(noise(5), number=15, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    for name in ("Rows", "Columns", "PixelData"):
        delattr(report, name)
    write(folder / "report", report)
    colour = np.zeros((12, 10, 3), np.uint8)
    write_slice(
        folder / "rgb",
        colour,
        number=16,
        Rows=12,
        Columns=10,
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
    )
    (folder / "copy").write_bytes(whole)
    (folder / "cut").write_bytes(
        write_slice(folder / "cut", noise(6), number=17, z=1).read_bytes()[:-30]
    )
    (folder / "header.dcm").write_bytes(whole[:400])
    write_slice(folder / "empty", noise(7), number=18, z=2, PixelData=None)
    jpeg = dataset(noise(8), number=19, z=3)
    jpeg.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    jpeg["PixelData"].is_undefined_length = True
    jpeg.PixelData = (
        b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0\x04\0\0\0abcd\xfe\xff\xdd\xe0\0\0\0\0"
    )
    write(folder / "jpeg", jpeg)
    (folder / "notes.txt").write_text("hello")
    (folder / "zero.nii").touch()
    (folder / ".hidden").write_bytes(whole)
    with pytest.raises(DataError, match=r"(?s)unusable.*--max-bad-fraction"):
        convert(source)
    assert not (source.parent / "out").exists()
    result = convert(source, max_bad_fraction=0.7)
    assert len(pictures(result)) == 4
    passed, excluded = reasons(result.log.passed), reasons(result.log.excluded)
    assert passed.pop("screen").startswith(
        "not in Hounsfield units (Secondary Capture Image Storage, modality CT)"
    )
    assert passed.pop("pet").startswith(
        "not in Hounsfield units (Positron Emission Tomography Image Storage, modality PT)"
    )
    # of a slice and its copy, the one whose name comes first stays
    assert passed == {
        "scout": "localizer", "seg": "no picture: Segmentation Storage", "report": "no picture: Basic Text SR Storage",
        "rgb": "colour", "IM00": "copy of another slice",
    }  # fmt: skip
    assert excluded.pop("jpeg").startswith(
        "compressed (JPEG Lossless, Non-Hierarchical, First-Order Prediction"
    )
    assert excluded == {
        "cut": "truncated or damaged DICOM", "empty": "DICOM without pixel data (truncated?)", "zero.nii": "empty file",
        "header.dcm": "DICOM header without rows and columns (truncated?)",
    }  # fmt: skip
    assert "pip install python-gdcm or pip install pylibjpeg pylibjpeg-libjpeg" in result.summary()
    assert "ignored 1 other files: 1 unknown content" in result.summary()


def test_series_in_one_folder_become_volumes_of_their_patients(source: Path):
    write_series(source / "covid", 1)
    for i in range(2):
        write_slice(
            source / "covid" / f"other{i}",
            noise(30 + i),
            series=2,
            number=i + 1,
            z=i,
            PatientID="B",
        )
        write_slice(
            source / "normal" / f"later{i}",
            noise(40 + i),
            series=3,
            number=i + 1,
            z=i,
            PatientID="B",
        )
        nameless = {"PatientID": "", "StudyInstanceUID": uid(6)}
        write_slice(
            source / "normal" / f"nameless{i}",
            noise(50 + i),
            series=4,
            number=i + 1,
            z=i,
            **nameless,
        )
    result = convert(source)
    assert result.counts() == {
        "covid": {"patients": 2, "volumes": 2, "slices": 5},
        "normal": {"patients": 2, "volumes": 2, "slices": 4},
    }
    assert len({w.patient for w in result.written}) == 3
    assert "slices without PatientID, whose study counts as the patient (2)" in result.summary()
