"""One set of tests, three ways to run: the CPU op, the Triton kernels interpreted on the CPU, the
kernels on a GPU.

Tests marked `kernel` are small enough for the interpreter. test_interpreted.py runs them again in a
process with TRITON_INTERPRET=1 and the backend "triton"; MAE_KERNELS_TEST_DEVICE=cuda runs them on
a GPU.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

import mae_kernels

DEVICE = os.environ.get("MAE_KERNELS_TEST_DEVICE", "cpu")
NO_PARAMETERS = SimpleNamespace(params={})


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kernel: small enough to run again with the Triton kernels interpreted"
    )
    config.addinivalue_line("markers", "unpoisoned: uninitialised memory stays as it is")


@pytest.fixture(scope="session", autouse=True)
def _dynamo_lists_the_real_functions() -> None:
    """Dynamo lists torch's functions once; later it could not trace a poisoned torch.empty."""
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    get_torch_obj_rule_map()


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """References in fp32 are to be fp32 on a GPU, where convolutions round to TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _kernel_runs_on_this_gpu(request: pytest.FixtureRequest) -> None:
    """Skips, with the reason, what the kernels cannot do on an older GPU."""
    if not (request.node.get_closest_marker("gpu") or DEVICE == "cuda"):
        return
    sample = getattr(request.node, "callspec", NO_PARAMETERS).params.get("sample")
    op = "attention" if request.path.name == "test_attention.py" else getattr(sample, "op", None)
    if op is not None and (why := mae_kernels.info()[op]) is not None:
        pytest.skip(f"{op}: {why}")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
