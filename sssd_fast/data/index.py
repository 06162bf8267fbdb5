"""The checked list of images: every file is decoded once and every bad one named before training.

Sources: a folder with one folder per class (layout.py), or a CSV manifest with the columns
path,label[,split][,patient], paths relative to the data folder. A label is the position of the
class in the sorted class names.

Results of earlier checks can be stored, so that a run does not decode a large data set only to
check it again. A file counts as unchanged if its size and modification time are; its content is
compared with the index again when a loader reads it. A file changed within the last seconds before
a check is not stored: another change could leave its time as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from sssd_fast.config import DataConfig
from sssd_fast.data.images import (
    SUFFIXES,
    WHITES,
    GreyRange,
    ImageError,
    decode_bytes,
    pixel_hash,
    printable,
    read_file,
)
from sssd_fast.data.layout import list_classes, note_variants
from sssd_fast.data.manifest import find_file, first_lines, read_manifest, refuse_bad_files
from sssd_fast.data.synthetic import is_synthetic
from sssd_fast.errors import DataError, SssdError
from sssd_fast.run.files import atomic_write_text

Progress = Callable[[int, int], None]  # (done, total)
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_FORMAT = {"format": "sssd_fast.index", "version": 1}
_CACHE_VERSION = 3  # raise it when images.py decodes by other rules
_SETTLED_S = 2.0
FEW_LEVELS = 32  # of 256 grey levels; images that use fewer are noted
_NEGATION = re.compile(
    r"(?i)(^|[^a-z])(non?($|[^a-z]|covid)|normal|neg|healthy|control|benign|uninfected)"
)


@dataclass(frozen=True)
class ImageRecord:
    path: str  # relative to the index's root, with /
    label: int  # position in DataIndex.classes
    sha256: str  # of the file
    pixel_hash: str  # of the decoded image (images.pixel_hash)
    height: int
    width: int
    mode: str  # Pillow's mode of the stored file
    split: str | None = None  # from the manifest: train, val, test
    patient: str | None = None
    plain: bool = False  # any decoder gives the same image (images.Decoded)
    format: str = ""  # by content (images.Decoded)
    # of 16-bit grey: 0.1 and 99.9 % percentile, number of pixels over 255 and over 4095
    grey16: list[int] = field(default_factory=list)

    @property
    def wrong_extension(self) -> str:
        """How the file's name disagrees with its content; "" if it agrees."""
        suffix = PurePosixPath(self.path).suffix
        named = SUFFIXES.get(suffix.lower(), printable(suffix) or "nothing")
        problem = f"wrong extension: the name says {named}, the content is {self.format}"
        return problem if self.format != named else ""


@dataclass(frozen=True)
class Excluded:
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


