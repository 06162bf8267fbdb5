"""Configuration: shipped files load, overrides apply, and everything wrong is refused at once with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sssd_fast.config import VIT_SIZES, from_dict, load_config, shipped_configs, to_dict, to_yaml
from sssd_fast.errors import ConfigError


def test_the_promised_configurations_ship() -> None:
    assert set(shipped_configs()) >= {
        "cpu_smoke",
        "8gb",
        "16gb",
        "24gb",
        "paper_covid_ct",
        "paper_sars_cov_2",
    }


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_load_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config == from_dict(to_dict(config))


def test_overrides_reach_nested_keys_with_yaml_types() -> None:
    config = load_config(
        "cpu_smoke",
        [
            "pretrain.base_lr=3e-4",
            "model.image_size=[64,96]",
            "data.source=my data: folder (1)/100%",
            "objective.detach_teacher=true",
            "pretrain.clip_grad=null",
            "pretrain.augment.crop_scale=[0.3, 1]",
        ],
    )
    assert config.pretrain.base_lr == 3e-4  # plain YAML 1.1 reads 3e-4 as a string
    assert config.model.image_size == (64, 96)
    assert config.data.source == "my data: folder (1)/100%"
    assert config.objective.detach_teacher is True
    assert config.pretrain.clip_grad is None
    assert config.pretrain.augment.crop_scale == (0.3, 1.0)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            "cpu_smoke",
            [
                "pretrain.epoch=3",
                "model.mask_ratio=1.5",
                "finetune.mixup=-1",
                "objective.kind=dono",
                "pretrain.batch_size=1.5",
                "layer_decay=0.5",
                "nonsense",
            ],
        )
    text = str(caught.value)
    assert text.startswith("7 problems in the configuration in cpu_smoke")
    assert "pretrain.epoch: unknown key; did you mean 'epochs'?" in text
    assert "layer_decay: unknown key; did you mean finetune.layer_decay?" in text
    assert "model.mask_ratio: got 1.5, needs to be less than 1" in text
    assert "finetune.mixup: got -1, needs to be greater than or equal to 0" in text
    assert "objective.kind: got 'dono', needs to be 'dino', 'cosine', 'mse' or 'smooth_l1'" in text
    assert "pretrain.batch_size: got 1.5, needs to be a valid integer" in text
    assert "override 'nonsense' needs the form key=value" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image_size=100", "needs a multiple of patch_size 8 (nearest: 96)"),
        ("model.heads=5", "width is 128, needs a multiple of heads (5)"),
        ("model.mask_ratio=0.999", "leaves 0 visible; needs at least 1 visible and 1 masked"),
        (
            "model.mean=[0.1,0.2]",
            "mean has 2 values, needs 1 or one per channel (in_channels is 1)",
        ),
        ("model.patch_size=10", "needs to be 8, 14 or 16"),
        ("pretrain.warmup_epochs=1000", "warmup_epochs is 1000, needs to be below epochs"),
        ("data.split=randm", "split is 'randm', needs random, block, patient, kfold, manifest"),
        ("data.split=manifest", "needs data.manifest=FILE.csv with a split column"),
        ("data.cache=ram", "cache is 'ram', needs auto, none, or a folder with a slash"),
        ("data.loader=ffcv", "data.loader: got 'ffcv'"),
        ("data.fold=7", "fold is 7, needs to be below folds (5)"),
        ("finetune.augment.crop_scale=[0.9,0.1]", "needs the smaller number first"),
        ("pretrain.base_lr=nan", "pretrain.base_lr"),
        ("seed.x=1", "seed"),
    ],
)
def test_contradictions_name_what_is_needed(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("cpu_smoke", [override])
    assert message in str(caught.value)


def test_cls_pooling_needs_a_cls_token() -> None:
    with pytest.raises(
        ConfigError, match=r"finetune.pool is 'cls', which needs model.cls_token=true"
    ):
        load_config("cpu_smoke", ["finetune.pool=cls", "model.cls_token=false"])


def test_unknown_names_and_bad_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cpu_smoke'"):
        load_config("cpu_smok")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    for text, message in (
        ("model: {a: [}", "not valid YAML"),
        ("- 1\n", "needs sections"),
        ("model:\n  name: tiny\n  name: base\n", "'name' stands twice"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path) == load_config()


def test_the_written_configuration_is_plain_yaml() -> None:
    tree = yaml.safe_load(to_yaml(load_config("cpu_smoke")))
    assert tree["model"]["image_size"] == [96, 96]
    assert VIT_SIZES["base"] == (768, 12, 12)
