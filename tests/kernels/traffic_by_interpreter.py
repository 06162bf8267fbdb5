"""What each kernel reads and writes, counted access by access (test_interpreted.py runs this file).

Every launch of every small sample: each element of an input is read at most once, and only where it
is needed; each element of an output is written at most once (the memory of these tests starts as
NaN, so test_accuracy.py notices elements that are not written).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from mae_kernels import Draw, Sample, _runtime, backend
from tests.kernels import calls

pytestmark = pytest.mark.kernel
Addresses = np.ndarray[Any, Any]
# parameters that stay in the cache and may be read by every program; single numbers may too
CACHED = {"POS", "MASK_TOKEN", "CENTER", "BIAS", "STATS", "IDS"}
# of crop_resize: a pixel is read for each output that it contributes to
CACHED |= {"PIXELS", "OFFSETS", "SHAPES", "BOXES", "FLIPS"}
# a row of logits is read again, in parts, after its largest value is known; with several rows per
# program the partial centre is read and written again
AGAIN = {"STUDENT", "TEACHER", "PARTIAL"}


class Launch:
    """Addresses that one launch read and wrote, and its tensors by parameter name."""

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.name = kernel.fn.__name__
        names = inspect.signature(kernel.fn).parameters
        pairs = zip(names, args, strict=False)
        self.tensors = {name: arg for name, arg in pairs if isinstance(arg, Tensor)}
        self.read: list[Addresses] = []
        self.written: list[Addresses] = []


def inside(addresses: list[Addresses], x: Tensor) -> Addresses:
    """The addresses that are in the storage of x."""
    first, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
    found = [a[(a >= first) & (a < first + size)] for a in addresses]
    return np.concatenate(found or [np.zeros(0, np.int64)])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches of the test, in order."""
    assert _runtime.INTERPRET, "run with TRITON_INTERPRET=1"
    seen: list[Launch] = []
    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store
    launch = _runtime.launch

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        seen[-1].read.append(ptrs.data[mask.data].ravel())
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen[-1].written.append(ptrs.data[mask.data].ravel())
        return store(self, ptrs, value, mask, *rest)

    def counted_launch(kernel: Any, grid: Any, on: Any, *args: Any, **constants: Any) -> None:
        seen.append(Launch(kernel, args))
        launch(kernel, grid, on, *args, **constants)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    for module in [m for name, m in sys.modules.items() if name.startswith("mae_kernels.")]:
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", counted_launch)
    return seen


def read_elements(sample: Sample, tensors: calls.Tensors) -> dict[str, int]:
    """How many elements of images and predictions a launch needs: those of the listed patches."""
    select = tensors.get("ids") if tensors.get("mask") is None else tensors["mask"]
    if "images" not in tensors or select is None:
        return {}
    listed = int(select.sum()) if select.dtype == torch.bool else select.numel()
    patch = sample.make(Draw("meta"))[1].get("patch_size") or tensors["weight"].shape[-1]
    values = tensors["images"].shape[1] * patch**2
    return {"IMAGES": listed * values, "PRED": listed * values}


def elements(sample: Sample) -> int:
    return sum(t.numel() for t in calls.made(sample)[0].values() if t is not None)


# the interpreter is slow, and the other samples have the same accesses in more steps
@pytest.mark.parametrize("sample", [s for s in calls.SMALL if elements(s) < 100_000], ids=str)
def test_each_element_is_read_and_written_once(sample: Sample, launches: list[Launch]) -> None:
    dtype = torch.float16 if sample.half_only else torch.float32
    tensors, options = calls.made(sample, dtype=dtype)
    with backend("triton"):
        calls.results(sample, tensors, options)
    inputs = {t.untyped_storage().data_ptr() for t in tensors.values() if t is not None}
    needed = read_elements(sample, tensors)
    # eight launches of linear_reconstruction_loss take an eighth of the patches each
    if sample.op == "linear_reconstruction_loss":
        needed = {}
    assert launches
    for launch in launches:
        unknown = np.concatenate(launch.read + launch.written)
        # an absent tensor is replaced by one of the others
        again = {launch.tensors[n].untyped_storage().data_ptr() for n in AGAIN & {*launch.tensors}}
        for name, x in launch.tensors.items():
            where = f"{launch.name}, {name}"
            read, written = inside(launch.read, x), inside(launch.written, x)
            unknown = np.setdiff1d(unknown, np.concatenate([read, written]))
            if name in needed:
                assert read.size == needed[name], where
            elif (
                name not in CACHED and x.untyped_storage().data_ptr() not in again and x.numel() > 1
            ):
                assert np.unique(read).size == read.size, where
            if written.size:
                assert x.untyped_storage().data_ptr() not in inputs, where
                assert np.unique(written).size == written.size, where
        assert not unknown.size, f"{launch.name} accesses memory of no tensor"
