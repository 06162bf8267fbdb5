"""Folders of data files, written completely or not at all, and their CSV manifests
path,label[,split][,patient]: a row per image, paths relative to the data folder.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from sssd_fast.data.images import printable
from sssd_fast.errors import DataError
from sssd_fast.run.files import atomic_write_bytes, existing_folder

SPLIT_NAMES = ("train", "val", "test")
_COLUMNS = ("label", "split", "patient")
_BYTES = "surrogateescape"  # keeps bytes that are not UTF-8
_LISTED = 20  # lines of a list printed before "and N more"


def read_manifest(
    manifest: str | os.PathLike[str], notes: list[str] | None = None
) -> list[dict[str, str]]:
    """Rows of the CSV with normalised paths. Raises DataError listing every problem at once.

    The file is UTF-8, or UTF-16 with its mark. Paths may have any bytes, as file names do.
    """
    where = printable(str(manifest))
    try:
        data = Path(manifest).read_bytes()
        wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = data.decode("utf-16" if wide else "utf-8-sig", "strict" if wide else _BYTES)
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = list(reader.fieldnames or [])
        lines = [(reader.line_num, row) for row in reader]
    except (OSError, csv.Error, UnicodeError) as error:
        raise DataError(f"{where}: cannot be read as CSV ({error})") from error
    missing = [name for name in ("path", "label") if name not in header]
    if missing:
        raise DataError(
            f"{where}: no column {' and '.join(missing)}; the header is "
            f"{','.join(map(printable, header))!r}, needed is path,label[,split][,patient] "
            "separated by commas"
        )
    if not lines:
        raise DataError(f"{where}: no rows")
    problems: list[str] = []
    rows: list[dict[str, str]] = []
    seen: dict[str, int] = {}
    for line, cells in lines:
        # DictReader's marks for too many and too few cells
        if None in cells or None in cells.values():
            problems.append(f"line {line}: not {len(header)} cells")
            continue
        row = {name: cells[name].strip() for name in _COLUMNS if name in header}
        path = PurePosixPath(cells["path"])
        rows.append({"path": path.as_posix(), **row})
        for problem in _row_problems(cells["path"], row, seen):
            problems.append(f"line {line}: {problem}")
        seen.setdefault(path.as_posix(), line)
    if problems:
        raise DataError(f"{where}: {len(problems)} problems\n" + "\n".join(first_lines(problems)))
    extra = [printable(name) for name in header if name not in ("path", *_COLUMNS)]
    if extra and notes is not None:
        notes.append(f"columns of {where} not used: {', '.join(extra)}")
    return rows


def _row_problems(cell: str, row: Mapping[str, str], seen: Mapping[str, int]) -> Iterator[str]:
    path = PurePosixPath(cell)
    name = printable(cell)
    if not cell.strip():
        yield "empty path"
    elif path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:[\\/]", cell):
        yield f"path {name} leaves the data folder; only relative paths without .. are read"
    elif path.as_posix() in seen:
        yield f"path {name} was already in line {seen[path.as_posix()]}"
    if not row["label"]:
        yield "empty label"
    for column in ("label", "patient"):
        if not is_utf8(row.get(column, "")):
            yield f"{column} {printable(row[column])} is not UTF-8; save the table as UTF-8"
    if row.get("split", "train") not in SPLIT_NAMES:
        yield f"split {printable(row['split'])!r} is not one of {', '.join(SPLIT_NAMES)}"


def is_utf8(text: str) -> bool:
    """False if a name has bytes that are not UTF-8."""
    return not any("\udc80" <= c <= "\udcff" for c in text)


def find_file(known: Callable[[str], bool], path: str) -> str:
    """`path`, or the form of it that is `known`: with / for the \\ of Windows, or with accents as
    one character (NFC) or two (NFD), which macOS and zip tools exchange.
    """
    if known(path):
        return path
    slashes = PurePosixPath(path.replace("\\", "/")).as_posix()
    forms = [normalize(form, slashes) for form in ("NFC", "NFD")]
    return next((form for form in (slashes, *forms) if known(form)), path)


def first_lines(lines: list[str]) -> list[str]:
    """The first lines, indented, and how many more there are."""
    more = [f"    and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return [f"    {line}" for line in lines[:_LISTED]] + more


def refuse_bad_files(kind: str, bad: list[str], total: int, limit: float, hint: str = "") -> None:
    """Raises DataError if all or more than the fraction `limit` of `total` files are in `bad`."""
    if not bad or (len(bad) <= limit * total and len(bad) < total):
        return
    share = len(bad) / total
    listed = "\n".join(first_lines(bad))
    advice = "Repair or remove them"
    if len(bad) < total:
        needed = math.ceil(1000 * share) / 1000
        advice += f", or raise the limit: --max-bad-fraction (data.max_bad_fraction) {needed:g}"
    raise DataError(
        f"{len(bad)} of {total} {kind} are unusable ({share:.1%}); the limit is {limit:.1%}:\n"
        f"{listed}\n{advice}.{hint}"
    )


def write_manifest(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows with equal keys as CSV that `read_manifest` reads back, atomically."""
    text = io.StringIO()
    # Python before 3.13 leaves a lone carriage return unquoted, and reads it as the end of a line
    odd = any("\r" in row["path"] for row in rows)
    writer = csv.DictWriter(
        text,
        list(rows[0]),
        lineterminator="\n",
        quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL,
    )
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_bytes(path, text.getvalue().encode("utf-8", _BYTES))


# ---- folders ----


# folders that storage systems and archives add
_HELPERS = {
    *("@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin"),
    *("system volume information", "lost+found", "__pycache__"),
}


def is_helper(name: str) -> bool:
    """True for a hidden file or folder and for folders that storage systems add."""
    return name.startswith(".") or name.lower() in _HELPERS


def walk_files(root: Path) -> Iterator[Path]:
    """Every file below `root`, sorted within its folder, without helpers and linked folders.

    Raises DataError if a folder cannot be listed: its files would be missing without a message.
    """

    def refuse(error: OSError) -> None:
        where = printable(str(error.filename))
        raise DataError(f"{where}: folder cannot be read ({error.strerror})") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not is_helper(name))
        yield from (Path(folder, name) for name in sorted(names) if not is_helper(name))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, renamed to it at the end; on any error it is removed.

    Raises DataError if `target` exists and is not an empty folder, or if it cannot be written.
    """
    name = printable(str(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{name} exists and is not empty; name another folder or delete it")
    absolute = target.absolute()
    unfinished = None
    try:
        absolute.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=absolute.parent, prefix=f".{absolute.name}."))
        yield unfinished
        # mkdtemp makes the folder private
        unfinished.chmod(0o755)
        os.replace(unfinished, absolute)
    except OSError as error:
        free_gib = shutil.disk_usage(existing_folder(target)).free / 2**30
        raise DataError(
            f"cannot write {name}: {error.strerror or error} ({free_gib:.2f} GiB free); nothing "
            "was kept. Free some space, check the permissions, or name another folder."
        ) from None
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
