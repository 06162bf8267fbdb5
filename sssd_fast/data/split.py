"""Train, validation and test splits of an index, and a check for leakage between them.

Test and validation sizes are rounded down per class: 20 % of COVID-CT (349 + 397) are 69 + 79 = 148
images. The validation images are taken from the training images, by whole patients if all of them
are known. `test` and `val` are fractions of all images.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sssd_fast.config import DataConfig
from sssd_fast.data.images import printable
from sssd_fast.data.index import DataIndex, identical_images, named_groups
from sssd_fast.data.manifest import (
    SPLIT_NAMES,
    find_file,
    first_lines,
    read_manifest,
    write_manifest,
)
from sssd_fast.errors import DataError

_PROPOSALS = 200  # random groupings tried by _cut_patients; the best balanced one is used


@dataclass(frozen=True)
class Split:
    """Record numbers of an index, without overlap. val and test may be empty; train may not."""

    name: str
    train: list[int]
    val: list[int]
    test: list[int]
    protocol: str  # one sentence for the report

    def __post_init__(self) -> None:
        every = [*self.train, *self.val, *self.test]
        twice = len(every) - len(set(every))
        if twice:
            raise DataError(f"split {self.name}: {twice} images are listed twice")
        if not self.train:
            raise DataError(f"split {self.name}: train is empty")

    def ids(self, name: str) -> list[int]:
        """Record numbers of train, val or test."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def split_of(self) -> dict[int, str]:
        """Record number -> train, val or test."""
        return {i: name for name in SPLIT_NAMES for i in self.ids(name)}


# ---- protocols ----


def make_split(config: DataConfig, index: DataIndex) -> Split:
    """The split that data.split names. A given split without validation images gets val_fraction of
    them from its training split.
    """
    val, seed, name = config.val_fraction, config.split_seed, config.split
    if name == "auto":
        name = "manifest" if any(r.split for r in index.records) else "random"
    if name == "random":
        return split_random(index, config.test_fraction, seed, val=val)
    if config.split == "block":
        return split_block(index, config.test_fraction, val=val)
    if config.split == "patient":
        return split_patient(index, config.test_fraction, seed, val=val)
    if config.split == "kfold":
        return split_kfold(index, config.folds, config.fold, seed, val=val)
    given = split_manifest(index) if name == "manifest" else split_csv(index, name)
    if config.split == "auto" and not given.test:
        raise DataError(
            "the split that is given with the data has no test images; name a folder test or set "
            "data.split=random, which draws another split of all images"
        )
    return given if given.val or val == 0 else carve_validation(index, given, val, seed)


def split_random(index: DataIndex, test: float = 0.2, seed: int = 0, *, val: float = 0.0) -> Split:
    """Stratified random images (StratifiedShuffleSplit), as in most published results.

    Slices of one patient can be in both train and test, so the scores are optimistic.
    """
    train, held_out = _cut_images(index, range(len(index)), test, seed, "test")
    train, valid = _cut_validation(index, train, val, seed, len(index))
    protocol = f"stratified random, {test:.0%} test, seed {seed}"
    return Split("random", train, valid, held_out, protocol)


def split_block(index: DataIndex, test: float = 0.2, *, val: float = 0.0) -> Split:
    """The last images of each class in natural order of the file names; val is the block before.

    Neighbouring file numbers are mostly slices of one patient, so patients mostly stay whole.
    """
    if test + val >= 1:
        raise DataError(
            f"data.test_fraction {test:g} + data.val_fraction {val:g} leave no training images; "
            "reduce them"
        )
    train: list[int] = []
    valid: list[int] = []
    held_out: list[int] = []
    by_name = sorted(range(len(index)), key=lambda i: natural_key(index.records[i].path))
    for label in range(len(index.classes)):
        ordered = [i for i in by_name if index.records[i].label == label]
        first_test = len(ordered) - _portion(len(ordered), test)
        first_val = first_test - _portion(len(ordered), val)
        train += ordered[:first_val]
        valid += ordered[first_val:first_test]
        held_out += ordered[first_test:]
    _need_every_class(index, held_out, "test")
    if val:
        _need_every_class(index, valid, "val")
    protocol = f"last {test:.0%} of file numbers per class"
    return Split("block", sorted(train), sorted(valid), sorted(held_out), protocol)


