"""Results of earlier checks, so that a run does not decode a large data set only to check it again.

A file counts as unchanged if its size and modification time are; its content is compared with the
index again when a loader reads it. `sssd-fast data check` always decodes. A file changed within the
last seconds before a check is not stored: another change could leave its time as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sssd_fast.errors import SssdError
from sssd_fast.run.files import atomic_write_bytes

_VERSION = 1  # raise it when images.py decodes by other rules
_SETTLED_S = 2.0


class Facts(NamedTuple):
    """Of one good image file; the names are those of ImageRecord and images.Decoded."""

    sha256: str
    pixel_hash: str
    height: int
    width: int
    mode: str
    format: str
    plain: bool


class IndexCache:
    """Facts of the files under one data folder, stored in `folder`; None stores nothing."""

    def __init__(self, folder: Path | None, root: Path) -> None:
        self._now = time.time()
        self._changed = False
        self._files: dict[str, object] = {}
        name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32]
        self._path = folder / f"{name}.checked.json" if folder else None
        # an absent or damaged file means that every image is decoded
        with suppress(OSError, ValueError, KeyError, TypeError):
            body = json.loads(self._path.read_text(encoding="utf-8")) if self._path else {}
            if body["version"] == _VERSION:
                self._files = dict(body["files"])

    def get_or_compute(self, name: str, file: Path, compute: Callable[[str, Path], Facts]) -> Facts:
        """The stored facts if `file` is unchanged, else compute(name, file)."""
        try:
            status = file.stat()
        except OSError:
            return compute(name, file)  # its error names the problem
        key = [status.st_size, status.st_mtime_ns]
        entry = self._files.get(name)
        if isinstance(entry, list) and entry[:2] == key and len(entry) == 2 + len(Facts._fields):
            return Facts(*entry[2:])
        facts = compute(name, file)
        if self._now - status.st_mtime > _SETTLED_S:
            self._files[name] = [*key, *facts]
            self._changed = True
        return facts

    def save(self) -> None:
        """Does nothing if the folder cannot be written."""
        if self._path is None or not self._changed:
            return
        text = json.dumps({"version": _VERSION, "files": self._files})
        with suppress(OSError, SssdError):
            atomic_write_bytes(self._path, text.encode("utf-8", "surrogateescape"))
