"""Which files under a source are CT volumes, which slices make up each, and those slices one after the other.

Sources: a folder with one folder per class (any nesting below), or a CSV manifest path,label[,split][,patient] whose paths
are files, or folders that stand for every file below them. The content decides what a file is, its name only whether one
that is nothing should have been something (.dcm, .nii, .nii.gz). Hidden names are skipped, links to folders not followed.

A DICOM volume is one series (SeriesInstanceUID, or the folder where it is missing) of one orientation. A copy of a slice
(same SOPInstanceUID) within a class counts once. Whose volume it is: the manifest's patient; else PatientID, else the study;
for NIfTI, which has neither, every volume counts as a patient of its own.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sssd_fast.convert.dicom import (
    Frame,
    has_preamble,
    looks_like_dicom,
    quiet,
    read_frames,
    read_slices,
)
from sssd_fast.convert.nifti import HEADER_BYTES, nifti_kind, read_nifti, unpacked_head
from sssd_fast.convert.orientation import is_axial, order
from sssd_fast.convert.window import Slice, Unusable, Window
from sssd_fast.data.images import printable, sniff_format
from sssd_fast.data.manifest import first_lines, read_manifest
from sssd_fast.errors import DataError

_NAMED = (".dcm", ".nii", ".nii.gz")


@dataclass(frozen=True)
class SourceFile:
    path: Path
    label: str
    split: str = ""
    patient: str = ""  # from the manifest, "" where it has none


@dataclass(frozen=True)
class Volume:
    label: str
    split: str
    patient: str  # an identity: it stays in memory
    frames: list[Frame] = field(default_factory=list)  # of DICOM, in no order yet
    path: Path | None = None  # of NIfTI
    nifti: str = ""  # its kind (nifti.nifti_kind)


@dataclass
class Log:
    """What was left out, and what is to be said. Paths are for the terminal alone; texts quote no file."""

    classes: set[str] = field(default_factory=set)  # those with any DICOM or NIfTI file
    files: int = 0  # DICOM and NIfTI files that should give slices
    excluded: list[tuple[Path, str]] = field(
        default_factory=list
    )  # of those, what could not be used
    passed: list[tuple[Path, str]] = field(
        default_factory=list
    )  # DICOM that is no axial slice by its nature
    ignored: Counter[str] = field(default_factory=Counter)  # other files, by content
    notes: Counter[str] = field(default_factory=Counter)

    def leave_out(self, path: Path, problem: Unusable) -> None:
        (self.excluded if problem.damaged else self.passed).append((path, problem.reason))


def list_files(
    source: Path, manifest: str | os.PathLike[str] | None
) -> tuple[list[SourceFile], list[Path]]:
    """Every file with its class, and the folders that were searched. Raises DataError."""
    if not source.exists():
        raise DataError(f"{printable(str(source))}: no such file or folder")
    if source.is_file():
        if manifest is not None or source.suffix.lower() != ".csv":
            raise DataError(
                f"{printable(str(source))} is a file; needed: a folder with one folder per class, a folder and --manifest "
                "CSV, or a CSV path,label[,split][,patient] whose paths start from its own folder"
            )
        source, manifest = source.parent, source
    if manifest is None:
        files = [
            SourceFile(path, path.relative_to(source).parts[0])
            for path in _walk(source)
            if len(path.relative_to(source).parts) > 1
        ]
        roots = [source]
        if not files:
            raise DataError(
                f"{printable(str(source))}: no files in folders; needed: one folder per class, with DICOM or NIfTI "
                "files in any nesting below it, or a CSV manifest path,label[,split][,patient]"
            )
    else:
        files, roots = _manifest_files(source, manifest)
    wrong = sorted(
        {
            f.label
            for f in files
            if not f.label.isprintable() or f.label[0] == "." or set("/\\") & {*f.label}
        }
    )
    if wrong:
        raise DataError(
            f"a class becomes a folder, which cannot be named {', '.join(map(printable, wrong))}; needed are printable names "
            "without / and \\ that do not start with a dot"
        )
    return files, roots


def find_volumes(
    files: list[SourceFile],
    window: Window,
    log: Log,
    done: Callable[[int], None] = lambda count: None,
) -> list[Volume]:
    """Reads the header of every file. What gives no slice lands in `log`. done: called with the files read so far."""
    volumes: dict[tuple[object, ...], Volume] = {}
    classes: dict[tuple[str, int], set[str]] = {}  # (SOPInstanceUID, frame): where it stands
    for count, file in enumerate(files, 1):
        done(count)
        try:
            found = _look_at(file.path, window, log)
        except Unusable as problem:
            log.leave_out(file.path, problem)
            log.files += problem.damaged
            log.classes.add(file.label)
            continue
        if found:
            log.files += 1
            log.classes.add(file.label)
        if isinstance(found, str):
            volumes[(file.path,)] = Volume(
                file.label, file.split, file.patient or str(file.path), path=file.path, nifti=found
            )
            log.notes[
                "NIfTI volumes without a patient, each counted as a patient of its own"
            ] += not file.patient
            continue
        for frame in found:
            stands_in = (
                classes.setdefault((frame.instance, frame.index), set())
                if frame.instance
                else set()
            )
            if not is_axial(frame.orientation):
                log.passed.append((file.path, "coronal or sagittal"))
            elif file.label in stands_in:
                log.passed.append((file.path, "copy of another slice"))
            else:
                log.notes["slices that stand in several classes"] += bool(stands_in)
                stands_in.add(file.label)
                plane = tuple(round(value, 2) for value in frame.orientation or ())
                key = (
                    file.label,
                    file.split,
                    file.patient,
                    frame.series or file.path.parent,
                    plane,
                )
                owner = file.patient or frame.patient or str(key)
                volumes.setdefault(key, Volume(file.label, file.split, owner)).frames.append(frame)
    log.notes["class folders without DICOM or NIfTI"] += len(
        {file.label for file in files} - log.classes
    )
    return list(volumes.values())


def pictures(
    volume: Volume, window: Window, every: int, log: Log
) -> Iterator[tuple[Path, int, Slice]]:
    """(file, number in the volume, slice) of what is kept and can be read; the rest lands in `log`."""
    if volume.path is not None:
        try:
            with quiet():
                nifti = read_nifti(volume.path, volume.nifti, window)
        except Unusable as problem:
            log.leave_out(volume.path, problem)
            return
        log.notes.update(nifti.notes)
        yield from (
            (volume.path, number, nifti.slice(number)) for number in range(0, len(nifti), every)
        )
        return
    ordered, notes = order(volume.frames)
    log.notes.update(notes)
    kept: dict[Path, list[tuple[int, Frame]]] = defaultdict(
        list
    )  # per file, so that each is read once
    for number in range(0, len(ordered), every):
        kept[ordered[number].path].append((number, ordered[number]))
    for path, slices in kept.items():
        slices.sort(key=lambda pair: pair[1].index)
        number_of = {frame.index: number for number, frame in slices}
        try:
            for frame, picture in read_slices(path, [frame for _, frame in slices]):
                log.notes.update(frame.notes)
                yield path, number_of[frame.index], picture
        except Unusable as problem:
            log.leave_out(path, problem)


def _look_at(path: Path, window: Window, log: Log) -> list[Frame] | str:
    """The frames of a DICOM file, the kind of a NIfTI, or nothing ([]), then counted. Raises Unusable."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    if has_preamble(head):
        return read_frames(path, window)
    kind = nifti_kind(unpacked_head(path) if head[:2] == b"\x1f\x8b" else head)
    if kind is not None:
        return kind
    if looks_like_dicom(head):
        frames = read_frames(path, window, certain=False)
        if frames:
            return frames
    if path.name.lower().endswith(_NAMED):
        raise Unusable(
            "named as DICOM or NIfTI, but the content is neither (truncated?)"
            if head
            else "empty file"
        )
    log.ignored[sniff_format(head) or "unknown content"] += 1
    return []


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(
            f"{printable(str(error.filename))}: folder cannot be read ({error.strerror})"
        ) from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _manifest_files(
    source: Path, manifest: str | os.PathLike[str]
) -> tuple[list[SourceFile], list[Path]]:
    files: dict[Path, SourceFile] = {}
    roots, problems = [], []
    for row in read_manifest(manifest):
        place = source / row["path"]
        if not place.exists():
            problems.append(f"{printable(row['path'])}: no such file or folder")
        if place.is_dir():
            roots.append(place)
        for path in _walk(place) if place.is_dir() else [place]:
            if path in files:
                problems.append(f"{printable(str(path))}: named by two rows")
            files[path] = SourceFile(
                path, row["label"], row.get("split", ""), row.get("patient", "")
            )
    if problems:
        raise DataError(
            f"{printable(str(manifest))}: {len(problems)} problems\n"
            + "\n".join(first_lines(problems))
        )
    return list(files.values()), roots
