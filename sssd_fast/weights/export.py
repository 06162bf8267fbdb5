"""Trained models as files that run without this package.

`export_classifier`: torch.export (.pt2) or ONNX (.onnx) of the same forward pass in plain torch:

    images uint8 [B, C, H, W], any B >= 1
    -> logits float32 [B, classes], scores float32 [B, classes] (softmax of the logits)

Pixels are scaled by the model's mean and std inside; the caller decodes and resizes.
`export_encoder`: weights under timm's or Hugging Face's names. Every file is read back and compared
with the model before it replaces anything at its path.

Shapes: B images, C channels, L patches, p prefix tokens, N = p + L, D width, H heads.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sssd_fast.errors import DependencyError, SssdError, WeightsError
from sssd_fast.model import Block, Classifier
from sssd_fast.run.files import atomic_write_bytes
from sssd_fast.weights.encoder import load_model
from sssd_fast.weights.files import read_weights, save_huggingface, save_safetensors
from sssd_fast.weights.formats import Model, export_state, huggingface_class

# largest difference from the model, relative to its largest output; float32 sums give about 1e-6
TOLERANCE = 1e-4
ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
LOADING = {
    "torch": "torch.export.load({!r}).module()(images)",
    "onnx": 'onnxruntime.InferenceSession({!r}).run(None, {{"images": images}})',
}
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class PortableClassifier(nn.Module):
    """The classifier's forward pass in operators of torch, which every exporter knows."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean_C11", torch.tensor(model.encoder.mean).view(-1, 1, 1))
        self.register_buffer("std_C11", torch.tensor(model.encoder.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoder, p = self.model.encoder, self.model.encoder.num_prefix
        pixels_BCHW = (images.float() / 255 - self.mean_C11) / self.std_C11
        proj = encoder.patch_embed.proj
        x_BDhw = F.conv2d(pixels_BCHW, proj.weight, proj.bias, stride=encoder.patch_size)
        x_BND = x_BDhw.flatten(2).transpose(1, 2) + encoder.pos_embed[p:]
        if encoder.cls_token is not None:
            cls_B1D = (encoder.cls_token + encoder.pos_embed[:p]).expand(x_BND.shape[0], -1, -1)
            x_BND = torch.cat([cls_B1D, x_BND], 1)
        for block in encoder.blocks:
            assert isinstance(block, Block)
            x_BND = x_BND + _attention(block, block.norm1(x_BND))
            x_BND = x_BND + block.mlp(block.norm2(x_BND))
        x_BND = encoder.norm(x_BND)
        pooled_BD = x_BND[:, 0] if self.model.pool == "cls" else x_BND[:, p:].mean(1)
        logits = self.model.head(self.model.fc_norm(pooled_BD))
        return logits, logits.softmax(-1)


def _attention(block: Block, x_BND: Tensor) -> Tensor:
    qkv = block.attn.qkv(x_BND).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed_BHNd = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    out: Tensor = block.attn.proj(mixed_BHNd.transpose(1, 2).flatten(2))
    return out


def export_classifier(
    model: Classifier,
    out: str | Path,
    formats: Sequence[Literal["torch", "onnx"]] = ("torch", "onnx"),
    *,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Writes `model` in each format; returns for each what was written and the call that loads it.

    Args:
        out: a file with the format's ending (.pt2, .onnx), or a folder for classifier.pt2 and
            classifier.onnx.
        classes: names stored in the file: `classes.json` in a .pt2, the metadata property
            "classes" (JSON) in ONNX.

    Raises DependencyError without the export extra, SssdError if outputs differ by more than
    TOLERANCE (nothing is written).
    """
    names = list(classes) if classes is not None else [str(i) for i in range(model.num_classes)]
    if len(names) != model.num_classes:
        raise WeightsError(
            f"{len(names)} class names were given for a model of {model.num_classes} classes"
        )
    unknown = [name for name in formats if name not in ENDINGS]
    if unknown:
        raise WeightsError(f"export format is {unknown[0]!r}, needs one of {', '.join(ENDINGS)}")
    out = Path(out)
    if len(formats) > 1 and out.suffix in ENDINGS.values():
        raise WeightsError(f"{out} is one file for {len(formats)} formats; give a folder")
    # a copy in float32 on the CPU: the program must not depend on how the model was trained
    copy = Classifier(model.config, model.num_classes, model.pool)
    copy.load_state_dict(model.state_dict())
    copy.eval().requires_grad_(False)
    lines = []
    for name in formats:
        path = out if out.suffix == ENDINGS[name] else out / f"classifier{ENDINGS[name]}"
        program = _torch_program if name == "torch" else _onnx_program
        with _quiet():
            content, run = program(PortableClassifier(copy).eval(), names)
            difference, limit = _compare(copy, run, path)
        atomic_write_bytes(path, content)
        shape = ", ".join(["batch", *map(str, _image_shape(copy))])
        lines.append(
            f"{path}: {len(content) / 1e6:.1f} MB, uint8 [{shape}] -> logits, scores; outputs "
            f"within {difference:.1e} of the model's (limit {limit:.1e})\nload it with: "
            + LOADING[name].format(str(path))
        )
    return lines


def _image_shape(model: Classifier) -> tuple[int, int, int]:
    return (model.encoder.in_channels, *model.encoder.image_size)


def _example(model: Classifier, batch: int) -> Tensor:
    seeded = torch.Generator().manual_seed(0)
    shape = (batch, *_image_shape(model))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded)


def _torch_program(module: PortableClassifier, classes: list[str]) -> tuple[bytes, Run]:
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(module, (_example(module.model, 3),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"classes.json": json.dumps(classes)})
    file.seek(0)
    loaded = torch.export.load(file).module()
    return file.getvalue(), lambda images: loaded(images)


def _onnx_program(module: PortableClassifier, classes: list[str]) -> tuple[bytes, Run]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise DependencyError(
            f"ONNX export needs onnx, onnxscript and onnxruntime, and {error.name} is missing: "
            "pip install 'sssd-fast[export]'"
        ) from None
    program = torch.onnx.export(
        module,
        (_example(module.model, 3),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits", "scores"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
    )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"classes": json.dumps(classes)})
    content: bytes = proto.SerializeToString()
    onnx.checker.check_model(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, scores = session.run(["logits", "scores"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(scores)

    return content, run


@torch.no_grad()
def _compare(model: Classifier, run: Run, path: Path) -> tuple[float, float]:
    """(largest difference, limit) over batches of 5 and 1 images, one black and one white."""
    images = _example(model, 5)
    images[0], images[1] = 0, 255
    worst, limit = 0.0, 0.0
    for batch in (images, images[4:]):
        logits = model(batch)
        wanted = {"logits": logits, "scores": logits.softmax(-1)}
        for (name, want), got in zip(wanted.items(), run(batch), strict=True):
            allowed = TOLERANCE * want.abs().max().item() + 1e-6
            same_shape = got.shape == want.shape
            difference = (want - got).abs().max().item() if same_shape else float("inf")
            if not difference <= allowed:
                raise SssdError(
                    f"{path} was not written: {name} of the exported program differ by "
                    f"{difference:.2e} from the model's at batch {len(batch)}, the limit is "
                    f"{allowed:.2e}; the installed torch or onnxruntime has a faulty operator"
                )
            worst, limit = max(worst, difference), max(limit, allowed)
    return worst, limit


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporters' deprecation warnings and progress lines; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---- encoders under foreign names ----


def export_encoder(
    source: str | Path, out: str | Path, format: Literal["timm", "huggingface"]
) -> str:
    """Writes the encoder of a run or checkpoint, with the head of a classifier, under other names.

    Args:
        out: for "timm" a .safetensors file, or a folder for model.safetensors; for "huggingface"
            the folder for from_pretrained.

    Returns what was written and the call that loads it. Raises CheckpointError for a damaged
    source, WeightsError for what the other library cannot express (see `export_state`).
    """
    model, path = load_model(source)
    written = Path(out)
    if format == "huggingface":
        save_huggingface(written, model)
    else:
        written = written if written.suffix == ".safetensors" else written / "model.safetensors"
        save_safetensors(written, model, format)
    want, got = export_state(model, format), read_weights(written)
    for name, tensor in want.items():
        if not torch.equal(tensor, got[name]):
            raise SssdError(
                f"{written}: {name} differs from {path}; the file system may be damaged"
            )
    lines = [f"{written}: {len(want)} tensors of {path} under {format} names, read back equal"]
    if format == "timm":
        return "\n".join([*lines, f"load it with: {_timm_call(model, written)}"])
    name = huggingface_class(model)
    if isinstance(model, Classifier) and name == "ViTModel":
        lines.append(
            "note: the head is not included, because ViTForImageClassification classifies from the "
            "cls token and this model from the mean of the patch tokens; its features are "
            "model.layernorm(out.hidden_states[-1][:, 1:].mean(1)) with output_hidden_states=True"
        )
    options = ", add_pooling_layer=False" if name == "ViTModel" else ""
    call = f"transformers.{name}.from_pretrained({str(written)!r}{options})"
    return "\n".join([*lines, f"load it with: {call}"])


def _timm_call(model: Model, path: Path) -> str:
    config = model.config
    width, depth, heads = config.encoder_shape
    tuned = isinstance(model, Classifier)
    unpooled = "token" if config.cls_token else ""
    options = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": model.num_classes if tuned else 0,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": config.mlp_ratio,
        "class_token": config.cls_token,
        "global_pool": "avg" if tuned and model.pool == "mean" else unpooled,
        "checkpoint_path": str(path),
    }
    words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    mean, std = model.encoder.mean, model.encoder.std
    call = f'timm.create_model("vit_base_patch16_224", {words})'
    return f"{call}; images: (x / 255 - mean) / std with mean {mean}, std {std}"
