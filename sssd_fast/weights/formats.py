"""Names and layouts of ViT weights in other projects, to and from this package's.

sssd_fast    this package's MAE, Classifier and SSSD: encoder.*, decoder.*, fc_norm.*, head.*
timm         VisionTransformer, and facebookresearch/mae: blocks.i.attn.qkv, decoder_blocks.i
huggingface  ViTMAE*, ViTModel, ViTFor*: [vit.]encoder.layer.i in files, layers.i in memory since
             transformers 5.0
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sssd_fast.errors import WeightsError
from sssd_fast.model import MAE, Classifier

Format = Literal["sssd_fast", "timm", "huggingface"]
Model = MAE | Classifier

# (here, in files of transformers), applied in this order in both directions
HUGGINGFACE = (
    ("encoder.blocks.", "encoder.layer."),
    ("encoder.norm.", "layernorm."),
    ("encoder.pos_embed", "embeddings.position_embeddings"),
    ("encoder.cls_token", "embeddings.cls_token"),
    ("encoder.patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    ("decoder.embed.", "decoder.decoder_embed."),
    ("decoder.norm.", "decoder.decoder_norm."),
    ("decoder.pred.", "decoder.decoder_pred."),
    ("decoder.pos_embed", "decoder.decoder_pos_embed"),
    ("head.", "classifier."),
    (".attn.q.", ".attention.attention.query."),
    (".attn.k.", ".attention.attention.key."),
    (".attn.v.", ".attention.attention.value."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)
# names in memory since transformers 5, which also writes decoder_layers as decoder_encoder.layer
TRANSFORMERS_5 = (
    (r"^vit\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
)
TIMM = (
    (r"^decoder_", "decoder."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^(cls_token$|pos_embed$|patch_embed\.|blocks\.|norm\.)", r"encoder.\1"),
)


class Converted(NamedTuple):
    tensor: Tensor
    # name in the file
    source: str
    # what was done to the values; "" = only renamed
    how: str = ""


# by this package's names
Named = dict[str, Converted]


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the `_orig_mod.` of torch.compile and the `module.` of DistributedDataParallel."""
    wrappers = ("_orig_mod", "module")
    return {
        ".".join(part for part in name.split(".") if part not in wrappers): tensor
        for name, tensor in state.items()
    }


def detect_format(state: Mapping[str, Tensor]) -> tuple[Format, str]:
    """(format, prefix of its names), such as "backbone." of DINO, by the patch projection.

    Raises WeightsError, with the first names, if there is none or several.
    """
    for name in state:
        if name in ("encoder.patch_embed.proj.weight", "mae.encoder.patch_embed.proj.weight"):
            return "sssd_fast", ""
        if name.endswith("embeddings.patch_embeddings.projection.weight"):
            return "huggingface", ""
    key = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(key) for name in state if name.endswith(key)]
    if "" in prefixes or len(prefixes) == 1:
        return "timm", "" if "" in prefixes else prefixes[0]
    if prefixes:
        prefix = prefixes[0]
        raise WeightsError(
            f"several encoders, {', '.join(prefixes)}; save the one to use, such as {prefix}: "
            'python -c "import torch; from sssd_fast.weights.files import read_source; s = '
            f"read_source('FILE').state; torch.save({{k.removeprefix('{prefix}'): v for k, v in "
            f"s.items() if k.startswith('{prefix}')}}, 'encoder.pth')\""
        )
    raise WeightsError(
        f"not the weights of a ViT under known names: none of {len(state)} tensors is "
        "patch_embed.proj.weight (timm, facebookresearch/mae), encoder.patch_embed.proj.weight or "
        "embeddings.patch_embeddings.projection.weight (Hugging Face); the first are "
        + ", ".join(list(state)[:5])
    )


