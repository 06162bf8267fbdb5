"""Train / validation / test parts of an index: every protocol a CT paper uses, and a check for leaks between the parts.

split_random    stratified random images: the usual published figure, with slices of one patient on both sides
split_block     the last file numbers of each class: a stand-in for patients where none are recorded
split_patient   whole patients: new people, the honest figure
split_kfold     fold i of k, whole patients where they are known
split_csv       as a CSV says; split_manifest: as the index's own manifest does

Test and validation sizes are rounded down per class: 20 % of COVID-CT (349 + 397) are 69 + 79 = 148 images.
A validation part is cut from the training part, by whole patients where all of them are known.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sssd_fast.data.images import printable
from sssd_fast.data.index import DataIndex, report_duplicates
from sssd_fast.data.manifest import SPLIT_NAMES, first_lines, read_manifest
from sssd_fast.data.split import Split
from sssd_fast.errors import DataError
from sssd_fast.run.files import atomic_write_bytes

_PROPOSALS = 200  # random groupings tried for whole-patient parts; the best balanced one is taken


def find_leaks(index: DataIndex, split: Split) -> list[str]:
    """One line per patient and per group of identical pictures that lies in more than one part."""
    parts: dict[str, set[str]] = defaultdict(set)
    for name in SPLIT_NAMES:
        for i in split.ids(name):
            patient = index.records[i].patient
            if patient:
                parts[patient].add(name)
    leaks = [
        f"patient {printable(p)} in {', '.join(sorted(names))}"
        for p, names in sorted(parts.items())
        if len(names) > 1
    ]
    same = report_duplicates(index, split).across_splits
    return leaks + ["identical pictures " + " = ".join(map(printable, group)) for group in same]


def split_random(index: DataIndex, test: float = 0.2, seed: int = 0, *, val: float = 0.0) -> Split:
    """Stratified random images (scikit-learn's StratifiedShuffleSplit), `test` and `val` as fractions of all images."""
    _check_fractions(test, val)
    train, held = _random_part(index, range(len(index)), test, seed, "test")
    rest, valid = _validation(index, train, val, seed)
    return Split(
        "random", rest, valid, held, f"stratified random, {test:.0%} test, seed {seed}", seed
    )


def split_block(index: DataIndex, test: float = 0.2, *, val: float = 0.0) -> Split:
    """The last `test` of each class in natural order of the file names is tested, the block before it validates.

    Neighbouring file numbers are mostly one patient's slices, so this mostly keeps patients whole.
    """
    _check_fractions(test, val)
    parts: dict[str, list[int]] = {name: [] for name in SPLIT_NAMES}
    for ids in _by_class(index, range(len(index))).values():
        ordered = sorted(ids, key=lambda i: natural_key(index.records[i].path))
        num_test, num_val = _portion(len(ids), test), _portion(len(ids), val)
        first_test = len(ids) - num_test
        parts["test"] += ordered[first_test:]
        parts["val"] += ordered[first_test - num_val : first_test]
        parts["train"] += ordered[: first_test - num_val]
    for name in ("test", "val") if val else ("test",):
        _need_every_class(index, parts[name], name)
    protocol = f"last {test:.0%} of file numbers per class"
    return Split(
        "block", sorted(parts["train"]), sorted(parts["val"]), sorted(parts["test"]), protocol
    )


def split_patient(index: DataIndex, test: float = 0.2, seed: int = 0, *, val: float = 0.0) -> Split:
    """Whole patients (scikit-learn's GroupShuffleSplit); of 200 draws the one whose class sizes come closest."""
    _check_fractions(test, val)
    _need_patients(index, "split_patient")
    train, held = _group_part(index, range(len(index)), test, seed, "test")
    rest, valid = _validation(index, train, val, seed)
    return Split(
        "patient", rest, valid, held, f"by patient, about {test:.0%} test, seed {seed}", seed
    )


def split_kfold(index: DataIndex, k: int, fold: int, seed: int = 0, *, val: float = 0.0) -> Split:
    """Fold `fold` of `k` is tested: StratifiedGroupKFold over patients where all are known, else StratifiedKFold."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if k < 2 or not 0 <= fold < k:
        raise DataError(f"fold {fold} of k = {k}; k >= 2 and a fold from 0 to k - 1 are needed")
    _check_fractions(1 / k, val)
    labels = np.array(index.labels)
    patients = [r.patient for r in index.records]
    grouped = all(patients)
    for name, ids in _by_class(index, range(len(index))).items():
        units, what = (
            (len({patients[i] for i in ids}), "patients") if grouped else (len(ids), "images")
        )
        if units < k:
            raise DataError(
                f"class {printable(name)} has {units} {what}; {k} folds need at least {k}"
            )
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(
        k, shuffle=True, random_state=seed
    )
    folds = list(splitter.split(labels, labels, patients if grouped else None))
    train, held = ([int(i) for i in part] for part in folds[fold])
    rest, valid = _validation(index, train, val, seed)
    kind = "by patient" if grouped else "by image"
    return Split(
        f"fold{fold}of{k}",
        rest,
        valid,
        held,
        f"fold {fold} of {k}, stratified {kind}, seed {seed}",
        seed,
    )


def split_csv(index: DataIndex, path: str | os.PathLike[str]) -> Split:
    """The parts that a CSV path,label,split gives. Images the check excluded are passed over; the rest must agree."""
    rows = read_manifest(path)
    where = printable(str(path))
    if "split" not in rows[0]:
        raise DataError(
            f"{where}: no column split; needed: path,label,split with {', '.join(SPLIT_NAMES)}"
        )
    number = {r.path: i for i, r in enumerate(index.records)}
    excluded = {e.path for e in index.excluded}
    parts: dict[str, list[int]] = {name: [] for name in SPLIT_NAMES}
    problems = []
    for row in rows:
        i = number.get(row["path"])
        if i is None:
            if row["path"] not in excluded:
                problems.append(f"{printable(row['path'])} is not in the index")
        elif index.classes[index.records[i].label] != row["label"]:
            known = index.classes[index.records[i].label]
            problems.append(
                f"{printable(row['path'])}: label {printable(row['label'])}, in the index {printable(known)}"
            )
        else:
            parts[row["split"]].append(i)
    if problems:
        listed = "\n".join(first_lines(problems))
        raise DataError(
            f"{where}: {len(problems)} rows do not fit the index of {index.root}\n{listed}"
        )
    return _given(index, parts, Path(path).stem, f"given by {printable(Path(path).name)}")


def split_manifest(index: DataIndex) -> Split:
    """The parts that the index's own manifest gave."""
    parts = {
        name: [i for i, r in enumerate(index.records) if r.split == name] for name in SPLIT_NAMES
    }
    if not any(parts.values()):
        raise DataError(
            "the index has no split column; use a manifest path,label,split, or `sssd-fast data split`"
        )
    return _given(index, parts, "manifest", "given by the manifest")


def carve_validation(index: DataIndex, split: Split, val: float, seed: int = 0) -> Split:
    """The same split with a validation part (`val` as a fraction of all its images) cut from its training part."""
    if split.val:
        raise DataError(
            f"split {split.name} already has a validation part of {len(split.val)} images"
        )
    if not 0 < val < 1:
        raise DataError(f"val is {val}; a fraction above 0 and below 1 is needed")
    total = len(split.train) + len(split.test)
    train, valid = _validation(index, split.train, val, seed, total=total)
    protocol = f"{split.protocol}; {len(valid)} images cut from train for validation, seed {seed}"
    return replace(split, train=train, val=valid, protocol=protocol)


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts Covid_9 before Covid_10."""
    pieces = re.split(r"([0-9]+)", path)
    return [
        (0, int(piece), "") if piece.isdecimal() and piece.isascii() else (1, 0, piece)
        for piece in pieces
    ]


def _given(index: DataIndex, parts: dict[str, list[int]], name: str, protocol: str) -> Split:
    unused = sorted(set(range(len(index))) - {i for ids in parts.values() for i in ids})
    return Split(name, parts["train"], parts["val"], parts["test"], protocol, None, unused)


def _check_fractions(test: float, val: float) -> None:
    if not 0 < test < 1:
        raise DataError(f"test is {test}; a fraction above 0 and below 1 is needed")
    if not 0 <= val < 1:
        raise DataError(
            f"val is {val}; a fraction from 0 (no validation part) to below 1 is needed"
        )
    if test + val >= 1:
        raise DataError(
            f"test {test:g} + val {val:g} leave nothing to train on; their sum must stay below 1"
        )


def _need_patients(index: DataIndex, what: str) -> None:
    unknown = [r.path for r in index.records if not r.patient]
    if unknown:
        raise DataError(
            f"{what}: {len(unknown)} of {len(index)} images have no patient, such as {printable(unknown[0])}; "
            "add a patient column to the manifest, or use split_block"
        )


def _need_every_class(index: DataIndex, ids: Sequence[int], part: str) -> None:
    empty = [name for name, n in index.counts(ids).items() if n == 0]
    if empty:
        raise DataError(
            f"the {part} part would hold no image of class {', '.join(map(printable, empty))}; "
            f"the classes have {index.counts()}: use a larger fraction or more images"
        )


def _by_class(index: DataIndex, ids: Iterable[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i in ids:
        groups[index.classes[index.records[i].label]].append(i)
    return groups


def _portion(count: int, fraction: float) -> int:
    return int(count * fraction + 1e-9)


def _validation(
    index: DataIndex, train: list[int], val: float, seed: int, total: int | None = None
) -> tuple[list[int], list[int]]:
    """Cut `val` (a fraction of all images, or of `total`) from the training part."""
    if val == 0:
        return train, []
    total = len(index) if total is None else total
    share = val * total / len(train)
    if share >= 1:
        raise DataError(
            f"val {val:g} of {total} images leaves nothing of the {len(train)} training images"
        )
    cut = _group_part if all(index.records[i].patient for i in train) else _random_part
    return cut(index, train, share, seed + 1, "val")


def _random_part(
    index: DataIndex, ids: Sequence[int], fraction: float, seed: int, part: str
) -> tuple[list[int], list[int]]:
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = [index.records[i].label for i in ids]
    counts = Counter(labels)
    size = sum(_portion(n, fraction) for n in counts.values())
    if size < len(counts) or min(counts.values()) < 2:
        raise DataError(
            f"{fraction:.3g} of {index.counts(ids)} images leaves a class without one in the {part} part; "
            "use a larger fraction or more images"
        )
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=size, random_state=seed)
    kept, held = next(splitter.split(labels, labels))
    result = sorted(ids[i] for i in kept), sorted(ids[i] for i in held)
    _need_every_class(index, result[1], part)
    return result


def _group_part(
    index: DataIndex, ids: Sequence[int], fraction: float, seed: int, part: str
) -> tuple[list[int], list[int]]:
    from sklearn.model_selection import GroupShuffleSplit

    patients = [index.records[i].patient for i in ids]
    if len(set(patients)) < 2:
        raise DataError(
            f"{len(set(patients))} patient cannot be divided; the {part} part needs one of its own"
        )
    labels = np.array([index.records[i].label for i in ids])
    num_classes = len(index.classes)
    wanted = fraction * np.bincount(labels, minlength=num_classes)
    splitter = GroupShuffleSplit(n_splits=_PROPOSALS, test_size=fraction, random_state=seed)

    def distance(held: np.ndarray) -> float:
        return float(np.abs(np.bincount(labels[held], minlength=num_classes) - wanted).sum())

    kept, held = min(splitter.split(labels, labels, patients), key=lambda pair: distance(pair[1]))
    result = sorted(ids[i] for i in kept), sorted(ids[i] for i in held)
    _need_every_class(index, result[0], "train")
    _need_every_class(index, result[1], part)
    return result


def save_split(split: Split, path: str | os.PathLike[str], index: DataIndex) -> None:
    """Write CSV path,label,split[,patient], atomically: a manifest that `check_data` and `split_csv` read."""
    patients = any(r.patient for r in index.records)
    text = io.StringIO()
    # Python before 3.13 leaves a lone carriage return unquoted, and its reader then takes it for a line end.
    tricky = any("\r" in r.path for r in index.records)
    writer = csv.writer(
        text, lineterminator="\n", quoting=csv.QUOTE_ALL if tricky else csv.QUOTE_MINIMAL
    )
    writer.writerow(["path", "label", "split"] + ["patient"] * patients)
    for name in SPLIT_NAMES:
        for i in split.ids(name):
            r = index.records[i]
            writer.writerow([r.path, index.classes[r.label], name] + [r.patient or ""] * patients)
    atomic_write_bytes(Path(path), text.getvalue().encode("utf-8", "surrogateescape"))


def split_summary(split: Split, index: DataIndex) -> str:
    """Counts per part and class, then every leak found."""
    lines = [f"split {split.name}: {split.protocol}"]
    for name in SPLIT_NAMES:
        counts = ", ".join(f"{printable(c)} {n}" for c, n in index.counts(split.ids(name)).items())
        lines.append(f"  {name}: {len(split.ids(name))} images ({counts})")
    if split.unused:
        lines.append(f"  not used: {len(split.unused)} images")
    return "\n".join(lines + [f"  leak: {leak}" for leak in find_leaks(index, split)])
