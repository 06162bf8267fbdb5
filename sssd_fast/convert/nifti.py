"""NIfTI volumes (.nii, .nii.gz, by content) as axial slices.

- Values: stored * scl_slope + scl_inter (NIfTI-1, nifti1.h; a slope of 0 means unscaled). Hounsfield units by
  convention: nothing in the file says so. A preset window therefore needs air (-500 HU or less) somewhere in the volume;
  many published volumes hold 0 to 255 or HU + 1024 instead, which a preset would turn into white pictures.
- Orientation: the axes nearest to Right, Anterior, Superior (nibabel.as_closest_canonical); slices lie along the last,
  the lowest first, and are turned so that the patient's right is on the left and anterior is up, as for DICOM.
- Two dimensions are one slice; four are refused unless the last is 1.

XYZ: Right, Anterior, Superior. HW: rows and columns of a picture.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from sssd_fast.convert.window import PRESETS, Slice, Unusable, Window
from sssd_fast.data.images import MAX_PIXELS, MIN_SIDE
from sssd_fast.errors import DependencyError

HEADER_BYTES = 352  # the magic of NIfTI-1 stands at 344, that of NIfTI-2 at 4
_AIR_HU = -500.0


@dataclass(frozen=True)
class NiftiVolume:
    stored_XYZ: npt.NDArray[Any]  # as in the file, axes turned; no copy
    slope: float
    inter: float
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.stored_XYZ.shape[2])

    def slice(self, number: int) -> Slice:
        """Number 0 is the lowest (towards the feet)."""
        stored_HW = self.stored_XYZ[
            ::-1, ::-1, number
        ].T  # columns to the patient's left, rows to the back
        return Slice(stored_HW.astype(np.float64) * self.slope + self.inter)

    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest finite value, rescaled."""
        stored = self.stored_XYZ
        finite = stored if stored.dtype.kind in "iu" else stored[np.isfinite(stored)]
        if not finite.size:
            return None
        ends = [float(end) * self.slope + self.inter for end in (finite.min(), finite.max())]
        return min(ends), max(ends)


def nifti_kind(head: bytes) -> str | None:
    """From the first HEADER_BYTES of a file, unpacked if gzip: n+1, n+2, pair (.hdr with .img), or None."""
    if head[344:348] == b"n+1\0":
        return "n+1"
    if head[4:8] == b"n+2\0":
        return "n+2"
    return "pair" if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0" else None


def unpacked_head(path: Path) -> bytes:
    """The first HEADER_BYTES inside a gzip file; fewer or none where it is damaged."""
    try:
        with gzip.open(path) as file:
            return file.read(HEADER_BYTES)
    except (EOFError, zlib.error, OSError):
        return b""


def read_nifti(path: Path, kind: str, window: Window) -> NiftiVolume:
    """The whole volume, in the type it is stored in. Raises Unusable, or DependencyError without nibabel."""
    try:
        import nibabel
    except ImportError:
        raise DependencyError(
            "reading NIfTI needs nibabel: pip install 'sssd-fast[volumes]'"
        ) from None
    if kind == "pair":
        raise Unusable(
            "a NIfTI header whose pixels lie in a second file (.img); save it as one .nii file"
        )
    make = nibabel.Nifti1Image if kind == "n+1" else nibabel.Nifti2Image
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if packed else raw)
            image = make.from_stream(cast(Any, stream))
            _check_shape(image.shape, image.get_data_dtype())
            proxy = cast(Any, image.dataobj)
            stored_XYZ = proxy.get_unscaled().reshape((*image.shape, 1)[:3])
        turns = nibabel.orientations.io_orientation(image.affine)
    except Unusable:
        raise
    except Exception:  # noqa: BLE001 - nibabel's parsers raise many types on damaged data
        raise Unusable("truncated or damaged NIfTI") from None
    if np.isnan(turns).any():
        raise Unusable("a NIfTI orientation (affine) that is singular")
    header = image.header
    unknown = not int(header["sform_code"]) and not int(header["qform_code"])
    volume = NiftiVolume(
        nibabel.orientations.apply_orientation(stored_XYZ, turns),
        float(proxy.slope),
        float(proxy.inter),
        ["NIfTI without orientation (sform and qform 0): taken as Left, Anterior, Superior"]
        if unknown
        else [],
    )
    if min(volume.stored_XYZ.shape[:2]) < MIN_SIDE:
        raise Unusable(f"slices of fewer than {MIN_SIDE} x {MIN_SIDE} pixels")
    limits = volume.limits() if window.name in PRESETS else None
    if limits is not None and limits[0] > _AIR_HU:
        raise Unusable(
            f"no value of {_AIR_HU:g} or less, so it is not in Hounsfield units (already windowed?); use --window minmax, "
            "or LEVEL,WIDTH in its own units"
        )
    return volume


def _check_shape(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) not in (2, 3, 4) or (len(shape) == 4 and shape[3] != 1):
        raise Unusable(
            f"a NIfTI of {len(shape)} dimensions ({' x '.join(map(str, shape))}); save each volume as its own file"
        )
    if dtype.names is not None or dtype.kind not in "iuf":
        raise Unusable("a NIfTI whose pixels are colour or complex")
    *_, long, longest = sorted(shape)
    if min(shape) < 1 or long * longest > MAX_PIXELS:
        raise Unusable(
            f"a NIfTI of {' x '.join(map(str, shape))}; a slice of 1 to {MAX_PIXELS} (2^26) pixels is needed"
        )
