"""DICOM files as axial slices. Section numbers are those of DICOM PS3.3.

- Which files: by content, DICM after the preamble (PS3.10 7.1), or a first tag of group 2 or 8
  followed by rows and columns. File names do not matter.
- Hounsfield units: CT images (by SOP class, or Modality CT if that is missing or private) whose
  RescaleType is HU or missing (C.8.2.1), and others with RescaleType HU. HU = stored * RescaleSlope
  + RescaleIntercept (C.11.1.1.2); a CT without the two counts as slope 1, intercept 0, with a note.
- Refused files: `_refuse` has all rules.
- PixelPaddingValue, to PixelPaddingRangeLimit if present, was not scanned (C.7.5.1.1.2).
- Multi-frame files: one slice per frame; position, orientation, rescaling and window from the
  functional groups (C.7.6.16), those of the frame before the shared ones.

Only the tags in `_TAGS` are read: the patient's name, birth date and the like are never loaded.
Warnings and log lines of pydicom are suppressed, because they quote the file.

HW: rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sssd_fast.convert.orientation import Orientation, height_mm, parse_orientation, turn
from sssd_fast.convert.window import NO_WINDOW, Slice, Unusable, Window, quiet
from sssd_fast.data.images import MAX_PIXELS, MIN_SIDE
from sssd_fast.errors import DependencyError

BURNED_IN = (
    "slices with burned-in text according to BurnedInAnnotation, which may name the patient: look "
    "at them"
)
_UNKNOWN = "unknown SOP class or syntax"
_MAX_FRAMES = 2**16
_TAGS = """
    ImageType SOPClassUID SOPInstanceUID Modality PatientID StudyInstanceUID SeriesInstanceUID
    InstanceNumber ImagePositionPatient ImageOrientationPatient SamplesPerPixel NumberOfFrames
    PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation
    PixelPaddingValue PixelPaddingRangeLimit BurnedInAnnotation RescaleSlope RescaleIntercept
    RescaleType WindowCenter WindowWidth VOILUTFunction ModalityLUTSequence PixelData
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence ExtendedOffsetTable
    ExtendedOffsetTableLengths
