"""A model reaches the same loss with each provider; on real CT images the providers agree as
documented.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sssd_fast.cli import main
from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex, check_data
from tests.sssd_fast.loaders.loading import PLAIN, loader_of

OTHERS = {"resident": (2, 0.02), "dali": (45, 0.5)}  # largest and mean difference to Pillow


def trained(out: Path, tiny: list[str], *settings: str) -> float:
    """The last validation loss."""
    steps = ["pretrain.max_steps=60", "pretrain.epochs=20"]
    assert main(["pretrain", "--out", str(out), *tiny, *steps, *settings]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float([r["loss"] for r in records if r["kind"] == "val"][-1])


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory, slices: Path) -> tuple[float, float]:
    """(loss with the torch loader, its distance to that of another seed)"""
    from tests.sssd_fast.conftest import TINY

    out, tiny = tmp_path_factory.mktemp("torch"), [*TINY, f"data.source={slices}"]
    losses = [
        trained(out / f"{seed}", tiny, "data.loader=torch", f"seed={seed}") for seed in (0, 1)
    ]
    return losses[0], abs(losses[1] - losses[0])


@pytest.mark.parametrize("provider", OTHERS)
def test_model_reaches_the_same_loss_with_each_provider(
    tmp_path: Path, tiny: list[str], by_torch: tuple[float, float], provider: str
):
    """The distance between providers is far below that between two seeds."""
    reference, noise = by_torch
    loss = trained(tmp_path / "run", tiny, f"data.loader={provider}", "data.cache=none")
    assert abs(loss - reference) < 0.25 * noise


@pytest.fixture(params=["covid-ct", "sars-cov-2-ct"])
def real(request: pytest.FixtureRequest) -> DataIndex:
    return check_data(
        Path(os.environ["SSSD_FAST_DATA"]) / request.param, accept_wrong_extension=True
    )


@pytest.mark.realdata
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [None, PLAIN], ids=["evaluate", "train"])
@pytest.mark.parametrize("provider", OTHERS)
def test_real_images_are_equal_in_every_provider(
    real: DataIndex, provider: str, augment: AugmentConfig | None, channels: int
):
    ids = np.random.default_rng(0).permutation(len(real))[:128].tolist()
    settings = {"batch_size": 32, "image_size": (224, 224), "channels": channels}
    settings |= {"augment": augment}
    reference, loader = (
        loader_of(real, ids, provider=name, **settings) for name in ("torch", provider)
    )
    largest, mean = OTHERS[provider]
    for a, b in zip(reference.epoch(0), loader.epoch(0), strict=True):
        difference = (a.images.int() - b.images.int()).abs()
        assert difference.max() <= largest
        per_image = difference.float().flatten(1).mean(1)
        assert per_image.max() <= 1
        assert per_image.mean() <= mean
    loader.close()
