"""Runs the tests marked `kernel` in a new process: with the Triton kernels interpreted on the CPU,
or on a GPU.

The interpreter must be chosen before triton is imported. It is right for fp32 and fp16, not for
bf16. It is slow, so each group of files has its own test file, which pytest-xdist runs in another
process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TRAFFIC = "traffic_by_interpreter.py"
MARKED = {file.name for file in HERE.glob("test_*.py") if "mark.kernel" in file.read_text()}
GROUPS = {
    "accuracy": {"test_accuracy.py"},
    "products": {"test_attention.py", "test_gelu_linear.py", "test_patches.py"},
    "losses": {"test_distillation.py", "test_reconstruction.py", "test_memory.py"},
}
GROUPS["rest"] = {*MARKED, TRAFFIC} - set().union(*GROUPS.values())


def assert_all_pass(names: set[str], **env: str) -> None:
    """Runs the `kernel` tests of the files with the backend "triton"; each file must have some."""
    files = [str(HERE / name) for name in sorted(names)]
    options = ["-q", "-rp", "-p", "no:cacheprovider", "-m", "kernel"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "MAE_KERNELS_BACKEND": "triton", **env},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]
    passed = re.findall(r"^PASSED tests/kernels/(\w+\.py)::", done.stdout, re.MULTILINE)
    assert set(passed) == names


def assert_group_passes(group: str) -> None:
    assert_all_pass(GROUPS[group], TRITON_INTERPRET="1")
