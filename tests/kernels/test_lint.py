"""What the compiler makes of every kernel, on a machine without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mae_kernels
from mae_kernels._runtime import Launch, jit, tl
from tests.kernels import calls
from tools import lint_kernels as lint

PACKAGE = Path(mae_kernels.__file__).parent
KERNELS = {
    name
    for file in PACKAGE.glob("*.py")
    for name in re.findall(r"^def _(\w+_kernel)\(", file.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize(("arch", "order"), [(80, 1), (90, -1)])
def test_each_kernel_keeps_the_rules(arch: int, order: int) -> None:
    """One launch of each kernel: of its first sample for sm_80, of its last one for sm_90."""
    chosen = {}
    for sample in calls.MODEL[::order]:
        for launch in lint.launches(sample, arch):
            chosen.setdefault(launch.kernel.fn.__name__, (sample, launch))
    rows = [lint.judge(str(s), launch, arch, s.wide) for s, launch in chosen.values()]
    assert not [row for row in rows if row.problems]
    assert {row.kernel for row in rows} == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("arch", lint.ARCHITECTURES)
def test_every_launch_keeps_the_rules(arch: int) -> None:
    rows = lint.lint(arch)
    assert {row.arch for row in rows} == {arch}
    assert not [row for row in rows if row.problems]
    if arch >= lint.TENSOR_CORES_FROM:
        assert {row.kernel for row in rows} == KERNELS
    if arch == 80:
        # sm_86 and sm_89 run what sm_80 runs, with less shared memory
        assert max(row.shared for row in rows) <= lint.SHARED_LIMITS[86] * 1024


@jit
def _bad_kernel(X, Y, scale: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i * 3).to(tl.float64)
    tl.store(Y + i * 3, (x * scale).to(tl.float32))


def test_rules_can_fail() -> None:
    x = torch.empty(4096, device="meta")
    row = lint.judge("bad", Launch(_bad_kernel, (x, x), {"scale": 0.1, "N": 512}), 90)
    assert row.problems == ("fp64 arithmetic", "no access of 16 bytes, widest 4")


def test_command_prints_one_row_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert lint.main(["--arch", "80", "--op", "gather_patches"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| gather_patches rgb 16 \| gather_kernel \| 80 \| \d+ \| 0 \|", printed)
    with pytest.raises(SystemExit):
        lint.main(["--arch", "70"])
