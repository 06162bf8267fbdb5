"""Weight files of this and other projects, read without running code from them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from sssd_fast.config import ModelConfig
from sssd_fast.errors import WeightsError
from sssd_fast.run.checkpoint import find_checkpoint, verify_checkpoint
from sssd_fast.weights.formats import strip_wrappers

# (mean, std) of x / 255, one value or one per channel
Norm = tuple[Sequence[float], Sequence[float]]
Read = tuple[dict[str, Tensor], dict[str, Any]]
# names under which training programs save a state dict; teacher: DINO and iBOT, which evaluate it
WRAPPERS = ("model", "state_dict", "module", "teacher", "target_encoder")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = r"-\d{5}-of-(\d{5})\.(?:safetensors|bin)$"  # Hugging Face's names of several files
_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")
_ACCEPTED = f"{', '.join(_ENDINGS)} or .safetensors file, or a Hugging Face folder"
# what torch.load and safetensors raise for damaged files
_DAMAGED = (EOFError, ValueError, TypeError, AttributeError, AssertionError, struct.error)
_UNREADABLE = (*_DAMAGED, RuntimeError, LookupError, OSError)


class Source(NamedTuple):
    """A state dict, and what the file says about its model (None = nothing)."""

    state: dict[str, Tensor]
    path: str
    grid: tuple[int, int] | None = None
    heads: int | None = None
    decoder_heads: int | None = None
    norm: Norm | None = None
    notes: tuple[str, ...] = ()


def read_source(path: str | Path | Mapping[str, Tensor]) -> Source:
    """The tensors of a weight file, a Hugging Face folder or a run folder, on the CPU.

    Torch files are read with weights_only=True; the only class that is accepted is
    argparse.Namespace, plain data that facebookresearch/mae saves with the weights. Unwraps the
    WRAPPERS and removes `module.` and `_orig_mod.`. Raises WeightsError if anything is missing,
    damaged, without tensors, not finite, or would have to run code; CheckpointError if a checksum
    does not fit.
    """
    if isinstance(path, Mapping):
        return Source(strip_wrappers(path), "the state dict")
    path = Path(path)
    stages = ("pretrain", "finetune")
    if path.name == "best" or any((path / s / "checkpoints").is_dir() for s in ("", *stages)):
        path = find_checkpoint(path, "last", stages=stages)
    if path.is_dir():
        tensors, facts = _read_folder(path)
    elif not path.is_file():
        raise WeightsError(f"weights {path} do not exist; give a {_ACCEPTED}")
    elif re.search(_SHARD, path.name):
        raise WeightsError(f"weights {path} are one file of several; give the folder {path.parent}")
    else:
        tensors, facts = _read_file(path)
    broken = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise WeightsError(
            f"weights {path} hold NaN or infinity in {listed(broken)}; use an earlier checkpoint"
        )
    return Source(strip_wrappers(tensors), str(path), **facts)


def _read_file(path: Path) -> Read:
    if path.suffix not in (*_ENDINGS, ".safetensors"):
        raise WeightsError(f"weights {path} end in {path.suffix!r}; needs a {_ACCEPTED}")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a pointer of Git LFS; run in its repository: git lfs pull")
    # more than "<": the length in front of a safetensors file can begin with it
    if re.match(rb"(?i)\s*<(!doctype|html|head|\?xml)", head):
        raise WeightsError(f"{path} is an HTML page, not weights; download the file itself")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_torch(path: Path) -> Read:
    # a checkpoint of this package
    if path.with_name(path.name + ".sha256").is_file():
        verify_checkpoint(path)
    if _is_torchscript(path):
        raise WeightsError(
            f"weights {path} are a TorchScript program; save its state dict: torch.save("
            f"torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refused(path, str(error))) from error
    except _UNREADABLE as error:
        raise WeightsError(_damaged(path, error)) from error
    config = content.get("config") if isinstance(content, Mapping) else None
    notes: list[str] = []
    while isinstance(content, Mapping) and not any(isinstance(v, Tensor) for v in content.values()):
        wrapper = next((key for key in WRAPPERS if key in content), None)
        others = [str(k) for k, v in content.items() if k != wrapper and _is_state(v)]
        notes += [f"{wrapper!r} of the file is used, not {listed(others)}"] if others else []
        content = content[wrapper] if wrapper else listed([*map(str, content)])
    if not isinstance(content, Mapping):
        what = content if isinstance(content, str) else f"a {type(content).__name__}"
        raise WeightsError(
            f"weights {path} hold {what}, needs a state dict (name -> tensor), or one under "
            + ", ".join(map(repr, WRAPPERS))
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    facts = _own_facts(config.get("model")) if isinstance(config, dict) else {}
    return tensors, facts | {"notes": tuple(notes)}


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _is_state(value: Any) -> bool:
    """True for a state dict, False for the state of an optimizer and others."""
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _refused(path: Path, message: str) -> str:
    """Replaces torch's message, which first advises to load the file without protection."""
    found = re.search(r"GLOBAL (\S+)", message)
    if not found:
        return _damaged(path, message.rpartition("WeightsUnpickler error:")[2])
    return (
        f"weights {path} hold {found[1]}, which cannot be read without running code from the file: "
        "refused. Weights need no code: in the project that wrote it, save the state dict alone, "
        "torch.save(model.state_dict(), 'weights.pth')"
    )


