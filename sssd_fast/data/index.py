"""The validated list of images: every file decoded once, every bad one named, before anything is trained on.

Sources: a folder with one folder per class (any depth below), or a CSV manifest with the columns
path,label[,split][,patient], paths relative to the data folder. Class numbers are the sorted class names.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TextIO

from sssd_fast.data.images import (
    SUFFIXES,
    ImageError,
    decode_bytes,
    pixel_hash,
    printable,
    read_file,
)
from sssd_fast.data.index_cache import Facts, IndexCache
from sssd_fast.data.manifest import SPLIT_NAMES, first_lines, read_manifest
from sssd_fast.data.split import Split
from sssd_fast.errors import DataError
from sssd_fast.run.files import atomic_write_bytes

if TYPE_CHECKING:
    pass

Progress = Callable[[int, int], None]  # (done, total)

_FORMAT = "sssd_fast.index"
_VERSION = 1


@dataclass(frozen=True)
class ImageRecord:
    path: str  # relative to the index's root, with /
    label: int  # number of the class in DataIndex.classes
    sha256: str  # of the file
    pixel_hash: str  # of the decoded picture (images.pixel_hash)
    height: int
    width: int
    mode: str  # Pillow's mode of the stored file
    split: str | None = None  # from the manifest: train, val, test
    patient: str | None = None
    plain: bool = False  # any decoder gives the same picture (images.Decoded)


@dataclass(frozen=True)
class Excluded:
    path: str
    reason: str


@dataclass(frozen=True)
class DataIndex:
    root: Path
    classes: list[str]  # sorted by name; a label is a position here
    records: list[ImageRecord]
    excluded: list[Excluded] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was passed over without being an error

    def __len__(self) -> int:
        return len(self.records)

    def file(self, i: int) -> Path:
        """Full path of record i."""
        return self.root / self.records[i].path

    @property
    def labels(self) -> list[int]:
        return [r.label for r in self.records]

    def counts(self, ids: Iterable[int] | None = None) -> dict[str, int]:
        """Images per class name, over all records or over `ids`."""
        found = Counter(self.records[i].label for i in (range(len(self)) if ids is None else ids))
        return {name: found[label] for label, name in enumerate(self.classes)}

    def fingerprint(self, ids: Iterable[int] | None = None) -> str:
        """SHA-256 over path, label and content of the records in order: equal means the same data set."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for i in range(len(self)) if ids is None else ids:
            r = self.records[i]
            digest.update(json.dumps([r.path, r.label, r.sha256]).encode())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically."""
        body = {
            "format": _FORMAT,
            "version": _VERSION,
            "root": str(self.root.absolute()),
            "classes": self.classes,
        }
        lists = {
            "records": [asdict(r) for r in self.records],
            "excluded": [asdict(e) for e in self.excluded],
        }
        text = json.dumps({**body, "notes": self.notes, **lists}, indent=1) + "\n"
        atomic_write_bytes(Path(path), text.encode("utf-8", "surrogateescape"))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
    ) -> DataIndex:
        """Read an index; `root` overrides the data folder when it moved. Raises DataError when it is not an index."""
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: not a readable index ({error}); make it with `sssd-fast data check`"
            ) from error
        if (
            not isinstance(body, dict)
            or body.get("format") != _FORMAT
            or body.get("version") != _VERSION
        ):
            raise DataError(
                f"{path}: not an index of version {_VERSION} ('format' and 'version' do not match); "
                "make it again with `sssd-fast data check`"
            )
        try:
            index = cls(
                root=Path(root if root is not None else body["root"]),
                classes=[str(name) for name in body["classes"]],
                records=[ImageRecord(**r) for r in body["records"]],
                excluded=[Excluded(**e) for e in body["excluded"]],
                notes=list(body["notes"]),
            )
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: damaged index ({error}); make it again with `sssd-fast data check`"
            ) from error
        if not all(0 <= r.label < len(index.classes) for r in index.records):
            raise DataError(
                f"{path}: damaged index (a label outside its {len(index.classes)} classes)"
            )
        if not index.root.is_dir():
            raise DataError(
                f"{path}: its data folder {index.root} does not exist; pass the folder's new place"
            )
        return index

    def summary(self) -> str:
        """Several lines: counts, sizes, modes, splits, excluded files by name, duplicates."""
        sides = [(r.height, r.width) for r in self.records]
        heights, widths = [h for h, _ in sides], [w for _, w in sides]
        modes = Counter(r.mode for r in self.records)
        lines = [
            f"{len(self)} images in {len(self.classes)} classes under {printable(str(self.root))}",
            "  classes: "
            + ", ".join(f"{printable(name)} {n}" for name, n in self.counts().items()),
            f"  height {min(heights)}-{max(heights)}, width {min(widths)}-{max(widths)} pixels; "
            + "modes: "
            + ", ".join(f"{mode} {n}" for mode, n in modes.most_common()),
        ]
        if any(r.split for r in self.records):
            for name in SPLIT_NAMES:
                ids = [i for i, r in enumerate(self.records) if r.split == name]
                lines.append(
                    f"  {name}: "
                    + ", ".join(f"{printable(c)} {n}" for c, n in self.counts(ids).items())
                )
        if any(r.patient for r in self.records):
            lines.append(f"  patients: {len({r.patient for r in self.records if r.patient})}")
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(f"  excluded: {len(self.excluded)}")
        lines += [f"    {printable(e.path)}: {e.reason}" for e in self.excluded]
        return "\n".join(lines + report_duplicates(self).lines())

    def print_summary(self, file: TextIO | None = None) -> None:
        print(self.summary(), file=file or sys.stdout)


@dataclass(frozen=True)
class Duplicates:
    """Groups of records with identical pixels; lists of paths."""

    groups: list[list[str]]
    across_splits: list[list[str]]  # each path followed by its split
    conflicting: list[list[str]]  # each path followed by its class

    def lines(self) -> list[str]:
        lines = [f"  identical pictures: {len(self.groups)} groups"]
        for title, groups in (
            ("IN SEVERAL SPLITS", self.across_splits),
            ("WITH DIFFERENT LABELS", self.conflicting),
        ):
            if groups:
                lines.append(f"  identical pictures {title}: {len(groups)} groups")
                lines += first_lines(
                    [" = ".join(printable(name) for name in group) for group in groups]
                )
        return lines


def report_duplicates(index: DataIndex, split: Split | None = None) -> Duplicates:
    """Find pictures with equal pixels; `split` None uses the manifest's split column."""
    part_of = (
        {i: r.split for i, r in enumerate(index.records)} if split is None else split.split_of()
    )
    by_hash: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(index.records):
        by_hash[record.pixel_hash].append(i)
    groups = [ids for ids in by_hash.values() if len(ids) > 1]

    def path(i: int) -> str:
        return index.records[i].path

    def class_of(i: int) -> str:
        return index.classes[index.records[i].label]

    across, conflicting = [], []
    for ids in groups:
        placed = [i for i in ids if part_of.get(i)]
        if len({part_of[i] for i in placed}) > 1:
            across.append([f"{path(i)} ({part_of[i]})" for i in placed])
        if len({class_of(i) for i in ids}) > 1:
            conflicting.append([f"{path(i)} ({class_of(i)})" for i in ids])
    return Duplicates([[path(i) for i in ids] for ids in groups], across, conflicting)


