"""The Triton kernels themselves, interpreted on the CPU: the tests marked `kernel`, in a process of their own.

The interpreter must be chosen before triton is imported. It is right for fp32 and fp16; bf16 is left to a GPU.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# file and the least number of its tests that must have run
FILES = {
    "test_patches.py": 28,
    "test_reconstruction.py": 20,
    "test_restore.py": 12,
    "test_gelu_linear.py": 38,
    "test_masking.py": 15,
    "test_distillation.py": 29,
    "test_attention.py": 57,
    "test_crop_resize.py": 35,
    "test_patch_model.py": 2,
}
INTERPRETED = FILES | {"test_gpu.py": 15, "test_memory.py": 4, "traffic_by_interpreter.py": 22}


@functools.cache  # the interpreter's start is dear: all files in one process
def run_marked(files: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the `kernel` tests of the files with the backend "triton" in one process, once."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rp",
        "-p",
        "no:cacheprovider",
        "-m",
        "kernel",
    ]
    command += [str(HERE / file) for file in files]
    full = {**os.environ, "MAE_KERNELS_BACKEND": "triton", **env}
    return subprocess.run(
        command, env=full, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900
    )


def passed(files: dict[str, int], **env: str) -> Counter[str]:
    """How many tests of each file passed; none may fail or be skipped."""
    done = run_marked(tuple(files), **env)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]
    return Counter(re.findall(r"^PASSED tests/kernels/(\w+\.py)::", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("file", INTERPRETED)
def test_kernels_under_the_interpreter(file: str) -> None:
    assert passed(INTERPRETED, TRITON_INTERPRET="1")[file] >= INTERPRETED[file]


@pytest.mark.gpu
@pytest.mark.parametrize("file", FILES)
def test_kernels_on_a_gpu(file: str) -> None:
    """A process per file: hundreds of kernels are compiled in all."""
    assert (
        passed({file: FILES[file]}, MAE_KERNELS_TEST_DEVICE="cuda", TRITON_INTERPRET="0")[file]
        >= FILES[file]
    )
