"""One set of tests, three ways to run: the CPU op, the Triton kernels interpreted on the CPU, the
kernels on a GPU.

Tests marked `kernel` are small enough for the interpreter. test_interpreted.py runs them again in a
process with TRITON_INTERPRET=1 and the backend "triton"; MAE_KERNELS_TEST_DEVICE=cuda runs them on
a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

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


@pytest.fixture
def close() -> Callable[..., None]:
    """close(got, exact, eager): the error against fp64 is at most twice the eager reference's,
    plus a small atol.
    """

    def check(
        got: torch.Tensor | Sequence[torch.Tensor],
        exact: torch.Tensor | Sequence[torch.Tensor],
        eager: torch.Tensor | Sequence[torch.Tensor],
        atol: float = 1e-6,
    ) -> None:
        if isinstance(got, torch.Tensor):
            got, exact, eager = [got], [exact], [eager]  # type: ignore[list-item]
        assert len(got) == len(exact) == len(eager)
        for i, (g, x, e) in enumerate(zip(got, exact, eager, strict=True)):
            assert (g.shape, g.dtype) == (x.shape, e.dtype), f"result {i}"
            if x.numel() == 0:
                continue
            error = (g.double().cpu() - x.double().cpu()).abs().max().item()
            allowed = 2 * (e.double().cpu() - x.double().cpu()).abs().max().item()
            allowed += atol * max(1.0, x.abs().max().item())
            assert error <= allowed, (
                f"result {i}: error {error:.3e} against fp64, allowed {allowed:.3e}"
            )

    return check
