"""What each kernel reads and writes, counted access by access under the interpreter (test_interpreted.py runs this file).

Every element of a large input is read exactly once, and only where it is needed; every element of an output is written
exactly once. Position tables, mask tokens, centres and scalars, which stay in the cache, may be read by every program.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from mae_kernels import _runtime

pytestmark = pytest.mark.kernel
OPS = torch.ops.mae_kernels
gelu_module = importlib.import_module(
    "mae_kernels.gelu_linear"
)  # the name in the package is the function's


class Traffic:
    """Addresses of every element read and written."""

    def __init__(self) -> None:
        self.read: list[np.ndarray[Any, Any]] = []
        self.written: list[np.ndarray[Any, Any]] = []

    def of(self, addresses: list[np.ndarray[Any, Any]], x: Tensor) -> tuple[int, int]:
        """(accesses, different elements) of a tensor's memory."""
        first, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        inside = np.concatenate(
            [a[(a >= first) & (a < first + size)] for a in addresses] or [np.zeros(0)]
        )
        return inside.size, np.unique(inside).size

    def assert_read_once(self, x: Tensor, elements: int | None = None) -> None:
        want = x.numel() if elements is None else elements
        assert self.of(self.read, x) == (want, want)

    def assert_written_once(self, *outputs: Tensor) -> None:
        """The outputs, whole, and nothing else but buffers that no argument or result shares."""
        for x in outputs:
            assert self.of(self.written, x) == (x.numel(), x.numel())


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    assert _runtime.INTERPRET, "run with TRITON_INTERPRET=1"
    seen = Traffic()
    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        seen.read.append(ptrs.data[mask.data].ravel())
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.written.append(ptrs.data[mask.data].ravel())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return seen


def ids_of(batch: int, patches: int, listed: int) -> Tensor:
    return torch.stack([torch.randperm(patches) for _ in range(batch)])[:, :listed].contiguous()


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_random_masking(traffic: Traffic) -> None:
    noise = torch.rand(3, 12)
    out = OPS.random_masking(noise, 5)
    traffic.assert_read_once(noise)
    traffic.assert_written_once(*out)


def test_gather(traffic: Traffic) -> None:
    images, ids = pixels(2, 3, 16, 24), ids_of(2, 6, 4)
    out = OPS.gather_patches(images, ids, 8, [], [], torch.float32)
    traffic.assert_read_once(images, 2 * 4 * 192)
    traffic.assert_read_once(ids)
    traffic.assert_written_once(out)


def test_embed(traffic: Traffic) -> None:
    images, ids = pixels(3, 1, 8, 12), ids_of(3, 6, 4)
    weight, pos = torch.randn(10, 1, 4, 4), torch.randn(6, 10)
    out = OPS.embed_patches(images, ids, weight, None, pos, [], [], torch.float32)
    traffic.assert_read_once(images, 3 * 4 * 16)
    traffic.assert_written_once(out)


def test_embed_backward_reads_the_gradient_once(traffic: Traffic) -> None:
    grad = torch.randn(3, 4, 10)
    images = pixels(3, 1, 8, 12)
    ids = ids_of(3, 6, 4)
    dtypes = (torch.float32,) * 3
    _, _, dpos = OPS.embed_patches_backward(
        grad, images, ids, 4, 6, [], [], torch.float32, *dtypes, False, False, True
    )
    traffic.assert_read_once(grad)
    traffic.assert_written_once(dpos)


def test_restore(traffic: Traffic) -> None:
    visible = torch.randn(3, 5, 24)
    ids = ids_of(3, 12, 12)
    pos = torch.randn(13, 24)
    out = OPS.restore_tokens(visible, ids, torch.randn(24), pos, 1)
    traffic.assert_read_once(visible)
    traffic.assert_written_once(out)


def test_restore_backward(traffic: Traffic) -> None:
    grad, ids = torch.randn(3, 13, 24), ids_of(3, 12, 12)
    dtypes = (torch.float32,) * 3
    dvisible, _, _ = OPS.restore_tokens_backward(grad, ids, 5, 1, *dtypes, False)
    traffic.assert_read_once(grad)
    traffic.assert_written_once(dvisible)


@pytest.mark.parametrize("rows", [9, 70])
def test_gelu(traffic: Traffic, rows: int) -> None:
    x = torch.randn(rows, 100)
    _, g = OPS.gelu_linear(x, torch.randn(100), torch.randn(3, 100), None, False)
    traffic.assert_read_once(x)
    traffic.assert_written_once(g)


