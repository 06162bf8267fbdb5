"""DICOM files as axial slices. Section numbers are those of DICOM PS3.3.

- Which files: by content, DICM after the preamble (PS3.10 7.1), or a first tag of group 2 or 8
  followed by rows and columns. File names do not matter.
- Hounsfield units: CT images (by SOP class, or Modality CT if that is missing or private) whose
  RescaleType is HU or missing (C.8.2.1), and others with RescaleType HU. HU = stored * RescaleSlope
  + RescaleIntercept (C.11.1.1.2); of a CT, a missing slope counts as 1 and a missing intercept as
  0, with a note. window.py checks the values.
- Refused files: `_refuse` has all rules.
- PixelPaddingValue, to PixelPaddingRangeLimit if present, was not scanned (C.7.5.1.1.2).
- Multi-frame files: one slice per frame; position, orientation, rescaling and window from the
  functional groups (C.7.6.16), those of the frame before the shared ones.
- Orientation (C.7.6.2.1.1): the direction of rising columns, then of rising rows, in LPS: x to the
  patient's Left, y to the back, z to the head. A slice is axial if its normal is nearer to z than
  to x or y; a tilted gantry stays axial. It is turned and mirrored until columns run to the
  patient's left and rows to the back, as a supine scan is displayed.

Only the tags in `_TAGS` are read: the patient's name, birth date and the like are never loaded.
Warnings and log lines of pydicom are suppressed, because they quote the file.

HW: rows and columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sssd_fast.convert.window import NO_WINDOW, Slice, Unusable, Window, quiet
from sssd_fast.data.images import MAX_PIXELS, MIN_SIDE
from sssd_fast.errors import DependencyError

BURNED_IN = (
    "slices with burned-in text according to BurnedInAnnotation, which may name the patient: look "
    "at them"
)
Orientation = tuple[float, ...]  # 6 cosines

_UNKNOWN = "unknown SOP class or syntax"
_MAX_FRAMES = 2**16
_TOLERANCE = 0.02  # of the cosines' length and right angle; files round them to 3 digits and fewer
_TAGS = """
    ImageType SOPClassUID SOPInstanceUID Modality PatientID StudyInstanceUID SeriesInstanceUID
    InstanceNumber ImagePositionPatient ImageOrientationPatient SamplesPerPixel NumberOfFrames
    PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation
    PixelPaddingValue PixelPaddingRangeLimit BurnedInAnnotation RescaleSlope RescaleIntercept
    RescaleType WindowCenter WindowWidth VOILUTFunction ModalityLUTSequence PixelData
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence ExtendedOffsetTable
    ExtendedOffsetTableLengths PixelPresentation
