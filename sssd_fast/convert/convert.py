"""CT volumes (DICOM series, NIfTI) to a data folder of 8-bit grey PNG slices.

    OUT/<class>/<patient>-<volume>/<slice>.png     slices from the feet to the head
    OUT/manifest.csv                               path,label,patient[,split]
    OUT/convert.json                               window, counts, what was left out and why, versions

volumes.py finds the volumes, dicom.py and nifti.py read them, orientation.py turns them, window.py makes them grey.

Patient data. Nothing of a source file's names, identifiers, dates or path enters OUT: patients and volumes get numbers
(p0001, p0001-1), PNG files have no metadata, every file the same time, and convert.json counts reasons that quote no file.
The terminal does name files that are left out, by their path as given, since you need to find them: where folders are named
after patients, that output is patient data. The manifest's patient column is numbered too. The pictures themselves are
the patient's: nothing removes burned-in text, or a face from a head scan.

Numbers follow a hash of the pictures' values, not the order of names or identifiers. A hash of the identifier could be
undone by trying all identifiers, an order of names by anybody who knows who took part; a secret key would give other
numbers, and so other random splits, at each run. To compute this order takes the images, and who has them needs no number.
The same source and the same --every give the same numbers, whatever the window, the size, and the names of the files.

One volume is in memory at a time. OUT appears complete or not at all. Sources are only read.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from PIL import Image

from sssd_fast import __version__
from sssd_fast.convert.dicom import BURNED_IN
from sssd_fast.convert.volumes import Log, Volume, find_volumes, list_files, pictures
from sssd_fast.convert.window import Unusable, Window, parse_window, to_grey
from sssd_fast.data.images import MIN_SIDE, ImageArray, printable
from sssd_fast.data.manifest import first_lines
from sssd_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sssd_fast.run.log import Console

_FORMAT = "sssd_fast.convert"


@dataclass
class _Written:
    volume: Volume
    folder: Path  # under the unfinished OUT; hidden, as no class is
    slices: int
    digest: str  # of the values before the window
    patient: str = ""  # p0001
    name: str = ""  # p0001-1


@dataclass(frozen=True)
class Converted:
    """What was made. `summary` is for the terminal, `record` for convert.json."""

    out: Path
    window: Window
    every: int
    size: int | None
    written: list[_Written]
    log: Log

    def counts(self) -> dict[str, dict[str, int]]:
        """Per class: patients, volumes, slices."""
        return {
            label: {
                "patients": len({w.patient for w in self.written if w.volume.label == label}),
                "volumes": sum(w.volume.label == label for w in self.written),
                "slices": sum(w.slices for w in self.written if w.volume.label == label),
            }
            for label in sorted({w.volume.label for w in self.written})
        }

    def notes(self) -> list[str]:
        return [f"{text} ({count})" for text, count in sorted(self.log.notes.items()) if count]

    def record(self) -> dict[str, Any]:
        window = {
            "name": self.window.name,
            "level_hu": self.window.level,
            "width_hu": self.window.width,
        }
        return {
            "format": _FORMAT,
            "version": 1,
            "window": window,
            "every": self.every,
            "shorter_side_px": self.size,
            "classes": self.counts(),
            "patients": len({w.patient for w in self.written}),
            "excluded": dict(sorted(Counter(reason for _, reason in self.log.excluded).items())),
            "passed_over": dict(sorted(Counter(reason for _, reason in self.log.passed).items())),
            "other_files": dict(sorted(self.log.ignored.items())),
            "notes": self.notes(),
            "versions": _versions(),
        }

    def summary(self) -> str:
        patients = len({w.patient for w in self.written})
        total = sum(w.slices for w in self.written)
        lines = [
            f"{total} slices of {len(self.written)} volumes of {patients} patients under {printable(str(self.out))}"
        ]
        lines += [
            f"  {printable(label)}: {n['slices']} slices, {n['volumes']} volumes, {n['patients']} patients"
            for label, n in self.counts().items()
        ]
        level = (
            ""
            if self.window.level is None
            else f" (level {self.window.level:g}, width {self.window.width:g} HU)"
        )
        lines.append(f"  window: {self.window.name}{level}")
        lines += [f"  note: {note}" for note in self.notes()]
        if self.log.ignored:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.log.ignored.items()))
            lines.append(f"  ignored {sum(self.log.ignored.values())} other files: {kinds}")
        lines += _by_reason("passed over", self.log.passed)
        lines.append(f"  excluded: {len(self.log.excluded)}")
        lines += [f"    {printable(str(path))}: {reason}" for path, reason in self.log.excluded]
        return "\n".join(lines)


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

    source: a folder with one folder per class, with `manifest` the folder its paths start from, or a CSV manifest, whose own
    folder is then that folder. window: see window.py. every: keep slices 0, every, 2 * every, ... of a volume. size: resize
    until the shorter side has so many pixels (bicubic, antialiased); None keeps the stored size. console: shows progress.
    Raises ConfigError (an option), DependencyError (no pydicom or nibabel), DataError: nothing found, a bad manifest, `out`
    exists or cannot be written, a class left empty, or more than `max_bad_fraction` of the files unusable.
    """
    chosen = parse_window(window)
    _check_options(every, size, max_bad_fraction)
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(
            f"{printable(str(target))} exists and is not empty; name another folder or delete it"
        )
    files, roots = list_files(Path(source), manifest)
    if any(target.resolve().is_relative_to(root.resolve()) for root in roots):
        raise DataError(
            f"{printable(str(target))} lies in the source, which stays as it is; name a folder elsewhere"
        )
    log = Log()
    with _progress(console, len(files), "reading headers") as done:
        volumes = find_volumes(files, chosen, log, done)
    _refuse_too_many_bad(log, max_bad_fraction)
    _refuse_empty_classes({volume.label for volume in volumes}, log)
    with _new_folder(target) as part:
        written = []
        with _progress(console, len(volumes), "converting volumes") as done:
            for i, volume in enumerate(volumes):
                written.append(_write_volume(volume, part / f".{i}", chosen, every, size, log))
                done(i + 1)
        written = [w for w in written if w.slices]
        _refuse_too_many_bad(log, max_bad_fraction)
        _refuse_empty_classes({w.volume.label for w in written}, log)
        _name(written)
        _note_identities(written, log)
        result = Converted(target, chosen, every, size, written, log)
        _publish(part, result)
    return result