def to_own_names(state: Mapping[str, Tensor]) -> tuple[Format, Named]:
    """Names and layouts of this package, still in the source's sizes; unknown names are kept.

    Joins q, k, v and drops the batch axis of position tables. Tensors outside of a prefix, such as
    the projection head of DINO, are omitted.
    """
    format_, prefix = detect_format(state)
    named: Named = {}
    for source, tensor in state.items():
        if not source.startswith(prefix):
            continue
        name = _own_name(source.removeprefix(prefix), format_)
        if name in ("encoder.pos_embed", "decoder.pos_embed") and tensor.ndim == 3:
            tensor = tensor.squeeze(0)
        named[name] = Converted(tensor, source)
    for name in [n for n in named if n.endswith((".attn.q.weight", ".attn.q.bias"))]:
        parts = [name.replace(".attn.q.", f".attn.{x}.") for x in "qkv"]
        if all(part in named for part in parts):
            q, k, v = (named.pop(part) for part in parts)
            joined = torch.cat([q.tensor, k.tensor, v.tensor])
            whole = name.replace(".attn.q.", ".attn.qkv.")
            named[whole] = Converted(joined, q.source, "q, k, v joined")
    if not any(name.startswith("decoder.blocks.") for name in named):
        # iBOT and DINOv2 mask the input of the encoder
        token = named.pop("decoder.mask_token", None)
        named |= {} if token is None else {"mask_token": token}
    return format_, named


def _own_name(name: str, format_: Format) -> str:
    if format_ == "sssd_fast":
        return name.removeprefix("mae.")
    for pattern, replacement in TIMM if format_ == "timm" else TRANSFORMERS_5:
        name = re.sub(pattern, replacement, name)
    for ours, theirs in HUGGINGFACE if format_ == "huggingface" else ():
        name = name.replace(theirs, ours)
    return name


def export_state(
    model: Model, format: Literal["timm", "huggingface"], *, decoder: bool = False
) -> dict[str, Tensor]:
    """Contiguous CPU copies under other names: the encoder, with head or (`decoder`) decoder.

    "timm": names of VisionTransformer (global_pool "avg" with fc_norm for pool "mean", else
    "token"); with `decoder`, those of facebookresearch/mae. "huggingface": the names in files of
    transformers for `huggingface_class`. Raises WeightsError without a cls token.
    """
    own = {
        name: t.detach().cpu().unsqueeze(0) if name.endswith("pos_embed") else t.detach().cpu()
        for name, t in model.state_dict().items()
        if decoder or not name.startswith("decoder.")
    }
    if format == "timm":
        names = {name: _timm_name(name) for name in own}
    else:
        if model.encoder.cls_token is None:
            raise WeightsError(
                "Hugging Face ViT always has a cls token, this model has none; export it as 'timm'"
            )
        kind = huggingface_class(model, decoder=decoder)
        if kind == "ViTModel":
            # without the head of a classifier, whose fc_norm becomes the last norm
            own = {name.replace("fc_norm.", "encoder.norm."): t for name, t in own.items()}
            own = {name: t for name, t in own.items() if name.startswith("encoder.")}
        for name in [n for n in own if ".attn.qkv." in n]:
            for part, piece in zip("qkv", own.pop(name).chunk(3), strict=True):
                own[name.replace("qkv", part)] = piece
        names = {name: _huggingface_name(name, prefix=kind != "ViTModel") for name in own}
    return {names[name]: t.clone(memory_format=torch.contiguous_format) for name, t in own.items()}


def _timm_name(name: str) -> str:
    name = name.removeprefix("encoder.")
    return name.replace("decoder.", "" if name == "decoder.mask_token" else "decoder_")


def _huggingface_name(name: str, *, prefix: bool) -> str:
    vit = "vit." if prefix and name.startswith("encoder.") else ""
    for ours, theirs in HUGGINGFACE:
        name = name.replace(ours, theirs)
    return vit + name


def huggingface_class(model: Model, *, decoder: bool = False) -> str:
    """The class of transformers that the exported weights fit. None classifies the mean of the
    patch tokens: such an encoder is exported without its head, and with fc_norm as the last norm.
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
        }
    return tree
