"""A group of the kernel tests under the interpreter: see interpreted.py."""

from __future__ import annotations

from tests.kernels.interpreted import assert_group_passes


def test_accuracy_under_the_interpreter() -> None:
    assert_group_passes("accuracy")