"""
_CT = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
}
_MODALITIES = "CT MR PT NM CR DX XA RF MG US OT SC SR SEG RTDOSE"
# the functional groups of a multi-frame file, and the attributes in them
_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}


@dataclass(frozen=True)
class Frame:
    """Position of one slice in its file and in the patient. Identifiers stay in memory."""

    path: Path
    index: int  # frame in its file
    instance: str  # SOPInstanceUID, "" if missing
    series: str  # SeriesInstanceUID, "" if missing
    patient: str  # PatientID, else StudyInstanceUID, else ""
    number: int | None  # InstanceNumber
    orientation: Orientation | None
    height_mm: float | None  # position along the normal, rising towards the head
    modality: str
    notes: tuple[str, ...]


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
        ds = _read(path, pixels=False)
        if not certain and ("Rows" not in ds or "Columns" not in ds):
            return []
        with quiet():
            _refuse(ds, window)
            count = int(ds.get("NumberOfFrames") or 1)
            return [_frame(ds, path, index) for index in range(count)]
    except (Unusable, DependencyError):
        raise
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    except Exception:  # noqa: BLE001 - parser and wrong types raise many types on damaged data
        if not certain:
            return []
        raise Unusable("truncated or damaged DICOM") from None


def read_slices(path: Path, frames: Sequence[Frame]) -> Iterator[tuple[Frame, Slice]]:
    """Decoded frames of one file, in the given order. Raises Unusable if decoding fails."""
    from pydicom.pixels import iter_pixels

    hint = ""
    try:
        ds = _read(path, pixels=True)
        if "PixelData" not in ds:
            raise Unusable("DICOM without pixel data (truncated?)")
        syntax = ds.file_meta.TransferSyntaxUID
        if syntax.is_compressed and _install(syntax):
            name = _standard_name(syntax)
            hint = f", or not readable by the installed decoders ({name}): {_install(syntax)}"
        decoded = iter_pixels(ds, indices=[frame.index for frame in frames], raw=True)
        for frame in frames:
            with quiet():
                picture = _slice(ds, frame, next(decoded))
            yield frame, picture
    except Unusable:
        raise
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    except Exception:  # noqa: BLE001 - decoders raise many types on damaged data, and quote it
        raise Unusable(f"truncated or damaged DICOM{hint}") from None


def _read(path: Path, *, pixels: bool) -> Any:
    try:
        from pydicom import dcmread, uid
    except ImportError:
        message = "reading DICOM needs pydicom: pip install 'sssd-fast[volumes]'"
        raise DependencyError(message) from None
    with quiet():
        ds = dcmread(path, force=True, specific_tags=_TAGS.split(), stop_before_pixels=not pixels)
        if "TransferSyntaxUID" not in ds.file_meta:
            # no file meta information: use what pydicom guessed
            implicit, little = ds.original_encoding
            explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            syntax = uid.ImplicitVRLittleEndian if implicit else explicit
            ds.file_meta.TransferSyntaxUID = syntax
        return ds


def _refuse(ds: Any, window: Window) -> None:
    """Raises Unusable if the file is not a grey axial image whose values fit the window."""
    from pydicom.pixels import get_decoder

    # 1. not an image by nature: reports, segmentations, dose, localizers (C.8.2.1.1.1), colour
    sop = str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    name = _standard_name(sop)
    if "Image Storage" not in name and name != _UNKNOWN:
        raise Unusable(f"not an image: {name}", damaged=False)
    if "Rows" not in ds or "Columns" not in ds:
        raise Unusable("DICOM header without rows and columns (truncated?)")
    if "LOCALIZER" in [str(value).upper() for value in _values(ds.get("ImageType"))]:
        raise Unusable("localizer", damaged=False)
    kind = str(ds.get("PhotometricInterpretation") or "MONOCHROME2")
    if int(ds.get("SamplesPerPixel") or 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable("colour", damaged=False)

    # 2. sizes
    rows, columns = int(ds.Rows), int(ds.Columns)
    if min(rows, columns) < MIN_SIDE or rows * columns > MAX_PIXELS:
        raise Unusable(
            f"{columns} x {rows} pixels; at least {MIN_SIDE} a side, at most {MAX_PIXELS} (2^26) "
            "are needed"
        )
    count = int(ds.get("NumberOfFrames") or 1)
    if not 1 <= count <= _MAX_FRAMES:
        raise Unusable(f"a DICOM file of {count} frames; 1 to {_MAX_FRAMES} are read")

    # 3. values that the window cannot be applied to
    if "ModalityLUTSequence" in ds:
        raise Unusable("a Modality LUT, which is not supported; RescaleSlope and Intercept are")
    unit = str(_attribute(ds, 0, "RescaleType") or "").upper()
    # US is the code for unspecified
    in_hu = unit == "HU" or (_is_ct(ds) and unit in ("", "US"))
    if window.hounsfield and not in_hu:
        what = f"{name}, modality {_modality(ds)}" if sop else f"modality {_modality(ds)}"
        raise Unusable(
            f"not in Hounsfield units ({what}), so a window in HU does not apply; use --window "
            "file or minmax",
            damaged=False,
        )
    if window.name == "file" and _attribute(ds, 0, "WindowCenter") is None:
        raise Unusable(NO_WINDOW)

    # 4. compression
    syntax = ds.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise Unusable(
            f"compressed in a way that pydicom cannot read ({_standard_name(syntax)}); decompress "
            "it first, for example with gdcmconv --raw"
        ) from None
    if not available:
        raise Unusable(
            f"compressed ({_standard_name(syntax)}) and no decoder is installed: {_install(syntax)}"
        )


def _is_ct(ds: Any) -> bool:
    sop = str(ds.get("SOPClassUID") or "")
    return sop in _CT or (_standard_name(sop) == _UNKNOWN and _modality(ds) == "CT")


def _install(syntax: Any) -> str:
    """The packages that decode this transfer syntax, as pydicom lists them."""
    from pydicom.pixels import get_decoder

    choices = []
    for line in get_decoder(syntax).missing_dependencies:
        needed = line.partition(" - requires ")[2].replace(" and ", ", ").split(", ")
        names = [name.partition(">")[0] for name in needed if name not in ("", "numpy")]
        names = [name.replace("gdcm", "python-gdcm") for name in names]
        choices.append("pip install " + " ".join(names))
    return " or ".join(choices)


def _frame(ds: Any, path: Path, index: int) -> Frame:
    orientation = parse_orientation(_values(_attribute(ds, index, "ImageOrientationPatient")))
    position = _values(_attribute(ds, index, "ImagePositionPatient"))
    patient = str(ds.get("PatientID") or "").strip()
    number = ds.get("InstanceNumber")
    notes = []
    if _is_ct(ds) and _rescaling(ds, index) is None:
        notes.append("slices of CT without RescaleSlope and RescaleIntercept, taken as 1 and 0")
    if orientation is None:
        notes.append("slices without orientation, kept as stored")
    if not patient:
        notes.append("slices without PatientID, whose study counts as the patient")
    if ds.get("PhotometricInterpretation") == "MONOCHROME1":
        notes.append("MONOCHROME1 slices, inverted")
    if str(ds.get("BurnedInAnnotation") or "").upper() == "YES":
        notes.append(BURNED_IN)
    return Frame(
        path=path,
        index=index,
        instance=str(ds.get("SOPInstanceUID") or ""),
        series=str(ds.get("SeriesInstanceUID") or ""),
        patient=patient or str(ds.get("StudyInstanceUID") or ""),
        number=int(number) if number not in (None, "") else None,
        orientation=orientation,
        height_mm=height_mm(orientation, position),
        modality=_modality(ds),
        notes=tuple(notes),
    )


def _slice(ds: Any, frame: Frame, stored_HW: npt.NDArray[Any]) -> Slice:
    slope, intercept = _rescaling(ds, frame.index) or (1.0, 0.0)
    values_HW = stored_HW.astype(np.float64) * slope + intercept
    outside_HW = None
    padding = _padding(ds)
    if padding is not None:
        outside_HW = turn((stored_HW >= padding[0]) & (stored_HW <= padding[1]), frame.orientation)
    return Slice(
        values_HW=turn(values_HW, frame.orientation),
        outside_HW=outside_HW,
        inverted=ds.get("PhotometricInterpretation") == "MONOCHROME1",
        window=_file_window(ds, frame.index),
    )


def _rescaling(ds: Any, index: int) -> tuple[float, float] | None:
    slope, intercept = (_attribute(ds, index, f"Rescale{name}") for name in ("Slope", "Intercept"))
    return None if slope is None or intercept is None else (float(slope), float(intercept))


def _padding(ds: Any) -> tuple[int, int] | None:
    """Lowest and highest stored value that mean padding."""
    first = ds.get("PixelPaddingValue")
    if first in (None, ""):
        return None
    ends = [int(value) for value in (first, ds.get("PixelPaddingRangeLimit", first))]
    if int(ds.PixelRepresentation) == 1:
        # often written as unsigned: 63536 for -2000
        ends = [end - 2**16 if end >= 2**15 else end for end in ends]
    return min(ends), max(ends)


def _file_window(ds: Any, index: int) -> tuple[float, float] | None:
    if str(_attribute(ds, index, "VOILUTFunction") or "LINEAR").upper() != "LINEAR":
        return None
    center, width = (_values(_attribute(ds, index, f"Window{k}")) for k in ("Center", "Width"))
    return (float(center[0]), float(width[0])) if center and width else None


def _attribute(ds: Any, index: int, name: str) -> Any:
    """Value for a frame: from its functional group, the shared group, or the file; or None."""
    if name in _GROUP_OF:
        frames = ds.get("PerFrameFunctionalGroupsSequence") or []
        shared = ds.get("SharedFunctionalGroupsSequence") or []
        for group in [*frames[index : index + 1], *shared]:
            items = group.get(_GROUP_OF[name]) or []
            if items and items[0].get(name) not in (None, ""):
                return items[0].get(name)
    value = ds.get(name)
    return None if value == "" else value


def _values(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _standard_name(uid: Any) -> str:
    """The name of a UID of the standard; a private UID is never quoted."""
    from pydicom.uid import UID

    name = UID(str(uid)).name
    return name if uid and name != str(uid) else _UNKNOWN


def _modality(ds: Any) -> str:
    found = str(ds.get("Modality") or "").upper()
    return found if found in _MODALITIES.split() else "unknown"
