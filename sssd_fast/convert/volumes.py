"""Find the CT volumes of a source, and read the slices of each in order.

Sources: a folder with one folder per class (data/layout.py), or a CSV manifest
path,label[,split][,patient] whose paths are files, or folders with all their files. The content
decides what a file is; a file named .dcm, .nii or .nii.gz with other content counts as damaged.
Hidden names and linked folders are skipped.

A DICOM volume is one series (SeriesInstanceUID, or the folder if it is missing) of one patient,
study and orientation: programs that make data anonymous may give several patients one identifier.
If slices of a volume are at the same positions in several folders, each folder is a volume. A slice
is a copy of another one of its class if SOPInstanceUID and position agree, without positions if the
stored pixels agree; copies count once. The patient of a volume is that of the manifest, else
PatientID, else the study. NIfTI has neither, so every volume is a separate patient.

Order of the slices: along the normal, from the feet to the head; by InstanceNumber if a position is
missing, else by file name, with a note.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sssd_fast.convert.dicom import Frame, dicom_kind, pixel_digest, read_frames, read_slices
from sssd_fast.convert.nifti import HEADER_BYTES, nifti_kind, read_nifti
from sssd_fast.convert.window import Slice, Unusable, Window
from sssd_fast.data.images import printable, sniff_format
from sssd_fast.data.layout import list_classes
from sssd_fast.data.manifest import find_file, first_lines, read_manifest, walk_files
from sssd_fast.errors import DataError


@dataclass(frozen=True)
class SourceFile:
    path: Path
    label: str
    split: str = ""
    patient: str = ""  # from the manifest, "" if it has none


@dataclass
class Volume:
    label: str
    split: str
    identity: str  # of the patient; it stays in memory
    frames: list[Frame] = field(default_factory=list)  # of DICOM, not ordered yet
    path: Path | None = None  # of NIfTI
    nifti: str = ""  # its kind (nifti.nifti_kind)
    # set when it is written
    slices: int = 0
    digest: bytes = b""  # of the values before the window
    patient: str = ""  # p0001
    name: str = ""  # p0001-1


@dataclass
class Log:
    """Files that were not converted, and notes. Paths are for the terminal; texts quote no file."""

    classes: set[str] = field(default_factory=set)  # with at least one DICOM or NIfTI file
    files: int = 0  # DICOM and NIfTI files that should give slices
    excluded: list[tuple[Path, str]] = field(default_factory=list)  # of those, the unusable ones
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # DICOM without axial slices
    ignored: Counter[str] = field(default_factory=Counter)  # other files, by content
    notes: Counter[str] = field(default_factory=Counter)
    layout: list[str] = field(default_factory=list)  # notes that name folders

    def add(self, path: Path, problem: Unusable) -> None:
        (self.excluded if problem.damaged else self.skipped).append((path, problem.reason))


# ---- which files ----


def list_files(
    source: Path, manifest: str | os.PathLike[str] | None, notes: list[str]
) -> list[SourceFile]:
    """Every file with its class; notes about the layout name folders. Raises DataError."""
    where = printable(str(source))
    if not source.exists():
        raise DataError(f"{where}: no such file or folder")
    if source.is_file():
        if manifest is not None or source.suffix.lower() != ".csv":
            raise DataError(
                f"{where} is a file; needed: a folder with one folder per class, a folder and "
                "--manifest CSV, or a CSV path,label[,split][,patient] in the folder of its paths"
            )
        source, manifest = source.parent, source
    if manifest is not None:
        files = _manifest_files(source, manifest)
    else:
        rows = list_classes(source, (), notes)
        files = [SourceFile(source / r["path"], r["label"], r.get("split", "")) for r in rows]
    labels = sorted({file.label for file in files})
    wrong = [n for n in labels if not n.isprintable() or n[0] == "." or set("/\\") & set(n)]
    if wrong:
        raise DataError(
            f"a class becomes a folder, which cannot be named {', '.join(map(printable, wrong))}; "
            "needed are printable names without / and \\ that do not start with a dot"
        )
    return files


def _manifest_files(source: Path, manifest: str | os.PathLike[str]) -> list[SourceFile]:
    files: dict[Path, SourceFile] = {}
    problems = []
    for row in read_manifest(manifest):
        place = source / find_file(lambda path: (source / path).exists(), row["path"])
        if not place.exists():
            problems.append(f"{printable(row['path'])}: no such file or folder")
        for path in walk_files(place) if place.is_dir() else [place]:
            if path in files:
                problems.append(f"{printable(str(path))}: named by two rows")
            split, patient = row.get("split", ""), row.get("patient", "")
            files[path] = SourceFile(path, row["label"], split, patient)
    if problems:
        listed = "\n".join(first_lines(problems))
        raise DataError(f"{printable(str(manifest))}: {len(problems)} problems\n{listed}")
    return list(files.values())


# ---- which volumes ----


def find_volumes(
    files: list[SourceFile], window: Window, log: Log, progress: Callable[[int], object]
) -> list[Volume]:
    """Reads the header of every file. Files without slices are recorded in `log`."""
    volumes: dict[tuple[object, ...], Volume] = {}
    # (SOPInstanceUID, frame) -> what was found under it, with its class
    seen: dict[tuple[str, int], list[tuple[Frame, str]]] = defaultdict(list)
    for count, file in enumerate(files, 1):
        progress(count)
        try:
            found = _read_header(file.path, window, log)
        except Unusable as problem:
            log.add(file.path, problem)
            log.files += problem.damaged
            log.classes.add(file.label)
            continue
        if found:
            log.files += 1
            log.classes.add(file.label)
        if isinstance(found, str):
            if not file.patient:
                log.notes["NIfTI volumes without a patient, each counted as a separate one"] += 1
            patient = file.patient or str(file.path)
            volumes[file.path,] = Volume(file.label, file.split, patient, [], file.path, found)
            continue
        for frame in found:
            if not frame.axial:
                log.skipped.append((file.path, "coronal or sagittal"))
                continue
            known = seen[frame.instance, frame.index] if frame.instance else []
            equal = {label for other, label in known if _same_slice(frame, other)}
            if file.label in equal:
                log.skipped.append((file.path, "copy of another slice"))
                continue
            if equal:
                log.notes["slices that are in several classes"] += 1
            elif known:
                log.notes["slices that share SOPInstanceUID with another one, kept"] += 1
            known.append((frame, file.label))
            plane = tuple(round(value, 2) for value in frame.orientation or ())
            series = frame.series or file.path.parent
            identity = (file.patient, frame.patient, frame.study)
            key = (file.label, file.split, *identity, series, plane)
            patient = file.patient or frame.patient or str(key)
            volumes.setdefault(key, Volume(file.label, file.split, patient)).frames.append(frame)
    empty = {file.label for file in files} - log.classes
    log.notes["class folders without DICOM or NIfTI"] += len(empty)
    result = [part for volume in volumes.values() for part in _by_folder(volume, log)]
    _note_repeated(result, log)
    return result


def _same_slice(one: Frame, other: Frame) -> bool:
    """For two frames of one SOPInstanceUID: position decides if it is known, else the pixels."""
    if one.height_mm is not None and other.height_mm is not None:
        return round(one.height_mm, 3) == round(other.height_mm, 3)
    try:
        return pixel_digest(one.path) == pixel_digest(other.path)
    except Unusable:
        return False


def _by_folder(volume: Volume, log: Log) -> list[Volume]:
    """The volume, or one per folder if it has slices at one position in several folders."""
    places: dict[float | None, set[Path]] = defaultdict(set)
    folders: dict[Path, list[Frame]] = defaultdict(list)
    for frame in volume.frames:
        places[None if frame.height_mm is None else round(frame.height_mm, 3)].add(
            frame.path.parent
        )
        folders[frame.path.parent].append(frame)
    if None in places or all(len(found) == 1 for found in places.values()):
        return [volume]
    log.notes["series in several folders with slices at the same positions, one volume each"] += 1
    return [replace(volume, frames=frames) for frames in folders.values()]


def _note_repeated(volumes: Sequence[Volume], log: Log) -> None:
    """Notes volumes at the positions of another one of their study."""
    scans: Counter[tuple[object, ...]] = Counter()
    for volume in volumes:
        heights = sorted(round(f.height_mm, 1) for f in volume.frames if f.height_mm is not None)
        if len(heights) > 1:
            scans[(volume.label, volume.identity, volume.frames[0].study, *heights)] += 1
    repeated = sum(count for count in scans.values() if count > 1)
    log.notes[
        "volumes at the positions of another one of their study (another kernel or phase?), kept"
    ] += repeated


def _read_header(path: Path, window: Window, log: Log) -> list[Frame] | str:
    """The frames of a DICOM file, the kind of a NIfTI, or [] for other files. Raises Unusable."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    dicom = dicom_kind(head)
    if dicom:
        return read_frames(path, window)
    found: list[Frame] | str | None = nifti_kind(path, head)
    if found is None and dicom is False:
        found = read_frames(path, window, certain=False)
    if found:
        return found
    if path.name.lower().endswith((".dcm", ".nii", ".nii.gz")):
        damaged = "named as DICOM or NIfTI, but the content is neither (truncated?)"
        raise Unusable(damaged if head else "empty file")
    kind = sniff_format(head) or "unknown content"
    packed = path.name.lower().endswith(".dcm.gz")
    log.ignored["packed DICOM (.dcm.gz, unpack them with gunzip)" if packed else kind] += 1
    return []


