"""Whichever provider feeds it, a model is trained to the same loss; on real CT images the providers agree as documented."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from sssd_fast.cli import main
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.loaders import AugmentSpec, build_loader

OTHERS = ["resident"] + ["dali"] * bool(find_spec("nvidia") and find_spec("nvidia.dali"))


def trained(out: Path, tiny: list[str], *settings: str) -> float:
    """The last validation loss."""
    assert main(["pretrain", "--out", str(out), *tiny, "pretrain.max_steps=60", "pretrain.epochs=20", *settings]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float([r["loss"] for r in records if r["kind"] == "val"][-1])


def test_a_model_ends_at_the_same_loss_with_each_provider(tmp_path: Path, tiny: list[str]):
    """The distance between providers is far below that between two seeds."""
    reference = trained(tmp_path / "torch", tiny, "data.loader=torch")
    other_seed = trained(tmp_path / "seed", tiny, "data.loader=torch", "seed=1")
    noise = abs(other_seed - reference)
    assert noise > 0
    for provider in OTHERS:
        loss = trained(tmp_path / provider, tiny, f"data.loader={provider}", "data.cache=none")
        assert abs(loss - reference) < 0.25 * noise, (provider, loss, reference, other_seed)


@pytest.fixture(params=["covid-ct", "sars-cov-2-ct"])
def real(request: pytest.FixtureRequest) -> DataIndex:
    return check_data(Path(os.environ["SSSD_FAST_DATA"]) / request.param, accept_wrong_extension=True)


@pytest.mark.realdata
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("train", [None, AugmentSpec()], ids=["evaluate", "train"])
def test_real_images_look_the_same_through_every_provider(real: DataIndex, train: AugmentSpec | None, channels: int):
    ids = np.random.default_rng(0).permutation(len(real))[:128].tolist()
    settings = {"batch_size": 32, "image_size": (224, 224), "channels": channels, "train": train, "cache": "none"}
    reference = list(build_loader(real, ids, provider="torch", **settings).epoch(0))  # type: ignore[arg-type]
    for provider, largest, mean in (("resident", 2, 0.02), ("dali", 45, 0.5)):
        if provider not in ("resident", *OTHERS):
            continue
        loader = build_loader(real, ids, provider=provider, **settings)  # type: ignore[arg-type]
        for a, b in zip(reference, loader.epoch(0), strict=True):
            difference = (a.images.int() - b.images.int()).abs()
            assert difference.max() <= largest
            per_image = difference.float().flatten(1).mean(1)
            assert per_image.max() <= 1
            assert per_image.mean() <= mean
        loader.close()
