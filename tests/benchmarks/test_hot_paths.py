"""The CPU's hot paths under pytest-benchmark, to compare commits; every result is checked as well.

`make bench-cpu` times them and saves the times. With --benchmark-disable each runs once as a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_kernels import attention, crop_resize
from mae_kernels.cpu_attention import AttentionProducts
from sssd_fast.config import load_config
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.run.device import World
from sssd_fast.step import Step, TaskLoss

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step(benchmark: BenchmarkFixture, precision: str) -> None:
    """The loss of the same batch decreases."""
    config = load_config("cpu_smoke")
    torch.manual_seed(0)
    model = SSSD(config.model, config.objective)
    images = torch.randint(0, 256, (2, 1, 96, 96), dtype=torch.uint8)
    noise_BL = torch.rand(2, (96 // 8) ** 2)

    def loss(module: torch.nn.Module, batch: Tensor, step: int, micro: int) -> TaskLoss:
        out = module(batch, noise_BL)
        return TaskLoss(out.total, {}, out.batch_center)

    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95))
    options = {"precision": precision, "update_state": model.update_center}
    step = Step(model, optimizer, loss, world=World(torch.device("cpu")), **options)
    first = step([images], 0, 1e-3)
    last = benchmark(step, [images], 0, 1e-3)
    assert bool(last.finite)
    assert float(last.losses["loss"]) < float(first.losses["loss"])


def test_attention_products(benchmark: BenchmarkFixture) -> None:
    """Forward and backward, against the fp32 of scaled_dot_product_attention."""
    qkv = torch.randn(2, 65, 3, 3, 64, requires_grad=True)
    half = qkv.detach().bfloat16().requires_grad_()
    upstream = torch.randn(2, 65, 3, 64)

    def ours() -> tuple[Tensor, Tensor]:
        out = AttentionProducts.apply(half, 0.125)
        return out, *torch.autograd.grad(out, half, upstream.bfloat16())

    out = attention(qkv)
    want = out, *torch.autograd.grad(out, qkv, upstream)
    for got, exact in zip(benchmark(ours), want, strict=True):
        torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05)


def test_crop_resize(benchmark: BenchmarkFixture) -> None:
    """Sixteen crops out of packed images, half of them mirrored, against Pillow."""
    height, width = 48, 56
    noise = np.random.default_rng(0).integers(0, 256, (16, 6, 7), dtype=np.uint8)
    arrays = [np.asarray(Image.fromarray(x).resize((width, height))) for x in noise]
    pixels = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    offsets = torch.arange(16) * height * width
    shapes = torch.tensor([[height, width]] * 16)
    boxes = torch.tensor([[i % 7, 2 * i % 11, 20 + i, 30 + i] for i in range(16)])
    flips = torch.arange(16) % 2 == 1
    out = benchmark(crop_resize, pixels, offsets, shapes, boxes, flips, (32, 32))
    for i, (top, left, rows, columns) in enumerate(boxes.tolist()):
        cut = Image.fromarray(arrays[i][top : top + rows, left : left + columns])
        want = np.asarray(cut.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        want = want[:, ::-1] if flips[i] else want
        # Pillow rounds between its two passes
        assert np.abs(out[i, 0].numpy().astype(int) - want).max() <= 2
