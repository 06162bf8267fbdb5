"""The Triton kernels interpreted on the CPU, or on a GPU: the tests marked `kernel`, in a new
process.

The interpreter must be chosen before triton is imported. It is right for fp32 and fp16, not for
bf16.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MARKED = [file for file in sorted(HERE.glob("test_*.py")) if "mark.kernel" in file.read_text()]
MARKED.remove(Path(__file__))


def assert_all_pass(files: list[Path], **env: str) -> None:
    """Runs the `kernel` tests of the files with the backend "triton"; each file must have some."""
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
    done = subprocess.run(
        [*command, *map(str, files)],
        env={**os.environ, "MAE_KERNELS_BACKEND": "triton", **env},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]
    passed = re.findall(r"^PASSED tests/kernels/(\w+\.py)::", done.stdout, re.MULTILINE)
    assert set(passed) == {file.name for file in files}


def test_kernels_under_the_interpreter() -> None:
    assert_all_pass([*MARKED, HERE / "traffic_by_interpreter.py"], TRITON_INTERPRET="1")


# test_memory.py counts allocations on the CPU; test_gpu.py measures memory
ON_GPU = [file for file in MARKED if file.name != "test_memory.py"]


@pytest.mark.gpu
@pytest.mark.parametrize("file", ON_GPU, ids=lambda file: file.stem)
def test_kernels_on_a_gpu(file: Path) -> None:
    """A process per file: hundreds of kernels are compiled in all."""
    assert_all_pass([file], MAE_KERNELS_TEST_DEVICE="cuda", TRITON_INTERPRET="0")