# ---- one volume ----


def _write_volume(
    volume: Volume, folder: Path, window: Window, every: int, size: int | None, log: Log
) -> _Written:
    """Its slices as folder/0000.png, ...: a number is the place in the whole volume, before `every`."""
    folder.mkdir()
    limits = None
    if window.name == "minmax":
        ends = [picture.limits() for _, _, picture in pictures(volume, window, every, Log())]
        known = [end for end in ends if end is not None]
        limits = (min(low for low, _ in known), max(high for _, high in known)) if known else None
    digests = {}
    for path, number, picture in pictures(volume, window, every, log):
        try:
            grey = to_grey(picture, window, limits)
        except Unusable as problem:
            log.leave_out(path, problem)
            continue
        Image.fromarray(_resized(grey, size)).save(folder / f"{number:04d}.png")
        digests[number] = hashlib.blake2b(np.ascontiguousarray(picture.values_HW).data).digest()
    if not digests:
        folder.rmdir()
    joined = hashlib.blake2b(b"".join(digests[number] for number in sorted(digests)))
    return _Written(volume, folder, len(digests), joined.hexdigest())


def _resized(grey: ImageArray, size: int | None) -> ImageArray:
    """Until the shorter side has `size` pixels; the other keeps the proportion, rounded."""
    if size is None or min(grey.shape) == size:
        return grey
    height, width = (round(side * size / min(grey.shape)) for side in grey.shape)
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC))


# ---- names and files ----


def _name(written: list[_Written]) -> None:
    """Patients and volumes numbered by what their pictures hold; the module's docstring says why."""
    by_patient: dict[str, list[_Written]] = defaultdict(list)
    for w in sorted(written, key=lambda w: w.digest):
        by_patient[w.volume.patient].append(w)  # so patients come in the order of their lowest hash
    digits = max(4, len(str(len(by_patient))))
    for i, volumes in enumerate(by_patient.values(), 1):
        for k, w in enumerate(volumes, 1):
            w.patient = f"p{i:0{digits}d}"
            w.name = f"{w.patient}-{k}"


def _note_identities(written: list[_Written], log: Log) -> None:
    burned = [w.name for w in written if any(BURNED_IN in frame.notes for frame in w.volume.frames)]
    if burned:
        log.notes[f"{BURNED_IN}: {', '.join(sorted(burned))}"] = log.notes.pop(BURNED_IN)
    kinds = {frame.modality for w in written for frame in w.volume.frames}
    if len(kinds) > 1:
        log.notes[f"kinds of images in one set: {', '.join(sorted(kinds))}"] = len(kinds)
    if len(written) > 1 and len({w.patient for w in written}) == 1:
        text = "all volumes are of one patient: if PatientID was overwritten, a split by patient needs a manifest"
        log.notes[f"{text} with a patient column"] = len(written)