def split_patient(index: DataIndex, test: float = 0.2, seed: int = 0, *, val: float = 0.0) -> Split:
    """Whole patients (GroupShuffleSplit); of 200 draws the one closest to the class sizes."""
    unknown = [r.path for r in index.records if not r.patient]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(index)} images have no patient, such as "
            f"{printable(unknown[0])}; add a patient column to the manifest, or set "
            "data.split=block"
        )
    train, held_out = _cut_patients(index, range(len(index)), test, seed, "test")
    train, valid = _cut_validation(index, train, val, seed, len(index))
    protocol = f"by patient, about {test:.0%} test, seed {seed}"
    return Split("patient", train, valid, held_out, protocol)


def split_kfold(index: DataIndex, k: int, fold: int, seed: int = 0, *, val: float = 0.0) -> Split:
    """Fold `fold` of `k` is the test split.

    StratifiedGroupKFold over patients if all are known, else StratifiedKFold over images.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    patients = [r.patient for r in index.records]
    by_patient = all(patients)
    unit = "patient" if by_patient else "image"
    for label, name in enumerate(index.classes):
        ids = [i for i, r in enumerate(index.records) if r.label == label]
        count = len({patients[i] for i in ids}) if by_patient else len(ids)
        if count < k:
            raise DataError(f"class {printable(name)} has {count} {unit}s; {k} folds need {k}")
    make = StratifiedGroupKFold if by_patient else StratifiedKFold
    groups = patients if by_patient else None
    splitter = make(k, shuffle=True, random_state=seed)
    folds = list(splitter.split(index.labels, index.labels, groups))
    train, held_out = (ids.tolist() for ids in folds[fold])
    train, valid = _cut_validation(index, train, val, seed, len(index))
    protocol = f"fold {fold} of {k}, stratified by {unit}, seed {seed}"
    return Split(f"fold{fold}of{k}", train, valid, held_out, protocol)


def split_csv(index: DataIndex, path: str | os.PathLike[str]) -> Split:
    """The split that a CSV path,label,split lists. Rows of excluded images are skipped.

    Raises DataError listing every row that does not match the index.
    """
    rows = read_manifest(path)
    where = printable(str(path))
    if "split" not in rows[0]:
        raise DataError(
            f"{where}: no column split; needed: path,label,split with {', '.join(SPLIT_NAMES)}"
        )
    number = {r.path: i for i, r in enumerate(index.records)}
    excluded = {e.path for e in index.excluded}
    split_of: dict[int, str] = {}
    problems = []
    for row in rows:
        path = find_file(lambda path: path in number or path in excluded, row["path"])
        i, name = number.get(path), printable(path)
        if i is None:
            if path not in excluded:
                problems.append(f"{name} is not in the index")
            continue
        label = index.classes[index.records[i].label]
        if label != row["label"]:
            here = f"label {printable(row['label'])}"
            problems.append(f"{name}: {here}, in the index {printable(label)}")
        split_of[i] = row["split"]
    if problems:
        raise DataError(
            f"{where}: {len(problems)} rows do not match the index of {index.root}\n"
            + "\n".join(first_lines(problems))
        )
    return _listed(split_of, Path(path).stem, f"given by {printable(Path(path).name)}")


def split_manifest(index: DataIndex) -> Split:
    """The split that the manifest or the folders of the index give."""
    split_of = {i: r.split for i, r in enumerate(index.records) if r.split}
    if not split_of:
        raise DataError(
            "the index has no split column; use a manifest path,label,split, or `sssd-fast data "
            "split`"
        )
    return _listed(split_of, "manifest", "given with the data")


def carve_validation(index: DataIndex, split: Split, val: float, seed: int = 0) -> Split:
    """Move training images to validation, which is empty."""
    total = len(split.train) + len(split.test)
    train, valid = _cut_validation(index, split.train, val, seed, total)
    protocol = f"{split.protocol}; {len(valid)} images cut from train for validation, seed {seed}"
    return replace(split, train=train, val=valid, protocol=protocol)


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts Covid_9 before Covid_10."""
    return [
        (0, int(piece), "") if piece.isascii() and piece.isdecimal() else (1, 0, piece)
        for piece in re.split(r"([0-9]+)", path)
    ]


# ---- leakage, files ----


def find_leaks(index: DataIndex, split: Split) -> list[str]:
    """One line per patient and per group of identical images that is in several splits."""
    split_of = split.split_of()
    found: dict[str, set[str]] = defaultdict(set)
    for i, name in split_of.items():
        found[index.records[i].patient or ""].add(name)
    leaks = [
        f"patient {printable(patient)} in {', '.join(sorted(names))}"
        for patient, names in sorted(found.items())
        if patient and len(names) > 1
    ]
    same = named_groups(index, identical_images(index), split_of)
    return leaks + [f"identical images {line}" for line in same]


