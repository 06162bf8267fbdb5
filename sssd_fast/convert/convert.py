"""CT volumes (DICOM series, NIfTI) to a data folder of 8-bit grey PNG slices.

    OUT/<class>/<patient>-<volume>/<slice>.png     slices from the feet to the head
    OUT/manifest.csv                               path,label,patient[,split]
    OUT/convert.json                               window, counts, reasons of exclusion, versions

volumes.py finds the volumes, dicom.py and nifti.py read them, window.py makes them grey.

Patient data. No name, identifier, date or path of a source file is written to OUT: patients and
volumes get numbers (p0001, p0001-1), PNG files have no metadata, all files have one time, and
convert.json counts reasons that quote no file. The terminal does name excluded files by their path,
because the user has to find them; if folders are named after patients, that output is patient data.
The patient column of a manifest is numbered too. The images are unchanged: burned-in text, or a
face in a head scan, is not removed.

Numbers follow a hash of the pixel values, not the order of names or identifiers. A hash of an
identifier could be reversed by trying all identifiers, and an order of names by anyone who knows
who was scanned; a secret key would give other numbers, and so other random splits, in each run.
Computing this order requires the images. The same source and the same --every give the same
numbers, whatever the window, the size and the file names.

One volume is in memory at a time. OUT appears complete or not at all. Sources are only read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from PIL import Image

from sssd_fast import __version__
from sssd_fast.convert.dicom import BURNED_IN
from sssd_fast.convert.volumes import Log, Volume, find_volumes, list_files, read_volume
from sssd_fast.convert.window import (
    PRESETS,
    HounsfieldCheck,
    Slice,
    Unusable,
    Window,
    parse_window,
    to_grey,
)
from sssd_fast.data.images import MIN_SIDE, ImageArray, printable
from sssd_fast.data.manifest import first_lines, new_folder, refuse_bad_files, write_manifest
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.run.log import Console


@dataclass(frozen=True)
class Converted:
    """The result."""

    out: Path
    record: dict[str, Any]  # convert.json
    written: list[Volume]
    log: Log

    def summary(self) -> str:
        """Several lines for the terminal, which name files."""
        window = self.record["window"]
        classes = self.record["classes"]
        total = sum(n["slices"] for n in classes.values())
        where = f"{self.record['patients']} patients under {printable(str(self.out))}"
        lines = [f"{total} slices of {len(self.written)} volumes of {where}"]
        for label, n in classes.items():
            sizes = f"{n['slices']} slices, {n['volumes']} volumes, {n['patients']} patients"
            lines.append(f"  {printable(label)}: {sizes}")
        in_hu = ""
        if window["width_hu"] is not None:
            in_hu = f" (level {window['level_hu']:g}, width {window['width_hu']:g} HU)"
        lines.append(f"  window: {window['name']}{in_hu}")
        lines += [f"  note: {note}" for note in (*self.log.layout, *self.record["notes"])]
        return "\n".join(lines + _not_converted(self.log))


def convert_volumes(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    manifest: str | os.PathLike[str] | None = None,
    window: str = "lung",
    every: int = 1,
    size: int | None = None,
    max_bad_fraction: float = 0.01,
    console: Console | None = None,
) -> Converted:
    """Write the axial slices of every volume under `source` as the new folder `out`.

    source: a folder with one folder per class, with `manifest` the folder its paths are relative
        to, or a CSV manifest in that folder.
    window: see window.py.
    every: keep slices 0, every, 2 * every, ... of a volume.
    size: resize the shorter side to this many pixels (bicubic, antialiased); None keeps the size.
    console: shows progress.

    Raises ConfigError (an option), DependencyError (no pydicom or nibabel), DataError: nothing
    found, a bad manifest, `out` exists or cannot be written, a class without slices, or more than
    `max_bad_fraction` of the files unusable.
    """
    chosen = parse_window(window)
    if every < 1:
        raise ConfigError(f"every is {every}; 1 (all slices) or more is needed")
    if size is not None and not MIN_SIDE <= size <= 8192:
        raise ConfigError(f"size is {size}; {MIN_SIDE} to 8192 pixels are needed")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction is {max_bad_fraction}; 0 to 1 is needed")
    target = Path(out)
    log = Log()
    files = list_files(Path(source), manifest, log.layout)
    console = console or Console(enabled=False)
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    if target.resolve().is_relative_to(root.resolve()):
        place = printable(str(target))
        raise DataError(f"{place} is in the source, which is only read; name another folder")
    with new_folder(target) as folder:
        with console.progress(len(files), "reading headers") as bar:
            volumes = find_volumes(files, chosen, log, bar.update)
        _check_result({volume.label for volume in volumes}, log, max_bad_fraction)
        written = {}
        with console.progress(len(volumes), "converting volumes") as bar:
            for i, volume in enumerate(volumes):
                hidden = folder / f".{i}"  # a name that no class has
                if _write_volume(volume, hidden, chosen, every, size, log):
                    written[hidden] = volume
                bar.update(i + 1)
        _check_result({volume.label for volume in written.values()}, log, max_bad_fraction)
        _number(written.values())
        _add_notes(written.values(), log)
        settings = {"every": every, "shorter_side_px": size}
        record = _record(chosen, settings, written.values(), log)
        _publish(folder, written, record)
    return Converted(target, record, list(written.values()), log)


# ---- one volume ----


def grey_slices(
    volume: Volume, window: Window, every: int, log: Log
) -> Iterator[tuple[int, Slice, ImageArray]]:
    """(number, slice, its grey image [H, W]) of every `every`-th slice that is usable; the numbers
    count all slices of the volume. Problems go to `log`.

    Raises Unusable at the end if the values are not in the unit that the window needs: the slices
    are then to be discarded.
    """
    limits = None
    if window.name == "minmax":
        slices = read_volume(volume, every, Log())
        inside = (picture.inside() for _, _, picture in slices)
        ends = [end for values in inside if values.size for end in (values.min(), values.max())]
        limits = (min(ends), max(ends)) if ends else None
    sources: dict[Path, None] = {}
    check = HounsfieldCheck()
    for path, number, picture in read_volume(volume, every, log):
        try:
            grey = to_grey(picture, window, limits)
        except Unusable as problem:
            log.add(path, problem)
            continue
        check.add(picture.inside())
        sources[path] = None
        yield number, picture, grey
    reason = check.problem() if window.name in PRESETS else None
    if sources and reason is not None:
        for path in sources:
            log.add(path, Unusable(reason))
        raise Unusable(reason)


def _write_volume(
    volume: Volume, folder: Path, window: Window, every: int, size: int | None, log: Log
) -> int:
    """Writes folder/0000.png, ... and returns how many; the names count all slices of the volume,
    before `every`.
    """
    folder.mkdir()
    digests = {}
    try:
        for number, picture, grey in grey_slices(volume, window, every, log):
            Image.fromarray(_resized(grey, size)).save(folder / f"{number:04d}.png")
            values = np.ascontiguousarray(picture.values_HW)
            digests[number] = hashlib.blake2b(values.data).digest()
    except Unusable:
        digests = {}
    if not digests:
        shutil.rmtree(folder)
    volume.slices = len(digests)
    ordered = [digests[number] for number in sorted(digests)]
    volume.digest = hashlib.blake2b(b"".join(ordered)).digest()
    return volume.slices


def _resized(grey: ImageArray, size: int | None) -> ImageArray:
    """The shorter side gets `size` pixels; the other keeps the proportion, rounded."""
    if size is None or min(grey.shape) == size:
        return grey
    height, width = (round(side * size / min(grey.shape)) for side in grey.shape)
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC))


# ---- names and files ----


def _number(written: Collection[Volume]) -> None:
    """Number patients and volumes by the hash of their values (see the top of this file)."""
    by_patient: dict[str, list[Volume]] = defaultdict(list)
    for w in sorted(written, key=lambda w: w.digest):
        by_patient[w.identity].append(w)
    digits = max(4, len(str(len(by_patient))))
    for i, volumes in enumerate(by_patient.values(), 1):
        for k, w in enumerate(volumes, 1):
            w.patient = f"p{i:0{digits}d}"
            w.name = f"{w.patient}-{k}"


def _add_notes(written: Collection[Volume], log: Log) -> None:
    burned = [w.name for w in written if any(BURNED_IN in frame.notes for frame in w.frames)]
    if burned:
        log.notes[f"{BURNED_IN}: {', '.join(sorted(burned))}"] = log.notes.pop(BURNED_IN)
    if len(written) > 1 and len({w.patient for w in written}) == 1:
        log.notes[
            "all volumes are of one patient: if PatientID was overwritten, a split by patient "
            "needs a manifest with a patient column"
        ] = len(written)


def _record(
    window: Window, settings: dict[str, Any], written: Collection[Volume], log: Log
) -> dict[str, Any]:
    """convert.json, which quotes no file."""

    def by_reason(entries: list[tuple[Path, str]]) -> dict[str, int]:
        return dict(sorted(Counter(reason for _, reason in entries).items()))

    classes = {}
    for label in sorted({w.label for w in written}):
        volumes = [w for w in written if w.label == label]
        patients = len({w.patient for w in volumes})
        slices = sum(w.slices for w in volumes)
        classes[label] = {"patients": patients, "volumes": len(volumes), "slices": slices}
    versions = {"python": python_version(), "sssd_fast": __version__}
    for name in ("numpy", "pillow", "pydicom", "nibabel"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "format": "sssd_fast.convert",
        "version": 1,
        "window": {"name": window.name, "level_hu": window.level, "width_hu": window.width},
        **settings,
        "classes": classes,
        "patients": len({w.patient for w in written}),
        "excluded": by_reason(log.excluded),
        "skipped": by_reason(log.skipped),
        "other_files": dict(sorted(log.ignored.items())),
        "notes": [f"{text} ({count})" for text, count in sorted(log.notes.items()) if count],
        "versions": versions,
    }


def _publish(folder: Path, written: Mapping[Path, Volume], record: dict[str, Any]) -> None:
    """Move the volumes to their names, write manifest.csv and convert.json, equalise the times."""
    rows = []
    for hidden, w in sorted(written.items(), key=lambda one: (one[1].label, one[1].name)):
        place = folder / w.label / w.name
        place.parent.mkdir(exist_ok=True)
        hidden.rename(place)
        for path in sorted(place.iterdir()):
            row = {"path": path.relative_to(folder).as_posix(), "label": w.label}
            split = {"split": w.split} if w.split else {}
            rows.append({**row, "patient": w.patient, **split})
    write_manifest(folder / "manifest.csv", rows)
    (folder / "convert.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    # the times of writing would reveal the order of the source's names
    now = int(time.time())
    for path in folder.rglob("*.png"):
        os.utime(path, (now, now))


# ---- refusals ----


def _check_result(classes: set[str], log: Log, max_bad_fraction: float) -> None:
    """Raises DataError if too many files are unusable, or a class has no slices."""
    bad = [f"{printable(str(path))}: {reason}" for path, reason in dict(log.excluded).items()]
    refuse_bad_files("DICOM and NIfTI files", bad, log.files, max_bad_fraction)
    empty = ", ".join(map(printable, sorted(log.classes - classes)))
    if empty or not classes:
        what = f"class {empty}" if empty else "any class: no DICOM or NIfTI file was found"
        raise DataError("\n".join([f"nothing to convert in {what}", *_not_converted(log)]))


def _not_converted(log: Log) -> list[str]:
    """Lines about ignored, skipped and excluded files, for the terminal."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(log.ignored.items())) or "none"
    lines = [f"  other files: {kinds}"]
    for title, entries in (("skipped", log.skipped), ("excluded", log.excluded)):
        paths: dict[str, list[str]] = defaultdict(list)
        for path, reason in dict.fromkeys(entries):
            paths[reason].append(printable(str(path)))
        lines.append(f"  {title}: {sum(map(len, paths.values()))} files")
        for reason, names in sorted(paths.items()):
            lines.append(f"    {len(names)}: {reason}")
            # the user needs all names of damaged files, but not those of every localizer
            listed = first_lines(names) if title == "skipped" else [f"    {name}" for name in names]
            lines += [f"  {line}" for line in listed]
    return lines
