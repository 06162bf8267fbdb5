"""The count of the compiled step against what the model's layers say, and what each setting must change in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from benchmarks.compiled_step import COUNTABLE, Counts, count
from sssd_fast.config import Config, load_config
from sssd_fast.objective import SSSD

pytestmark = pytest.mark.skipif(not COUNTABLE, reason="counting needs the Inductor of torch 2.13")
BATCH = 16
SETTINGS = [
    "model.image_size=64", "model.patch_size=8", "model.width=64", "model.depth=1", "model.heads=2", "model.decoder_width=64",
    "model.decoder_depth=1", "model.decoder_heads=2", "objective.head_hidden=64", "objective.head_bottleneck=32",
    "objective.prototypes=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, SETTINGS)


@pytest.fixture(scope="module")
def counts(config: Config) -> dict[tuple[torch.dtype, bool], Counts]:
    variants = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    return {
        (residual, fused): count(
            config, BATCH, residual=residual, fused_mlp=fused, budget=1.0, target="triton"
        )
        for residual, fused in variants
    }


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_every_product_of_the_model_is_counted(
    config: Config, counts: dict[tuple[torch.dtype, bool], Counts]
) -> None:
    """Each linear layer is one product forward and two backward; the patch projection has no gradient of its input."""
    model = SSSD(config.model, config.objective)
    layers = (
        sum(isinstance(m, nn.Linear) for m in model.modules()) + 2
    )  # and the two matrices of prototypes
    for found in counts.values():
        assert found.kernels["products"] == 3 * layers + 2


def test_the_triton_kernels_of_the_step_are_all_there(
    counts: dict[tuple[torch.dtype, bool], Counts], config: Config
) -> None:
    blocks = len(SSSD(config.model, config.objective).mae.encoder.blocks) + 1
    plain, fused = (counts[torch.bfloat16, f].kernels["ours"] for f in (False, True))
    assert fused - plain == 2 * blocks  # GELU forward and backward of each block
    # attention forward and backward, masking, gather, positions, restore and its backward, loss and its backward
    assert plain >= 2 * blocks + 7


def test_settings_move_the_count_as_they_should(
    counts: dict[tuple[torch.dtype, bool], Counts],
) -> None:
    fp32, bf16, fused = counts.values()
    assert bf16.bytes["Inductor's"] < fp32.bytes["Inductor's"]
    assert bf16.saved_bytes < fp32.saved_bytes
    assert fused.saved_bytes < bf16.saved_bytes
    tokens = BATCH * (
        1 + 16 + 64
    )  # of the encoder's block, and of the decoder's, which drops its cls row
    spared = bf16.saved_bytes - fused.saved_bytes
    assert spared == pytest.approx(
        2 * 4 * 64 * tokens, rel=1e-3
    )  # GELU's output in bf16, four times the width
    assert fused.kernels["Inductor's"] < bf16.kernels["Inductor's"]
