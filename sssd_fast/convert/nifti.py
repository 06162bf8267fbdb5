"""NIfTI volumes (.nii, .nii.gz, recognised by content) as axial slices.

- Values: stored * scl_slope + scl_inter (NIfTI-1, nifti1.h; a slope of 0 means unscaled). They are
  Hounsfield units by convention; the file does not say so (window.py checks the values).
- Orientation: the axes nearest to Right, Anterior, Superior. Slices are along the last axis, the
  lowest first, with the patient's right on the left and anterior up, as for DICOM.
- Two dimensions are one slice; four are refused unless the last is 1.

XYZ: Right, Anterior, Superior. HW: rows and columns of a slice.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from sssd_fast.convert.window import Slice, Unusable, quiet
from sssd_fast.data.images import MAX_PIXELS, MIN_SIDE
from sssd_fast.errors import DependencyError

HEADER_BYTES = 352  # the magic of NIfTI-1 is at byte 344, that of NIfTI-2 at 4
_GZIP = b"\x1f\x8b"


def nifti_kind(path: Path, head: bytes) -> str | None:
    """From the first HEADER_BYTES of a file: n+1, n+2, pair (.hdr with .img), or None."""
    if head[:2] == _GZIP:
        try:
            with gzip.open(path) as file:
                head = file.read(HEADER_BYTES)
        except (EOFError, zlib.error, OSError):
            return None
    if head[344:348] == b"n+1\0":
        return "n+1"
    if head[4:8] == b"n+2\0":
        return "n+2"
    return "pair" if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0" else None


def read_nifti(
    path: Path, kind: str, every: int, notes: Counter[str]
) -> Iterator[tuple[int, Slice]]:
    """(number, slice) of every `every`-th slice; number 0 is the lowest (towards the feet).

    Raises Unusable, or DependencyError without nibabel.
    """
    try:
        import nibabel
    except ImportError:
        message = "reading NIfTI needs nibabel: pip install 'sssd-fast[volumes]'"
        raise DependencyError(message) from None
    if kind == "pair":
        raise Unusable("a NIfTI header with its pixels in an .img file; save it as one .nii file")
    make = nibabel.Nifti1Image if kind == "n+1" else nibabel.Nifti2Image
    try:
        with quiet(), open(path, "rb") as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if packed else raw)
            image = make.from_stream(cast(Any, stream))
            _refuse_header(image.shape, image.get_data_dtype())
            proxy = cast(Any, image.dataobj)
            stored_XYZ = proxy.get_unscaled().reshape((*image.shape, 1)[:3])
            axes = nibabel.orientations.io_orientation(image.affine)
    except Unusable:
        raise
    except Exception:  # noqa: BLE001 - nibabel raises many types on damaged data
        raise Unusable("truncated or damaged NIfTI") from None
    if np.isnan(axes).any():
        raise Unusable("a NIfTI orientation (affine) that is singular")
    # in the stored type, axes turned without a copy
    stored_XYZ = nibabel.orientations.apply_orientation(stored_XYZ, axes)
    slope, inter = float(proxy.slope), float(proxy.inter)
    if min(stored_XYZ.shape[:2]) < MIN_SIDE:
        raise Unusable(f"slices of fewer than {MIN_SIDE} x {MIN_SIDE} pixels")
    if not (image.header["sform_code"] or image.header["qform_code"]):
        notes[
            "NIfTI without orientation (sform and qform 0): taken as Left, Anterior, Superior"
        ] += 1
    for number in range(0, stored_XYZ.shape[2], every):
        # columns to the patient's left, rows to the back
        stored_HW = stored_XYZ[::-1, ::-1, number].T
        yield number, Slice(stored_HW.astype(np.float64) * slope + inter)


def _refuse_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    size = " x ".join(map(str, shape))
    if len(shape) not in (2, 3, 4) or (len(shape) == 4 and shape[3] != 1):
        raise Unusable(f"a NIfTI of {len(shape)} dimensions ({size}); save each volume as a file")
    if dtype.names is not None or dtype.kind not in "iuf":
        raise Unusable("a NIfTI with colour or complex pixels")
    *_, long, longest = sorted(shape)
    if min(shape) < 1 or long * longest > MAX_PIXELS:
        raise Unusable(f"a NIfTI of {size}; a slice of 1 to {MAX_PIXELS} (2^26) pixels is needed")
