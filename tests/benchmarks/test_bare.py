"""Ops are measured where torch, numpy and triton are all that is installed."""

from __future__ import annotations

import subprocess
import sys

HIDDEN = (
    "PIL",
    "pydantic",
    "yaml",
    "rich",
    "transformers",
    "matplotlib",
    "sklearn",
    "safetensors",
    "tensorboard",
)


def test_the_benchmarks_start_without_the_trainers_packages() -> None:
    code = f"""
import sys
for name in {HIDDEN}:
    sys.modules[name] = None  # importing it raises ImportError
import benchmarks.report, benchmarks.session, benchmarks.tune
from benchmarks.__main__ import main
sys.exit(main(["kernels", "--device", "cpu", "--op", "no such op"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "no such op" in done.stderr
