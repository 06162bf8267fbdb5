"""The configuration and the epochs that `run` chooses, with a step of known duration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sssd_fast import api, pipeline
from sssd_fast.config import Config, load_config, shipped_configs
from sssd_fast.errors import ConfigError
from sssd_fast.performance import schedule
from sssd_fast.performance.schedule import choose_config, fit_minutes
from sssd_fast.run.device import World

CPU = World(torch.device("cpu"))
STAGES = ("pretrain", "finetune")


@pytest.fixture(autouse=True)
def _known_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of pre-training takes 0.1 s, one of fine-tuning 0.5 s."""

    def seconds(config: Config, stage: str, *_: object) -> float:
        return 0.1 if stage == "pretrain" else 0.5

    monkeypatch.setattr(schedule, "time_steps", seconds)


def _config(*settings: str) -> Config:
    sizes = ["pretrain.batch_size=50", "finetune.batch_size=25"]
    epochs = ["pretrain.epochs=100", "pretrain.warmup_epochs=10", "finetune.epochs=20"]
    return load_config(None, [*sizes, *epochs, "finetune.warmup_epochs=2", *settings])


def test_epochs_fill_the_minutes_in_the_proportions_of_the_configuration() -> None:
    lines: list[str] = []
    # 1000 images: 100 epochs x 20 steps x 0.1 s and 20 x 40 x 0.5 s, plus 15 %: 690 s
    whole = fit_minutes(_config(), STAGES, 1000, None, CPU, lines.append)
    assert whole == _config()
    assert "100 epochs of pretrain in about 3.8 minutes and 20 epochs of finetune" in lines[0]
    assert "together about 12 minutes" in lines[0]
    # minutes for half of each epoch count
    half = fit_minutes(_config(), STAGES, 1000, 690 / 120 + 0.01, CPU, lines.append)
    assert (half.pretrain.epochs, half.pretrain.warmup_epochs) == (50, 5)
    assert (half.finetune.epochs, half.finetune.warmup_epochs) == (10, 1)
    assert half.finetune.validate_epochs <= 10


def test_minutes_for_less_than_an_epoch_are_an_error() -> None:
    with pytest.raises(ConfigError, match="one epoch of finetune takes about 23 s"):
        fit_minutes(_config(), STAGES, 1000, 0.2, CPU, print)


def test_shared_batches_and_accumulation_count_as_in_the_schedule_of_a_run() -> None:
    lines: list[str] = []
    accumulate = _config("pretrain.accumulate=4")
    # 5 steps of four micro-batches; two of them are timed
    fit_minutes(accumulate, ("pretrain",), 1000, None, CPU, lines.append)
    assert "100 epochs of pretrain in about 1.9 minutes" in lines[0]


def test_a_limit_of_steps_is_announced_instead_of_the_epochs() -> None:
    lines: list[str] = []
    fit_minutes(_config("pretrain.max_steps=1200"), STAGES, 1000, None, CPU, lines.append)
    assert "at most 1200 steps of pretrain in about 2.3 minutes and 20 epochs" in lines[0]


def test_steps_are_timed_with_the_batch_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """batch: auto may be much smaller than the batch of the settings, which may not fit."""

    def two_images(config: Config, stage: str, *_: object, **__: object) -> Config:
        fits = getattr(config, stage).model_copy(update={"batch_size": 2, "batch": None})
        return config.model_copy(update={stage: fits})

    timed: list[int] = []

    def seconds(
        config: Config, stage: str, classes: int, world: World, images: int, *_: int
    ) -> float:
        timed.append(images)
        return 0.1

    monkeypatch.setattr(pipeline, "resolve_batch", two_images)
    monkeypatch.setattr(pipeline, "_once", lambda *_, **__: {})
    monkeypatch.setattr(schedule, "time_steps", seconds)
    config = load_config(None, ["pretrain.batch=auto", "finetune.batch=auto", "device=cpu"])
    pipeline.run_all(config, tmp_path / "run")
    assert timed == [2, 2]


def test_auto_chooses_by_images_and_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_config(746, cpu)[0] == "paper_covid_ct_cpu"
    assert choose_config(2481, cpu)[0] == "paper_sars_cov_2_cpu"
    for gib, name in ((8, "8gb"), (16, "16gb"), (80, "24gb")):
        card = type("Card", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert choose_config(746, gpu)[0] == name
        assert name in shipped_configs()
    for label in ("COVID", "non-COVID"):
        (tmp_path / label).mkdir()
        Image.new("L", (32, 32)).save(tmp_path / label / "a.png")
    chosen = api._config({"config": "auto"}, tmp_path)
    assert chosen == load_config("paper_covid_ct_cpu", [f"data.source={tmp_path}"])
    assert "because the device is a CPU and the set has 2 images" in capsys.readouterr().out
