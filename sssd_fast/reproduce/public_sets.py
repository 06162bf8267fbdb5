"""The two public CT sets of the paper: their folders, their splits, and the published results.

Published results: Tan, Yu, Meng, Liu, Li, Comput. Methods Programs Biomed. 243 (2024) 107876,
stratified random 80/20. Only the abstract is public; it does not say what "external knowledge" was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sssd_fast.data.images import printable
from sssd_fast.data.manifest import SPLIT_NAMES, first_lines, read_manifest, write_manifest
from sssd_fast.errors import DataError

# Levels of folders in which the class folders are searched.
_DEEPEST = 5


@dataclass(frozen=True)
class PublicSet:
    """A published image set. Rates are fractions, by the names of metrics.RATES.

    `classes` maps a class folder to its published number of images. `controlled` is the
    leak-controlled split: "official" (the authors', by patient) or "block" (last file numbers),
    with `controlled_title` for tables. `published` maps a source to rates on the random split.
    `split_files` maps a class to the authors' list of names of a split, {split} to be filled in.
    """

    name: str
    title: str
    config: str
    classes: Mapping[str, int]
    controlled: str
    controlled_title: str
    published: Mapping[str, Mapping[str, float]]
    split_files: Mapping[str, str] = field(default_factory=dict)


COVID_CT = PublicSet(
    name="covid-ct",
    title="COVID-CT",
    config="paper_covid_ct",
    classes={"CT_COVID": 349, "CT_NonCOVID": 397},
    controlled="official",
    controlled_title="the authors' split by patient",
    published={
        "paper, no external data": {
            "accuracy": 0.8176,
            "precision": 0.8182,
            "sensitivity": 0.7826,
            "f1": 0.80,
            "auc": 0.8821,
        },
        "paper, with external knowledge": {"accuracy": 0.9527},
    },
    split_files={"CT_COVID": "{split}CT_COVID.txt", "CT_NonCOVID": "{split}CT_NonCOVID.txt"},
)
SARS_COV_2_CT = PublicSet(
    name="sars-cov-2-ct",
    title="SARS-CoV-2 CT",
    config="paper_sars_cov_2",
    classes={"COVID": 1252, "non-COVID": 1229},
    controlled="block",
    controlled_title="last 20 % of file numbers per class",
    published={
        "paper, no external data": {"accuracy": 0.9778},
        "paper, with external knowledge": {"accuracy": 0.9960},
    },
)
PUBLIC_SETS = {one.name: one for one in (COVID_CT, SARS_COV_2_CT)}


def image_root(which: PublicSet, folder: str | os.PathLike[str]) -> Path:
    """The folder with the set's class folders: `folder` or one below it. Raises DataError."""
    top = Path(folder)
    where, needed = printable(str(top)), " and ".join(which.classes)
    if not top.is_dir():
        raise DataError(f"{where} is not a folder; give the one with the images of {which.title}")
    first = next(iter(which.classes))
    places = [path.parent for n in range(_DEEPEST + 1) for path in top.glob("*/" * n + first)]
    found = [p for p in sorted(places) if all((p / name).is_dir() for name in which.classes)]
    found = [p for p in found if not any(n.startswith(".") for n in p.relative_to(top).parts)]
    if not found:
        archives = [printable(path.name) for path in sorted(top.rglob("*.zip"))]
        hint = f"; unpack {', '.join(archives[:3])} first" if archives else ""
        raise DataError(
            f"{where}: no folder in it holds {needed}, the classes of {which.title}{hint}"
        )
    if len(found) > 1:
        listed = ", ".join(printable(str(place)) for place in found)
        raise DataError(f"{where}: {needed} are in several places ({listed}); name one of them")
    return found[0]


def departures(which: PublicSet, counts: Mapping[str, int]) -> list[str]:
    """One line per class whose number of images is not the published one."""
    return [
        f"{name} has {counts.get(name, 0)} images, the published set has {number}"
        for name, number in which.classes.items()
        if counts.get(name, 0) != number
    ]


def write_official_split(
    which: PublicSet,
    folder: str | os.PathLike[str],
    root: Path,
    given: str | os.PathLike[str] | None,
    out: Path,
) -> str:
    """Write the authors' split as CSV path,label,split with paths relative to `root`.

    Read from `given` (CSV path,label,split), else from `folder`/split_official.csv, else from the
    authors' lists of names ({split}CT_COVID.txt and so on) anywhere below `folder`. Images are
    matched by class and file name. Returns where the split was read. Raises DataError if there is
    no split, or it names images that are missing.
    """
    source = Path(given) if given is not None else Path(folder) / "split_official.csv"
    if given is not None or source.is_file():
        where, given_rows = source.name, read_manifest(source)
        if not all(row.get("split") for row in given_rows):
            raise DataError(
                f"{printable(str(source))}: no column split; needed: path,label,split with "
                f"{', '.join(SPLIT_NAMES)}"
            )
        rows = [(r["label"], PurePosixPath(r["path"]).name, r["split"]) for r in given_rows]
    else:
        where, rows = "the authors' lists of names", _read_lists(which, Path(folder))
    missing = [f"{label}/{name}" for label, name, _ in rows if not (root / label / name).is_file()]
    if missing:
        listed = "\n".join(first_lines([printable(name) for name in missing]))
        raise DataError(
            f"{where} names {len(missing)} images that are not in {printable(str(root))}:\n{listed}"
        )
    cells = [{"path": f"{k}/{name}", "label": k, "split": split} for k, name, split in rows]
    write_manifest(out, cells)
    return where


def _read_lists(which: PublicSet, folder: Path) -> list[tuple[str, str, str]]:
    """(class, file name, split) from the authors' text files, one name per line."""
    rows = []
    for label, pattern in which.split_files.items():
        for split in SPLIT_NAMES:
            name = pattern.format(split=split)
            files = [path for path in folder.rglob(name) if "old_split" not in path.parts]
            if len(files) != 1:
                raise DataError(
                    f"{printable(str(folder))}: {len(files) or 'no'} files called {name}, which "
                    f"list the authors' split of {which.title}; one is needed. Or give the split "
                    "as CSV path,label,split: --official-split FILE.csv"
                )
            lines = files[0].read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
            rows += [(label, line.strip(), split) for line in lines if line.strip()]
    return rows
