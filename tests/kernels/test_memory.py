"""Peak memory of the ops above their inputs, forward and backward, counted allocation by allocation.

Run by test_interpreted.py on the kernels' own path, which allocates on a GPU what it allocates under the interpreter: the
masked loss one gradient of the predictions, the loss with the head inside no predictions at all at full size, the MLP's
second half three tensors of its input's size.
Here the same calls count the registered ops' plain path.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mae_kernels  # noqa: F401  (registers the ops)
from mae_kernels._runtime import INTERPRET

OPS = torch.ops.mae_kernels
BATCH, MASKED, WIDTH, VALUES = 8, 64, 16, 192
PREDICTIONS = 4 * BATCH * MASKED * VALUES
HIDDEN = 4 * BATCH * MASKED * WIDTH
WEIGHT = 4 * VALUES * WIDTH


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside the block that are alive, after each operation, inside registered ops too."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.namespace == "mae_kernels"
        ):  # its own function, whose operations come here one by one
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.alive = {
            key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()
        }
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.given:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def measured(call: Callable[..., Tensor], leaves: list[Tensor], others: list[Tensor]) -> LiveBytes:
    with LiveBytes([*leaves, *others]) as live:
        torch.autograd.grad(call(), leaves)
    return live


def test_the_count_is_right() -> None:
    x = torch.zeros(1000, requires_grad=True)
    live = measured(lambda: ((x * 2).exp() + 1).sum(), [x], [])
    # 2x and its exp, exp and exp + 1, or exp and its gradient: two of 4000 bytes at any time, and scalars
    assert 8000 <= live.peak <= 8100 and live.largest == 4000


@pytest.fixture
def images_and_ids() -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8)
    return images, torch.stack([torch.randperm(64) for _ in range(BATCH)])


@pytest.mark.kernel
def test_masked_reconstruction_loss(images_and_ids: tuple[Tensor, Tensor]) -> None:
    images, ids = images_and_ids
    pred = torch.randn(BATCH, MASKED, VALUES, requires_grad=True)
    live = measured(
        lambda: OPS.masked_reconstruction_loss(
            pred, images, ids, None, 8, "patch", 1e-6, [0.5], [0.2]
        )[0],
        [pred],
        [images, ids],
    )
    per_patch = 4 * BATCH * MASKED + 64
    assert live.peak <= (1 if INTERPRET else 3) * PREDICTIONS + per_patch


@pytest.mark.kernel
def test_linear_reconstruction_loss(images_and_ids: tuple[Tensor, Tensor]) -> None:
    images, ids = images_and_ids
    hidden, weight, bias = (
        torch.randn(s, requires_grad=True)
        for s in ((BATCH, MASKED, WIDTH), (VALUES, WIDTH), (VALUES,))
    )
    live = measured(
        lambda: OPS.linear_reconstruction_loss(
            hidden, weight, bias, images, ids, 8, "patch", 1e-6, [0.5], [0.2], torch.float32, True
        )[0],
        [hidden, weight, bias],
        [images, ids],
    )
    part = PREDICTIONS // 8
    assert live.largest <= max(part, HIDDEN), (
        "predictions, or their gradient, at more than an eighth of their size"
    )
    # two gradients of hidden; of one part predictions and gradient (plain path: target and difference too); weight's gradients
    assert live.peak <= 2 * HIDDEN + (2 if INTERPRET else 4) * part + 5 * WEIGHT


@pytest.mark.kernel
@pytest.mark.parametrize("recompute", [False, True])
def test_gelu_linear(recompute: bool) -> None:
    rows, hidden, width = 512, 192, 8
    x, bias, weight, out_bias = (
        torch.randn(s, requires_grad=True)
        for s in ((rows, hidden), (hidden,), (width, hidden), (width,))
    )
    leaves = [x, bias, weight, out_bias]

    def call() -> Tensor:
        out = OPS.gelu_linear(*leaves, recompute)[0].sum()
        gc.collect()  # the interpreter's frames refer to themselves and hold what the kernel wrote; a GPU launch holds nothing
        return out

    live = measured(call, leaves, [])
    large = x.nbytes
    small = 4 * (2 * rows * width + 3 * weight.numel() + 64 * hidden)
    assert live.largest == large
    # the gradient of g, that of x, and g itself; plain path: intermediate results of the derivative too
    assert live.peak <= (3 if INTERPRET else 6) * large + small