@dataclass(frozen=True)
class DataIndex:
    root: Path
    classes: list[str]  # sorted by name; a label is a position here
    records: list[ImageRecord]
    excluded: list[Excluded] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # ignored files and the like; not errors
    grey_range: GreyRange | None = None  # of all 16-bit images; None: there are none

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

    def empty_classes(self, ids: Iterable[int] | None = None) -> str:
        """Names of the classes without an image, for an error; "" if there is none."""
        return ", ".join(printable(name) for name, n in self.counts(ids).items() if n == 0)

    def fingerprint(self, ids: Iterable[int] | None = None) -> str:
        """SHA-256 over path, label and content of the records in order: equal means equal data."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for i in range(len(self)) if ids is None else ids:
            r = self.records[i]
            digest.update(json.dumps([r.path, r.label, r.sha256]).encode())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically."""
        body = {
            **_FORMAT,
            **asdict(self),
            "root": str(self.root.absolute()),
            "wrong_extension": [r.path for r in self.records if r.wrong_extension],
        }
        atomic_write_text(Path(path), json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DataIndex:
        """Raises DataError if the file is not an index, or is damaged."""
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            if {**body, **_FORMAT} != body:
                raise ValueError("'format' and 'version' do not match")
            index = cls(
                root=Path(body["root"]),
                classes=[str(name) for name in body["classes"]],
                records=[ImageRecord(**r) for r in body["records"]],
                excluded=[Excluded(**e) for e in body["excluded"]],
                notes=list(body["notes"]),
                # without it: an index of an earlier version, with a range for each file
                grey_range=tuple(body["grey_range"]) if body.get("grey_range") else None,
            )
            if not all(0 <= label < len(index.classes) for label in index.labels):
                raise ValueError(f"a label outside its {len(index.classes)} classes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not an index, of another version, or damaged ({error}); make it again "
                "with `sssd-fast data check`"
            ) from error
        return index

    def moved_to(self, root: Path, setting: str) -> DataIndex:
        """This index with another data folder of the same files.

        Raises DataError if a file is missing there or has another content. `setting` names the
        setting of the folder.
        """

        def problem(record: ImageRecord) -> str:
            try:
                data = read_file(root / record.path)
            except ImageError as error:
                return f"{printable(record.path)}: {error.reason}"
            same = hashlib.sha256(data).hexdigest() == record.sha256
            return "" if same else f"{printable(record.path)}: another content"

        problems = [p for p in map_threads(problem, self.records, os.cpu_count() or 1) if p]
        if problems:
            where = printable(str(root))
            lines = [
                f"{where} does not hold the images that were checked in {self.root}: "
                f"{len(problems)} of {len(self)} are missing or changed; give the folder that "
                f"holds them, {setting}=DIR",
                *first_lines(problems),
            ]
            raise DataError("\n".join(lines))
        return replace(self, root=root)

    def summary(self) -> str:
        """Several lines: counts, sizes, modes, notes, excluded files, duplicates."""
        heights = [r.height for r in self.records]
        widths = [r.width for r in self.records]
        modes = Counter(r.mode for r in self.records).most_common()
        where = printable(str(self.root))
        lines = [
            f"{len(self)} images in {len(self.classes)} classes under {where}",
            f"  classes: {', '.join(f'{printable(c)} {n}' for c, n in self.counts().items())}",
            f"  height {min(heights)}-{max(heights)}, width {min(widths)}-{max(widths)} pixels; "
            f"modes: {', '.join(f'{mode} {n}' for mode, n in modes)}",
        ]
        patients = {r.patient for r in self.records if r.patient}
        if patients:
            lines.append(f"  patients: {len(patients)}")
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(f"  excluded: {len(self.excluded)}")
        lines += first_lines([str(e) for e in self.excluded])
        return "\n".join(lines + duplicate_lines(self))


def identical_images(index: DataIndex) -> list[list[int]]:
    """Groups of records with equal pixels."""
    by_hash: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(index.records):
        by_hash[record.pixel_hash].append(i)
    return [ids for ids in by_hash.values() if len(ids) > 1]


def named_groups(
    index: DataIndex, groups: Iterable[Iterable[int]], name_of: Mapping[int, str]
) -> list[str]:
    """A line per group whose records have several names (of classes or splits)."""
    known = [[i for i in ids if i in name_of] for ids in groups]
    return [
        " = ".join(printable(f"{index.records[i].path} ({name_of[i]})") for i in ids)
        for ids in known
        if len({name_of[i] for i in ids}) > 1
    ]


def duplicate_lines(index: DataIndex) -> list[str]:
    """How many images have equal pixels, and which of those have different labels."""
    groups = identical_images(index)
    class_of = {i: index.classes[r.label] for i, r in enumerate(index.records)}
    lines = [f"  identical images: {len(groups)} groups"]
    mixed = named_groups(index, groups, class_of)
    if mixed:
        lines.append(f"  identical images WITH DIFFERENT LABELS: {len(mixed)} groups")
    return lines + first_lines(mixed)


def count_images(config: DataConfig) -> int:
    """Images of all splits, without reading them. Raises DataError."""
    if is_synthetic(config.source):
        return config.synthetic_images
    root = Path(config.source)
    if config.manifest is not None or root.is_file():
        return len(read_manifest(config.manifest or root))
    if not root.is_dir():
        raise DataError(f"{printable(str(root))}: no such file or folder")
    return len(list_classes(root, tuple(SUFFIXES), []))


def check_data(
    source: str | os.PathLike[str],
    manifest: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.01,
    accept_wrong_extension: bool = True,
    index_cache: Path | None = None,
    grey_range: GreyRange | None = None,
    labelled: bool = True,
) -> DataIndex:
    """Decode every image once and return the index of the good ones.

    source: the data folder (one folder per class, see layout.py; with `manifest` the folder its
        paths are relative to), or a CSV manifest in the data folder.
    out: also save the index there.
    accept_wrong_extension: keep files such as a JPEG named .png, which decode well (COVID-CT has 34
        of them), with a note; else they are excluded like other bad files.
    grey_range: for 16-bit grey images; None = the smallest of 8, 12 and 16 bits that 99.9 % of
        the pixels of all those images fit in.
    index_cache: folder that stores the results, so that unchanged files are not decoded again.

    labelled: False = the folders are no classes.

    Raises DataError: nothing found, an unknown layout, a bad manifest (all problems at once), a
    class without a usable image, or more than `max_bad_fraction` of the files unusable.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"max_bad_fraction is {max_bad_fraction}; a fraction from 0 to 1 is needed")
    root = Path(source)
    if not root.exists():
        raise DataError(f"{printable(str(root))}: no such file or folder")
    if root.is_file():
        if manifest is not None:
            raise DataError(
                f"{printable(str(root))} is a file; with a manifest the source is the folder that "
                "its paths are relative to"
            )
        root, manifest = root.parent, root
    notes: list[str] = []
    if manifest is None:
        rows = list_classes(root, tuple(SUFFIXES), notes, labelled=labelled)
    else:
        rows = _on_disk(root, read_manifest(manifest, notes), notes)
        note_variants({row["label"] for row in rows}, notes)
    classes = sorted({row["label"] for row in rows})
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32] + ".checked.json"
    stored = index_cache / name if index_cache else None
    cache = _read_cache(stored)
    before = dict(cache)
    examine = partial(_examine, root, classes, cache, time.time())
    results = map_threads(examine, rows, min(8, os.cpu_count() or 1))
    if stored and cache != before:
        body = json.dumps({"version": _CACHE_VERSION, "files": cache})
        # without the file, the next check decodes every image
        with suppress(OSError, SssdError):
            atomic_write_text(stored, body)
    records = [result for result in results if isinstance(result, ImageRecord)]
    excluded = [result for result in results if isinstance(result, Excluded)]
    renamed = [r.path for r in records if r.wrong_extension]
    if renamed and accept_wrong_extension:
        notes.append(
            f"{len(renamed)} images with a wrong extension kept, such as {printable(renamed[0])}; "
            "all are listed in index.json (wrong_extension)"
        )
    hint = ""
    if renamed and not accept_wrong_extension:
        excluded += [Excluded(r.path, r.wrong_extension) for r in records if r.wrong_extension]
        records = [r for r in records if not r.wrong_extension]
        hint = (
            f"\n{len(renamed)} of them are good images with a wrong extension; rename them, or "
            "accept them: omit --reject-wrong-extension, data.accept_wrong_extension=true."
        )
    listed = [str(e) for e in excluded]
    refuse_bad_files("images", listed, len(rows), max_bad_fraction, hint)
    grey_range = _grey_range(records, grey_range, notes)
    index = DataIndex(root, classes, records, excluded, notes, grey_range)
    empty = index.empty_classes()
    if empty:
        lines = [f"no usable image left in class {empty}; excluded:"]
        raise DataError("\n".join(lines + first_lines(listed)))
    if out is not None:
        index.save(out)
    return index


def _on_disk(root: Path, rows: list[dict[str, str]], notes: list[str]) -> list[dict[str, str]]:
    """The rows with the paths as the file system has them (see `find_file`)."""

    def exists(path: str) -> bool:
        return (root / path).exists()

    found = [{**row, "path": find_file(exists, row["path"])} for row in rows]
    other = [row["path"] for row, new in zip(rows, found, strict=True) if row != new]
    if other:
        notes.append(
            f"{len(other)} paths of the manifest have \\ or another Unicode form than the file, "
            f"such as {printable(other[0])}; the file is used"
        )
    if len({row["path"] for row in found}) < len(found):
        raise DataError(f"{printable(str(root))}: several rows of the manifest name one file")
    return found


def map_threads(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    threads: int,
    progress: Progress | None = None,
) -> list[ResultT]:
    """The results in order. Several threads help because Pillow and hashlib release the GIL."""
    results = []
    pool = ThreadPoolExecutor(max(1, threads))
    try:
        for result in pool.map(function, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _read_cache(file: Path | None) -> dict[str, Any]:
    """Path -> [[size, modification time in ns], record]; empty if the file is absent or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        body = json.loads(file.read_text(encoding="utf-8")) if file else {}
        if body["version"] == _CACHE_VERSION:
            return dict(body["files"])
    return {}


def _examine(
    root: Path, classes: list[str], cache: dict[str, Any], now: float, row: Mapping[str, str]
) -> ImageRecord | Excluded:
    """Decode the image of one row, unless the cache has its record."""
    path = row["path"]
    given: dict[str, Any] = {
        "label": classes.index(row["label"]),
        "split": row.get("split") or None,
        "patient": row.get("patient") or None,
    }
    stamp = None
    with suppress(OSError):  # read_file names the problem
        status = (root / path).stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if path in cache and cache[path][0] == stamp:
            return ImageRecord(**{**cache[path][1], **given})
    try:
        data = read_file(root / path)
        pixels, mode, kind, plain, values = decode_bytes(data, path)
    except ImageError as error:
        return Excluded(path, error.reason)
    facts: dict[str, Any] = {
        "path": path,
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixel_hash": pixel_hash(pixels if values is None else values),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "mode": mode,
        "plain": plain,
        "format": kind,
    }
    if values is not None:
        ends = np.percentile(values, (0.1, 99.9), method="nearest")
        facts["grey16"] = [*map(int, ends), *(int((values > top).sum()) for top in WHITES[:2])]
    if stamp and now - stamp[1] / 1e9 > _SETTLED_S:
        cache[path] = [stamp, facts]
    return ImageRecord(**facts, **given)


def _grey_range(
    records: Sequence[ImageRecord], given: GreyRange | None, notes: list[str]
) -> GreyRange | None:
    """The range of all 16-bit images, and notes about it; None if there are none."""
    deep = [r for r in records if r.grey16]
    if not deep:
        return None
    pixels = sum(r.height * r.width for r in deep)
    # a few pixels of metal must not make every image darker
    allowed = 0.001 * pixels
    over = [sum(r.grey16[2 + place] for r in deep) for place in (0, 1)]
    fits = [white for white, n in zip(WHITES, over, strict=False) if n <= allowed]
    low, high = given or (0, [*fits, WHITES[-1]][0])
    above = sum(r.grey16[1] > high for r in deep)
    notes.append(
        f"16-bit images: {len(deep)} of {len(records)}; values from {low} to {high} are shown from "
        f"black to white{f', more than 0.1 % of the pixels of {above} are above' * (above > 0)}"
    )
    levels = [(min(r.grey16[1], high) - max(r.grey16[0], low)) * 255 / (high - low) for r in deep]
    flat = [r for r, n in zip(deep, levels, strict=True) if n < FEW_LEVELS]
    if len(flat) > 0.1 * len(deep):
        ends = min(r.grey16[0] for r in flat), max(r.grey16[1] for r in flat)
        advice = f"show more contrast with data.grey_range=[{ends[0]},{max(ends[1], ends[0] + 1)}]"
        if 31000 < ends[0] < 32768 < ends[1] + 300:
            # DeepLesion and others store HU + 32768; level -600, width 1500
            advice += "; if they are HU + 32768, the lung window is data.grey_range=[31418,32918]"
        notes.append(
            f"{len(flat)} of the 16-bit images use fewer than {FEW_LEVELS} of 256 grey levels, "
            f"their values are {ends[0]} to {ends[1]}; {advice}"
        )
    return low, high


def positive_class(classes: Sequence[str]) -> int:
    """Index of the class that sensitivity is about, for two classes.

    If exactly one name is a negation (non..., no..., normal, negative, healthy, control), the other
    class, else index 1. "CT_COVID" sorts before "CT_NonCOVID", so index 1 alone would swap
    sensitivity and specificity.
    """
    if len(classes) != 2:
        raise DataError(f"a positive class needs 2 classes, got {len(classes)}: {list(classes)}")
    negative = [_NEGATION.search(name) for name in classes]
    return 0 if negative[1] and not negative[0] else 1
