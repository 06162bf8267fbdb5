"""Exported files run without this package on any batch size and give the model's outputs; a file
that does not is never written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from sssd_fast.config import Config, ModelConfig, to_dict
from sssd_fast.errors import CheckpointError, DependencyError, SssdError
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD
from sssd_fast.run.checkpoint import save_checkpoint
from sssd_fast.weights import export
from sssd_fast.weights.export import export_classifier, export_encoder
from sssd_fast.weights.load import IMAGENET, load_into
from tests.sssd_fast import vit_by_hand

CLASSES = ["a", "b c", "ü"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean, grey": ("mean", {"in_channels": 1, "mean": (0.4,), "std": (0.2,)}),
    "cls, colour": ("cls", {"in_channels": 3, "mean": IMAGENET[0], "std": IMAGENET[1]}),
    "mean, no cls token": ("mean", {"in_channels": 3, "cls_token": False}),
}


def model_of(name: str) -> Classifier:
    """In training mode, with drop path: it is exported as in evaluation."""
    pool, overrides = CASES[name]
    config = ModelConfig(image_size=(24, 40), patch_size=8, width=24, depth=2, heads=3, **overrides)
    model = Classifier(config, 3, pool, drop_path=0.5).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images_of(model: Classifier, batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, model.encoder.in_channels, 24, 40), dtype=torch.uint8)


def by_hand(model: Classifier, images: Tensor) -> Tensor:
    """Logits by the hand-written transformer from pixels scaled by hand, in float64."""
    config, state = model.config, model.state_dict()
    mean, std = (torch.tensor(x).double().view(-1, 1, 1) for x in (config.mean, config.std))
    weights = {name.removeprefix("encoder."): t.detach().double() for name, t in state.items()}
    pixels = (images.double() / 255 - mean) / std
    return vit_by_hand.classify(pixels, weights, 3, config.norm_eps)


@pytest.mark.parametrize("name", CASES)
def test_onnx_file_gives_the_models_outputs_for_any_batch(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    path = tmp_path / "classifier.onnx"
    text = export_classifier(model, tmp_path, "onnx", CLASSES, (100, 1500))
    assert text.startswith(f"{path}: ")
    assert f"onnxruntime.InferenceSession({str(path)!r}).run(None, " + '{"images": images})' in text
    # standard operators only
    assert {node.domain for node in onnx.load(str(path)).graph.node} == {""}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type) == ("images", "tensor(uint8)")
    assert taken.shape[1:] == [model.encoder.in_channels, 24, 40]
    facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert facts == {"classes": CLASSES, "grey_range": [100, 1500]}
    assert "values 100 to 1500 become 0 to 255" in text
    for batch in (1, 2, 7):
        images = images_of(model, batch)
        logits, scores = session.run(["logits", "scores"], {"images": images.numpy()})
        want = by_hand(model, images).numpy()
        np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
        want = np.exp(want) / np.exp(want).sum(1, keepdims=True)
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_torch_program_runs_without_this_package(tmp_path: Path) -> None:
    """For every case and batch sizes 1, 2 and 7."""
    models = [model_of(name) for name in CASES]
    for i, model in enumerate(models):
        path = tmp_path / f"{i}.pt2"
        assert export_classifier(model, path, "torch", CLASSES, (0, i)).startswith(f"{path}: ")
    saved = [[images_of(model, batch) for batch in (1, 2, 7)] for model in models]
    torch.save(saved, tmp_path / "images.pt")
    script = """
import json, sys, torch
outputs = []
for i, batches in enumerate(torch.load("images.pt")):
    extra = {"classes.json": "", "grey_range.json": ""}
    program = torch.export.load(f"{i}.pt2", extra_files=extra).module()
    assert json.loads(extra["classes.json"]) == ["a", "b c", "ü"]
    assert json.loads(extra["grey_range.json"]) == [0, i]
    outputs.append([program(images) for images in batches])
assert not {"sssd_fast", "mae_kernels"} & set(sys.modules)
torch.save(outputs, "outputs.pt")
"""
    command = [sys.executable, "-I", "-W", "ignore", "-c", script]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    found = torch.load(tmp_path / "outputs.pt")
    for model, batches, outputs in zip(models, saved, found, strict=True):
        for images, (logits, scores) in zip(batches, outputs, strict=True):
            want = by_hand(model, images)
            torch.testing.assert_close(logits.double(), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(scores.double(), want.softmax(1), rtol=1e-4, atol=1e-5)


def test_export_of_a_half_precision_model_is_float32(tmp_path: Path) -> None:
    model = model_of("mean, grey")
    export_classifier(model.bfloat16(), tmp_path / "half.pt2", "torch", CLASSES)
    images = images_of(model, 2)
    logits, _ = torch.export.load(tmp_path / "half.pt2").module()(images)
    torch.testing.assert_close(logits.double(), by_hand(model, images), rtol=1e-4, atol=1e-4)


def test_export_writes_no_program_with_other_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a translation that swaps the channels of two heads."""
    right = export._LogitsAndScores.forward
    wrong: Any = lambda self, images: [1.01 * x for x in right(self, images)]  # noqa: E731
    monkeypatch.setattr(export._LogitsAndScores, "forward", wrong)
    (tmp_path / "classifier.pt2").write_bytes(b"what was there before")
    with pytest.raises(SssdError, match=r"classifier.pt2 was not written: .* the limit is"):
        export_classifier(model_of("mean, grey"), tmp_path, "torch", CLASSES)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"what was there before"]


