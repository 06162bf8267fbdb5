"""The two public CT sets of the paper: their folders, their splits, and the published results.

Published results: Tan, Yu, Meng, Liu, Li, Comput. Methods Programs Biomed. 243 (2024) 107876,
stratified random 80/20. Only the abstract is public; it does not say what "external knowledge" was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sssd_fast.data.images import printable
from sssd_fast.data.manifest import SPLIT_NAMES, first_lines, read_manifest, write_manifest
from sssd_fast.errors import DataError

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class PublicSet:
    """A published image set. Rates are fractions, by the names of metrics.RATES.

    `classes` maps a class folder to its published number of images. `controlled` is the
    leak-controlled split: "official" (the authors', by patient) or "block" (last file numbers),
    with `controlled_title` for tables. `published` maps a source to rates on the random split.
    """

    title: str
    config: str
    classes: Mapping[str, int]
    controlled: str
    controlled_title: str
    published: Mapping[str, Mapping[str, float]]

    def departures(self, counts: Mapping[str, int]) -> list[str]:
        """One line per class whose number of images is not the published one."""
        return [
            f"{name} has {counts.get(name, 0)} images, the published set has {number}"
            for name, number in self.classes.items()
            if counts.get(name, 0) != number
        ]


COVID_CT = PublicSet(
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
)
SARS_COV_2_CT = PublicSet(
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
PUBLIC_SETS = {"covid-ct": COVID_CT, "sars-cov-2-ct": SARS_COV_2_CT}


def image_root(which: PublicSet, folder: PathLike) -> Path:
    """The folder with the set's class folders: `folder` or one below it. Raises DataError."""
    top, needed = Path(folder), " and ".join(which.classes)
    places = sorted(path.parent for path in top.rglob(next(iter(which.classes))))
    found = [p for p in places if all((p / name).is_dir() for name in which.classes)]
    if not found:
        raise DataError(
            f"{printable(str(top))}: no folder there holds {needed}, the classes of {which.title}; "
            "unpack its archives first"
        )
    if len(found) > 1:
        listed = ", ".join(printable(str(place)) for place in found)
        raise DataError(f"{needed} are in several places ({listed}); name one of them")
    return found[0]


def write_official_split(which: PublicSet, folder: PathLike, out: Path) -> None:
    """Write the authors' split of COVID-CT as CSV path,label,split, paths relative to its images.

    Read from `folder`/split_official.csv (path,label,split), else from the authors' lists of names
    (trainCT_COVID.txt and so on) anywhere below `folder`. Images are matched by class and file
    name. Raises DataError if there is no split, or it names images that are missing.
    """
    top, root = Path(folder), image_root(which, folder)
    csv = top / "split_official.csv"
    if csv.is_file():
        rows = [
            (r["label"], PurePosixPath(r["path"]).name, r.get("split", ""))
            for r in read_manifest(csv)
        ]
    else:
        rows = [row for label in which.classes for row in _listed(label, top)]
    missing = [f"{label}/{name}" for label, name, _ in rows if not (root / label / name).is_file()]
    if missing:
        listed = "\n".join(first_lines([printable(name) for name in missing]))
        raise DataError(
            f"the official split names {len(missing)} images that are not in "
            f"{printable(str(root))}:\n{listed}"
        )
    write_manifest(out, [{"path": f"{k}/{n}", "label": k, "split": s} for k, n, s in rows])


def _listed(label: str, folder: Path) -> list[tuple[str, str, str]]:
    """(class, file name, split) of one class from the authors' text files, one name per line."""
    rows = []
    for split in SPLIT_NAMES:
        name = f"{split}{label}.txt"
        files = [path for path in folder.rglob(name) if "old_split" not in path.parts]
        if len(files) != 1:
            raise DataError(
                f"{printable(str(folder))}: {len(files) or 'no'} files called {name}, which list "
                "the authors' split; one is needed, or path,label,split in split_official.csv"
            )
        text = files[0].read_text(encoding="utf-8-sig", errors="surrogateescape")
        rows += [(label, line.strip(), split) for line in text.splitlines() if line.strip()]
    return rows
