"""Folder layouts: which folders of a data folder are classes, splits, masks or something else.

    ROOT/CLASS/...           classes
    ROOT/SPLIT/CLASS/...     classes and the split (Kaggle, torchvision)
    ROOT/CLASS/SPLIT/...     classes and the split

A split is named train, val (valid, validation, dev) or test, also as in train_set. Folders of masks
(masks, lung masks, segmentations) hold no images of a class and are skipped with a note. What else
would be misread (folds, a folder around the data, an empty class) is an error that names the layout
and what to do. The same rules hold for images and for volumes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from sssd_fast.data.images import printable
from sssd_fast.data.manifest import is_helper, is_utf8, walk_files
from sssd_fast.errors import DataError

_SPLIT = re.compile(
    r"(?i)(?P<train>train(ing)?)|(?P<val>val(id(ation)?)?|dev)|(?P<test>test(ing)?)"
)
_SET = re.compile(r"(?i)[ _-]?(set|data|images)$")
_FOLD = re.compile(r"(?i)(fold|cv|part|subset)[ _-]?\d+")
_MASKS = re.compile(
    r"(?i)((lungs?|infection|lesion|lobe|ct|image)[ _-]?)?masks?|segmentations?|ground[ _-]?truth"
)
# what class folders of CT sets are called, to tell them from folders of patients
_CLASS = re.compile(r"(?i)covid|normal|healthy|control|pneumonia|positive|negative|infected|^cap$")


def is_mask_folder(name: str) -> bool:
    """True for a folder that holds segmentations of the images next to it."""
    return _MASKS.fullmatch(name) is not None


def split_named(folder: str) -> str | None:
    """train, val or test if a folder's name means a split."""
    match = _SPLIT.fullmatch(_SET.sub("", folder))
    return None if match is None else match.lastgroup


def list_classes(
    root: Path, suffixes: Sequence[str], notes: list[str], *, labelled: bool = True
) -> list[dict[str, str]]:
    """One row path, label[, split] per file below `root`; `notes` receives what was ignored.

    suffixes: of the files that count; empty = all. labelled: False takes every file, also directly
    in `root`, with the label "no label".

    Raises DataError for a layout that is not one of those above.
    """
    paths: list[PurePosixPath] = []
    ignored: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for file in walk_files(root):
        path = PurePosixPath(file.relative_to(root).as_posix())
        suffix = file.suffix.lower()
        files[path.parts[0]] += 1
        mask = next((name for name in path.parts[:-1] if is_mask_folder(name)), None)
        if len(path.parts) == 1 and labelled:
            ignored[f"{suffix or 'no suffix'} directly in the folder"] += 1
        elif suffixes and suffix not in suffixes:
            ignored[suffix or "no suffix"] += 1
        elif mask is not None:
            masks[mask] += 1
        else:
            paths.append(path)
    if masks:
        ignored.update({f"in folders named {name}": n for name, n in masks.items()})
    listed = ", ".join(f"{n} {printable(kind)}" for kind, n in sorted(ignored.items()))
    where = printable(str(root))
    if not paths:
        found = f"ignored {listed}" if listed else "no files"
        kinds = f"{', '.join(suffixes)} files" if suffixes else "DICOM or NIfTI files below it"
        raise DataError(
            f"{where}: no images found ({found}); needed: one folder per class with {kinds}, or a "
            "CSV manifest path,label[,split][,patient]"
        )
    if ignored:
        notes.append(f"ignored {ignored.total()} files that are not images of a class: {listed}")
    if not labelled:
        return [{"path": path.as_posix(), "label": "no label"} for path in paths]
    tops = sorted(item.name for item in root.iterdir() if item.is_dir())
    tops = [name for name in tops if not (is_helper(name) or is_mask_folder(name))]
    hollow = [name for name in tops if not files[name]]
    if hollow:
        raise DataError(
            f"{where}: no file in the folder {_names(hollow)}; the folders here are classes: add "
            "its images (linked folders are not followed), or delete it"
        )
    bare = [name for name in tops if files[name] and all(p.parts[0] != name for p in paths)]
    if bare:
        notes.append(f"no image of a class in the folder {_names(bare)}")
    rows = _rows(root, paths, notes)
    odd = [name for name in tops if not is_utf8(name)]
    if odd:
        raise DataError(
            f"{where}: the name of the class folder {_names(odd)} is not UTF-8; rename it"
        )
    note_variants({row["label"] for row in rows}, notes)
    return rows


