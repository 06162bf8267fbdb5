"""Checkpoints: `step-0000500.pt` with a SHA-256 sidecar; the text file `best` names one of them.

A checkpoint is one torch file of tensors and plain containers: loading it never runs code from it.
`sha256sum -c` reads the sidecar. The checksum is needed because torch.load does not notice a
flipped bit in a weight.

A published file is never overwritten. The sidecar is written, the temporary file is synced and
renamed: a crash between any two steps leaves no new checkpoint, or a complete one with its sidecar.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from sssd_fast.errors import CheckpointError
from sssd_fast.run.files import atomic_file, atomic_write_text


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> Path:
    """Writes `state` to the new file `path` atomically and durably, with its sidecar.

    Raises SssdError, publishing nothing, if `path` exists, if `load_checkpoint` would not accept
    the state (only tensors, plain containers and values, torch dtypes), or if the disk fails.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"cannot save {path}: it exists, and checkpoints are not overwritten")
    with atomic_file(path) as file:
        torch.save(state, file)
        file.flush()
        # memory-mapped: reads the structure, not the tensors
        _load(file.name, path, mmap=True)
        with open(file.name, "rb") as written:
            atomic_write_text(_sidecar(path), f"{_sha256(written)}  {path.name}\n")
    return path


def load_checkpoint(
    path: str | Path, *, map_location: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The state saved by `save_checkpoint`, loaded with weights_only after checking its checksum.

    Raises CheckpointError if the file is missing or damaged, or holds classes, which can run code.
    """
    path = Path(path)
    with _open_verified(path) as file:
        return _load(file, path, map_location=map_location)


def verify_checkpoint(path: str | Path) -> Path:
    """Raises CheckpointError if the file is missing or does not fit its sidecar."""
    _open_verified(Path(path)).close()
    return Path(path)


def _load(file: BinaryIO | str, path: Path, **options: Any) -> dict[str, Any]:
    try:
        state = torch.load(file, weights_only=True, **{"map_location": "cpu", **options})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) (\S+)", str(error))
        what = f"holds {found[1]}" if found else "is not a plain torch file"
        raise CheckpointError(
            f"{path} {what}: rejected, because loading anything but tensors and plain containers "
            "can run code. Convert it first: str(path), value.item(), torch.from_numpy(array)."
        ) from error
    except Exception as error:
        # the bytes are as written: not a checkpoint, or not loadable on map_location
        raise CheckpointError(f"cannot load {path}: {type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, a dict is needed")
    return state


def _open_verified(path: Path) -> BinaryIO:
    """The file, open at its start; it stays readable if training deletes it."""
    sidecar = _sidecar(path)
    try:
        file = open(path, "rb")  # noqa: SIM115
        sha256 = _sha256(file)
        text = sidecar.read_bytes().decode("utf-8", "replace") if sidecar.exists() else ""
    except OSError as error:
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.pt"))) or "no checkpoints"
        problem = f"cannot read {path}: {error.strerror}"
        raise CheckpointError(f"{problem}. {path.parent} holds {others}.") from error
    written = re.match(r"([0-9a-f]{64})[ *]+\S", text)
    if written is not None and written[1] == sha256:
        return file
    file.close()
    if written is None:
        raise CheckpointError(
            f"{path} cannot be verified: {sidecar.name} is missing or unreadable. Copy it too; or, "
            f"if you trust the file, run in its folder: sha256sum {path.name} > {sidecar.name}"
        )
    raise CheckpointError(
        f"{path} is damaged: its content changed after it was written (checksum {sha256[:12]}..., "
        f"{written[1][:12]}... was written). Use another checkpoint and delete it."
    )


def _sha256(file: BinaryIO) -> str:
    """The checksum of an open file, which is then at its start again."""
    sha256 = hashlib.sha256()
    while chunk := file.read(1 << 22):
        sha256.update(chunk)
    file.seek(0)
    return sha256.hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _numbers(path: Path) -> list[int]:
    """step-0000500-2.pt -> [500, 2]"""
    return [int(number) for number in re.findall(r"\d+", path.name)]


class CheckpointManager:
    """The checkpoints of one run. One process writes (rank 0); others may read at any time.

    Args:
        keep_last: number of newest files to keep (>= 1), in addition to the one that `best` names.
        log: receives one-line notes (a damaged file that is skipped, a deletion that failed).
    """

    def __init__(
        self, folder: str | Path, keep_last: int = 2, *, log: Callable[[str], None] = print
    ) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.log = log

    def _files(self, step: str = "*") -> list[Path]:
        """Ascending by number (by name, 10000000 is before 9999999)."""
        return sorted(self.folder.glob(f"step-{step}.pt"), key=_numbers)

    def path(self, step: int) -> Path:
        """The newest file of `step`, or the name that its first file gets."""
        return (self._files(f"{step:07d}*") or [self.folder / f"step-{step:07d}.pt"])[-1]

    def best(self) -> Path | None:
        """The checkpoint with the best validation metric, if any."""
        try:
            return self.folder / (self.folder / "best").read_text("utf-8").strip()
        except OSError:
            return None

    def save(self, state: dict[str, Any], step: int, *, best: bool = False) -> Path:
        """Saves, points `best` to the file if requested, and only then deletes old files.

        A step that is saved again (at the end of an epoch, after a save by steps) gets the name
        step-N-2.pt. Raises SssdError, having deleted nothing.
        """
        for leftover in self.folder.glob(".step-*.tmp"):
            # of a killed process: this one holds the lock of the run folder
            leftover.unlink(missing_ok=True)
        path = self.path(step)
        if path.exists():
            _, revision = [*_numbers(path), 1][:2]
            path = self.folder / f"step-{step:07d}-{revision + 1}.pt"
        save_checkpoint(path, state)
        if best:
            atomic_write_text(self.folder / "best", path.name + "\n")
        # files of later steps stay: they are damaged, or of another run
        past = [file for file in self._files() if _numbers(file)[0] <= step]
        for old in past[: -self.keep_last]:
            if old != self.best():
                try:
                    old.unlink()
                    _sidecar(old).unlink(missing_ok=True)
                except OSError as error:
                    self.log(f"could not delete {old}: {error.strerror}; next save tries again")
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies; damaged ones are reported and skipped.

        None if the folder holds no checkpoint. Raises CheckpointError if none is intact: whether to
        start again is for the user to decide.
        """
        candidates = self._files()[::-1]
        for path in candidates:
            try:
                return verify_checkpoint(path)
            except CheckpointError as error:
                self.log(f"skipping {path.name}: {error}")
        if candidates:
            names = ", ".join(path.name for path in candidates)
            problem = f"no checkpoint in {self.folder} is intact ({names})"
            raise CheckpointError(f"{problem}; restore one or start again")
        return None


def find_checkpoint(
    path: str | Path,
    which: Literal["best", "last"] = "best",
    *,
    stages: Sequence[str] = ("finetune", "pretrain"),
) -> Path:
    """The checkpoint file that `path` names.

    Args:
        path: a checkpoint file, a run folder, the file checkpoints/best in it, or a folder of
            `sssd-fast run` (then the first of `stages` in it).
        which: "best" (the newest, if the run has no best) or "last" (the newest that is intact).

    Raises CheckpointError, listing the runs in `path` if it is a folder without checkpoints.
    """
    path = Path(path)
    if path.is_file():
        best = CheckpointManager(path.parent).best()
        return best if path.name == "best" and best is not None else path
    for folder in (path, *(path / stage for stage in stages)):
        if (folder / "checkpoints").is_dir():
            manager = CheckpointManager(folder / "checkpoints")
            found = (manager.best() if which == "best" else None) or manager.latest()
            if found is None:
                raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint")
            return found
    runs = sorted(str(found.parent) for found in path.glob("*/**/checkpoints"))
    raise CheckpointError(
        f"{path} is neither a checkpoint file nor a run folder with checkpoints/ in it"
        + (f"; it holds the runs {', '.join(runs[:8])}: give one of them" if runs else "")
    )
