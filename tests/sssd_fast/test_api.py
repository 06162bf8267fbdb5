"""`import sssd_fast as sf`: the functions train, evaluate and predict as the commands do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.linear_model import LogisticRegression

import sssd_fast as sf
from sssd_fast.config import load_config, to_yaml
from sssd_fast.data.index import DataIndex
from sssd_fast.data.split import split_csv
from sssd_fast.errors import CheckpointError, ConfigError, DataError
from sssd_fast.evaluation.predict import load_trained, predict_files
from sssd_fast.finetune import FinetuneTask
from sssd_fast.run.checkpoint import find_checkpoint, load_checkpoint
from sssd_fast.run.folder import RUN_MARKER

ROOT = Path(sf.__file__).resolve().parent.parent


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_package_imports_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, sssd_fast as sf; assert 'torch' not in sys.modules; sf.pretrain; "
        "assert 'torch' not in sys.modules; import sssd_fast.run.device, sssd_fast.pretrain; "
        "assert callable(sf.run) and callable(sf.pretrain)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(sf.__all__) <= set(dir(sf))
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        sf.pretrian  # noqa: B018


def test_api_functions_give_the_metrics_of_the_commands(
    slices: Path, trained: Path, tiny: list[str], tmp_path: Path
) -> None:
    """The same settings and seed give the metrics of `sssd-fast run`, bit for bit."""
    given = [*tiny, "pretrain.max_steps=2"]
    # what run chooses for 48 images on a CPU
    config = "paper_covid_ct_cpu"
    pre = sf.pretrain(slices, out=tmp_path / "pre", config=config, settings=given)
    assert (pre.out / RUN_MARKER).is_file()
    settings = {"finetune.max_steps": 4}
    fine = sf.finetune(slices, init=pre.out, out=tmp_path / "fine", settings=settings)
    other = json.loads((trained / "finetune" / "eval/test/metrics.json").read_text())
    assert json.loads(json.dumps(fine.metrics["image"])) == other["image"]
    val = sf.evaluate(fine.out, split="val")
    assert val.metrics["split"] == "val"
    assert (fine.out / "command.txt").read_text() == "sssd_fast.finetune\n"


def test_python_blocks_of_the_readme_run(
    slices: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed, but for the folder of images and a small configuration."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    trainer, kernels = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    small = load_config(None, [*tiny, "pretrain.max_steps=2", "finetune.max_steps=2"])
    (tmp_path / "small.yaml").write_text(to_yaml(small))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(trainer.replace("path/to/ct", str(slices)).replace("8gb", "./small.yaml"), names)
    assert names["result"].metrics["split"] == "test"
    assert names["encoder"](torch.zeros(1, 1, 32, 32)).shape == (1, 32)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
    sizes |= {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1}
    sizes |= {"decoder_num_attention_heads": 3, "decoder_intermediate_size": 48}
    config = transformers.ViTMAEConfig(**sizes)
    names = {"model": transformers.ViTMAEForPreTraining(config)}
    exec(kernels, names)
    assert "parts replaced, 0 left to the host" in str(names["report"])


def test_dry_run_of_a_resumed_run_is_rejected(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dry-run tries a new run, --resume continues .*run"):
        sf.run(resume=trained, dry_run=True)


def test_predict_accepts_files_and_arrays(trained: Path, slices: Path) -> None:
    paths = sorted(slices.glob("*/*.png"))[:3]
    files = sf.predict(trained, paths)
    arrays = sf.predict(trained, np.stack([read(path) for path in paths]))
    rgb = sf.predict(trained, [np.repeat(read(path)[:, :, None], 3, 2) for path in paths])
    one = sf.predict(trained, read(paths[0]))
    np.testing.assert_array_equal(files.scores, arrays.scores)
    np.testing.assert_array_equal(files.scores, rgb.scores)
    np.testing.assert_allclose(files.scores[:1], one.scores, atol=1e-6)
    np.testing.assert_allclose(files.scores.sum(1), 1)
    assert files.labels == [files.classes[i] for i in files.scores.argmax(1)]
    with pytest.raises(DataError, match=r"image 1 is float64 \[8, 8\], needs uint8"):
        sf.predict(trained, [paths[0], np.zeros((8, 8))])


def test_predict_shows_16_bit_images_as_in_training(trained: Path, tmp_path: Path) -> None:
    """The value 4096 in one pixel must not change the scale of the others."""
    model = replace(load_trained(trained / "finetune", torch.device("cpu")), grey_range=(0, 4095))
    values = np.random.default_rng(0).integers(0, 2000, (32, 32), dtype=np.uint16)
    values[0, 0] = 4096
    Image.fromarray(values).save(tmp_path / "a.png")
    scaled = np.rint(np.minimum(values, 4095) * 255.0 / 4095).astype(np.uint8)
    scores, bad = predict_files(model, [tmp_path / "a.png", scaled], batch_size=2, precision="fp32")
    assert not bad
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)


def test_classifiers_record_the_grey_range_of_their_images() -> None:
    index = DataIndex(Path("ct"), ["a", "b"], [], grey_range=(0, 4095))
    task: Any = SimpleNamespace(index=index, settings=SimpleNamespace(pool="mean"))
    assert FinetuneTask.extra_state(task)["grey_range"] == (0, 4095)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_load_encoder_returns_the_features_of_the_model(
    trained: Path, slices: Path, stage: str
) -> None:
    """Against the checkpoint's weights in the model's modules, pooled by hand."""
    from sssd_fast.config import from_dict
    from sssd_fast.model import MAE, Classifier

    run = trained / stage
    encoder = sf.load_encoder(run)
    state = load_checkpoint(find_checkpoint(run))
    model = from_dict(state["config"]).model
    pixels = torch.from_numpy(np.stack([read(p) for p in sorted(slices.glob("*/*.png"))[:4]]))[
        :, None
    ]
    with torch.no_grad():
        features = encoder(pixels)
        if stage == "finetune":
            classifier = Classifier(model, 2, state["pool"]).eval()
            classifier.load_state_dict(state["model"])
            expected = classifier.features(pixels)
        else:
            mae = MAE(model)
            mae.load_state_dict({k[4:]: v for k, v in state["model"].items() if k[:4] == "mae."})
            expected = mae.encoder((pixels / 255 - model.mean[0]) / model.std[0])[:, 1:].mean(1)
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(encoder(pixels / 255), features, atol=1e-5, rtol=1e-4)
    assert features.shape == (4, encoder.width)
    assert not encoder.training
    assert encoder.image_size == (32, 32)


def test_probe_is_logistic_regression_on_frozen_features(trained: Path, tmp_path: Path) -> None:
    """The folded head gives scikit-learn's probabilities on the pre-trained encoder's features."""
    settings = {"probe.inverse_penalties": [0.1], "precision": "fp32", "evaluate.crops": 1}
    run = sf.probe(init=trained / "pretrain", out=tmp_path / "probe", settings=settings).out
    before = load_checkpoint(find_checkpoint(trained / "pretrain", "last"))["model"]
    after = load_checkpoint(find_checkpoint(run))["model"]
    blocks = [name for name in after if name.startswith("encoder.blocks.")]
    assert all(torch.equal(after[name], before[f"mae.{name}"]) for name in blocks)

    index = DataIndex.load(run / "index.json")
    split = split_csv(index, run / "split.csv")
    encoder = sf.load_encoder(run)

    def features(ids: list[int]) -> np.ndarray:
        images = torch.from_numpy(np.stack([read(index.file(i)) for i in ids]))[:, None]
        with torch.no_grad():
            return encoder(images).double().numpy()

    train, test = features(split.train), features(split.test)
    mean, std = train.mean(0), train.std(0) + 1e-6
    labels = [index.records[i].label for i in split.train]
    fitted = LogisticRegression(C=0.1, max_iter=5000).fit((train - mean) / std, labels)
    found = sf.predict(run, [index.file(i) for i in split.test], precision="fp32")
    np.testing.assert_allclose(found.scores, fitted.predict_proba((test - mean) / std), atol=2e-4)


def test_api_reports_bad_arguments_before_writing_anything(tmp_path: Path) -> None:
    out = tmp_path / "none"
    with pytest.raises(ConfigError, match="unknown key; did you mean"):
        sf.pretrain("ct", out=out, settings={"pretrain.epoch": 3})
    with pytest.raises(ConfigError, match="needs a list or a dict"):
        sf.run("ct", out=out, settings="pretrain.epochs=3")
    with pytest.raises(DataError, match="no such"):
        sf.finetune("/no/such: folder", out=out)
    with pytest.raises(ConfigError, match="init_norm is 'zero'"):
        sf.pretrain(out=out, init="x", init_norm="zero", overwrite=True)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="neither a checkpoint file nor a run folder"):
        sf.load_encoder(tmp_path)
