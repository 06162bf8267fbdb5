"""What earlier checks found out about files, so that a run does not decode a large data set only to check it again.

A file counts as the same when size and modification time are; its content is compared with the index once more when a
loader reads it. `sssd-fast data check` itself always decodes. A file changed within the last seconds before a check is not
remembered: a second change could leave its time as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from sssd_fast.run.files import atomic_write_bytes

_VERSION = 1  # to be raised when images.py decodes by other rules
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
    """The facts of the files under one data folder, kept in `folder`; None remembers nothing."""

    def __init__(self, folder: Path | None, root: Path) -> None:
        self._now = time.time()
        self._new = dict[str, list[object]]()
        self._old: dict[str, object] = {}
        self._path: Path | None = None
        if folder is None:
            return
        name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32]
        self._path = folder / f"{name}.checked.json"
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            if body["version"] == _VERSION and isinstance(body["files"], dict):
                self._old = body["files"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent or damaged: every file is decoded, as the first time

    def get(self, path: str, status: os.stat_result) -> Facts | None:
        entry = self._old.get(path)
        if not isinstance(entry, list) or len(entry) != 2 + len(Facts._fields):
            return None
        if entry[:2] != [status.st_size, status.st_mtime_ns]:
            return None
        return Facts(*entry[2:])

    def put(self, path: str, status: os.stat_result, facts: Facts) -> None:
        if self._now - status.st_mtime > _SETTLED_S:
            self._new[path] = [status.st_size, status.st_mtime_ns, *facts]

    def save(self) -> None:
        """Where the folder cannot be written, nothing is remembered."""
        files = {**self._old, **self._new}  # another manifest of the same folder knows others
        if self._path is None or files == self._old:
            return
        text = json.dumps({"version": _VERSION, "files": files})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(self._path, text.encode("utf-8", "surrogateescape"))
        except OSError:
            return