def check_data(
    source: str | os.PathLike[str],
    manifest: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
    threads: int | None = None,
    accept_wrong_extension: bool = False,
    index_cache: Path | None = None,
) -> DataIndex:
    """Decode every image once and return the index of the good ones.

    source: the data folder (folder per class, or with `manifest` the folder its paths start from), or a CSV manifest,
    whose own folder is then the data folder. out: also save the index there. threads: default one per core, at most 8.
    accept_wrong_extension: keep files such as a JPEG named .png, which decode well, and only note their names (COVID-CT
    has 34 of them); by default they are excluded like other bad files.
    index_cache: folder in which good files are remembered; unchanged ones are not decoded again.
    Raises DataError: nothing found, a bad manifest (all problems at once), a class left empty, or more than
    `max_bad_fraction` of the files unusable.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"max_bad_fraction is {max_bad_fraction}; a fraction from 0 to 1 is needed")
    place = Path(source)
    if not place.exists():
        raise DataError(f"{printable(str(place))}: no such file or folder")
    if place.is_file():
        if manifest is not None:
            raise DataError(
                f"{printable(str(place))} is a file; with a manifest the source is the folder its paths start from"
            )
        place, manifest = place.parent, place
    notes: list[str] = []
    rows = _scan_folders(place, notes) if manifest is None else read_manifest(manifest, notes)
    classes = sorted({row["label"] for row in rows})
    memory = IndexCache(index_cache, place)
    results = _decode_all(
        place, rows, classes, memory, progress, threads or min(8, os.cpu_count() or 1)
    )
    memory.save()
    records, excluded, renamed = [], [], []
    for record, problem in results:
        if record is not None and (problem is None or accept_wrong_extension):
            records.append(record)
            renamed += [f"{printable(problem.path)}: {problem.reason}"] if problem else []
        elif problem is not None:
            excluded.append(problem)
            renamed += [problem.path] if record is not None else []
    if len(excluded) > max_bad_fraction * len(rows) or not records:
        listed = "\n".join(first_lines([f"{printable(e.path)}: {e.reason}" for e in excluded]))
        raise DataError(
            f"{len(excluded)} of {len(rows)} images are unusable ({len(excluded) / len(rows):.1%}); "
            f"the limit is {max_bad_fraction:.1%}:\n{listed}\n"
            f"Repair or remove them, or raise the limit: --max-bad-fraction (max_bad_fraction) above "
            f"{len(excluded) / len(rows):.3f}."
            + (
                f" {len(renamed)} of them are good images under a wrong extension; keep those with "
                "--accept-wrong-extension (accept_wrong_extension=True)."
                if renamed
                else ""
            )
        )
    if accept_wrong_extension and renamed:
        notes += [
            f"kept {len(renamed)} images with a wrong extension:",
            *(f"  {line}" for line in renamed),
        ]
    index = DataIndex(place, classes, records, excluded, notes)
    empty = [name for name, n in index.counts().items() if n == 0]
    if empty:
        raise DataError(
            f"no usable image left in class {', '.join(map(printable, empty))}; see the excluded files: {excluded}"
        )
    if out is not None:
        index.save(out)
    return index


def _examine(path: Path, name: str, index_cache: IndexCache) -> Facts:
    """What an image file is. Raises ImageError when it is not a good one."""
    try:
        status = path.stat()
    except OSError:
        status = None  # read_file says what is wrong
    facts = None if status is None else index_cache.get(name, status)
    if facts is None:
        data = read_file(path)
        decoded = decode_bytes(data, name)
        height, width = decoded.pixels.shape[:2]
        digests = hashlib.sha256(data).hexdigest(), pixel_hash(decoded.pixels)
        facts = Facts(*digests, height, width, decoded.mode, decoded.format, decoded.plain)
        if status is not None:
            index_cache.put(name, status, facts)
    return facts


def _decode_all(
    root: Path,
    rows: Sequence[Mapping[str, str]],
    classes: list[str],
    index_cache: IndexCache,
    progress: Progress | None,
    threads: int,
) -> list[tuple[ImageRecord | None, Excluded | None]]:
    """Per row its record, its problem, or both for a good image whose suffix belongs to another format."""
    number = {name: label for label, name in enumerate(classes)}

    def check(row: Mapping[str, str]) -> tuple[ImageRecord | None, Excluded | None]:
        path = row["path"]
        try:
            facts = _examine(root / path, path, index_cache)
        except ImageError as error:
            return None, Excluded(path, error.reason)
        record = ImageRecord(
            path=path,
            label=number[row["label"]],
            sha256=facts.sha256,
            pixel_hash=facts.pixel_hash,
            height=facts.height,
            width=facts.width,
            mode=facts.mode,
            split=row.get("split") or None,
            patient=row.get("patient") or None,
            plain=facts.plain,
        )
        suffix = PurePosixPath(path).suffix
        named = SUFFIXES.get(suffix.lower(), printable(suffix) or "nothing")
        if named == facts.format:
            return record, None
        return record, Excluded(
            path, f"wrong extension: the name says {named}, the content is {facts.format}"
        )

    results = []
    pool = ThreadPoolExecutor(threads)  # Pillow and hashlib release the GIL
    try:
        for done, result in enumerate(pool.map(check, rows), 1):
            results.append(result)
            if progress is not None:
                progress(done, len(rows))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _scan_folders(root: Path, notes: list[str]) -> list[dict[str, str]]:
    """One row per image file below root/<class>/. Hidden names are skipped, other files counted by suffix."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{printable(str(error.filename))}: folder cannot be read ({error.strerror})"
        ) from error

    rows: list[dict[str, str]] = []
    ignored: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        for name in sorted(files):
            if name.startswith("."):
                continue
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES and inside.parts:
                rows.append({"path": (inside / name).as_posix(), "label": inside.parts[0]})
            else:
                ignored[
                    (suffix or "no suffix") + ("" if inside.parts else " directly in the folder")
                ] += 1
    listed = ", ".join(f"{n} {printable(kind)}" for kind, n in sorted(ignored.items()))
    if ignored:
        notes.append(
            f"ignored {sum(ignored.values())} files that are not images of a class: {listed}"
        )
    if not rows:
        raise DataError(
            f"{printable(str(root))}: no images found ({'ignored ' + listed if listed else 'no files'}); "
            f"needed: one folder per class with {', '.join(SUFFIXES)} files, "
            "or a CSV manifest path,label[,split][,patient]"
        )
    return rows
