"""Settings: shipped files load, overrides apply, all mistakes are reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sssd_fast.config import (
    REMOVED,
    Config,
    _keys,
    changed,
    from_dict,
    load_config,
    shipped_configs,
    to_dict,
    to_yaml,
)
from sssd_fast.errors import ConfigError


def problems(overrides: list[str], source: str | None = "cpu_smoke") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_load_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config == from_dict(to_dict(config))
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)  # plain YAML for other programs
    assert shipped_configs()[name].endswith(".")


def test_every_setting_has_a_description_in_yaml_and_schema() -> None:
    lines = to_yaml(Config()).split("\n")
    sections = [line for line in lines if line.endswith(":")]
    comments = [line for line in lines if line.lstrip().startswith("# ") and line.endswith(".")]
    assert len(comments) == len(sections) + len(list(_keys()))
    schema = Config.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, setting in model["properties"].items():
            assert "$ref" in setting or setting["description"], name


def test_overrides_reach_nested_keys_with_yaml_types() -> None:
    overrides = [
        "pretrain.base_lr=3e-4",  # plain YAML 1.1 reads it as a string
        "model.image_size=[64,96]",
        "data.source=my data: folder (1)/100%",
        "objective.stop_gradient=teacher",
        "pretrain.clip_grad=null",
        "pretrain.augment.crop_scale=[0.3, 1]",
        "finetune.augment={hflip: 0.25}",
    ]
    for config in (load_config("cpu_smoke", overrides), changed(load_config("8gb"), overrides)):
        assert config.pretrain.base_lr == 3e-4
        assert config.model.image_size == (64, 96)
        assert config.data.source == "my data: folder (1)/100%"
        assert config.objective.stop_gradient == "teacher"
        assert config.pretrain.clip_grad is None
        assert config.pretrain.augment.crop_scale == (0.3, 1.0)
        assert config.finetune.augment.hflip == 0.25
        assert config.finetune.augment.crop_scale[0] in (0.7, 0.5)  # as in the file


def test_objective_name_sets_its_keys_unless_they_are_given() -> None:
    predictor = load_config(None, ["objective.name=predictor"]).objective
    assert (predictor.kind, predictor.heads, predictor.stop_gradient) == (
        "mse",
        "student",
        "teacher",
    )
    cosine = ["objective.name=predictor", "objective.kind=cosine", "objective.weight=0.5"]
    config = load_config(None, cosine)
    assert (config.objective.kind, config.objective.pooling) == ("cosine", "token")
    # a new name replaces all keys of the former one, and no other setting
    renamed = changed(config, ["objective.name=sinkhorn"]).objective
    assert (
        renamed == load_config(None, ["objective.name=sinkhorn", "objective.weight=0.5"]).objective
    )
    assert "needs heads 'both'" in problems(["objective.kind=dino"])


def test_every_problem_is_reported_at_once() -> None:
    wrong = """pretrain.epoch=3 model.mask=0.5 model.patch_size=10 finetune.mixup=-1
        objective.kind=dono pretrain.batch_size=1.5 layer_decay=0.5 nonsense a..b=1"""
    text = problems(wrong.split())
    assert text.startswith("9 problems in the configuration in cpu_smoke")
    for line in (
        "pretrain.epoch: unknown key; did you mean 'pretrain.epochs'?",
        "model.mask: unknown key; did you mean 'model.mask_ratio'?",
        "layer_decay: unknown key; did you mean 'finetune.layer_decay'?",
        "model.patch_size: got 10, needs to be 8, 14 or 16",
        "finetune.mixup: got -1, needs to be greater than or equal to 0",
        "objective.kind: got 'dono', needs to be 'dino', 'cosine', 'mse' or 'smooth_l1'",
        "pretrain.batch_size: got 1.5, needs to be a valid integer",
        "'nonsense' needs the form key=value",
        "'a..b=1' needs the form key=value",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image_size=100", "needs a multiple of patch_size 8 (nearest: 96)"),
        ("model.heads=5", "width is 128, needs a multiple of heads (5)"),
        (
            "model.mask_ratio=0.999",
            "leaves 0 of 144 patches visible; needs at least 1 visible and 1 masked",
        ),
        ("model.mask_ratio=1.5", "model.mask_ratio: got 1.5, needs to be less than 1"),
        (
            "evaluate.threshold=2",
            "evaluate.threshold: got 2, needs to be 'auto' or be less than or equal to 1",
        ),
        (
            "processes=x",
            "processes: got 'x', needs to be 'auto' or be a valid integer",
        ),
        ("model.mean=[0.1,0.2]", "mean has 2 values, needs 1 or one per channel"),
        (
            "data.split=randm",
            "split is 'randm', needs auto, random, block, patient, kfold, manifest",
        ),
        ("data.split=manifest", "needs data.manifest=FILE.csv with splits"),
        ("data.cache=ram", "cache is 'ram', needs auto, none or a folder like"),
        ("data.loader=ffcv", "data.loader: got 'ffcv'"),
        ("data.fold=7", "fold is 7, needs to be below folds (5)"),
        ("finetune.augment.crop_scale=[0.9,0.1]", "needs the smaller number first"),
        ("pretrain.base_lr=nan", "pretrain.base_lr"),
        ("step={compile: false, cuda_graphs: true}", "needs compile true or auto"),
        ("step={compile: false, activation_budget: 0.5}", "use checkpoint"),
        ("step={compile: true, checkpoint: full}", "lower activation_budget instead"),
        ("finetune={pool: cls}", "finetune.pool is 'cls', which needs model.cls_token=true"),
        ("seed.x=1", "seed"),
        ("data.source=${", "data.source"),
    ],
)
def test_contradictions_name_what_is_needed(override: str, message: str) -> None:
    cls_token = ["model.cls_token=false"] if "pool" in override else []
    assert message in problems([override, *cls_token])


def test_shortened_run_scales_its_warmup() -> None:
    lines: list[str] = []
    config = load_config("8gb", ["pretrain.epochs=2", "finetune.epochs=50"], lines.append)
    assert config.pretrain.warmup_epochs == pytest.approx(2 * 40 / 800)
    assert config.finetune.warmup_epochs == 5  # still below the epochs
    assert lines == ["pretrain.warmup_epochs is 0.1 instead of 40: 5% of 2 epochs"]
    shortened = changed(load_config("8gb"), ["pretrain.epochs=2"])
    assert shortened == changed(config, ["finetune.epochs=100"])
    with pytest.raises(ConfigError, match="needs to be below epochs"):
        load_config("8gb", ["pretrain.epochs=2", "pretrain.warmup_epochs=2"])


def test_warmup_of_a_broken_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for text in ("pretrain: 3\n", "pretrain: {epochs: many}\n", "pretrain: {warmup_epochs: x}\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"problems? in the configuration"):
            load_config(path, ["pretrain.epochs=2", "model.width=x"])


@pytest.mark.parametrize("key", REMOVED)
def test_removed_keys_name_the_replacement(key: str) -> None:
    assert f"{key}: a setting of an earlier version; {REMOVED[key]}" in problems([f"{key}=1"])


def test_load_config_explains_unknown_names_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cpu_smoke'"):
        load_config("cpu_smok")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    for text, message in (
        ("model: {a: [}", "not valid YAML"),
        ("- 1\n", "needs sections"),
        ("3", "not valid YAML"),
        ("model:\n  name: tiny\n  name: base\n", "found duplicate key name .* line 3"),
        ("model: 3", "needs to be a valid dictionary"),
        ("1: 2", "1: unknown key"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    path.write_text("")
    assert load_config(path) == load_config() == Config()
