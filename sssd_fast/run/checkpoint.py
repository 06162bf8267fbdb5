"""Checkpoints that survive a kill, a full disk and a flipped bit, and load without running anybody's code.

A checkpoint is one torch file of tensors and plain containers, with a sidecar `<name>.sha256` that `sha256sum -c` can
read:

    # size=1234567 step=500
    <sha256 of the file>  step-0000500.pt

Why the order of writes in `_publish` is safe. Two files cannot be renamed in one atomic act, so the sidecar may list
more than one accepted content: (1) the new content is written to a temporary file and synced; (2) the sidecar is
replaced by one that accepts the content now in place AND the new one; (3) the file is replaced; (4) the sidecar is
reduced to the new content. A crash between any two steps leaves a complete file that its sidecar accepts, old or new;
a torn file is accepted by no sidecar, because every line in it was computed from bytes on their way to the disk,
never from what was found there.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from sssd_fast.errors import CheckpointError, ConfigError
from sssd_fast.run.files import (
    _cannot_write,
    _lock,
    _replace,
    _sync,
    _sync_folder,
    _temporary,
    remove_leftovers,
)

_STEP_NAME = re.compile(r"step-(\d+)\.pt")
_SIDECAR_LINE = re.compile(r"([0-9a-f]{64})[ *]+\S.*")
_PLAIN_TYPES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class CheckpointInfo:
    """What the sidecar says about one checkpoint file. `size` in bytes; None where it does not say."""

    path: Path
    sha256: str
    size: int | None = None
    step: int | None = None


# ---- atomic files ----


# ---- one checkpoint ----


class _HashingFile:
    """Passes torch.save's sequential writes through a checksum: a later read compares the disk with what was meant."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:  # torch's writer replaces it by a RuntimeError about positions
            self.error = self.error or error
            raise
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(
    path: str | Path, state: dict[str, Any], *, step: int | None = None
) -> CheckpointInfo:
    """Writes `state` to `path` atomically and durably, with its sidecar. A kill at any moment leaves the old file or
    the new one.

    state: dicts, lists, tuples and sets of tensors, numbers, strings, None, torch dtypes and devices: what
    `load_checkpoint` accepts. The step is a note for the sidecar. Raises CheckpointError naming the entry
    for anything else in the state (before writing), and naming the path and the free space when the disk refuses (the
    previous file is then intact).
    """
    path = Path(path)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"cannot save {path}: the state is a {type(state).__name__}, a dict is needed"
        )
    _require_plain(state, "state", path)
    try:
        with _temporary(path) as (temporary, file):
            hashing = _HashingFile(file)
            try:
                torch.save(state, cast(BinaryIO, hashing))
            except RuntimeError as error:
                raise (hashing.error or error) from error
            _sync(file)
            info = CheckpointInfo(path, hashing.sha256.hexdigest(), hashing.size, step)
            _publish(temporary, info)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(_cannot_write(path, error)) from error
    return info


def _publish(temporary: Path, info: CheckpointInfo) -> None:
    """Puts a complete, synced temporary file and its sidecar in place; the module's docstring explains the order."""
    path = info.path
    accepted = _read_sidecar(path) if path.exists() else []
    _write_sidecar(path, [*accepted, info])
    os.replace(temporary, path)
    _sync_folder(path.parent)
    _write_sidecar(path, [info])


def _require_plain(value: Any, where: str, path: Path) -> None:
    kind = type(value)  # exact types: numpy.float64 is a float, and would be refused when loading
    if kind in (torch.Tensor, torch.nn.Parameter) or kind in _PLAIN_TYPES:
        return
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            _require_plain(key, f"a key of {where}", path)
            _require_plain(item, f"{where}[{key!r}]", path)
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]", path)
    else:
        raise CheckpointError(
            f"cannot save {path}: {where} is a {kind.__module__}.{kind.__qualname__}; checkpoints hold "
            "tensors and plain containers only. Convert it first: str(path), dataclasses.asdict(config), value.item(), "
            "torch.from_numpy(array)."
        )


def verify_checkpoint(path: str | Path) -> CheckpointInfo:
    """Reads the whole file, compares it with its sidecar. Raises CheckpointError if it is missing or damaged."""
    file, info = _open_verified(Path(path))
    file.close()
    return info


