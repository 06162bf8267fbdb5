"""The Triton kernels themselves, interpreted on the CPU: the tests marked `kernel`, in a process of their own.

The interpreter must be chosen before triton is imported. It is right for fp32 and fp16; bf16 is left to a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_marked(file: str, **env: str) -> int:
    """Runs the `kernel` tests of a file with the backend "triton"; returns how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernel", str(HERE / file)]
    full = {**os.environ, "MAE_KERNELS_BACKEND": "triton", **env}
    done = subprocess.run(command, env=full, cwd=HERE.parents[1], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    return int(passed[1])


# file and the least number of its tests that must have run
FILES = [
    ("test_patches.py", 50),
    ("test_reconstruction.py", 20),
    ("test_restore.py", 12),
    ("test_masking.py", 15),
    ("test_distillation.py", 29),
    ("test_attention.py", 81),
]


@pytest.mark.parametrize(("file", "at_least"), [*FILES, ("traffic_by_interpreter.py", 14)])
def test_kernels_under_the_interpreter(file: str, at_least: int) -> None:
    assert run_marked(file, TRITON_INTERPRET="1") >= at_least


@pytest.mark.gpu
@pytest.mark.parametrize(("file", "at_least"), FILES)
def test_kernels_on_a_gpu(file: str, at_least: int) -> None:
    assert run_marked(file, MAE_KERNELS_TEST_DEVICE="cuda", TRITON_INTERPRET="0") >= at_least
