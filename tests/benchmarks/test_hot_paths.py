"""The CPU's hot paths under pytest-benchmark, to compare commits; every result is checked as well.

`make bench-cpu` times them and saves the times. With --benchmark-disable each runs once as a test.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mae_kernels import (
    crop_resize,
    embed_patches,
    masked_reconstruction_loss,
    random_masking,
    restore_tokens,
)
from sssd_fast.config import AugmentConfig, load_config
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.loaders import SampleOrder, build_loader
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.run.device import World
from sssd_fast.step import Step, TaskLoss

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip(
    "pytest_benchmark", reason="pytest-benchmark, which times the CPU's hot paths, is not installed"
)

CPU = torch.device("cpu")
IMAGES, HEIGHT, WIDTH = 64, 48, 56


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 synthetic slices, old enough to be remembered by a check."""
    folder = write_synthetic_dataset(
        tmp_path_factory.mktemp("data") / "slices", IMAGES, (HEIGHT, WIDTH), seed=5
    )
    for file in folder.glob("*/*.png"):
        os.utime(file, (time.time() - 3600,) * 2)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> DataIndex:
    return check_data(folder)


@pytest.fixture
def model() -> SSSD:
    config = load_config("cpu_smoke")
    torch.manual_seed(0)
    return SSSD(config.model, config.objective)


def test_training_step(benchmark: BenchmarkFixture, model: SSSD) -> None:
    """The loss of the same batch decreases."""
    images = torch.randint(0, 256, (2, 1, 96, 96), dtype=torch.uint8)
    noise_BL = torch.rand(2, (96 // 8) ** 2)

    def loss(module: torch.nn.Module, batch: Tensor, step: int, micro: int) -> TaskLoss:
        out = module(batch, noise_BL)
        return TaskLoss(out.total, {}, out.batch_center)

    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95))
    step = Step(model, optimizer, loss, world=World(CPU), update_state=model.update_center)
    first = step([images], 0, 1e-3)
    last = benchmark(step, [images], 0, 1e-3)
    assert bool(last.finite)
    assert float(last.losses["loss"]) < float(first.losses["loss"])


def test_mask_embed_restore_and_loss(benchmark: BenchmarkFixture) -> None:
    """The four ops in a row, forward and backward, against plain PyTorch."""
    batch, patch, grid, width, keep = 4, 8, 8, 64, 16
    patches = grid * grid
    images = torch.randint(0, 256, (batch, 1, grid * patch, grid * patch), dtype=torch.uint8)
    noise_BL = torch.rand(batch, patches)
    weight = torch.randn(width, 1, patch, patch)
    bias = torch.randn(width)
    token = torch.randn(width)
    pos_LD = torch.randn(patches, width)
    leaves = [tensor.requires_grad_() for tensor in (weight, bias, token, pos_LD)]

    def ours() -> tuple[Tensor, ...]:
        masking = random_masking(noise_BL, keep)
        x_BKD = embed_patches(images, masking.ids_keep, weight, bias, pos_LD)
        x_BLD = restore_tokens(x_BKD, masking.ids_restore, token, pos_LD, prefix=0)
        loss = masked_reconstruction_loss(x_BLD, images, mask=masking.mask, patch_size=patch)
        return loss, *torch.autograd.grad(loss, leaves)

    def plain() -> tuple[Tensor, ...]:
        pixels = images.float() / 255
        order_BL = noise_BL.argsort(1)
        visible_BL = torch.zeros(batch, patches, dtype=torch.bool).scatter_(
            1, order_BL[:, :keep], True
        )
        embedded_BLD = F.conv2d(pixels, weight, bias, stride=patch).flatten(2).mT + pos_LD
        x_BLD = torch.where(visible_BL[..., None], embedded_BLD, token) + pos_LD
        target_BLV = F.unfold(
            pixels, patch, stride=patch
        ).mT  # one channel: (row, column) is the order of the ops too
        variance = target_BLV.var(2, keepdim=True, unbiased=True)
        target_BLV = (target_BLV - target_BLV.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()
        loss = (x_BLD - target_BLV).square().mean(2)[~visible_BL].mean()
        return loss, *torch.autograd.grad(loss, leaves)

    for got, want in zip(benchmark(ours), plain(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_epoch_of_the_resident_loader(benchmark: BenchmarkFixture, index: DataIndex) -> None:
    """Every image once, with its label, and the pixels of the loader that reads files."""
    more: dict[str, Any] = {"image_size": (32, 32), "channels": 1, "seed": 3}
    order = SampleOrder(index, range(IMAGES), batch_size=16, augment=AugmentConfig(), **more)
    loader = build_loader(order, provider="resident", cache="none")
    batches = benchmark(lambda: list(loader.epoch(1)))
    shown = torch.cat([batch.indices for batch in batches])
    assert sorted(shown.tolist()) == list(range(IMAGES))
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == [index.records[i].label for i in shown.tolist()]
    reader = build_loader(order, provider="torch")
    for got, want in zip(batches, reader.epoch(1), strict=True):
        assert got.images.shape == want.images.shape == (16, 1, 32, 32)
        assert torch.equal(got.indices, want.indices)
        assert (got.images.int() - want.images.int()).abs().max() <= 2
        assert want.images.float().std() > 10
    loader.close()
    reader.close()


def test_crop_resize(benchmark: BenchmarkFixture, index: DataIndex) -> None:
    """Sixteen crops out of packed images, half of them mirrored, against Pillow."""
    arrays = [np.asarray(Image.open(index.file(i)).convert("L")) for i in range(16)]
    pixels = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    offsets = torch.arange(16) * HEIGHT * WIDTH
    shapes = torch.tensor([[HEIGHT, WIDTH]] * 16)
    boxes = torch.tensor([[i % 7, 2 * i % 11, 20 + i, 30 + i] for i in range(16)])
    flips = torch.arange(16) % 2 == 1
    out = benchmark(crop_resize, pixels, offsets, shapes, boxes, flips, (32, 32))
    assert out.shape == (16, 1, 32, 32)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        cut = Image.fromarray(arrays[i][top : top + height, left : left + width])
        want = np.asarray(cut.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        want = want[:, ::-1] if flips[i] else want
        assert (
            np.abs(out[i, 0].numpy().astype(int) - want).max() <= 2
        )  # Pillow rounds between its two passes
