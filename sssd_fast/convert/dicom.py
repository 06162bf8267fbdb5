"""DICOM files as axial slices. Section numbers are those of DICOM PS3.3.

- Which files: by content, DICM behind the preamble (PS3.10 7.1), or a first tag of group 2 or 8 and rows and columns
  behind it. Names say nothing.
- Hounsfield units: CT images (by SOP class, or Modality CT where that is missing or private) whose RescaleType is HU or
  not given (C.8.2.1), and others that say RescaleType HU. HU = stored * RescaleSlope + RescaleIntercept (C.11.1.1.2); a
  CT without the two counts as slope 1, intercept 0, with a note. A window in HU refuses what is not in HU.
- Left out by nature: localizers (C.8.2.1.1.1), what has no pixels or is no picture (reports, segmentations, dose),
  colour, and planes that are nearer to coronal or sagittal than to axial.
- PixelPaddingValue, to PixelPaddingRangeLimit if given, was not scanned (C.7.5.1.1.2).
- Order and direction of the slices: orientation.py.
- Multi-frame files: one slice a frame; position, orientation, rescaling and window from the functional groups
  (C.7.6.16), per frame before shared.

Only the tags listed here are read: the patient's name, birth date and the like never enter the program. What pydicom
warns about is silenced, as its texts quote the file.

HW: rows and columns.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sssd_fast.convert.orientation import Orientation, height_mm, parse_orientation, turn
from sssd_fast.convert.window import Slice, Unusable, Window
from sssd_fast.data.images import MAX_PIXELS, MIN_SIDE
from sssd_fast.errors import DependencyError

BURNED_IN = "slices that say they hold burned-in text (BurnedInAnnotation YES), which may name the patient: look at them"
_MAX_FRAMES = 2**16
_TAGS = [
    "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID",
    "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "SamplesPerPixel", "PhotometricInterpretation",
    "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "BurnedInAnnotation", "RescaleSlope", "RescaleIntercept",
    "RescaleType", "WindowCenter", "WindowWidth", "VOILUTFunction", "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
]  # fmt: skip
_CT = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
}
_MODALITIES = {
    "CT",
    "MR",
    "PT",
    "NM",
    "CR",
    "DX",
    "XA",
    "RF",
    "MG",
    "US",
    "OT",
    "SC",
    "SR",
    "SEG",
    "RTDOSE",
}
_GROUP_OF = {  # attribute: the functional group that holds it in a multi-frame file
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "VOILUTFunction": "FrameVOILUTSequence",
}


@dataclass(frozen=True)
class Frame:
    """Where one slice lies in its file and in the patient. Identifiers stay in memory."""

    path: Path
    index: int  # frame in its file
    instance: str  # SOPInstanceUID, "" where missing
    series: str  # SeriesInstanceUID, "" where missing
    patient: str  # PatientID, else StudyInstanceUID, else ""
    number: int | None  # InstanceNumber
    orientation: Orientation | None
    height_mm: float | None  # position along the normal, rising towards the head
    modality: str
    notes: tuple[str, ...]


def looks_like_dicom(head: bytes) -> bool:
    """From the first 132 bytes: certainly (DICM) or perhaps (no preamble, then `read_frames` decides)."""
    return has_preamble(head) or head[:2] in (b"\x02\0", b"\x08\0") or head[:3] == b"\0\x08\0"


def has_preamble(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def read_frames(path: Path, window: Window, *, certain: bool = True) -> list[Frame]:
    """The slices that a file promises, from its header; none when it is not `certain` to be DICOM and turns out not to be.

    Raises Unusable, or DependencyError without pydicom.
    """
    try:
        ds = _read(path, pixels=False)
        if not certain and ("Rows" not in ds or "Columns" not in ds):
            return []
        with quiet():
            _need_picture(ds)
            _need_values(ds, window)
            _need_decoder(ds)
            count = int(ds.get("NumberOfFrames") or 1)
            if not 1 <= count <= _MAX_FRAMES:
                raise Unusable(f"a DICOM file of {count} frames; 1 to {_MAX_FRAMES} are read")
            return [_frame(ds, path, index) for index in range(count)]
    except (Unusable, DependencyError):
        raise
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    except Exception:  # noqa: BLE001 - the parser, and values of the wrong type, raise many types on damaged data
        if not certain:
            return []
        raise Unusable("truncated or damaged DICOM") from None


def read_slices(path: Path, frames: Sequence[Frame]) -> Iterator[tuple[Frame, Slice]]:
    """Decoded frames of one file, in the order given. Raises Unusable where one cannot be read or decoded."""
    from pydicom.pixels import iter_pixels

    hint = ""
    try:
        ds = _read(path, pixels=True)
        if "PixelData" not in ds:
            raise Unusable("DICOM without pixel data (truncated?)")
        syntax = ds.file_meta.TransferSyntaxUID
        if syntax.is_compressed and _install(syntax):
            hint = f", or compressed ({_known_name(syntax)}) as the installed decoders cannot read: {_install(syntax)}"
        decoded = iter_pixels(ds, indices=[frame.index for frame in frames], raw=True)
        for frame in frames:
            with quiet():
                picture = _slice(ds, frame, next(decoded))
            yield frame, picture
    except Unusable:
        raise
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    except Exception:  # noqa: BLE001 - the decoders raise many types on damaged data, with texts that quote it
        raise Unusable(f"truncated or damaged DICOM{hint}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of the parsers, which quote what they stumble over."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _read(path: Path, *, pixels: bool) -> Any:
    try:
        from pydicom import dcmread
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
    except ImportError:
        raise DependencyError(
            "reading DICOM needs pydicom: pip install 'sssd-fast[volumes]'"
        ) from None
    with quiet():
        ds = dcmread(path, force=True, specific_tags=list(_TAGS), stop_before_pixels=not pixels)
        if (
            "TransferSyntaxUID" not in ds.file_meta
        ):  # no file meta information: as pydicom guessed it
            implicit, little = ds.original_encoding
            guessed = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else guessed
        return ds


def _need_picture(ds: Any) -> None:
    """Raises Unusable for what is no grey picture of a plane through the patient."""
    sop = str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    name = _known_name(sop)
    picture = "Image Storage" in name or not sop or name.startswith("unknown")
    if "Rows" not in ds or "Columns" not in ds:
        if picture:
            raise Unusable("DICOM header without rows and columns (truncated?)")
        raise Unusable(f"no picture: {name}", damaged=False)
    if not picture:
        raise Unusable(f"no picture: {name}", damaged=False)
    if "LOCALIZER" in [str(value).upper() for value in _values(ds.get("ImageType"))]:
        raise Unusable("localizer", damaged=False)
    kind = str(ds.get("PhotometricInterpretation") or "MONOCHROME2")
    if int(ds.get("SamplesPerPixel") or 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable("colour", damaged=False)
    rows, columns = int(ds.Rows), int(ds.Columns)
    if min(rows, columns) < MIN_SIDE or rows * columns > MAX_PIXELS:
        raise Unusable(
            f"{columns} x {rows} pixels; at least {MIN_SIDE} a side, at most {MAX_PIXELS} (2^26) are needed"
        )
    if "ModalityLUTSequence" in ds:
        raise Unusable(
            "values behind a Modality LUT, which is not read; RescaleSlope and RescaleIntercept are"
        )


def _need_values(ds: Any, window: Window) -> None:
    """Raises Unusable where the window cannot be applied to the values of this file."""
    kind = str(_attribute(ds, 0, "RescaleType") or "").upper()
    if (
        window.hounsfield and kind != "HU" and not (_is_ct(ds) and kind in ("", "US"))
    ):  # US: unspecified
        sop = str(ds.get("SOPClassUID") or "")
        what = f"{_known_name(sop)}, " if sop else ""
        raise Unusable(
            f"not in Hounsfield units ({what}modality {_modality(ds)}), so no window in HU fits; "
            "--window file or minmax would take it",
            damaged=False,
        )
    if window.name == "file" and _attribute(ds, 0, "WindowCenter") is None:
        raise Unusable(
            "the file names no window (WindowCenter, WindowWidth); use --window=LEVEL,WIDTH or minmax"
        )


def _is_ct(ds: Any) -> bool:
    sop = str(ds.get("SOPClassUID") or "")
    return sop in _CT or (_known_name(sop).startswith("unknown") and _modality(ds) == "CT")


def _need_decoder(ds: Any) -> None:
    from pydicom.pixels import get_decoder

    syntax = ds.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise Unusable(
            f"compressed in a way that pydicom cannot read ({_known_name(syntax)}); decompress it first, "
            "such as with gdcmconv --raw"
        ) from None
    if not available:
        raise Unusable(
            f"compressed ({_known_name(syntax)}) and no decoder is installed: {_install(syntax)}"
        )


def _install(syntax: Any) -> str:
    """The packages any one line of which decodes this transfer syntax, as pydicom lists them."""
    from pydicom.pixels import get_decoder

    choices = []
    for line in get_decoder(syntax).missing_dependencies:
        needed = line.partition(" - requires ")[2].replace(" and ", ", ").split(", ")
        names = [
            part.partition(">")[0].replace("gdcm", "python-gdcm")
            for part in needed
            if part and part != "numpy"
        ]
        choices.append("pip install " + " ".join(names))
    return " or ".join(choices)


def _frame(ds: Any, path: Path, index: int) -> Frame:
    orientation = parse_orientation(_values(_attribute(ds, index, "ImageOrientationPatient")))
    rescaled = all(
        _attribute(ds, index, name) is not None for name in ("RescaleSlope", "RescaleIntercept")
    )
    notes = {
        "slices of CT without RescaleSlope and RescaleIntercept, taken as 1 and 0": _is_ct(ds)
        and not rescaled,
        "slices without orientation, kept as stored": orientation is None,
        "slices without PatientID, whose study counts as the patient": not str(
            ds.get("PatientID") or ""
        ).strip(),
        "MONOCHROME1 slices, inverted": ds.get("PhotometricInterpretation") == "MONOCHROME1",
        BURNED_IN: str(ds.get("BurnedInAnnotation") or "").upper() == "YES",
    }
    number = ds.get("InstanceNumber")
    return Frame(
        path,
        index,
        str(ds.get("SOPInstanceUID") or ""),
        str(ds.get("SeriesInstanceUID") or ""),
        str(ds.get("PatientID") or "").strip() or str(ds.get("StudyInstanceUID") or ""),
        int(number) if number not in (None, "") else None,
        orientation,
        height_mm(orientation, _values(_attribute(ds, index, "ImagePositionPatient"))),
        _modality(ds),
        tuple(text for text, applies in notes.items() if applies),
    )


def _slice(ds: Any, frame: Frame, stored_HW: npt.NDArray[Any]) -> Slice:
    slope, intercept = (
        _attribute(ds, frame.index, name) for name in ("RescaleSlope", "RescaleIntercept")
    )
    scale = (1.0, 0.0) if slope is None or intercept is None else (float(slope), float(intercept))
    values_HW = stored_HW.astype(np.float64) * scale[0] + scale[1]
    outside_HW = None
    padding = _padding(ds)
    if padding is not None:
        outside_HW = turn((stored_HW >= padding[0]) & (stored_HW <= padding[1]), frame.orientation)
    inverted = ds.get("PhotometricInterpretation") == "MONOCHROME1"
    return Slice(
        turn(values_HW, frame.orientation), outside_HW, inverted, _own_window(ds, frame.index)
    )


def _padding(ds: Any) -> tuple[int, int] | None:
    """Lowest and highest stored value that mean padding."""
    first = ds.get("PixelPaddingValue")
    if first in (None, ""):
        return None
    ends = [int(value) for value in (first, ds.get("PixelPaddingRangeLimit", first))]
    if int(ds.PixelRepresentation) == 1:  # often written as unsigned: 63536 for -2000
        ends = [end - 2**16 if end >= 2**15 else end for end in ends]
    return min(ends), max(ends)


def _own_window(ds: Any, index: int) -> tuple[float, float] | None:
    function = str(_attribute(ds, index, "VOILUTFunction") or "LINEAR").upper()
    center, width = (
        _values(_attribute(ds, index, name)) for name in ("WindowCenter", "WindowWidth")
    )
    return (
        (float(center[0]), float(width[0])) if center and width and function == "LINEAR" else None
    )


def _attribute(ds: Any, index: int, name: str) -> Any:
    """Of one frame: from the frame's own functional group, the shared one, or the file. None where missing or empty."""
    if name in _GROUP_OF:
        frames = ds.get("PerFrameFunctionalGroupsSequence") or []
        for group in [
            *frames[index : index + 1],
            *(ds.get("SharedFunctionalGroupsSequence") or []),
        ]:
            items = group.get(_GROUP_OF[name]) or []
            if items and items[0].get(name) not in (None, ""):
                return items[0].get(name)
    value = ds.get(name)
    return None if value == "" else value


def _values(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _known_name(uid: Any) -> str:
    """The name of a UID of the standard; never the UID of somebody's own."""
    from pydicom.uid import UID

    name = UID(str(uid)).name
    return name if uid and name != str(uid) else "unknown SOP class or syntax"


def _modality(ds: Any) -> str:
    found = str(ds.get("Modality") or "").upper()
    return found if found in _MODALITIES else "unknown"
