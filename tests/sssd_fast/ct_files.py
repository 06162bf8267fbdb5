"""CT files as scanners write them, with a patient whose data must not turn up anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

CT = "1.2.840.10008.5.1.4.1.1.2"
ROOT = "1.2.826.0.1.3680043.8.498."  # of every UID written here
NAME = "Quastenflosser^Wilhelmina"
PATIENT = "KH-4711-0815"
BIRTH = "19470203"
ACCESSION = "ACC998877"
SECRETS = [
    "Quastenflosser",
    "Wilhelmina",
    PATIENT,
    BIRTH,
    ACCESSION,
    ROOT,
    "Rossmoor",
]  # the last: InstitutionName


def uid(*parts: int) -> str:
    return ROOT + ".".join(map(str, parts))


def dataset(
    stored: np.ndarray, *, series: int = 1, number: int = 1, z: float | None = None, **tags: Any
) -> FileDataset:
    """A CT slice [H, W], or frames [N, H, W] (any integer type), in HU as it stands. tags: set last; None deletes one."""
    ds = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CT
    ds.SOPInstanceUID = uid(series, 7, number)
    ds.StudyInstanceUID = uid(5)
    ds.SeriesInstanceUID = uid(series, 3)
    ds.PatientName = NAME
    ds.PatientID = PATIENT
    ds.PatientBirthDate = BIRTH
    ds.AccessionNumber = ACCESSION
    ds.InstitutionName = "Rossmoor"
    ds.Modality = "CT"
    ds.InstanceNumber = number
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * stored.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.RescaleSlope = 1
    ds.RescaleIntercept = 0
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    if z is not None:
        ds.ImagePositionPatient = [0, 0, z]
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    ds.PixelData = stored.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
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
    for i, picture in enumerate(stored):
        write_slice(
            folder / f"IM{(i * 7) % 10}{i}", picture, series=seed, number=i + 1, z=5.0 * i, **tags
        )
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
    """PS3.3 C.11.2.1.2.1 as it is printed there, for one value, rounded to 8 bits."""
    if value <= level - 0.5 - (width - 1) / 2:
        return 0
    if value > level - 0.5 + (width - 1) / 2:
        return 255
    return round(((value - (level - 0.5)) / (width - 1) + 0.5) * 255)


def each(values: np.ndarray, function: Callable[[float], int]) -> np.ndarray:
    return np.array([[function(float(v)) for v in row] for row in values], dtype=np.uint8)
