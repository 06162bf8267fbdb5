"""Planes of slices in the patient: which are axial, in what order they come, and which way up.

Coordinates are DICOM's (PS3.3 C.7.6.2.1.1): LPS, in mm, x to the patient's Left, y to the back (Posterior), z to the head
(Superior). A plane's orientation is six cosines: where columns rise to, then where rows rise to.

- Axial: the plane's normal is nearer to z than to x or y; a tilted gantry stays axial.
- Order: along the normal, from the feet to the head; by InstanceNumber where a position is missing, with a note.
- Direction: turned by 90 degrees and mirrored until columns run to the patient's left and rows to the back. This is how
  a supine scan is displayed: the patient's right on the left of the picture, anterior up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Orientation = tuple[float, ...]  # 6 numbers
_TOLERANCE = 0.02  # of the cosines' length and right angle; files round them to 3 digits and fewer


class Placed(Protocol):
    """What `order` needs to know of a slice."""

    @property
    def path(self) -> Path: ...
    @property
    def index(self) -> int: ...
    @property
    def number(self) -> int | None: ...
    @property
    def height_mm(self) -> float | None: ...


PlacedT = TypeVar("PlacedT", bound=Placed)


def parse_orientation(cosines: Sequence[Any]) -> Orientation | None:
    """None where missing, or where the two directions are not perpendicular unit vectors."""
    values = np.array([float(value) for value in cosines])
    if values.shape != (6,) or not np.isfinite(values).all():
        return None
    right, down = values[:3], values[3:]
    errors = (right @ right - 1, down @ down - 1, right @ down)
    return tuple(float(value) for value in values) if max(map(abs, errors)) < _TOLERANCE else None


def is_axial(orientation: Orientation | None) -> bool:
    """Unknown counts as axial."""
    if orientation is None:
        return True
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    return bool(normal[2] >= normal[:2].max())


def height_mm(orientation: Orientation | None, position: Sequence[Any]) -> float | None:
    """Position along the plane's normal, rising towards the head. None where either is missing."""
    if orientation is None or len(position) != 3:
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    height = float(
        np.dot(normal if normal[2] >= 0 else -normal, [float(value) for value in position])
    )
    return height if np.isfinite(height) else None


def order(slices: Sequence[PlacedT]) -> tuple[list[PlacedT], list[str]]:
    """The slices of one volume from the feet to the head, and what is to be said about their order."""
    if all(s.height_mm is not None for s in slices):
        ordered = sorted(
            slices, key=lambda s: (round(s.height_mm or 0.0, 3), s.number or 0, s.index)
        )
        places = {round(s.height_mm or 0.0, 3) for s in slices}
        repeated = ["volumes with several slices at one position (phases?), all kept"]
        return ordered, repeated if len(places) < len(slices) else []
    if all(s.number is not None for s in slices):
        ordered = sorted(slices, key=lambda s: (s.number or 0, s.index))
        return ordered, ["volumes with slices without position, ordered by InstanceNumber"] if len(
            slices
        ) > 1 else []
    ordered = sorted(slices, key=lambda s: (s.path, s.index))
    return ordered, ["volumes without positions and InstanceNumber, ordered by file name"] if len(
        slices
    ) > 1 else []


def turn(picture_HW: npt.NDArray[Any], orientation: Orientation | None) -> npt.NDArray[Any]:
    """Columns to the patient's left, rows to the back; unchanged where the orientation is unknown."""
    if orientation is None:
        return picture_HW
    right, down = orientation[:3], orientation[3:]
    if abs(right[0]) < abs(right[1]):
        picture_HW, right, down = picture_HW.T, down, right
    if right[0] < 0:
        picture_HW = picture_HW[:, ::-1]
    return picture_HW[::-1] if down[1] < 0 else picture_HW