def load_checkpoint(
    path: str | Path, *, map_location: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The state saved by `save_checkpoint`, after its size and checksum were verified; always weights_only.

    Raises CheckpointError for a file that is missing, truncated or altered, or that holds classes (which could run
    code).
    """
    path = Path(path)
    file, _ = _open_verified(path)
    with file:
        try:
            state = torch.load(file, map_location=map_location, weights_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except pickle.UnpicklingError as error:
            found = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)", str(error))
            what = f"holds {found[1]}" if found else "is not a plain torch file"
            raise CheckpointError(
                f"{path} {what}: refused, because loading anything but tensors and plain containers can run code. "
                "Save it again as a state dict of tensors."
            ) from error
        except Exception as error:  # the bytes are as written: it was never a checkpoint, or does not fit map_location
            raise CheckpointError(f"cannot load {path}: {type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, a dict is needed: not a checkpoint of this program"
        )
    return state


def _open_verified(path: Path) -> tuple[BinaryIO, CheckpointInfo]:
    """The file, open at its start, and its sidecar entry; looks again if a running training just replaced it."""
    attempts = 3
    while True:
        try:
            file = open(path, "rb")  # noqa: SIM115 - handed to the caller
        except OSError as error:
            others = (
                ", ".join(sorted(other.name for other in path.parent.glob("*.pt")))
                or "no checkpoints"
            )
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}. {path.parent} holds {others}."
            ) from error
        try:
            info = _match(file, path)
            file.seek(0)
            return file, info
        except CheckpointError:
            with file:
                replaced = path.exists() and os.stat(path).st_ino != os.fstat(file.fileno()).st_ino
            attempts -= 1
            if attempts == 0 or not replaced:
                raise


def _match(file: BinaryIO, path: Path) -> CheckpointInfo:
    accepted = _read_sidecar(path)
    if not accepted:
        raise CheckpointError(
            f"{path} cannot be verified: {_sidecar(path).name} is missing or unreadable. Copy it along "
            f"with the checkpoint; or, if you trust the file, run in its folder: "
            f"sha256sum {path.name} > {_sidecar(path).name}"
        )
    size = os.fstat(file.fileno()).st_size
    sizes = [info.size for info in accepted]
    if None not in sizes and size not in sizes:
        raise CheckpointError(
            f"{path} is damaged: {size} bytes, {sizes[-1]} were written. Use another checkpoint and delete it."
        )
    sha256 = hashlib.sha256()
    try:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}. Use another checkpoint."
        ) from error
    for info in accepted:
        if info.sha256 == sha256.hexdigest():
            return replace(info, size=size)
    raise CheckpointError(
        f"{path} is damaged: its content changed after it was written (checksum {sha256.hexdigest()[:12]}..., "
        f"{accepted[-1].sha256[:12]}... was written). Use another checkpoint and delete it."
    )


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write_sidecar(path: Path, infos: list[CheckpointInfo]) -> None:
    lines = []
    for info in infos:
        notes = {"size": info.size, "step": info.step}
        lines.append(
            "# " + " ".join(f"{key}={value}" for key, value in notes.items() if value is not None)
        )
        lines.append(f"{info.sha256}  {path.name}")
    _replace(_sidecar(path), ("\n".join(lines) + "\n").encode())


def _read_sidecar(path: Path) -> list[CheckpointInfo]:
    """The accepted contents; empty without a readable sidecar. Lines made by `sha256sum` alone are accepted too."""
    try:
        lines = _sidecar(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    infos: list[CheckpointInfo] = []
    notes: dict[str, int] = {}
    for line in lines:
        if line.startswith("#"):
            notes = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)\b", line)}
        elif found := _SIDECAR_LINE.fullmatch(line):
            infos.append(CheckpointInfo(path, found[1], notes.get("size"), notes.get("step")))
            notes = {}
    return infos


# ---- a folder of checkpoints ----


class CheckpointManager:
    """`step-0000500.pt` files of one run, and `best.pt`. One writer (rank 0); readers may look at any time.

    keep_last: how many of the newest stay (>= 1).
    report: where one-line notes go (a damaged file passed over, a deletion that failed).
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        *,
        report: Callable[[str], None] = print,
    ) -> None:
        if keep_last < 1:
            raise ConfigError(
                f"keep_last is {keep_last}, at least 1 is needed: resuming starts from the newest checkpoint"
            )
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.report = report
        self.best_path = self.folder / "best.pt"
        self._resumed = False
        remove_leftovers(self.folder)

    def steps(self) -> list[int]:
        """Steps on disk, ascending by number (a string sort would put step 10000000 before 9999999)."""
        names = (_STEP_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.pt"))
        return sorted({int(name[1]) for name in names if name})

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}.pt"

    def save(self, state: dict[str, Any], step: int, *, best: bool = False) -> CheckpointInfo:
        """Saves, reads back and verifies, makes it best.pt too if `best`, and only then deletes old files.

        Raises CheckpointError, having deleted nothing.
        """
        info = save_checkpoint(self.path(step), state, step=step)
        verify_checkpoint(info.path)
        if best:
            self._link_best(info)
        self._delete_old(step)
        return info

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies; damaged ones are reported by name and passed over, best.pt comes last.

        None if the folder holds no checkpoint. Raises CheckpointError if it holds some and none is intact: starting
        again from nothing must be the user's decision.
        """
        self._resumed = True
        candidates = [self.path(step) for step in reversed(self.steps())] + [
            self.best_path
        ] * self.best_path.exists()
        for path in candidates:
            try:
                return verify_checkpoint(path).path
            except CheckpointError as error:
                self.report(f"passing over {path.name}: {error}")
        if candidates:
            names = ", ".join(path.name for path in candidates)
            raise CheckpointError(
                f"no checkpoint in {self.folder} is intact ({names}); restore one, or start a new run"
            )
        return None

    def resolve(self, which: str | int) -> Path:
        """The path of "last", "best" or a step's checkpoint. Raises CheckpointError naming what there is."""
        path = self.latest() if which == "last" else None
        if which == "best":
            path = self.best_path
        elif str(which).isdigit():
            path = self.path(int(which))
        if path is None or not path.exists():
            there = (
                ", ".join(["best"] * self.best_path.exists() + [str(step) for step in self.steps()])
                or "nothing"
            )
            raise CheckpointError(
                f"no checkpoint {which!r} in {self.folder}, which holds {there}; give last, best or a step"
            )
        return path

    def _link_best(self, info: CheckpointInfo) -> None:
        best = replace(info, path=self.best_path)
        temporary = self.folder / f".best.pt.{secrets.token_hex(6)}.tmp"
        try:
            with open(info.path, "rb") as source:
                _lock(
                    source
                )  # the link shares the lock: another process's clean-up leaves it alone
                try:
                    os.link(info.path, temporary)
                except OSError:  # a file system without hard links
                    with _temporary(self.best_path) as (copied, file):
                        shutil.copyfileobj(source, file, _CHUNK_BYTES)
                        _sync(file)
                        _publish(copied, best)
                else:
                    _publish(temporary, best)
        except OSError as error:
            raise CheckpointError(_cannot_write(self.best_path, error)) from error
        finally:
            temporary.unlink(
                missing_ok=True
            )  # renaming one hard link onto another of the same file leaves both

    def _delete_old(self, newest: int) -> None:
        """Deletes what the policy no longer keeps.

        Steps beyond the one just saved belong to a future that resuming earlier has abandoned. They go too, but only
        if this manager was asked where to resume: otherwise a mistaken call could delete another run's checkpoints.
        """
        past = [step for step in self.steps() if step <= newest]
        beyond = [step for step in self.steps() if step > newest]
        doomed = past[: -self.keep_last]
        if beyond and not self._resumed:
            self.report(
                f"left alone: steps {beyond} in {self.folder}, newer than step {newest}, are of an earlier run"
            )
        for step in doomed + (beyond if self._resumed else []):
            try:
                self.path(step).unlink()
                _sidecar(self.path(step)).unlink(missing_ok=True)
            except OSError as error:
                self.report(
                    f"could not delete {self.path(step)}: {error.strerror}; trying again at the next checkpoint"
                )
