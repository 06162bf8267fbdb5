"""The kernel tests of all other files under the interpreter, and all of them on a GPU."""

from __future__ import annotations

import pytest

from tests.kernels.interpreted import MARKED, assert_all_pass, assert_group_passes


def test_kernels_under_the_interpreter() -> None:
    assert_group_passes("rest")


# test_memory.py counts allocations on the CPU; test_gpu.py measures memory
@pytest.mark.gpu
@pytest.mark.parametrize("file", sorted(MARKED - {"test_memory.py"}))
def test_kernels_on_a_gpu(file: str) -> None:
    """A process per file: hundreds of kernels are compiled in all."""
    assert_all_pass({file}, MAE_KERNELS_TEST_DEVICE="cuda", TRITON_INTERPRET="0")
