"""One set of tests, three ways to run: the CPU op, the Triton kernels interpreted on the CPU, the
kernels on a GPU.

Tests marked `kernel` are small enough for the interpreter. test_interpreted.py runs them again in a
process with TRITON_INTERPRET=1 and the backend "triton"; MAE_KERNELS_TEST_DEVICE=cuda runs them on
a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("MAE_KERNELS_TEST_DEVICE", "cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kernel: small enough to run again with the Triton kernels interpreted"
    )


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """References in fp32 are to be fp32 on a GPU, where convolutions round to TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
