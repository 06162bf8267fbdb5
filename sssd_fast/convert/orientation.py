"""Orientation of a slice in the patient: is it axial, at which height, and which way up.

Coordinates are those of DICOM (PS3.3 C.7.6.2.1.1): LPS in mm, x to the patient's Left, y to the
back (Posterior), z to the head (Superior). The orientation of a plane is six cosines: the direction
of rising columns, then of rising rows.

- Axial: the normal is nearer to z than to x or y; a tilted gantry stays axial.
- Direction: turned by 90 degrees and mirrored until columns run to the patient's left and rows to
  the back. This is how a supine scan is displayed: patient's right on the left, anterior up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Orientation = tuple[float, ...]  # 6 numbers
_TOLERANCE = 0.02  # of the cosines' length and right angle; files round them to 3 digits and fewer


def parse_orientation(cosines: Sequence[Any]) -> Orientation | None:
    """None if missing, or if the two directions are not perpendicular unit vectors."""
    values = np.array([float(value) for value in cosines])
    if values.shape != (6,) or not np.isfinite(values).all():
        return None
    right, down = values[:3], values[3:]
    errors = (right @ right - 1, down @ down - 1, right @ down)
    return tuple(values.tolist()) if max(map(abs, errors)) < _TOLERANCE else None


def is_axial(orientation: Orientation | None) -> bool:
    """An unknown orientation counts as axial."""
    if orientation is None:
        return True
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    return bool(normal[2] >= normal[:2].max())


def height_mm(orientation: Orientation | None, position: Sequence[Any]) -> float | None:
    """Position along the normal, rising towards the head. None if it is unknown."""
    if orientation is None or len(position) != 3:
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    height = float(np.sign(normal[2] or 1) * normal @ [float(value) for value in position])
    return height if np.isfinite(height) else None


def turn(picture_HW: npt.NDArray[Any], orientation: Orientation | None) -> npt.NDArray[Any]:
    """Columns to the patient's left, rows to the back; unchanged if the orientation is unknown."""
    if orientation is None:
        return picture_HW
    right, down = orientation[:3], orientation[3:]
    if abs(right[0]) < abs(right[1]):
        picture_HW, right, down = picture_HW.T, down, right
    if right[0] < 0:
        picture_HW = picture_HW[:, ::-1]
    return picture_HW[::-1] if down[1] < 0 else picture_HW
