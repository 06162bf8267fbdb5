"""Trained models as files that run without this package.

`export_classifier`: torch.export (.pt2) or ONNX (.onnx) of the forward pass in plain torch:

    images uint8 [B, C, H, W], any B >= 1
    -> logits float32 [B, classes], scores float32 [B, classes] (softmax of the logits)

Pixels are scaled by the model's mean and std inside; the caller decodes and resizes.
`export_encoder`: weights under timm's or Hugging Face's names. Every file is read back and compared
with the model before it replaces anything at its path.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import ExportedProgram

import mae_kernels
from sssd_fast import __version__
from sssd_fast.errors import DependencyError, SssdError
from sssd_fast.model import Classifier
from sssd_fast.run.checkpoint import load_checkpoint
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.weights.encoder import load_model
from sssd_fast.weights.files import read_source
from sssd_fast.weights.formats import Model, export_state, huggingface_class, huggingface_config

# largest difference from the model, relative to its largest output; float32 sums give about 1e-6
TOLERANCE = 1e-4
ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
LOADING = {
    "torch": "torch.export.load({!r}).module()(images)",
    "onnx": 'onnxruntime.InferenceSession({!r}).run(None, {{"images": images}})',
}
MEAN_POOLED = "MeanPooledViTForImageClassification"  # of mean_pooled_vit.txt
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class _LogitsAndScores(nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        return logits, logits.softmax(-1)


def export_classifier(
    model: Classifier,
    out: str | Path,
    format: Literal["torch", "onnx"],
    classes: Sequence[str],
    grey_range: tuple[int, int] | None = None,
) -> str:
    """Writes `model`; returns what was written and the call that loads it.

    Args:
        out: a file with the format's ending (.pt2, .onnx), or a folder for classifier.ENDING.
        classes: stored as `classes.json` in a .pt2, as the metadata "classes" (JSON) in ONNX.
        grey_range: values of 16-bit images that are 0 and 255 for the model, stored likewise.

    Raises DependencyError without the export extra, SssdError if outputs differ by more than
    TOLERANCE (nothing is written).
    """
    # a copy in float32 on the CPU: the program must not depend on how the model was trained
    copy = Classifier(model.config, model.num_classes, model.pool)
    copy.load_state_dict(model.state_dict())
    copy.eval().requires_grad_(False)
    path, ending = Path(out), ENDINGS[format]
    path = path if path.suffix == ending else path / f"classifier{ending}"
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    # the exporters print deprecation warnings and progress lines
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # the references of mae_kernels are plain torch, which every exporter knows
        with mae_kernels.backend("reference"):
            module, example = _LogitsAndScores(copy).eval(), (_example(copy, 3),)
            program = torch.export.export(module, example, dynamic_shapes=shapes)
        write = _torch_file if format == "torch" else _onnx_file
        facts = {"classes": json.dumps(list(classes))}
        if grey_range is not None:
            facts["grey_range"] = json.dumps(list(grey_range))
        content, run = write(program, facts)
        difference = _compare(copy, run, path)
    atomic_write_bytes(path, content)
    shape = ", ".join(map(str, _example(copy, 1).shape[1:]))
    scaled = "" if grey_range is None else f"\n{_scaling(grey_range)}"
    call = LOADING[format].format(str(path))
    return (
        f"{path}: {len(content) / 1e6:.1f} MB, uint8 [batch, {shape}] -> logits, scores; outputs "
        f"within {difference:.1e} of the model's{scaled}\nload it with: {call}"
    )


def _scaling(grey_range: Sequence[int]) -> str:
    return f"scale 16-bit images first: values {grey_range[0]} to {grey_range[1]} become 0 to 255"


def _example(model: Classifier, batch: int) -> Tensor:
    seeded = torch.Generator().manual_seed(0)
    shape = (batch, model.encoder.in_channels, *model.encoder.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded)


def _torch_file(program: ExportedProgram, facts: dict[str, str]) -> tuple[bytes, Run]:
    file = io.BytesIO()
    extra = {f"{name}.json": text for name, text in facts.items()}
    torch.export.save(program, file, extra_files=extra)
    file.seek(0)
    loaded = torch.export.load(file).module()
    return file.getvalue(), lambda images: loaded(images)


def _onnx_file(program: ExportedProgram, facts: dict[str, str]) -> tuple[bytes, Run]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise DependencyError(
            f"ONNX export needs onnx, onnxscript and onnxruntime, and {error.name} is missing: "
            "pip install 'sssd-fast[export]'"
        ) from None
    names = ["logits", "scores"]
    exported = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names)
    assert exported is not None
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, facts)
    content: bytes = proto.SerializeToString()
    onnx.checker.check_model(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, scores = session.run(names, {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(scores)

    return content, run


@torch.no_grad()
def _compare(model: Classifier, run: Run, path: Path) -> float:
    """Largest difference over batches of 5 and 1 images, one black and one white."""
    images = _example(model, 5)
    images[0], images[1] = 0, 255
    worst = 0.0
    for batch in (images, images[4:]):
        logits = model(batch)
        for want, got in zip((logits, logits.softmax(-1)), run(batch), strict=True):
            allowed = TOLERANCE * want.abs().max().item() + 1e-6
            same_shape = got.shape == want.shape
            difference = (want - got).abs().max().item() if same_shape else float("inf")
            if not difference <= allowed:
                raise SssdError(
                    f"{path} was not written: outputs of the exported program differ by "
                    f"{difference:.2e} from the model's at batch {len(batch)}, the limit is "
                    f"{allowed:.2e}; the installed torch or onnxruntime has a faulty operator"
                )
            worst = max(worst, difference)
    return worst


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
        facts, evaluation = (
            load_checkpoint(path),
            path.parents[1] / "eval" / "test" / "metrics.json",
        )
        want = save_huggingface(written, model, facts.get("classes"))
        atomic_write_text(written / "README.md", _model_card(model, facts, evaluation))
    else:
        written = written if written.suffix == ".safetensors" else written / "model.safetensors"
        want = save_safetensors(written, model, "timm")
    got = read_source(written).state
    for name, tensor in want.items():
        if not torch.equal(tensor, got[name]):
            raise SssdError(
                f"{written}: {name} differs from {path}; the file system may be damaged"
            )
    call = (
        _timm_call(model, written) if format == "timm" else _huggingface_call(model, str(written))
    )
    return (
        f"{written}: {len(want)} tensors of {path} under {format} names, read back equal\n"
        f"load it with: {call}"
    )


def save_safetensors(
    path: Path,
    model: Model,
    format: Literal["timm", "huggingface"],
    state: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`export_state`, or `state`, as one file; its metadata holds the naming and the configuration
    as JSON. Returns the tensors.
    """
    state = export_state(model, format) if state is None else state
    config = json.dumps(model.config.model_dump(mode="json"))
    # transformers requires format = pt
    metadata = {"format": "pt", "names": format, "config": config}
    atomic_write_bytes(path, save(state, metadata))
    return state


