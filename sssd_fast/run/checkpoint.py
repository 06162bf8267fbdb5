"""Checkpoints: `step-0000500.pt` with a SHA-256 sidecar; the text file `best` names one of them.

A checkpoint is one torch file of tensors and plain containers: loading it never runs code from it.
`sha256sum -c` reads the sidecar. The checksum is needed because torch.load does not notice a
flipped bit in a weight.

A published file is never overwritten. The temporary file is synced, the sidecar is written, the
file is renamed: a crash between any two steps leaves no new checkpoint, or a complete one with its
sidecar.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch

from sssd_fast.errors import CheckpointError, ConfigError
from sssd_fast.run.files import (
    atomic_write_text,
    cannot_write,
    remove_leftovers,
    replace_file,
    sync_file,
    temporary_file,
)

_STEP_NAME = re.compile(r"step-(\d+)(?:-(\d+))?\.pt")


class _HashingFile:
    """Hashes what torch.save writes, so that a later read compares the disk with what was meant."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            # torch's writer replaces it by a RuntimeError about positions
            self.error = self.error or error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> Path:
    """Writes `state` to the new file `path` atomically and durably, with its sidecar.

    Raises CheckpointError if `path` exists, if `load_checkpoint` would not accept the state (only
    tensors, plain containers, numbers, strings, None, torch dtypes and devices), or if the disk
    fails (naming the free space); nothing is published then.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"cannot save {path}: it exists, and checkpoints are not overwritten")
    try:
        with temporary_file(path) as (temporary, file):
            hashing = _HashingFile(file)
            try:
                torch.save(state, cast(BinaryIO, hashing))
            except RuntimeError as error:
                raise (hashing.error or error) from error
            sync_file(file)
            # memory-mapped: reads the structure, not the tensors
            _load(str(temporary), path, mmap=True)
            replace_file(_sidecar(path), f"{hashing.sha256.hexdigest()}  {path.name}\n".encode())
            os.replace(temporary, path)
            sync_file(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(cannot_write(path, error)) from error
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
    """Compares the file with its sidecar. Raises CheckpointError if it is missing or damaged."""
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
            "can run code. Save a state dict of tensors; convert other values first, such as "
            "str(path), value.item(), torch.from_numpy(array)."
        ) from error
    except Exception as error:
        # the bytes are as written: not a checkpoint, or not loadable on map_location
        raise CheckpointError(f"cannot load {path}: {type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, a dict is needed")
    return state


def _open_verified(path: Path) -> BinaryIO:
    """The file, open at its start; it stays readable if training deletes it."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.pt"))) or "no checkpoints"
        problem = f"cannot read {path}: {error.strerror}"
        raise CheckpointError(f"{problem}. {path.parent} holds {others}.") from error
    try:
        _verify(file, path)
    except OSError as error:
        file.close()
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    except BaseException:
        file.close()
        raise
    return file


def _verify(file: BinaryIO, path: Path) -> None:
    sidecar = _sidecar(path)
    text = sidecar.read_bytes().decode("utf-8", "replace") if sidecar.is_file() else ""
    # sidecars of earlier releases hold two checksums if a crash came while a file was replaced
    accepted = re.findall(r"^([0-9a-f]{64})[ *]+\S", text, re.MULTILINE)
    if not accepted:
        raise CheckpointError(
            f"{path} cannot be verified: {sidecar.name} is missing or unreadable. Copy it along "
            f"with the checkpoint; or, if you trust the file, run in its folder: "
            f"sha256sum {path.name} > {sidecar.name}"
        )
    sha256 = hashlib.sha256()
    while chunk := file.read(1 << 22):
        sha256.update(chunk)
    if sha256.hexdigest() not in accepted:
        raise CheckpointError(
            f"{path} is damaged: its content changed after it was written ({file.tell()} bytes, "
            f"checksum {sha256.hexdigest()[:12]}..., {accepted[-1][:12]}... was written). "
            "Use another checkpoint and delete it."
        )
    file.seek(0)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


