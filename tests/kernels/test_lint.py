"""What the compiler makes of every kernel, for every architecture, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from mae_kernels import lint
from mae_kernels._runtime import Launch, jit, tl


@pytest.mark.parametrize("arch", lint.ARCHITECTURES)
def test_every_kernel_keeps_the_rules(arch: int) -> None:
    rows = lint.lint(arch)
    assert {row.arch for row in rows} == {arch}
    assert not [row for row in rows if row.problems]


@jit
def _bad_kernel(X, Y, scale: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i * 3).to(tl.float64)
    tl.store(Y + i * 3, (x * scale).to(tl.float32))


def test_the_rules_can_fail() -> None:
    x = torch.empty(4096, device="meta")
    row = lint.judge(lint.LintCase("bad", lambda t: None), Launch(_bad_kernel, (x, x), {"scale": 0.1, "N": 512}), 90)
    assert row.problems == ("fp64 arithmetic", "no access of 16 bytes, widest 4")