def save_huggingface(
    folder: Path, model: Model, classes: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The folder for transformers' from_pretrained: weights, configuration, pixel statistics and,
    for a classifier of the mean of the patch tokens, the code of its class. Returns the tensors.
    """
    state, config = export_state(model, "huggingface"), huggingface_config(model)
    if isinstance(model, Classifier):
        names = classes or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    if isinstance(model, Classifier) and _mean_pooled(model):
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
        # not "classifier": ViTForImageClassification would take it for a head of the cls token
        state |= {f"head.{n}": t.cpu().clone() for n, t in model.head.state_dict().items()}
        # no module: it imports transformers
        code = Path(__file__).with_name("mean_pooled_vit.txt")
        config["architectures"] = [MEAN_POOLED]
        config["auto_map"] = {"AutoModelForImageClassification": f"{code.stem}.{MEAN_POOLED}"}
        atomic_write_text(folder / f"{code.stem}.py", code.read_text(encoding="utf-8"))
    save_safetensors(folder / "model.safetensors", model, "huggingface", state)
    height, width = model.config.image_size
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
        "resample": 3,
        "image_mean": list(model.encoder.mean),
        "image_std": list(model.encoder.std),
    }
    for name, tree in {"config": config, "preprocessor_config": pixels}.items():
        atomic_write_text(folder / f"{name}.json", json.dumps(tree, indent=2) + "\n")
    return state


def _mean_pooled(model: Model) -> bool:
    return isinstance(model, Classifier) and model.pool == "mean"


def _huggingface_call(model: Model, folder: str) -> str:
    if _mean_pooled(model):
        name, options = "AutoModelForImageClassification", ", trust_remote_code=True"
    else:
        name = huggingface_class(model)
        options = ", add_pooling_layer=False" if name == "ViTModel" else ""
    return f"transformers.{name}.from_pretrained({folder!r}{options})"


def _model_card(model: Model, facts: dict[str, Any], evaluation: Path) -> str:
    """README.md of an exported model, with the test results if the run has them."""
    config, settings = model.config, facts["config"]
    width, depth, heads = config.encoder_shape
    tuned = isinstance(model, Classifier)
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'image-classification' if tuned else 'image-feature-extraction'}",
        "tags: [ct, covid-19, masked-autoencoder, self-distillation]",
        "---",
        "",
        f"# ViT of width {width}, {depth} blocks, {heads} heads",
        "",
        f"Trained by sssd_fast {__version__} (`{facts['task']}`) on "
        f"{Path(str(settings['data']['source'])).name}. Research software: not a medical device, "
        "not for diagnosis.",
        "",
        "```python",
        "import transformers",
        "",
        f"model = {_huggingface_call(model, 'PATH')}",
        "processor = transformers.AutoImageProcessor.from_pretrained('PATH')",
        "```",
        "",
        f"- Input: {'grey' if config.in_channels == 1 else 'RGB'} images of "
        f"{config.image_size[0]} x {config.image_size[1]} pixels, (x / 255 - mean) / std with mean "
        f"{tuple(model.encoder.mean)} and std {tuple(model.encoder.std)}. Training used the "
        + (
            "largest centred crop with this aspect."
            if settings["data"]["fit"] == "crop"
            else "whole image, stretched to this size."
        ),
    ]
    if facts.get("grey_range"):
        lines.append(f"- {_scaling(facts['grey_range']).capitalize()}.")
    if tuned:
        pooled = "mean of the patch tokens" if model.pool == "mean" else "cls token"
        lines.append(f"- Classes, from the {pooled}: {', '.join(facts['classes'])}.")
    if tuned and evaluation.is_file():
        result = json.loads(evaluation.read_text(encoding="utf-8"))["image"]
        rates = ("accuracy", "sensitivity", "specificity", "auc")
        found = [f"{rate} {result[rate]:.3f}" for rate in rates if result[rate] is not None]
        crops = settings.get("evaluate", {}).get("crops", 1)
        views = f", scores averaged over {crops} crops" if crops > 1 else ""
        lines.append(f"- Test split, {result['n']} images{views}: {', '.join(found)}.")
    return "\n".join(lines) + "\n"


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