class CheckpointManager:
    """The checkpoints of one run. One process writes (rank 0); others may read at any time.

    Args:
        keep_last: number of newest steps to keep (>= 1), in addition to the one that `best` names.
        log: receives one-line notes (a damaged file that is skipped, a deletion that failed).
    """

    def __init__(
        self, folder: str | Path, keep_last: int = 2, *, log: Callable[[str], None] = print
    ) -> None:
        if keep_last < 1:
            raise ConfigError(f"keep_last is {keep_last}, at least 1 is needed to resume a run")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.log = log
        self._resumed = False
        remove_leftovers(self.folder)

    def _files(self) -> list[tuple[int, int, Path]]:
        """(step, revision, path), ascending by number (by name, 10000000 is before 9999999)."""
        found = ((_STEP_NAME.fullmatch(p.name), p) for p in self.folder.glob("step-*.pt"))
        return sorted((int(name[1]), int(name[2] or 1), path) for name, path in found if name)

    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return sorted({step for step, _, _ in self._files()})

    def path(self, step: int) -> Path:
        """The newest file of `step`, or the name that its first file gets."""
        found = [path for at, _, path in self._files() if at == step]
        return found[-1] if found else self.folder / f"step-{step:07d}.pt"

    def best(self) -> Path | None:
        """The checkpoint with the best validation metric, if any."""
        try:
            return self.folder / (self.folder / "best").read_text("utf-8").strip()
        except OSError:
            # runs of earlier releases hold a copy, not a pointer
            old = self.folder / "best.pt"
            return old if old.exists() else None

    def save(self, state: dict[str, Any], step: int, *, best: bool = False) -> Path:
        """Saves, verifies, points `best` to the file if requested, and only then deletes old files.

        A step that is saved again (at the end of an epoch, after a save by steps) gets the name
        step-N-2.pt. Raises CheckpointError, having deleted nothing.
        """
        path = self.path(step)
        if path.exists():
            revision = max(number for at, number, _ in self._files() if at == step)
            path = self.folder / f"step-{step:07d}-{revision + 1}.pt"
        verify_checkpoint(save_checkpoint(path, state))
        if best:
            atomic_write_text(self.folder / "best", path.name + "\n")
        self._delete_old(step)
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies; damaged ones are reported and skipped.

        None if the folder holds no checkpoint. Raises CheckpointError if it holds some and none is
        intact: whether to start again is for the user to decide.
        """
        self._resumed = True
        best = self.best()
        candidates = [path for _, _, path in reversed(self._files())]
        candidates += [best] if best is not None and best not in candidates else []
        for path in candidates:
            try:
                return verify_checkpoint(path)
            except CheckpointError as error:
                self.log(f"skipping {path.name}: {error}")
        if candidates:
            names = ", ".join(path.name for path in candidates)
            raise CheckpointError(
                f"no checkpoint in {self.folder} is intact ({names}); restore one or start again"
            )
        return None

    def _delete_old(self, newest: int) -> None:
        """Deletes what is no longer kept; never the file that `best` names.

        Steps beyond the one just saved were abandoned by resuming from an earlier one. They are
        deleted too, but only by a manager that has called `latest`: a wrong call must not delete
        another run's checkpoints.
        """
        files = self._files()
        beyond = [step for step, _, _ in files if step > newest]
        past = [step for step in self.steps() if step <= newest]
        kept = {self.path(step) for step in past[-self.keep_last :]} | {self.best()}
        if beyond and not self._resumed:
            self.log(f"steps {beyond} in {self.folder} are of an earlier run and were not deleted")
            kept |= {path for step, _, path in files if step > newest}
        old_best = [self.folder / "best.pt"] * (self.folder / "best.pt").exists()
        for path in [*(path for _, _, path in files), *old_best]:
            if path not in kept:
                try:
                    path.unlink()
                    _sidecar(path).unlink(missing_ok=True)
                except OSError as error:
                    self.log(f"could not delete {path}: {error.strerror}; next save tries again")


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
    if path.is_file() and path.name != "best":
        return path
    if path.is_file():
        which = "best"
    run = path.parent.parent if path.is_file() else path
    for folder in (run, *(run / stage for stage in stages)):
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