"""
_CT = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
}
# Modalities (C.7.3.1.1.1) whose pixels, if any, are no picture: their SOP class may be newer than
# the installed pydicom.
_NO_PICTURE = {"SEG", "SR", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "PR", "KO", "FID", "M3D", "DOC"}
SECONDARY = (
    "slices that are derived and secondary according to ImageType (screen save, MIP or reformat): "
    "look at them"
)


@dataclass(frozen=True)
class Frame:
    """Position of one slice in its file and in the patient. Identifiers stay in memory."""

    path: Path
    index: int  # frame in its file
    instance: str  # SOPInstanceUID, "" if missing
    series: str  # SeriesInstanceUID, "" if missing
    study: str  # StudyInstanceUID, "" if missing
    patient: str  # PatientID, else StudyInstanceUID, else ""
    number: int | None  # InstanceNumber
    orientation: Orientation | None  # None: missing or wrong
    height_mm: float | None  # position along the normal, rising towards the head
    notes: tuple[str, ...]

    @property
    def axial(self) -> bool:
        """An unknown orientation counts as axial."""
        if self.orientation is None:
            return True
        normal = np.abs(np.cross(self.orientation[:3], self.orientation[3:]))
        return bool(normal[2] >= normal[:2].max())


def dicom_kind(head: bytes) -> bool | None:
    """From the first 132 bytes of a file: True is DICOM, False may be (`read_frames` decides)."""
    if head[128:132] == b"DICM":
        return True
    return False if head[:2] in (b"\x02\0", b"\x08\0") or head[:3] == b"\0\x08\0" else None


def read_frames(path: Path, window: Window, *, certain: bool = True) -> list[Frame]:
    """The slices of a file, from its header; none if it is not `certain` to be DICOM and is not.

    Raises Unusable, or DependencyError without pydicom.
    """
    try:
        with _problems():
            ds = _read(path, pixels=False)
            sized = "Rows" in ds and "Columns" in ds
            if not certain and not sized and _standard_name(ds.get("SOPClassUID")) == _UNKNOWN:
                return []
            _refuse(ds, window)
            return [_frame(ds, path, i) for i in range(int(ds.get("NumberOfFrames") or 1))]
    except _Damaged:
        if not certain:
            return []
        raise


def read_slices(path: Path, frames: Sequence[Frame]) -> Iterator[tuple[Frame, Slice]]:
    """Decoded frames of one file, in the given order. Raises Unusable if decoding fails."""
    from pydicom.pixels import iter_pixels

    with _problems():
        ds = _read(path, pixels=True)
        if "PixelData" not in ds:
            raise Unusable("DICOM without pixel data (truncated?)")
        syntax = ds.file_meta.TransferSyntaxUID
        decoded = iter_pixels(ds, indices=[frame.index for frame in frames], raw=True)
    hint = f", or not readable by the installed decoders ({_standard_name(syntax)})"
    for frame in frames:
        with _problems(hint if syntax.is_compressed else ""):
            picture = _slice(ds, frame, next(decoded))
        yield frame, picture


class _Damaged(Unusable):
    pass


@contextmanager
def _problems(hint: str = "") -> Iterator[None]:
    """Turns errors of the parser and the decoders, which quote the file, into Unusable."""
    try:
        with quiet():
            yield
    except (Unusable, DependencyError):
        raise
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    except Exception:  # noqa: BLE001 - damaged data raise many types
        raise _Damaged(f"truncated or damaged DICOM{hint}") from None


def _read(path: Path, *, pixels: bool) -> Any:
    try:
        from pydicom import dcmread, uid
    except ImportError:
        message = "reading DICOM needs pydicom: pip install 'sssd-fast[volumes]'"
        raise DependencyError(message) from None
    ds = dcmread(path, force=True, specific_tags=_TAGS.split(), stop_before_pixels=not pixels)
    if "TransferSyntaxUID" not in ds.file_meta:
        # no file meta information: use what pydicom guessed
        implicit, little = ds.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return ds


def _refuse(ds: Any, window: Window) -> None:
    """Raises Unusable if the file is not a grey axial image whose values fit the window."""
    from pydicom.pixels import get_decoder

    # 1. not an image by nature: reports, segmentations, dose, localizers (C.8.2.1.1.1), colour
    sop = str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    name = _standard_name(sop)
    if "Image Storage" not in name and name != _UNKNOWN:
        raise Unusable(f"not an image: {name}", damaged=False)
    if (modality := str(ds.get("Modality") or "").upper()) in _NO_PICTURE:
        raise Unusable(f"not an image: Modality {modality}", damaged=False)
    if "Rows" not in ds or "Columns" not in ds:
        raise Unusable("DICOM header without rows and columns (truncated?)")
    if "LOCALIZER" in [str(value).upper() for value in _values(ds.get("ImageType"))]:
        raise Unusable("localizer", damaged=False)
    kind = str(ds.get("PhotometricInterpretation") or "MONOCHROME2")
    if int(ds.get("SamplesPerPixel") or 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable("colour", damaged=False)
    if "COLOR" in str(ds.get("PixelPresentation")).upper():  # C.8.16.2.1.1.1: a perfusion map
        raise Unusable("values for a colour map, not Hounsfield units", damaged=False)

    # 2. sizes
    rows, columns, count = int(ds.Rows), int(ds.Columns), int(ds.get("NumberOfFrames") or 1)
    if min(rows, columns) < MIN_SIDE or rows * columns > MAX_PIXELS:
        raise Unusable(
            f"{columns} x {rows} pixels; at least {MIN_SIDE} a side, at most {MAX_PIXELS} (2^26) "
            "are needed"
        )
    if not 1 <= count <= _MAX_FRAMES:
        raise Unusable(f"a DICOM file of {count} frames; 1 to {_MAX_FRAMES} are read")

    # 3. values that the window cannot be applied to
    if "ModalityLUTSequence" in ds:
        raise Unusable("a Modality LUT, which is not supported; RescaleSlope and Intercept are")
    for index in range(count):
        slope, intercept = _rescaling(ds, index)
        if slope == 0 or not np.isfinite(slope):
            raise Unusable(f"RescaleSlope is {'0' if slope == 0 else 'not finite'}")
        if not np.isfinite(intercept):
            raise Unusable("RescaleIntercept is not finite")
    unit = str(_attribute(ds, 0, "RescaleType") or "").upper()
    # US is the code for unspecified
    if window.hounsfield and unit != "HU" and not (_is_ct(ds) and unit in ("", "US")):
        raise Unusable(
            f"not in Hounsfield units ({name}), so a window in HU does not apply; use --window "
            "file or minmax",
            damaged=False,
        )
    if window.name == "file" and _attribute(ds, 0, "WindowCenter") is None:
        raise Unusable(NO_WINDOW)

    # 4. compression
    syntax = ds.file_meta.TransferSyntaxUID
    compression = f"compressed ({_standard_name(syntax)})"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Unusable(
            f"{compression} in a way that pydicom cannot read; decompress it first, for example "
            "with gdcmconv --raw"
        ) from None
    if not decoder.is_available:
        packages = "; ".join(decoder.missing_dependencies)
        raise Unusable(f"{compression} and no decoder is installed; install one of: {packages}")


def _is_ct(ds: Any) -> bool:
    sop = str(ds.get("SOPClassUID") or "")
    return sop in _CT or (_standard_name(sop) == _UNKNOWN and ds.get("Modality") == "CT")


def _frame(ds: Any, path: Path, index: int) -> Frame:
    orientation = _orientation(_values(_attribute(ds, index, "ImageOrientationPatient")))
    position = [float(x) for x in _values(_attribute(ds, index, "ImagePositionPatient"))]
    height_mm = None
    if orientation is not None and len(position) == 3 and np.isfinite(position).all():
        normal = np.cross(orientation[:3], orientation[3:])
        height_mm = float(np.sign(normal[2] or 1) * normal @ position)
    patient = str(ds.get("PatientID") or "").strip()
    number = ds.get("InstanceNumber")
    neutral = {"RescaleSlope": 1, "RescaleIntercept": 0}
    missing = [name for name in neutral if _attribute(ds, index, name) is None]
    taken = " and ".join(str(neutral[name]) for name in missing)
    kinds = [str(value).upper() for value in _values(ds.get("ImageType"))]
    notes = {
        f"slices of CT without {' and '.join(missing)}, taken as {taken}": bool(missing)
        and _is_ct(ds),
        SECONDARY: kinds[:2] == ["DERIVED", "SECONDARY"] or bool({"MIP", "MPR"} & {*kinds}),
        "slices without orientation, kept as stored": orientation is None,
        "slices without PatientID, whose study counts as the patient": not patient,
        "MONOCHROME1 slices, inverted": _inverted(ds),
        BURNED_IN: str(ds.get("BurnedInAnnotation") or "").upper() == "YES",
    }
    return Frame(
        path=path,
        index=index,
        instance=str(ds.get("SOPInstanceUID") or ""),
        series=str(ds.get("SeriesInstanceUID") or ""),
        study=str(ds.get("StudyInstanceUID") or ""),
        patient=patient or str(ds.get("StudyInstanceUID") or ""),
        number=int(number) if number not in (None, "") else None,
        orientation=orientation,
        height_mm=height_mm,
        notes=tuple(note for note, applies in notes.items() if applies),
    )


def _orientation(cosines: list[Any]) -> Orientation | None:
    """None if missing, or if the two directions are not perpendicular unit vectors."""
    values = np.array([float(value) for value in cosines])
    if values.shape != (6,) or not np.isfinite(values).all():
        return None
    right, down = values[:3], values[3:]
    errors = (right @ right - 1, down @ down - 1, right @ down)
    return tuple(values.tolist()) if max(map(abs, errors)) < _TOLERANCE else None


def _turn(picture_HW: npt.NDArray[Any], orientation: Orientation | None) -> npt.NDArray[Any]:
    """Columns to the patient's left, rows to the back; unchanged if the orientation is unknown."""
    if orientation is None:
        return picture_HW
    right, down = orientation[:3], orientation[3:]
    if abs(right[0]) < abs(right[1]):
        picture_HW, right, down = picture_HW.T, down, right
    if right[0] < 0:
        picture_HW = picture_HW[:, ::-1]
    return picture_HW[::-1] if down[1] < 0 else picture_HW