# ---- slices of a volume ----


def read_volume(volume: Volume, every: int, log: Log) -> Iterator[tuple[Path, int, Slice]]:
    """(file, number in the volume, slice) of every `every`-th slice; problems go to `log`."""
    if volume.path is not None:
        try:
            for number, picture in read_nifti(volume.path, volume.nifti, every, log.notes):
                yield volume.path, number, picture
        except Unusable as problem:
            log.add(volume.path, problem)
        return
    ordered, notes = _in_order(volume.frames)
    log.notes.update(notes)
    number_of = {frame: number for number, frame in enumerate(ordered) if number % every == 0}
    by_file: dict[Path, list[Frame]] = defaultdict(list)
    for frame in sorted(number_of, key=lambda frame: frame.index):
        by_file[frame.path].append(frame)
    for path, frames in by_file.items():
        try:
            for frame, picture in read_slices(path, frames):
                log.notes.update(frame.notes)
                yield path, number_of[frame], picture
        except Unusable as problem:
            log.add(path, problem)


def _in_order(frames: Sequence[Frame]) -> tuple[list[Frame], list[str]]:
    """The slices of one volume from the feet to the head, and notes about their order."""
    heights = {frame: round(h, 3) for frame in frames if (h := frame.height_mm) is not None}
    if len(heights) == len(frames):
        ordered = sorted(frames, key=lambda f: (heights[f], f.number or 0, f.index))
        note = "volumes with several slices at one position (phases?), all kept"
        return ordered, [note] if len(set(heights.values())) < len(frames) else []
    if all(frame.number is not None for frame in frames):
        ordered = sorted(frames, key=lambda frame: (frame.number or 0, frame.index))
        note = "volumes with slices without position, ordered by InstanceNumber"
    else:
        ordered = sorted(frames, key=lambda frame: (frame.path, frame.index))
        note = "volumes without positions and InstanceNumber, ordered by file name"
    return ordered, [note] if len(frames) > 1 else []
