"""The CPU's hot paths under pytest-benchmark, small enough to compare one commit with another; each result is checked as well.

`make bench-cpu` times them and keeps the figures. In the normal suite, with --benchmark-disable, each runs once as a plain test.
No time is asserted: what is slow on one machine is fast on another.
"""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
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
from sssd_fast.data import index as index_module
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.evaluation.metrics import bootstrap_intervals
from sssd_fast.loaders import SampleOrder, build_loader
from sssd_fast.loaders.augment import rotate_and_jitter
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.run.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
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
    """Forward, backward and update. Loss and gradient norm are those of a copy, and the same batch again costs less."""
    images = torch.randint(0, 256, (2, 1, 96, 96), dtype=torch.uint8)
    noise_BL = torch.rand(2, (96 // 8) ** 2)

    def loss(module: torch.nn.Module, batch: Tensor, step: int, micro: int) -> TaskLoss:
        out = module(batch, noise_BL)
        return TaskLoss(
            out.total, {"reconstruction": out.losses["reconstruction"]}, out.batch_center
        )

    twin = copy.deepcopy(model)
    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95))
    step = Step(model, optimizer, loss, world=World(CPU), update_state=model.update_center)
    first = step([images], 0, 1e-3)
    total = twin(images, noise_BL).total
    total.backward()
    torch.testing.assert_close(first.losses["loss"], total.detach())
    squares = [p.grad.square().sum() for p in twin.parameters() if p.grad is not None]
    torch.testing.assert_close(
        first.grad_norm, torch.stack(squares).sum().sqrt(), rtol=1e-4, atol=1e-5
    )

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
    arguments: dict[str, Any] = {
        "batch_size": 16,
        "image_size": (32, 32),
        "channels": 1,
        "augment": AugmentConfig(),
        "seed": 3,
    }
    order = SampleOrder(index, range(IMAGES), **arguments)
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


def test_turn_and_light(benchmark: BenchmarkFixture) -> None:
    """A quarter turn counter-clockwise, brightness and contrast, each alone, and an image that stays as it is."""
    images = torch.randint(40, 160, (16, 1, 64, 64), dtype=torch.uint8)
    jitter_B3 = torch.zeros(16, 3)
    jitter_B3[1, 0], jitter_B3[2, 1], jitter_B3[3, 2] = 90, 0.25, -0.5
    jitter_B3[4:] = torch.rand(12, 3) * torch.tensor([20, 0.2, 0.2])
    out = benchmark(rotate_and_jitter, images, jitter_B3)
    x = images.double()
    assert torch.equal(out[0], images[0])
    assert (out[1].int() - torch.rot90(images[1], 1, (1, 2)).int()).abs().max() <= 1
    assert (out[2] - 1.25 * x[2]).abs().max() <= 0.51
    assert (out[3] - (x[3].mean() + 0.5 * (x[3] - x[3].mean()))).abs().max() <= 0.51


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


def test_check_of_known_files(
    benchmark: BenchmarkFixture,
    folder: Path,
    index: DataIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second start on the same folder: no file is read, and the index is that of a check that reads all."""
    check_data(folder, index_cache=tmp_path)
    monkeypatch.setattr(
        index_module, "read_file", lambda path: pytest.fail(f"{path} was read again")
    )
    again = benchmark(check_data, folder, index_cache=tmp_path, threads=1)
    assert again.records == index.records
    assert again.classes == index.classes
    assert len(again) == IMAGES


def test_saving_a_checkpoint(benchmark: BenchmarkFixture, model: SSSD, tmp_path: Path) -> None:
    """Atomic and synced; what is read back is what was saved."""
    path, weights = tmp_path / "step-0000001.pt", model.state_dict()

    def save() -> Path:
        path.unlink(missing_ok=True)
        return save_checkpoint(path, {"model": weights, "step": 1})

    assert verify_checkpoint(benchmark(save)) == path
    loaded = load_checkpoint(path)
    assert loaded["step"] == 1
    assert list(loaded["model"]) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in loaded["model"].items())
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix == ".pt") == [path.name]


def test_bootstrapped_metrics(benchmark: BenchmarkFixture) -> None:
    """The 95 % interval of the AUC against scikit-learn's AUC of resamples drawn here."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    scores = 1 / (1 + np.exp(-(rng.standard_normal(200) + labels)))
    found = benchmark(bootstrap_intervals, labels, scores, n=500, seed=1)["auc"]
    drawn = rng.integers(0, 200, (500, 200))
    low, high = np.quantile(
        [roc_auc_score(labels[ids], scores[ids]) for ids in drawn], (0.025, 0.975)
    )
    assert found.used == 500
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    assert found.low < roc_auc_score(labels, scores) < found.high
