"""CT files as scanners write them, with patient data that must not appear in any output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from sssd_fast.convert.convert import Converted, convert_volumes

CT = "1.2.840.10008.5.1.4.1.1.2"
LOCALIZER = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
ROOT = "1.2.826.0.1.3680043.8.498."  # of every UID written here
NAME = "Quastenflosser^Wilhelmina"
IDENTITY = {
    "PatientName": NAME,
    "PatientID": "KH-4711-0815",
    "PatientBirthDate": "19470203",
    "AccessionNumber": "ACC998877",
    "InstitutionName": "Rossmoor",
}
SECRETS = ["Quastenflosser", "Wilhelmina", ROOT, *list(IDENTITY.values())[1:]]


def uid(*parts: int) -> str:
    return ROOT + ".".join(map(str, parts))


def dataset(
    stored: np.ndarray, *, series: int = 1, number: int = 1, z: float | None = None, **tags: Any
) -> FileDataset:
    """A CT slice [H, W], or frames [N, H, W], in HU without rescaling. tags: None deletes one."""
    height, width = stored.shape[-2:]
    bits = 8 * stored.dtype.itemsize
    values: dict[str, Any] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": uid(series, 7, number),
        "StudyInstanceUID": uid(5),
        "SeriesInstanceUID": uid(series, 3),
        **IDENTITY,
        "Modality": "CT",
        "InstanceNumber": number,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": height,
        "Columns": width,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": None if z is None else [0, 0, z],
        "NumberOfFrames": len(stored) if stored.ndim == 3 else None,
        "PixelData": stored.tobytes(),
        **tags,
    }
    ds = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for name, value in values.items():
        if value is not None:
            setattr(ds, name, value)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds


def write(path: Path, ds: Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, ds, enforce_file_format=True)  # unlike save_as, it also writes big endian
    return path


def write_slice(path: Path, stored: np.ndarray, **tags: Any) -> Path:
    return write(path, dataset(stored, **tags))


def noise(
    seed: int, shape: tuple[int, ...] = (12, 10), low: int = -1400, high: int = 250
) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int16)


def write_series(folder: Path, seed: int, count: int = 3, **tags: Any) -> np.ndarray:
    """`count` slices 5 mm apart, the lowest first in the array [count, H, W] that is returned."""
    stored = noise(seed, (count, 12, 10))
    for i, values in enumerate(stored):
        path = folder / f"IM{(i * 7) % 10}{i}"
        write_slice(path, values, series=seed, number=i + 1, z=5.0 * i, **tags)
    return stored


def write_nifti(
    path: Path, values_XYZ: np.ndarray, affine: np.ndarray, *, slope: float = 1, inter: float = 0
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values_XYZ, affine)
    image.header.set_slope_inter(slope, inter)
    image.header["descrip"] = NAME.encode()
    nibabel.save(image, path)
    return path


def lung(value: float, level: float = -600, width: float = 1500) -> int:
    """The formula of PS3.3 C.11.2.1.2.1 for one value, rounded to 8 bits."""
    if value <= level - 0.5 - (width - 1) / 2:
        return 0
    if value > level - 0.5 + (width - 1) / 2:
        return 255
    return round(((value - (level - 0.5)) / (width - 1) + 0.5) * 255)


def each(values: np.ndarray, function: Callable[[float], int] = lung) -> np.ndarray:
    return np.array([[function(float(v)) for v in row] for row in values], dtype=np.uint8)


# ---- converted folders ----


def convert(source: Path, out: str = "out", **options: Any) -> Converted:
    return convert_volumes(source, source.parent / out, **options)


def slices(result: Converted, label: str = ".") -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted((result.out / label).rglob("*.png"))]


def assert_slices(result: Converted, expected: list[np.ndarray], label: str = ".") -> None:
    found = slices(result, label)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=label)


def reasons(entries: list[tuple[Path, str]]) -> dict[str, str]:
    return {path.name: reason for path, reason in entries}