def _slice(ds: Any, frame: Frame, stored_HW: npt.NDArray[Any]) -> Slice:
    slope, intercept = _rescaling(ds, frame.index)
    values_HW = stored_HW.astype(np.float64) * slope + intercept
    low, high = _padding(ds)
    outside_HW = (stored_HW >= low) & (stored_HW <= high)
    names = ("WindowCenter", "WindowWidth")
    center, width = (_values(_attribute(ds, frame.index, name)) for name in names)
    window = None
    if center and width and _attribute(ds, frame.index, "VOILUTFunction") in (None, "LINEAR"):
        window = float(center[0]), float(width[0])
    values_HW, outside_HW = (_turn(one, frame.orientation) for one in (values_HW, outside_HW))
    return Slice(values_HW, outside_HW, _inverted(ds), window)


def _rescaling(ds: Any, index: int) -> tuple[float, float]:
    """(slope, intercept), each with its neutral value if it is missing."""
    slope, intercept = (_attribute(ds, index, f"Rescale{name}") for name in ("Slope", "Intercept"))
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def pixel_digest(path: Path) -> bytes:
    """Hash of the stored pixels of a file, as they are encoded. Raises Unusable."""
    with _problems():
        return hashlib.blake2b(_read(path, pixels=True).get("PixelData") or b"").digest()


