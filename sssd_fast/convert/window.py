"""Values of one slice to 8-bit grey.

window            range shown
lung              level -600, width 1500 HU: -1350 black, +150 white (usual for lung parenchyma)
mediastinum       level 40, width 400 HU
LEVEL,WIDTH       in HU
file              each slice by its WindowCenter and WindowWidth, the first if there are several
minmax            lowest to highest value of the volume; for values that are not HU

Level L and width W >= 1 define the LINEAR function of DICOM PS3.3 C.11.2.1.2.1 from 0 to 255:
    x <= L - 0.5 - (W - 1) / 2    0
    x >  L - 0.5 + (W - 1) / 2    255
    else                          ((x - (L - 0.5)) / (W - 1) + 0.5) * 255
MONOCHROME1 (PS3.3 C.7.6.3.1.2: the lowest value is white) is inverted after the window. Pixels
outside the scan (pixel padding, NaN) are 0 in both cases.

HW: rows and columns of one slice.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sssd_fast.data.images import ImageArray
from sssd_fast.errors import ConfigError

PRESETS = {"lung": (-600.0, 1500.0), "mediastinum": (40.0, 400.0)}  # level, width in HU
NO_WINDOW = "the file has no WindowCenter and WindowWidth; use --window=LEVEL,WIDTH or minmax"


class Unusable(Exception):
    """A file or slice that is not converted. `reason` never quotes the file (patient data).

    damaged: True if it should have been a slice; False if it is not an axial slice by nature, such
    as a localizer.
    """

    def __init__(self, reason: str, *, damaged: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.damaged = damaged


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and log lines of the parsers, which quote the file."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class Window:
    name: str  # lung, mediastinum, custom, file or minmax
    level: float | None = None  # HU; None for file and minmax
    width: float | None = None

    @property
    def hounsfield(self) -> bool:
        """True if the window needs values in HU."""
        return self.level is not None


@dataclass(frozen=True)
class Slice:
    """One slice in radiological orientation: patient's right on the left, anterior up."""

    values_HW: npt.NDArray[np.float64]  # rescaled: HU for CT
    outside_HW: npt.NDArray[np.bool_] | bool = False  # True where nothing was scanned
    inverted: bool = False  # MONOCHROME1
    window: tuple[float, float] | None = None  # level and width in the file

    def inside(self) -> npt.NDArray[np.float64]:
        """The values inside the scan, [N]."""
        return self.values_HW[np.isfinite(self.values_HW) & np.logical_not(self.outside_HW)]


class HounsfieldCheck:
    """Whether the values of a volume can be Hounsfield units, of which a preset window makes sense.

    Many published volumes hold 0 to 255, HU + 1024 or MR intensities instead, which a preset would
    turn into white images. In a CT of the body, air (about -1000) fills a real share of the pixels,
    and hardly any is above 3100 (12 bits with an intercept of -1024 end at 3071). Values below
    -1500 are padding outside of the scan.
    """

    AIR = (-1500.0, -500.0)
    LEAST_AIR = 0.001  # of the pixels that are not padding
    HIGHEST = 3100.0
    MOST_ABOVE = 0.01

    def __init__(self) -> None:
        self.pixels = 0
        self.air = 0
        self.above = 0

    def add(self, values_N: npt.NDArray[np.float64]) -> None:
        """values_N: those inside the scan of one slice."""
        low, high = self.AIR
        scanned_N = values_N[values_N > low]
        self.pixels += len(scanned_N)
        self.air += int((scanned_N <= high).sum())
        self.above += int((scanned_N > self.HIGHEST).sum())

    def problem(self) -> str | None:
        """Why the values are not in HU, or None."""
        advice = "use --window minmax, or --window=LEVEL,WIDTH in their own units"
        if self.air < self.LEAST_AIR * self.pixels:
            low, high = self.AIR
            share = f"less than {self.LEAST_AIR:.1%} of the values are air ({low:g} to {high:g} HU)"
            return f"{share}: not in Hounsfield units, or already windowed; {advice}"
        if self.above > self.MOST_ABOVE * self.pixels:
            share = f"more than {self.MOST_ABOVE:.0%} of the values are above {self.HIGHEST:g}"
            return f"{share}: not in Hounsfield units; {advice}"
        return None


def parse_window(text: str) -> Window:
    """`lung`, `mediastinum`, `file`, `minmax` or LEVEL,WIDTH. Raises ConfigError."""
    if text in PRESETS:
        return Window(text, *PRESETS[text])
    if text in ("file", "minmax"):
        return Window(text)
    try:
        level, width = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"window is {text!r}; needed: {', '.join(PRESETS)}, file, minmax, or LEVEL,WIDTH in HU "
            "such as -600,1500 (on the command line with =, as in --window=-600,1500)"
        ) from None
    if not (math.isfinite(level) and math.isfinite(width) and width >= 1):
        raise ConfigError(f"window is {text!r}; needed: a finite level and a width of at least 1")
    return Window("custom", level, width)


def to_grey(
    picture: Slice, window: Window, limits: tuple[float, float] | None = None
) -> ImageArray:
    """uint8 [H, W]. limits: lowest and highest value of the volume, for minmax.

    Raises Unusable for the window `file` if the file has none.
    """
    x_HW = picture.values_HW
    if window.name == "minmax":
        low, high = limits or (0.0, 0.0)
        y_HW = (x_HW - low) * 255 / (high - low) if high > low else np.zeros_like(x_HW)
    else:
        level, width = window.level, window.width
        if level is None or width is None:
            if picture.window is None:
                raise Unusable(NO_WINDOW)
            level, width = picture.window
            if not (math.isfinite(level) and math.isfinite(width) and width >= 1):
                raise Unusable(
                    "WindowWidth of the file below 1; use --window=LEVEL,WIDTH or minmax"
                )
        above_HW = x_HW - (level - 0.5)
        step_HW = np.where(above_HW > 0, 255.0, 0.0)
        y_HW = (above_HW / (width - 1) + 0.5) * 255 if width > 1 else step_HW
    outside_HW = np.isnan(x_HW) | picture.outside_HW
    grey_HW = np.rint(np.clip(np.where(outside_HW, 0, y_HW), 0, 255)).astype(np.uint8)
    if picture.inverted:
        grey_HW = 255 - grey_HW
    grey_HW[outside_HW] = 0
    return grey_HW