def _publish(part: Path, result: Converted) -> None:
    """Moves the volumes to their names and writes manifest.csv and convert.json; all files get one time."""
    splits = any(w.volume.split for w in result.written)
    rows = [("path", "label", "patient", *["split"] * splits)]
    for w in sorted(result.written, key=lambda w: (w.volume.label, w.name)):
        place = part / w.volume.label / w.name
        place.parent.mkdir(exist_ok=True)
        w.folder.rename(place)
        label, split = w.volume.label, [w.volume.split] * splits
        rows += [
            (f"{label}/{w.name}/{path.name}", label, w.patient, *split)
            for path in sorted(place.iterdir())
        ]
    with open(part / "manifest.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    (part / "convert.json").write_text(
        json.dumps(result.record(), indent=1) + "\n", encoding="utf-8"
    )
    now = int(time.time())  # the times of writing would tell the order of the source's names
    for path in part.rglob("*.png"):
        os.utime(path, (now, now))


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its name at the end, or vanishes."""
    place = target.absolute()
    part = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
        yield part
        part.chmod(0o755)  # mkdtemp makes it private
        os.replace(part, place)
    except OSError as error:
        there = next(folder for folder in place.parents if folder.exists())
        raise DataError(
            f"cannot write {printable(str(target))}: {error.strerror or error} "
            f"({shutil.disk_usage(there).free / 2**30:.2f} GiB free there); nothing was kept. Free some space, check the "
            "permissions, or name another folder; --every and --size make it smaller."
        ) from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


# ---- refusals, progress ----


def _check_options(every: int, size: int | None, max_bad_fraction: float) -> None:
    if every < 1:
        raise ConfigError(f"every is {every}; 1 (all slices) or more is needed")
    if size is not None and not MIN_SIDE <= size <= 8192:
        raise ConfigError(f"size is {size}; {MIN_SIDE} to 8192 pixels are needed")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(
            f"max_bad_fraction is {max_bad_fraction}; a fraction from 0 to 1 is needed"
        )


def _refuse_too_many_bad(log: Log, limit: float) -> None:
    bad = len({path for path, _ in log.excluded})
    if bad > limit * log.files:
        listed = "\n".join(
            first_lines([f"{printable(str(path))}: {reason}" for path, reason in log.excluded])
        )
        raise DataError(
            f"{bad} of {log.files} DICOM and NIfTI files are unusable ({bad / log.files:.1%}); the limit is {limit:.1%}:\n"
            f"{listed}\nRepair or remove them, or raise the limit: --max-bad-fraction (max_bad_fraction) above "
            f"{bad / log.files:.3f}."
        )


def _refuse_empty_classes(found: set[str], log: Log) -> None:
    empty = sorted(log.classes - found)
    if found and not empty:
        return
    what = (
        f"class {', '.join(map(printable, empty))}"
        if empty
        else "any class: no DICOM or NIfTI file was found"
    )
    ignored = ", ".join(f"{count} {kind}" for kind, count in sorted(log.ignored.items())) or "none"
    lines = [*_by_reason("passed over", log.passed), *_by_reason("excluded", log.excluded)]
    raise DataError(
        "\n".join([f"nothing to convert in {what}", *lines, f"  other files: {ignored}"])
    )


def _by_reason(title: str, entries: list[tuple[Path, str]]) -> list[str]:
    paths: dict[str, list[str]] = defaultdict(list)
    for path, reason in dict.fromkeys(entries):
        paths[reason].append(printable(str(path)))
    lines = [f"  {title}: {sum(map(len, paths.values()))} files"] if paths else []
    for reason, names in sorted(paths.items()):
        lines += [f"    {len(names)}: {reason}", *(f"  {line}" for line in first_lines(names))]
    return lines


def _versions() -> dict[str, str]:
    versions = {
        "python": python_version(),
        "sssd_fast": __version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    for name in ("pydicom", "nibabel"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@contextmanager
def _progress(console: Console | None, total: int, what: str) -> Iterator[Callable[[int], None]]:
    if console is None:
        yield lambda done: None
        return
    with console.progress(total, what) as bar:
        yield bar.update
