"""For every test: fixed seeds, one torch thread, no network, restored signal handlers. Tests of the
ops get NaN in uninitialised memory.

The last lines of a session list the tests that this machine cannot run.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Set before torch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Decoded images and compiled steps of tests must not fill the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="sssd_fast_tests_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPOSITORY), str(REPOSITORY / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# A machine with only torch and triton still tests the ops.
NEEDED = ("pydantic", "omegaconf", "typer", "yaml", "rich", "PIL", "sklearn", "safetensors")
TRAINER_NEEDS = [name for name in NEEDED if find_spec(name) is None]
collect_ignore_glob = (
    ["sssd_fast/*", "benchmarks/test_[!g]*.py", "test_layout.py", "test_fakegpu.py"]
    if TRAINER_NEEDS
    else []
)
NO_PARAMETERS = SimpleNamespace(params={})
# By time, so that no worker is left alone with a long file at the end.
LONGEST = ("test_train.py", "test_step.py", "test_execution.py", "test_reproduce.py")
# marker: why this machine cannot run its tests
REASONS = {}
if not torch.cuda.is_available():
    REASONS["gpu"] = "no CUDA device"
if not find_spec("fakegpu"):
    REASONS["fakegpu"] = "no fake CUDA device (docs/gpu.md)"
if not os.environ.get("SSSD_FAST_DATA"):
    REASONS["realdata"] = "SSSD_FAST_DATA does not name a folder with the CT data sets"
if not (find_spec("nvidia") and find_spec("nvidia.dali")):
    REASONS["dali"] = "NVIDIA DALI is not installed"
for _name in ("mlflow", "timm", "wandb"):
    if find_spec(_name) is None:
        REASONS[_name] = f"{_name} is not installed"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what this machine cannot run; `pytest_terminal_summary` prints why. Sorts the long
    files first.
    """
    kept, skipped = [], []
    for item in items:
        values = getattr(item, "callspec", NO_PARAMETERS).params.values()
        if any(value == "dali" for value in values if isinstance(value, str)):
            item.add_marker("dali")
        (skipped if any(map(item.get_closest_marker, REASONS)) else kept).append(item)
    config.hook.pytest_deselected(items=skipped)
    items[:] = sorted(kept, key=lambda item: item.path.name not in LONGEST)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [f"skipped: tests marked {marker}: {reason}" for marker, reason in REASONS.items()]
    if TRAINER_NEEDS:
        lines.append(f"skipped: tests of the trainer, which needs {', '.join(TRAINER_NEEDS)}")
    for line in lines:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may use the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restored_signals() -> Iterator[None]:
    """A training run's handler must not outlive its test: `timeout` has to end pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that leave this machine raise, except in processes that a test starts."""

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
                raise RuntimeError(f"tests must not need the network, but use {address[0]!r}")
            return real(self, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


@pytest.fixture(autouse=True)
def _poison_ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of the ops, torch.empty and similar return NaN or the largest integer, which shows
    unwritten memory. Not if marked `unpoisoned`: AOTAutograd cannot trace the fills.
    """
    if REPOSITORY / "tests" / "kernels" not in request.path.parents:
        return
    if request.node.get_closest_marker("unpoisoned"):
        return

    def poisoned(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = real(*args, **kwargs)
            if out.dtype.is_floating_point or out.dtype.is_complex:
                return out.detach().fill_(float("nan")).requires_grad_(out.requires_grad)
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return empty

    names = {torch: "empty empty_like empty_strided", torch.Tensor: "new_empty new_empty_strided"}
    for owner, listed in names.items():
        for name in listed.split():
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