def _padding(ds: Any) -> tuple[float, float]:
    """Lowest and highest stored value that mean padding."""
    first = ds.get("PixelPaddingValue")
    if first in (None, ""):
        return np.inf, -np.inf
    ends = [int(value) for value in (first, ds.get("PixelPaddingRangeLimit", first))]
    if int(ds.PixelRepresentation) == 1:
        # often written as unsigned: 63536 for -2000
        ends = [end - 2**16 if end >= 2**15 else end for end in ends]
    return min(ends), max(ends)


def _inverted(ds: Any) -> bool:
    return bool(ds.get("PhotometricInterpretation") == "MONOCHROME1")


def _attribute(ds: Any, index: int, name: str) -> Any:
    """Value for a frame: from its functional groups, the shared groups, or the file; or None."""
    frames = ds.get("PerFrameFunctionalGroupsSequence") or []
    shared = ds.get("SharedFunctionalGroupsSequence") or []
    groups = [element for group in [*frames[index : index + 1], *shared] for element in group]
    items = [group.value[0] for group in groups if group.VR == "SQ" and group.value]
    found = [item.get(name) for item in [*items, ds]]
    return next((value for value in found if value not in (None, "")), None)


def _values(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _standard_name(uid: Any) -> str:
    """The name of a UID of the standard; a private UID is never quoted."""
    from pydicom.uid import UID

    name = UID(str(uid)).name
    return name if uid and name != str(uid) else _UNKNOWN
