"""The two public CT sets of the paper: how they lie in a folder, how they are split, and what was published on them.

Published figures: Tan, Yu, Meng, Liu, Li, Comput. Methods Programs Biomed. 243 (2024) 107876, stratified random 80/20. Only the
abstract is public; what "external knowledge" was is not said there.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sssd_fast.data.images import SUFFIXES, printable
from sssd_fast.data.manifest import SPLIT_NAMES, first_lines, read_manifest
from sssd_fast.errors import DataError
from sssd_fast.run.files import atomic_write_bytes

_DEEPEST = 5  # folders below the one that was named, in which the class folders are looked for


@dataclass(frozen=True)
class PublicSet:
    """A published image set. Rates are fractions, by the names of metrics.RATES."""

    name: str
    title: str
    config: str  # the shipped configuration that repeats the paper on it
    classes: Mapping[str, int]  # class folder -> images in it, as published
    controlled: str  # the leak-controlled split: "official" = the authors', by patient; "block" = last file numbers
    published: Mapping[str, Mapping[str, float]]  # who -> rates, on the random split
    split_files: Mapping[str, str] = field(
        default_factory=dict
    )  # class -> file of names of a part, {part} to be filled in

    @property
    def images(self) -> int:
        return sum(self.classes.values())


COVID_CT = PublicSet(
    name="covid-ct",
    title="COVID-CT",
    config="paper_covid_ct",
    classes={"CT_COVID": 349, "CT_NonCOVID": 397},
    controlled="official",
    published={
        "paper, no external data": {
            "accuracy": 0.8176, "precision": 0.8182, "sensitivity": 0.7826, "f1": 0.80, "auc": 0.8821,
        },
        "paper, with external knowledge": {"accuracy": 0.9527},
    },
    split_files={"CT_COVID": "{part}CT_COVID.txt", "CT_NonCOVID": "{part}CT_NonCOVID.txt"},
)  # fmt: skip
SARS_COV_2_CT = PublicSet(
    name="sars-cov-2-ct",
    title="SARS-CoV-2 CT",
    config="paper_sars_cov_2",
    classes={"COVID": 1252, "non-COVID": 1229},
    controlled="block",
    published={
        "paper, no external data": {"accuracy": 0.9778},
        "paper, with external knowledge": {"accuracy": 0.9960},
    },
)
PUBLIC_SETS = {one.name: one for one in (COVID_CT, SARS_COV_2_CT)}


def image_root(which: PublicSet, folder: str | os.PathLike[str]) -> Path:
    """The folder that holds the set's class folders: `folder` or one below it. Raises DataError where it is not to be found."""
    top = Path(folder)
    if not top.is_dir():
        raise DataError(
            f"{printable(str(top))} is no folder; give the one with the images of {which.title}"
        )
    found = [
        place for place, names in _folders(top) if all(name in names for name in which.classes)
    ]
    needed = " and ".join(which.classes)
    if not found:
        archives = sorted(path.name for path in top.rglob("*.zip"))
        hint = f"; unpack {', '.join(map(printable, archives[:3]))} first" if archives else ""
        raise DataError(
            f"{printable(str(top))}: no folder in it holds {needed}, the classes of {which.title}{hint}"
        )
    if len(found) > 1:
        listed = ", ".join(printable(str(place)) for place in found)
        raise DataError(
            f"{printable(str(top))}: {needed} lie in several places ({listed}); name the one to use"
        )
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
    """Writes the authors' split as CSV path,label,split with paths relative to `root`; returns where it was read.

    Read from `given` (CSV path,label,split), else from `folder`/split_official.csv, else from the authors' lists of names
    ({part}CT_COVID.txt and so on) anywhere below `folder`. Images are told by class and file name. Raises DataError where there
    is no split, or it names images that are not there.
    """
    source = Path(given) if given is not None else Path(folder) / "split_official.csv"
    if given is not None or source.is_file():
        rows = [
            (row["label"], PurePosixPath(row["path"]).name, row.get("split", ""))
            for row in read_manifest(source)
        ]
        if not all(part for _, _, part in rows):
            raise DataError(
                f"{printable(str(source))}: no column split; needed: path,label,split with {', '.join(SPLIT_NAMES)}"
            )
        where = source.name
    else:
        rows, where = _named_in_lists(which, Path(folder))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    missing = []
    for label, name, part in rows:
        if (root / label / name).is_file():
            writer.writerow([f"{label}/{name}", label, part])
        else:
            missing.append(f"{printable(label)}/{printable(name)}")
    if missing:
        listed = "\n".join(first_lines(missing))
        raise DataError(
            f"{where} names {len(missing)} images that are not in {printable(str(root))}:\n{listed}"
        )
    atomic_write_bytes(out, text.getvalue().encode("utf-8", "surrogateescape"))
    return where


def _named_in_lists(which: PublicSet, folder: Path) -> tuple[list[tuple[str, str, str]], str]:
    """(class, file name, part) from the authors' text files, one name per line."""
    rows = []
    for label, pattern in which.split_files.items():
        for part in SPLIT_NAMES:
            name = pattern.format(part=part)
            files = [path for path in folder.rglob(name) if "old_split" not in path.parts]
            if len(files) != 1:
                raise DataError(
                    f"{printable(str(folder))}: {len(files) or 'no'} files called {name}, which list the authors' split of {which.title}; "
                    f"one is needed. Or give the split as CSV path,label,split: --official-split FILE.csv"
                )
            lines = files[0].read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
            rows += [(label, line.strip(), part) for line in lines if line.strip()]
    return rows, "the authors' lists of names"


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders from `top` on with the names of those inside; what holds images is not entered."""
    for place, inside, files in os.walk(top):
        depth = len(Path(place).relative_to(top).parts)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        yield Path(place), list(inside)
        if depth >= _DEEPEST or any(Path(name).suffix.lower() in SUFFIXES for name in files):
            inside[:] = []
