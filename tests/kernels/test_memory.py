"""Peak memory of the ops above their inputs, forward and backward, allocation by allocation.

The registered ops on the CPU and, run by test_interpreted.py, the kernels' own path, which
allocates on a GPU what it allocates under the interpreter.
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

import mae_kernels as mk
from mae_kernels import Sample
from mae_kernels._runtime import INTERPRET
from tests.kernels import calls


class LiveBytes(TorchDispatchMode):
    """Bytes of all live storages that were made inside the block, also inside registered ops."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mae_kernels":
            # its own function, whose operations come here one by one
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.given:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_count_is_right() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes([x]) as live:
        torch.autograd.grad(((x * 2).exp() + 1).sum(), [x])
    # 2x and its exp, exp and exp + 1, or exp and its gradient: two of 4000 bytes, and scalars
    assert 8000 <= live.peak <= 8100
    assert live.largest == 4000


# bytes above gradients and outputs; none, unless an op is listed here
EXTRA: dict[str, Callable[[calls.Tensors], int]] = {
    # the gathered patches
    "embed_patches": lambda t: t["ids"].numel() * t["weight"][0].nbytes,
    # the gradient of gelu, and gelu itself, computed again or kept
    "gelu_linear": lambda t: 2 * t["x"].nbytes,
    # the gradients that the forward computes
    "linear_reconstruction_loss": lambda t: t["hidden"].nbytes + t["weight"].nbytes,
}
SAMPLES = [sample for sample in calls.FIRST if sample.gradients]


@pytest.mark.kernel
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_peak_is_gradients_and_outputs(sample: Sample) -> None:
    tensors, options = calls.made(sample)
    tensors, leaves = calls.with_leaves(sample, tensors)
    given = [t for t in tensors.values() if t is not None]
    with mk.backend("triton" if INTERPRET else "registered"), LiveBytes(given) as live:
        out = calls.outputs(sample, tensors, options)
        # frames of the interpreter hold what a kernel wrote; a launch on a GPU holds nothing
        gc.collect()
        torch.autograd.grad(out[0], leaves, torch.ones_like(out[0]))
    limit = sum(t.nbytes for t in (*leaves, *out, out[0])) + EXTRA.get(sample.op, lambda t: 0)(
        tensors
    )
    # 2 kB: partial sums and scalars; the formulas in plain torch hold more intermediate results
    assert live.peak <= (1 if INTERPRET else 3) * limit + 2000


@pytest.mark.kernel
@pytest.mark.parametrize(("batch", "masked"), [(2, 64), (16, 8)])
def test_linear_reconstruction_loss_holds_an_eighth_of_the_predictions(
    batch: int, masked: int
) -> None:
    images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8)
    ids = torch.stack([torch.randperm(64)[:masked] for _ in range(batch)])
    hidden, weight = torch.randn(batch, masked, 16), torch.randn(192, 16)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    backend = mk.backend("triton" if INTERPRET else "registered")
    with backend, LiveBytes([images, ids, *leaves]) as live:
        loss = mk.linear_reconstruction_loss(hidden, weight, None, images, ids, patch_size=8)
        torch.autograd.grad(loss, leaves)
    eighth = batch * masked * weight.shape[0] * 4 // 8
    assert live.largest <= max(eighth, hidden.nbytes)
    # two gradients of hidden; an eighth of the predictions and their gradient (in plain torch the
    # target and the difference too); gradients of the weight
    parts = 2 if INTERPRET else 4
    assert live.peak <= 2 * hidden.nbytes + parts * eighth + 5 * weight.nbytes