def test_export_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"onnxruntime is missing: pip install 'sssd-fast\[export\]'"
    with pytest.raises(DependencyError, match=message):
        export_classifier(model_of("mean, grey"), tmp_path, "onnx", CLASSES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_huggingface_folder_classifies_like_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    """transformers loads model, class names and pixel statistics; logits are those by hand."""
    import transformers

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    tree = {"image_size": 32, "width": 24, "depth": 2, "heads": 3, "mean": 0.4, "std": 0.2}
    crops = 5 if pool == "mean" else 1
    sections = {"model": {**tree, "in_channels": 3}, "evaluate": {"crops": crops}}
    config = Config.model_validate(sections)
    model = Classifier(config.model, 2, pool)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {"task": "finetune", "model": model.state_dict(), "config": to_dict(config)}
    path = tmp_path / "run" / "checkpoints" / "step-0000001.pt"
    state |= {"classes": ["covid", "a: b"], "pool": pool, "grey_range": (0, 4095)}
    save_checkpoint(path, state)
    evaluation = tmp_path / "run" / "eval" / "test" / "metrics.json"
    evaluation.parent.mkdir(parents=True)
    rates = {"n": 9, "accuracy": 0.75, "sensitivity": None, "specificity": 0.5, "auc": 0.5}
    evaluation.write_text(json.dumps({"image": rates}))
    out = tmp_path / "exported"
    call = export_encoder(path, out, "huggingface").partition("load it with: ")[2]
    assert ("trust_remote_code=True" in call) == (pool == "mean")
    loaded = eval(call, {"transformers": transformers})
    assert loaded.config.id2label == {0: "covid", 1: "a: b"}
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    inputs = processor(images=list(pictures), return_tensors="pt")
    logits = loaded.eval()(**inputs).logits
    torch.testing.assert_close(logits.double(), by_hand(model, pictures), rtol=1e-4, atol=1e-4)
    card = (out / "README.md").read_text()
    views = ", scores averaged over 5 crops" if crops == 5 else ""
    assert f"Test split, 9 images{views}: accuracy 0.750, specificity 0.500, auc 0.500." in card
    assert "covid, a: b" in card
    assert "values 0 to 4095 become 0 to 255" in card


@pytest.mark.timm
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_timm_call_of_the_export_gives_the_models_outputs(tmp_path: Path, pool: str) -> None:
    import timm

    model = {"image_size": 32, "width": 24, "depth": 2, "heads": 3, "in_channels": 1}
    config = Config.model_validate({"model": model})
    tuned = Classifier(config.model, 2, pool)
    state = {"task": "finetune", "model": tuned.state_dict(), "config": to_dict(config)}
    path = tmp_path / "step-0000001.pt"
    save_checkpoint(path, {**state, "classes": ["a", "b"], "pool": pool})
    call = export_encoder(path, tmp_path / "e.safetensors", "timm").partition("load it with: ")[2]
    loaded = eval(call.partition("; images")[0], {"timm": timm})
    images = images_of(tuned, 2)[:, :, :, :32].repeat(1, 1, 2, 1)[:, :, :32]
    with torch.no_grad():
        logits = loaded.eval()((images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(logits.double(), by_hand(tuned, images), rtol=1e-4, atol=1e-4)


def checkpoints(folder: Path) -> tuple[Path, Path, Config]:
    """(pre-training, fine-tuning) checkpoints as the training loop writes them."""
    model = {"image_size": 32, "width": 24, "depth": 2, "heads": 3}
    model |= {"decoder_width": 16, "decoder_heads": 2}
    sizes = {"prototypes": 8, "head_hidden": 8, "head_bottleneck": 4}
    config = Config.model_validate({"model": model, "objective": sizes})
    common = {"config": to_dict(config), "optimizer": {}}
    trained = SSSD(config.model, config.objective).state_dict()
    save_checkpoint(folder / "pretrain.pt", {"task": "pretrain", "model": trained, **common})
    tuned = Classifier(config.model, 2, "cls").state_dict()
    extra = {"classes": ["covid", "normal"], "pool": "cls"}
    save_checkpoint(folder / "finetune.pt", {"task": "finetune", "model": tuned, **common, **extra})
    return folder / "pretrain.pt", folder / "finetune.pt", config


CALLS = {
    ("timm", "pretrain"): "timm.create_model",
    ("timm", "finetune"): "timm.create_model",
    ("huggingface", "pretrain"): "transformers.ViTModel.from_pretrained",
    ("huggingface", "finetune"): "transformers.ViTForImageClassification.from_pretrained",
}


@pytest.mark.parametrize("format_", ["timm", "huggingface"])
def test_export_encoder_reads_the_file_back(tmp_path: Path, format_: Any) -> None:
    pretrained, finetuned, config = checkpoints(tmp_path)
    for source in (pretrained, finetuned):
        out = tmp_path / f"{source.stem}_{format_}"
        first, load = export_encoder(source, out, format_).splitlines()
        assert first.startswith(str(out))
        assert first.endswith(f"tensors of {source} under {format_} names, read back equal")
        assert load.startswith(f"load it with: {CALLS[format_, source.stem]}(")
        want, got = (Classifier(config.model, 2, "cls") for _ in range(2))
        load_into(want, source)
        load_into(got, out)
        for name, tensor in got.state_dict().items():
            if name.startswith("encoder.") or source is finetuned:
                assert torch.equal(tensor, want.state_dict()[name]), name


def test_export_and_load_reject_a_damaged_checkpoint(tmp_path: Path) -> None:
    """The checksum of our checkpoints is verified, also when they are read as weights."""
    source, _, config = checkpoints(tmp_path)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        export_encoder(source, tmp_path / "out", "timm")
    with pytest.raises(CheckpointError, match="damaged"):
        load_into(Classifier(config.model, 2), source)
    assert not (tmp_path / "out").exists()
