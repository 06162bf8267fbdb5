"""A small synthetic image set, settings of a model that trains on it in a second, and one
trained run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sssd_fast.cli import main
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.evaluation import pictures

SETTINGS = """
model.name=tiny model.image_size=32 model.patch_size=8 model.width=32 model.depth=2
model.heads=2 model.decoder_width=16 model.decoder_depth=1 model.decoder_heads=2
objective.head_hidden=16 objective.head_bottleneck=8 objective.prototypes=24 tensorboard=false
threads=1 processes=1 device=cpu precision=fp32
pretrain.batch_size=8 pretrain.warmup_epochs=1 pretrain.epochs=3
pretrain.base_lr=0.01 pretrain.image_epochs=0 finetune.batch_size=8 finetune.warmup_epochs=1
finetune.epochs=3 finetune.drop_path=0.1 evaluate.batch_size=16 evaluate.bootstrap=100
"""
TINY = SETTINGS.split()


@pytest.fixture(scope="session")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 synthetic slices of 32 x 32 in two folders."""
    folder = tmp_path_factory.mktemp("data") / "slices"
    write_synthetic_dataset(folder, 48, (32, 32), seed=1)
    return folder


@pytest.fixture
def tiny(slices: Path) -> list[str]:
    return [*TINY, f"data.source={slices}"]


@pytest.fixture(scope="session")
def trained(slices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `sssd-fast run` with short runs in pretrain/ and finetune/; do not change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    steps = ["pretrain.max_steps=2", "finetune.max_steps=4"]
    assert main(["run", "--out", str(out), *TINY, f"data.source={slices}", *steps]) == 0
    return out


@pytest.fixture(scope="session", autouse=True)
def _coarse_pictures() -> Iterator[None]:
    """Drawing in full resolution would take most of the time of a run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 40)
        patch.setattr(pictures, "LAYOUT", None)
        yield
