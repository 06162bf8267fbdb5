"""Score CT volumes: DICOM series and NIfTI files, in memory, by the rules of `data convert`.

Shapes: S slices of a volume, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd_fast.convert.convert import grey_slices
from sssd_fast.convert.dicom import dicom_kind
from sssd_fast.convert.nifti import HEADER_BYTES, nifti_kind
from sssd_fast.convert.volumes import Log, SourceFile, find_volumes
from sssd_fast.convert.window import Unusable, parse_window
from sssd_fast.data.images import SUFFIXES, ImageArray
from sssd_fast.data.manifest import walk_files
from sssd_fast.evaluation.predict import Trained, predict_files


@dataclass(frozen=True)
class VolumeScores:
    """Scores of one volume."""

    path: Path  # a NIfTI file, or the folder of a DICOM series
    slices: list[int]  # numbers, from the feet to the head
    scores: NDArray[np.float64]  # [S, K] softmax

    @property
    def mean(self) -> NDArray[np.float64]:
        """[K] over the slices."""
        return self.scores.mean(0)

    @property
    def maximum(self) -> NDArray[np.float64]:
        """[K] over the slices: of a finding that few slices show."""
        return self.scores.max(0)


def volume_files(targets: Sequence[str | Path]) -> list[Path]:
    """The DICOM and NIfTI files among `targets` and in folders, by content."""
    found = []
    for target in map(Path, targets):
        files = walk_files(target) if target.is_dir() else [target]
        for path in files:
            if path.suffix.lower() in SUFFIXES or not path.is_file():
                continue
            with open(path, "rb") as file:
                head = file.read(HEADER_BYTES)
            if dicom_kind(head) or nifti_kind(path, head):
                found.append(path)
    return found


def score_volumes(
    trained: Trained, files: Sequence[Path], window: str, *, batch_size: int, precision: str
) -> tuple[list[VolumeScores], dict[Path, str]]:
    """(scores of every volume, reason for each file that was not used). One volume is in memory.

    window: see convert/window.py; the one that the training images were made with.
    """
    chosen, log, results = parse_window(window), Log(), []
    sources = [SourceFile(path, label="") for path in files]
    for volume in find_volumes(sources, chosen, log, lambda count: None):
        slices: list[tuple[int, ImageArray]] = []
        # its files are in `log`
        with suppress(Unusable):
            found = [(number, grey) for number, _, grey in grey_slices(volume, chosen, 1, log)]
            slices = sorted(found, key=lambda one: one[0])
        if slices:
            pictures = [grey for _, grey in slices]
            scores, _ = predict_files(trained, pictures, batch_size=batch_size, precision=precision)
            place = volume.path or volume.frames[0].path.parent
            results.append(VolumeScores(place, [number for number, _ in slices], scores))
    return results, {**dict(log.skipped), **dict(log.excluded)}