def _read_safetensors(path: Path) -> Read:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata.get("config", "null"))
    except (safetensors.SafetensorError, *_UNREADABLE) as error:
        raise WeightsError(_damaged(path, error)) from error
    return tensors, _own_facts(config)


def _read_folder(folder: Path) -> Read:
    whole = next((folder / name for name in _WHOLE if (folder / name).is_file()), None)
    files = _shards(folder) if whole is None else [whole]
    if not files:
        needed = "model.safetensors, pytorch_model.bin or checkpoints/"
        raise WeightsError(f"folder {folder} holds no {needed}")
    parts = [_read_file(path) for path in files]
    tensors = {name: tensor for part, _ in parts for name, tensor in part.items()}
    facts = parts[0][1]
    config = folder / "config.json"
    if config.is_file():
        try:
            facts |= _huggingface_facts(json.loads(config.read_text(encoding="utf-8")))
        except (ValueError, OSError, AttributeError) as error:
            raise WeightsError(_damaged(config, error)) from error
    return tensors, facts


def _shards(folder: Path) -> list[Path]:
    """The files of weights that are saved in several; [] if there are none."""
    for suffix in ("safetensors", "bin"):
        files = sorted(folder.glob(f"*-of-*.{suffix}"))
        match = re.search(_SHARD, files[0].name) if files else None
        if match is not None:
            if len(files) != int(match[1]):
                found = f"{len(files)} of the {int(match[1])} files of its weights"
                raise WeightsError(f"folder {folder} holds {found}")
            return files
    return []


def _own_facts(tree: Any) -> dict[str, Any]:
    """From a ModelConfig as plain containers; nothing from a config of another project."""
    try:
        config = ModelConfig.model_validate(tree)
    except ValueError:
        return {}
    return {
        "grid": config.grid,
        "heads": config.encoder_shape[2],
        "decoder_heads": config.decoder_heads,
        "norm": (config.mean, config.std),
    }


def _huggingface_facts(tree: dict[str, Any]) -> dict[str, Any]:
    facts = {
        "heads": tree.get("num_attention_heads"),
        "decoder_heads": tree.get("decoder_num_attention_heads"),
    }
    size, patch = tree.get("image_size"), tree.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int) and patch > 0:
        facts["grid"] = (size // patch, size // patch)
    return facts


def listed(items: Sequence[str], limit: int = 8) -> str:
    """The first items, and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _damaged(path: Path, error: BaseException | str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path} is damaged or not what its name says: {reason}. Copy or download it again"