def _rows(root: Path, paths: list[PurePosixPath], notes: list[str]) -> list[dict[str, str]]:
    where = printable(str(root))
    tops = list(dict.fromkeys(path.parts[0] for path in paths))
    second: dict[str, list[str]] = {top: [] for top in tops}
    for path in paths:
        # "": a file directly in the folder
        name = path.parts[1] if len(path.parts) > 2 else ""
        if name not in second[path.parts[0]]:
            second[path.parts[0]].append(name)
    inner = sorted({name for names in second.values() for name in names})

    # SPLIT/CLASS
    splits = {top: split_named(top) for top in tops}
    if all(splits.values()):
        if "" in inner:
            direct = [top for top in tops if "" in second[top]]
            raise DataError(
                f"{where}: {_names(tops)} are splits, but {_names(direct)} holds images that are "
                "in no class folder; needed: SPLIT/CLASS/..., or a CSV manifest path,label,split"
            )
        if len(tops) == 1:
            raise DataError(
                f"{where}: its only folder, {_names(tops)}, is a split, and {_names(inner)} are "
                f"its classes; give that folder: {printable(str(root / tops[0]))}"
            )
        return _with_split(paths, notes, label=1, split=0)
    named = [top for top in tops if splits[top]]
    if len({splits[top] for top in named}) > 1:
        others = [top for top in tops if top not in named]
        raise DataError(
            f"{where}: {_names(named)} are splits, but {_names(others)} is none; move it out of "
            "the data folder, or give a CSV manifest path,label,split"
        )
    if len(tops) > 1 and all(_FOLD.fullmatch(top) for top in tops) and "" not in inner:
        raise DataError(
            f"{where}: {_names(tops)} are folds of the classes {_names(inner)}, which are not read "
            "as such; give a CSV manifest path,label[,patient] and set data.split=kfold"
        )

    # CLASS/SPLIT
    parts = {split_named(name) for name in inner if name}
    if None not in parts and len(parts) > 1:
        mixed = [top for top in tops if "" in second[top]]
        if mixed:
            raise DataError(
                f"{where}: classes with splits below them ({_names(inner[1:])}), but "
                f"{_names(mixed)} also holds images outside of them; move those into a split"
            )
        third = {path.parts[2] for path in paths if len(path.parts) > 3}
        if len(tops) == 1 and len(third) > 1 and all(len(path.parts) > 3 for path in paths):
            _refuse_wrapper(root, tops[0], inner)
        return _with_split(paths, notes, label=0, split=1)

    if len(tops) == 1 and len(inner) > 1 and "" not in inner:
        if any(_CLASS.search(name) for name in inner):
            _refuse_wrapper(root, tops[0], inner)
        notes.append(
            f"1 class, {_names(tops)}; if its {len(inner)} folders ({_names(inner)}) are the "
            f"classes, give {printable(str(root / tops[0]))}"
        )
    return [{"path": path.as_posix(), "label": path.parts[0]} for path in paths]


def _refuse_wrapper(root: Path, top: str, inner: Sequence[str]) -> None:
    raise DataError(
        f"{printable(str(root))}: its only folder, {printable(top)}, holds {_names(inner)}; give "
        f"that folder: {printable(str(root / top))}"
    )


def _with_split(
    paths: list[PurePosixPath], notes: list[str], *, label: int, split: int
) -> list[dict[str, str]]:
    rows = []
    for path in paths:
        name = split_named(path.parts[split])
        assert name is not None
        rows.append({"path": path.as_posix(), "label": path.parts[label], "split": name})
    folders = list(dict.fromkeys(path.parts[split] for path in paths))
    notes.append(
        f"the folders {_names(folders)} give the split; data.split=random draws another one"
    )
    return rows


def note_variants(labels: set[str], notes: list[str]) -> None:
    """Notes labels that differ only by case, spaces or the way a number is written."""
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        key = re.sub(r"[\s_-]+", "", label).casefold()
        with suppress(ValueError):
            key = str(float(key))
        groups.setdefault(key, []).append(label)
    for names in groups.values():
        if len(names) > 1:
            notes.append(f"separate classes with almost the same name: {_names(names)}")


def _names(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more
