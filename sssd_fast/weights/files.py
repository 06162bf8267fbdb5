"""Weight files of other projects, read without running code; safetensors written atomically."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sssd_fast.config import ModelConfig
from sssd_fast.errors import DependencyError, WeightsError
from sssd_fast.run.checkpoint import find_checkpoint, verify_checkpoint
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.weights.formats import Model, export_state, huggingface_config, strip_wrappers

# (mean, std) of x / 255, one value or one per channel
Norm = tuple[Sequence[float], Sequence[float]]
_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")
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
    norm_eps: float | None = None
    norm: Norm | None = None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file, a Hugging Face folder or a run folder, on the CPU.

    Files: .pth, .pt, .bin, .ckpt, .safetensors; folders may be sharded. Torch files are read with
    weights_only=True; the only class that is accepted is argparse.Namespace, plain data that
    facebookresearch/mae saves with the weights. Unwraps {"model"}, {"state_dict"}, {"module"} and
    removes `module.` and `_orig_mod.`. Raises WeightsError if anything is missing, damaged, without
    tensors, not finite, or would have to run code; CheckpointError if a checksum does not fit.
    """
    return read_source(path).state


def read_source(path: str | Path | Mapping[str, Tensor]) -> Source:
    """`read_weights`, with what a config in or beside the file says about the model."""
    if isinstance(path, Mapping):
        return Source(strip_wrappers(path), "the state dict")
    path = Path(path)
    stages = ("pretrain", "finetune")
    if path.name == "best" or any((path / s / "checkpoints").is_dir() for s in ("", *stages)):
        path = find_checkpoint(path, "last", stages=stages)
    if path.is_dir():
        tensors, facts = _read_folder(path)
    elif not path.is_file():
        raise WeightsError(f"weights {path} do not exist; give a {_accepted()}")
    elif path.suffix == ".safetensors":
        tensors, facts = _read_safetensors(path)
    elif path.suffix in _ENDINGS:
        tensors, facts = _read_torch(path)
    else:
        raise WeightsError(f"weights {path} end in {path.suffix!r}; needs a {_accepted()}")
    broken = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise WeightsError(
            f"weights {path} hold NaN or infinity in {listed(broken)}; use an earlier checkpoint"
        )
    return Source(strip_wrappers(tensors), str(path), **facts)


def _accepted() -> str:
    return f"{', '.join(_ENDINGS)} or .safetensors file, or a Hugging Face folder"


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
        if wrapper is None:
            keys = listed([str(key) for key in content])
            raise WeightsError(
                f"weights {path} hold no tensors but {keys}; needs a state dict, or one under "
                "'model', 'state_dict' or 'module'"
            )
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"weights {path} hold a {type(content).__name__}, needs a state dict (name -> tensor)"
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors, _own_facts(config.get("model")) if isinstance(config, dict) else {}


def _refused(path: Path, message: str) -> str:
    """Replaces torch's message, which first advises to load the file without protection."""
    found = re.search(r"GLOBAL (\S+)", message)
    if not found:
        return _damaged(path, message.rpartition("WeightsUnpickler error:")[2])
    if "is blocked" in message:
        return (
            f"weights {path} call {found[1]} when read, which no weights need: refused. Do not "
            "open this file elsewhere"
        )
    return (
        f"weights {path} hold {found[1]}, which cannot be read without running code from the file: "
        "refused. If you trust its origin, convert it once (this does run that code):\n"
        f'  python -c "import torch; '
        f"c = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        f"torch.save({{'model': c['model']}}, 'converted.pth')\""
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    safetensors = _import_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata.get("config", "null"))
    except (safetensors.SafetensorError, *_UNREADABLE) as error:
        raise WeightsError(_damaged(path, error)) from error
    return tensors, _own_facts(config)


def _import_safetensors(path: str | Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        install = "pip install 'sssd-fast[train]'"
        raise DependencyError(f"{path} needs safetensors: {install}") from None
    return safetensors


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    index = folder / "model.safetensors.index.json"
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    if (folder / "model.safetensors").is_file():
        tensors, facts = _read_safetensors(folder / "model.safetensors")
    elif index.is_file():
        shards = sorted({str(shard) for shard in _json(index).get("weight_map", {}).values()})
        for shard in shards:
            named = f"{index} names the shard {shard!r}"
            if Path(shard).name != shard:
                raise WeightsError(f"{named}, which is outside its folder: refused")
            if not (folder / shard).is_file():
                raise WeightsError(f"{named}, which is missing; copy all {len(shards)}")
            tensors |= _read_safetensors(folder / shard)[0]
    elif (folder / "pytorch_model.bin").is_file():
        tensors, _ = _read_torch(folder / "pytorch_model.bin")
    else:
        raise WeightsError(
            f"folder {folder} holds no model.safetensors, model.safetensors.index.json, "
            "pytorch_model.bin or checkpoints/"
        )
    if (folder / "config.json").is_file():
        facts |= _huggingface_facts(_json(folder / "config.json"))
    return tensors, facts


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(_damaged(path, error)) from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{path} holds a {type(tree).__name__}, needs an object")
    return tree


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
        "norm_eps": config.norm_eps,
        "norm": (config.mean, config.std),
    }


def _huggingface_facts(tree: dict[str, Any]) -> dict[str, Any]:
    def pair(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value, value]

    sizes, patches = pair(tree.get("image_size")), pair(tree.get("patch_size"))
    known = all(isinstance(n, int) and n > 0 for n in (*sizes, *patches))
    return {
        "grid": (sizes[0] // patches[0], sizes[1] // patches[1]) if known else None,
        "heads": tree.get("num_attention_heads"),
        "decoder_heads": tree.get("decoder_num_attention_heads"),
        "norm_eps": tree.get("layer_norm_eps"),
    }


def save_safetensors(
    path: str | Path, model: Model, format: Literal["timm", "huggingface"], *, decoder: bool = False
) -> None:
    """`export_state` as one file; its metadata holds the naming and the configuration as JSON."""
    torch_format = _import_safetensors(path).torch
    config = json.dumps(model.config.model_dump(mode="json"))
    # transformers requires format = pt
    metadata = {"format": "pt", "names": format, "config": config}
    state = export_state(model, format, decoder=decoder)
    atomic_write_bytes(path, torch_format.save(state, metadata=metadata))


def save_huggingface(folder: str | Path, model: Model, *, decoder: bool = False) -> None:
    """The folder for transformers' from_pretrained: weights, configuration, pixel statistics."""
    folder = Path(folder)
    save_safetensors(folder / "model.safetensors", model, "huggingface", decoder=decoder)
    tree = huggingface_config(model, decoder=decoder)
    height, width = model.config.image_size
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.encoder.mean),
        "image_std": list(model.encoder.std),
    }
    for name, content in (("config", tree), ("preprocessor_config", pixels)):
        atomic_write_text(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")


def listed(items: Sequence[str], limit: int = 8) -> str:
    """The first items, and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _damaged(path: Path, error: BaseException | str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path} is damaged or not what its name says: {reason}. Copy or download it again"
