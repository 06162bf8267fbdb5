"""Names and layouts of ViT weights in other projects, to and from this package's.

sssd_fast    this package's MAE, Classifier and SSSD: encoder.*, decoder.*, fc_norm.*, head.*
mae          facebookresearch/mae with its decoder: blocks.i.attn.qkv, decoder_blocks.i
timm         VisionTransformer, and facebookresearch/mae's released encoders: blocks.i.attn.qkv
huggingface  ViTMAE*, ViTModel, ViTFor*: [vit.]encoder.layer.i in files, layers.i in memory since
             transformers 5.0

Shapes: D encoder width, L patches, p prefix tokens, P patch side, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sssd_fast.errors import WeightsError
from sssd_fast.model import MAE, Classifier

Format = Literal["sssd_fast", "mae", "timm", "huggingface"]
Model = MAE | Classifier
# (pattern, replacement), applied in this order
Rules = tuple[tuple[str, str], ...]


class Converted(NamedTuple):
    tensor: Tensor
    # name in the file
    source: str
    # what was done to the values; "" = only renamed
    how: str


# by this package's names
Named = dict[str, Converted]

_MAE_NAMES = (
    (r"^decoder_(embed|blocks|norm|pred)\.", r"decoder.\1."),
    (r"^decoder_pos_embed$", "decoder.pos_embed"),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^(cls_token$|pos_embed$|patch_embed\.proj\.|blocks\.\d+\.|norm\.)", r"encoder.\1"),
)
_HUGGINGFACE_NAMES = (
    (r"^vit\.", ""),
    # transformers 5 writes decoder_layers back as decoder_encoder.layer in save_pretrained
    (r"^decoder\.decoder_(?:layers|encoder\.layer)\.(\d+)\.", r"decoder.blocks.\1."),
    (r"^decoder\.decoder_(embed|norm|pred)\.", r"decoder.\1."),
    (r"^decoder\.decoder_pos_embed$", "decoder.pos_embed"),
    (r"^embeddings\.cls_token$", "encoder.cls_token"),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"encoder.blocks.\1."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^classifier\.", "head."),
    (r"(blocks\.\d+)\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r"\1.attn.\2."),
    (r"(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
)
_NAMES: dict[str, Rules] = {
    "sssd_fast": ((r"^mae\.", ""),),
    "mae": _MAE_NAMES,
    "timm": _MAE_NAMES,
    "huggingface": _HUGGINGFACE_NAMES,
}


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the `_orig_mod.` of torch.compile and the `module.` of DistributedDataParallel."""
    stripped: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
        if short in stripped:
            raise WeightsError(
                f"two tensors are called {short!r} without 'module.' and '_orig_mod.'; keep one"
            )
        stripped[short] = tensor
    return stripped


def detect_format(state: Mapping[str, Tensor]) -> Format:
    """Raises WeightsError, with the first names, if no known patch projection is found."""
    for name in state:
        if name.endswith("encoder.patch_embed.proj.weight"):
            return "sssd_fast"
        if name.endswith("embeddings.patch_embeddings.projection.weight"):
            return "huggingface"
        if name == "patch_embed.proj.weight":
            return "mae" if "decoder_embed.weight" in state else "timm"
    raise WeightsError(
        f"not the weights of a ViT under known names: none of {len(state)} tensors is "
        "patch_embed.proj.weight (timm, facebookresearch/mae), "
        "embeddings.patch_embeddings.projection.weight (Hugging Face) or "
        f"encoder.patch_embed.proj.weight (sssd_fast); the first are {', '.join(list(state)[:5])}. "
        "Rename them to one of these forms"
    )


def to_own_names(state: Mapping[str, Tensor]) -> tuple[Format, Named]:
    """Names and layouts of this package, still in the source's sizes; unknown names are kept.

    Joins q, k, v; gives attention without qkv bias a zero bias and folds LayerScale into the layer
    before it (both exact); drops the batch axis of position tables.
    """
    format_ = detect_format(state)
    named: Named = {}
    for source, tensor in state.items():
        name = _rename(source, _NAMES[format_])
        if name in ("encoder.pos_embed", "decoder.pos_embed") and tensor.ndim == 3:
            tensor = tensor.squeeze(0)
        named[name] = Converted(tensor, source, "")
    for name in [n for n in named if n.endswith((".attn.q.weight", ".attn.q.bias"))]:
        stem, kind = name[: name.rindex(".q.")], name.rsplit(".", 1)[1]
        parts = [f"{stem}.{x}.{kind}" for x in "qkv"]
        if all(part in named for part in parts):
            q, k, v = (named.pop(part) for part in parts)
            joined = torch.cat([q.tensor, k.tensor, v.tensor])
            named[f"{stem}.qkv.{kind}"] = Converted(joined, q.source, "q, k, v joined")
    for part in ("encoder", "decoder"):
        qkv = [n for n in named if re.fullmatch(rf"{part}\.blocks\.\d+\.attn\.qkv\.weight", n)]
        biases = [name.replace("weight", "bias") for name in qkv]
        if not named.keys() & set(biases):
            for name, bias in zip(qkv, biases, strict=True):
                zeros = named[name].tensor.new_zeros(len(named[name].tensor))
                named[bias] = Converted(zeros, "(none)", "no qkv bias in the source: zeros")
    for name in [n for n in named if n.endswith((".ls1.gamma", ".ls2.gamma"))]:
        stem, which, _ = name.rsplit(".", 2)
        layer = f"{stem}.attn.proj" if which == "ls1" else f"{stem}.mlp.fc2"
        if {f"{layer}.weight", f"{layer}.bias"} <= named.keys():
            gamma = named.pop(name).tensor
            for kind, scale in (("weight", gamma[:, None]), ("bias", gamma)):
                old = named[f"{layer}.{kind}"]
                folded = Converted(scale * old.tensor, old.source, "LayerScale folded in")
                named[f"{layer}.{kind}"] = folded
    return format_, named


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