@pytest.mark.parametrize(
    "programs", [512, 2]
)  # one step each; several, the last of them past the end
def test_gelu_backward(traffic: Traffic, monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """The launch itself: the gradient of g, which it reads, is made and dropped inside the op."""
    monkeypatch.setattr(gelu_module, "BACKWARD_PROGRAMS", programs)
    x, dg, bias = torch.randn(150, 100), torch.randn(150, 100), torch.randn(100)
    dh, _, g = gelu_module._launch_gelu_backward(x, bias, dg, torch.float16)
    for t in (x, dg):
        traffic.assert_read_once(t)
    traffic.assert_written_once(dh, g)
    traffic.read.clear()
    dh, _, g = gelu_module._launch_gelu_backward(x, bias, dg, None)
    for t in (x, dg):
        traffic.assert_read_once(t)
    traffic.assert_written_once(dh)
    assert g.numel() == 0


@pytest.mark.parametrize("norm", ["patch", "channel", "none"])
@pytest.mark.parametrize("use_mask", [False, True])
def test_reconstruction(traffic: Traffic, norm: str, use_mask: bool) -> None:
    images, ids = pixels(2, 3, 16, 24), ids_of(2, 6, 4)
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter_(1, ids, True)
    pred = torch.randn(2, 6 if use_mask else 4, 192)
    select = (None, mask) if use_mask else (ids, None)
    options = (images, *select, 8, norm, 1e-6, [0.4], [0.2])
    OPS.masked_reconstruction_loss(pred, *options)
    for x in (pred, images):
        traffic.assert_read_once(
            x, 2 * 4 * 192
        )  # with a mask too: visible predictions are not read
    traffic.read.clear()
    one = torch.ones(())
    dpred = OPS.masked_reconstruction_loss_backward(one, one, pred, *options)
    for x in (pred, images):
        traffic.assert_read_once(x, 2 * 4 * 192)
    traffic.assert_written_once(dpred)


def test_sssd(traffic: Traffic) -> None:
    images = pixels(2, 3, 16, 24)
    ids = ids_of(2, 6, 4)
    pred = torch.randn(2, 4, 192)
    student = torch.randn(2, 37)
    teacher = torch.randn(2, 37)
    center = torch.randn(37)
    tensors = (pred, images, student, teacher, ids, None, center)
    options = (8, "patch", 1e-6, [0.4], [0.2], 0.2)
    OPS.sssd_loss(*tensors, *options, False, 0.1, 0.04)
    large = ((pred, None), (images, 2 * 4 * 192), (student, None), (teacher, None), (ids, None))
    for x, elements in large:
        traffic.assert_read_once(x, elements)
    traffic.read.clear()
    grads = [torch.ones(()) for _ in range(4)]
    gradients = OPS.sssd_loss_backward(*grads, *tensors, *options, 0.1, 0.04, True)
    for x, elements in large:
        traffic.assert_read_once(x, elements)
    traffic.assert_written_once(*gradients)


def test_distillation(traffic: Traffic) -> None:
    student = torch.randn(5, 37)
    teacher = torch.randn(5, 37)
    center = torch.randn(37)
    OPS.distillation_loss(student, teacher, center, False, 0.1, 0.04)
    for x in (student, teacher):
        traffic.assert_read_once(x)
    traffic.read.clear()
    gradients = OPS.distillation_loss_backward(
        torch.ones(()), student, teacher, center, 0.1, 0.04, True
    )
    for x in (student, teacher):
        traffic.assert_read_once(x)
    traffic.assert_written_once(*gradients)


def crop(pixels_T: Tensor, places: Tensor, size: list[int], channels: int) -> Tensor:
    flips = torch.tensor([False, True])[: len(places)]
    return OPS.crop_resize(
        pixels_T, places[:, 0], places[:, 1:3], places[:, 3:7], flips, size, channels
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_resize(traffic: Traffic, channels: int) -> None:
    """All of each box and nothing beside it; some of it again, from the cache, for each output that it reaches."""
    pixels_T = pixels(500 * channels)
    places = torch.tensor([[5, 9, 13, 1, 2, 7, 9], [200, 4, 31, 0, 3, 3, 27]])
    out = crop(pixels_T, places, [9, 11], channels)
    inside = np.zeros(500 * channels, bool)
    for offset, height, width, top, left, rows, columns in places.tolist():
        image = inside[offset : offset + height * width * channels].reshape(height, width, channels)
        image[top : top + rows, left : left + columns] = True
    read = np.unique(np.concatenate(traffic.read)) - pixels_T.data_ptr()
    assert np.array_equal(read[(read >= 0) & (read < inside.size)], np.flatnonzero(inside))
    traffic.assert_written_once(out)


def test_crop_resize_reads_no_pixel_for_a_box_out_of_range(traffic: Traffic) -> None:
    pixels_T = pixels(500)
    out = crop(
        pixels_T, torch.tensor([[5, 9, 13, 1, 5, 7, 9], [480, 4, 31, 0, 3, 3, 27]]), [9, 11], 1
    )
    assert traffic.of(traffic.read, pixels_T) == (0, 0) and not out.any()
    traffic.assert_written_once(out)


@pytest.mark.parametrize("tokens", [21, 70])
def test_attention(traffic: Traffic, tokens: int) -> None:
    """Up to 64 tokens the backward makes the softmax again and needs neither output nor log-sum-exp."""
    qkv, grad = torch.randn(2, tokens, 3, 2, 16), torch.randn(2, tokens, 2, 16)
    out, lse = OPS.attention(qkv, 0.25)
    short = tokens <= 64
    traffic.assert_read_once(qkv)
    traffic.assert_written_once(*((out,) if short else (out, lse)))
    traffic.read.clear()
    dqkv = OPS.attention_backward(grad, qkv, None if short else out, None if short else lse, 0.25)
    for x in (qkv, grad) if short else (qkv, grad, out, lse):
        traffic.assert_read_once(x)
    traffic.assert_written_once(dqkv)
