"""What the compiler makes of every kernel, for every architecture, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from mae_kernels import lint
from mae_kernels._runtime import Launch, jit, tl

# each kernel once, both backwards of attention included
SAMPLE = (
    "gather_patches rgb", "embed_patches", "embed_patches_backward", "masked_reconstruction_loss rgb patch",
    "random_masking 196", "distillation_loss 4096", "sssd_loss rgb", "restore_tokens 512", "gelu_linear 3072",
    "attention 50 x 12 x 64", "attention 197 x 16 x 32", "crop_resize rgb",
)  # fmt: skip
LARGEST = "attention 197 x 12 x 64"


@pytest.mark.parametrize(
    ("arch", "only"),
    [
        (75, SAMPLE),
        (80, (*SAMPLE, LARGEST)),
        (86, SAMPLE),
        (89, SAMPLE),
        (90, None),
        (100, SAMPLE),
        (120, SAMPLE),
    ],
    ids=map(str, lint.ARCHITECTURES),
)
def test_every_kernel_keeps_the_rules(arch: int, only: tuple[str, ...] | None) -> None:
    """Every case on sm_90, every kernel on the others; the command `--lint` takes every case on all of them."""
    rows = lint.lint(arch, only)
    assert {row.arch for row in rows} == {arch}
    assert len({row.kernel for row in rows}) == (16 if arch < lint.OPS["attention"].oldest else 19)
    assert not [row for row in rows if row.problems]
    if arch == 80:  # sm_86 and sm_89 run what sm_80 runs, with less shared memory
        assert max(row.shared for row in rows) <= lint.SHARED_LIMITS[86] * 1024


def test_the_sample_is_taken_from_the_cases_and_every_architecture_is_tested() -> None:
    assert {*SAMPLE, LARGEST} <= {case.op for case in lint.cases()}
    assert lint.ARCHITECTURES == (75, 80, 86, 89, 90, 100, 120)


@jit
def _bad_kernel(X, Y, scale: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i * 3).to(tl.float64)
    tl.store(Y + i * 3, (x * scale).to(tl.float32))


def test_the_rules_can_fail() -> None:
    x = torch.empty(4096, device="meta")
    row = lint.judge(
        lint.LintCase("bad", lambda t: None),
        Launch(_bad_kernel, (x, x), {"scale": 0.1, "N": 512}),
        90,
    )
    assert row.problems == ("fp64 arithmetic", "no access of 16 bytes, widest 4")