_TO_TIMM = (
    (r"^encoder\.", ""),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.", "decoder_"),
)
_TO_HUGGINGFACE = (
    (r"^encoder\.blocks\.", "vit.encoder.layer."),
    (r"^encoder\.norm\.", "vit.layernorm."),
    (r"^encoder\.pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^encoder\.patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^encoder\.cls_token$", "vit.embeddings.cls_token"),
    (r"^head\.", "classifier."),
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"^decoder\.(embed\.|norm\.|pred\.|pos_embed$)", r"decoder.decoder_\1"),
    (r"(\.\d+)\.attn\.(query|key|value)\.", r"\1.attention.attention.\2."),
    (r"(\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"(\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"(\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.\d+)\.norm2\.", r"\1.layernorm_after."),
)


def export_state(
    model: Model, format: Literal["timm", "huggingface"], *, decoder: bool = False
) -> dict[str, Tensor]:
    """Contiguous CPU copies under other names: the encoder, with head or (`decoder`) decoder.

    "timm": names of VisionTransformer (global_pool "avg" with fc_norm for pool "mean", else
    "token"); with `decoder`, those of facebookresearch/mae. "huggingface": the names in files of
    transformers 4 and 5 for `huggingface_class`, which from_pretrained renames. Raises WeightsError
    for what the other side cannot express.
    """
    if decoder and not isinstance(model, MAE):
        raise WeightsError(
            f"decoder=True needs an MAE, got a {type(model).__name__}, which has no decoder"
        )
    if format not in ("timm", "huggingface"):
        raise WeightsError(f"weights format is {format!r}, needs 'timm' or 'huggingface'")
    own = {
        name: t.detach().cpu().unsqueeze(0) if name.endswith("pos_embed") else t.detach().cpu()
        for name, t in model.state_dict().items()
        if decoder or not name.startswith("decoder.")
    }
    rules: Rules = _TO_TIMM
    if format == "huggingface":
        rules = _TO_HUGGINGFACE
        if model.encoder.cls_token is None:
            raise WeightsError(
                "Hugging Face ViT always has a cls token, this model has none; export it as 'timm'"
            )
        if isinstance(model, Classifier) and model.pool == "mean":
            # a ViTModel without head, whose last norm holds fc_norm
            own = {name.replace("fc_norm.", "encoder.norm."): t for name, t in own.items()}
            own = {name: t for name, t in own.items() if name.startswith("encoder.")}
        for name in [n for n in own if ".attn.qkv." in n]:
            parts = zip(("query", "key", "value"), own.pop(name).chunk(3), strict=True)
            own |= {name.replace("qkv", part): piece for part, piece in parts}
        if huggingface_class(model, decoder=decoder) == "ViTModel":
            rules = (*rules, (r"^vit\.", ""))
    return {
        _rename(name, rules): t.clone(memory_format=torch.contiguous_format)
        for name, t in own.items()
    }


def huggingface_class(model: Model, *, decoder: bool = False) -> str:
    """The class of transformers that the exported weights fit.

    ViTForImageClassification classifies from the cls token. Of a Classifier that pools the mean of
    the patch tokens, the encoder is exported without its head, and fc_norm as the last norm:
    features are layernorm(hidden_states[-1][:, 1:].mean(1)).
    """
    if decoder:
        return "ViTMAEForPreTraining"
    tuned = isinstance(model, Classifier) and model.pool == "cls"
    return "ViTForImageClassification" if tuned else "ViTModel"


def huggingface_config(model: Model, *, decoder: bool = False) -> dict[str, Any]:
    """The config.json that goes with export_state(model, "huggingface")."""
    config = model.config
    width, depth, heads = config.encoder_shape
    height, columns = config.image_size
    tree: dict[str, Any] = {
        "architectures": [huggingface_class(model, decoder=decoder)],
        "model_type": "vit_mae" if decoder else "vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": int(width * config.mlp_ratio),
        "image_size": height if height == columns else [height, columns],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if isinstance(model, Classifier) and model.pool == "cls":
        tree["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
        tree["label2id"] = {f"LABEL_{i}": i for i in range(model.num_classes)}
    if decoder:
        tree |= {
            "decoder_hidden_size": config.decoder_width,
            "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_num_attention_heads": config.decoder_heads,
            "decoder_intermediate_size": int(config.decoder_width * config.mlp_ratio),
            "mask_ratio": config.mask_ratio,
            "norm_pix_loss": True,
        }
    return tree