def save_split(split: Split, path: str | os.PathLike[str], index: DataIndex) -> None:
    """Write CSV path,label,split[,patient], which `check_data` and `split_csv` read."""
    rows = []
    patients = any(index.records[i].patient for i in split.split_of())
    for i, name in split.split_of().items():
        r = index.records[i]
        row = {"path": r.path, "label": index.classes[r.label], "split": name}
        rows.append({**row, "patient": r.patient or ""} if patients else row)
    write_manifest(Path(path), rows)


def split_summary(split: Split, index: DataIndex) -> str:
    """Counts per split and class, then every leak found."""
    lines = [f"split {split.name}: {split.protocol}"]
    for name in SPLIT_NAMES:
        ids = split.ids(name)
        counts = ", ".join(f"{printable(c)} {n}" for c, n in index.counts(ids).items())
        lines.append(f"  {name}: {len(ids)} images ({counts})")
    unused = len(index) - len(split.split_of())
    if unused:
        lines.append(f"  not used: {unused} images")
    return "\n".join(lines + [f"  leak: {leak}" for leak in find_leaks(index, split)])


# ---- cutting ----


def _listed(split_of: dict[int, str], name: str, protocol: str) -> Split:
    train, val, test = ([i for i in split_of if split_of[i] == s] for s in SPLIT_NAMES)
    return Split(name, train, val, test, protocol)


def _need_every_class(index: DataIndex, ids: Sequence[int], split: str) -> None:
    empty = index.empty_classes(ids)
    if empty:
        raise DataError(
            f"{split} would have no image of class {empty}; the classes have "
            f"{_counted(index)}: use another data.{split}_fraction, or more images"
        )


def _counted(index: DataIndex, ids: Sequence[int] | None = None) -> str:
    return ", ".join(f"{printable(name)} {n}" for name, n in index.counts(ids).items())


def _portion(count: int, fraction: float) -> int:
    return int(count * fraction + 1e-9)


def _cut_validation(
    index: DataIndex, train: list[int], val: float, seed: int, total: int
) -> tuple[list[int], list[int]]:
    """Cut `val` (a fraction of `total` images) from the training images."""
    if val == 0:
        return train, []
    share = val * total / len(train)
    if share >= 1:
        raise DataError(
            f"data.val_fraction {val:g} of {total} images leaves none of the {len(train)} training "
            "images; reduce it"
        )
    if all(index.records[i].patient for i in train):
        return _cut_patients(index, train, share, seed + 1, "val")
    return _cut_images(index, train, share, seed + 1, "val", val)


def _cut_images(
    index: DataIndex,
    ids: Sequence[int],
    fraction: float,
    seed: int,
    split: str,
    given: float | None = None,
) -> tuple[list[int], list[int]]:
    """(kept, cut), stratified. given: what the user calls `fraction`, if it is of all images."""
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = [index.records[i].label for i in ids]
    counts = Counter(labels)
    size = sum(_portion(n, fraction) for n in counts.values())
    if size < len(counts) or min(counts.values()) < 2:
        setting = f"data.{split}_fraction {fraction if given is None else given:g}"
        raise DataError(
            f"{setting} leaves {split} without an image of some class: the images it is taken from "
            f"are {_counted(index, ids)}; use a larger fraction or more images"
        )
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=size, random_state=seed)
    kept, cut = (sorted(ids[i] for i in part) for part in next(splitter.split(labels, labels)))
    _need_every_class(index, cut, split)
    return kept, cut


def _cut_patients(
    index: DataIndex, ids: Sequence[int], fraction: float, seed: int, split: str
) -> tuple[list[int], list[int]]:
    """(kept, cut), whole patients; class sizes as close to `fraction` as the draws allow."""
    from sklearn.model_selection import GroupShuffleSplit

    patients = [index.records[i].patient for i in ids]
    if len(set(patients)) < 2:
        raise DataError(f"1 patient cannot be divided; {split} needs a separate one")
    labels = np.array([index.records[i].label for i in ids])
    classes = len(index.classes)
    wanted = fraction * np.bincount(labels, minlength=classes)

    def distance(draw: tuple[np.ndarray, np.ndarray]) -> float:
        return float(np.abs(np.bincount(labels[draw[1]], minlength=classes) - wanted).sum())

    splitter = GroupShuffleSplit(n_splits=_PROPOSALS, test_size=fraction, random_state=seed)
    best = min(splitter.split(labels, labels, patients), key=distance)
    kept, cut = (sorted(ids[i] for i in part) for part in best)
    _need_every_class(index, kept, "train")
    _need_every_class(index, cut, split)
    return kept, cut
