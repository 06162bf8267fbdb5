"""Weight files of this and other projects, read without running code from them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
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


def read_source(path: str | Path | Mapping[str, Tensor]) -> Source:
    """The tensors of a weight file, a Hugging Face folder or a run folder, on the CPU.

    Torch files are read with weights_only=True; the only class that is accepted is
    argparse.Namespace, plain data that facebookresearch/mae saves with the weights. Unwraps
    {"model"}, {"state_dict"}, {"module"} and removes `module.` and `_orig_mod.`. Raises
    WeightsError if anything is missing, damaged, without tensors, not finite, or would have to run
    code; CheckpointError if a checksum does not fit.
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
    elif path.suffix == ".safetensors":
        tensors, facts = _read_safetensors(path)
    elif path.suffix in _ENDINGS:
        tensors, facts = _read_torch(path)
    else:
        raise WeightsError(f"weights {path} end in {path.suffix!r}; needs a {_ACCEPTED}")
    broken = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise WeightsError(
            f"weights {path} hold NaN or infinity in {listed(broken)}; use an earlier checkpoint"
        )
    return Source(strip_wrappers(tensors), str(path), **facts)


def _read_torch(path: Path) -> Read:
    # a checkpoint of this package
    if path.with_name(path.name + ".sha256").is_file():
        verify_checkpoint(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refused(path, str(error))) from error
    except _UNREADABLE as error:
        raise WeightsError(_damaged(path, error)) from error
    config = content.get("config") if isinstance(content, Mapping) else None
    while isinstance(content, Mapping) and not any(isinstance(v, Tensor) for v in content.values()):
        wrapper = next((key for key in ("model", "state_dict", "module") if key in content), None)
        content = content[wrapper] if wrapper else listed([*map(str, content)])
    if not isinstance(content, Mapping):
        what = content if isinstance(content, str) else f"a {type(content).__name__}"
        raise WeightsError(
            f"weights {path} hold {what}, needs a state dict (name -> tensor), or one under "
            "'model', 'state_dict' or 'module'"
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors, _own_facts(config.get("model")) if isinstance(config, dict) else {}


def _refused(path: Path, message: str) -> str:
    """Replaces torch's message, which first advises to load the file without protection."""
    found = re.search(r"GLOBAL (\S+)", message)
    if not found:
        return _damaged(path, message.rpartition("WeightsUnpickler error:")[2])
    return (
        f"weights {path} hold {found[1]}, which cannot be read without running code from the file: "
        "refused. Weights need no code: if you trust its origin, save its state dict alone"
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
    if (folder / "model.safetensors").is_file():
        tensors, facts = _read_safetensors(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        tensors, facts = _read_torch(folder / "pytorch_model.bin")
    else:
        needed = "model.safetensors, pytorch_model.bin or checkpoints/"
        raise WeightsError(f"folder {folder} holds no {needed}")
    config = folder / "config.json"
    if config.is_file():
        try:
            facts |= _huggingface_facts(json.loads(config.read_text(encoding="utf-8")))
        except (ValueError, OSError, AttributeError) as error:
            raise WeightsError(_damaged(config, error)) from error
    return tensors, facts


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
