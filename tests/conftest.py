"""For every test: fixed seeds, one torch thread, no network, restored signal handlers. Tests of the
ops get NaN in uninitialised memory.

The last lines of a session list the tests that this machine cannot run.
"""

from __future__ import annotations

import ipaddress
import os
import random
import signal
import socket
import tempfile
from collections import Counter
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

NO_PARAMETERS = SimpleNamespace(params={})
SKIPPED = pytest.StashKey[Counter[str]]()
# A machine with only torch and triton still tests the ops.
TRAINER_NEEDS = [
    name
    for name in ("pydantic", "yaml", "rich", "PIL", "sklearn", "safetensors")
    if find_spec(name) is None
]
collect_ignore_glob = (
    ["sssd_fast/*", "benchmarks/test_[!g]*.py", "test_layout.py"] if TRAINER_NEEDS else []
)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what this machine cannot run; `pytest_terminal_summary` prints how many and why."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not os.environ.get("SSSD_FAST_DATA"):
        reasons["realdata"] = "SSSD_FAST_DATA does not name a folder with the CT data sets"
    if not (find_spec("nvidia") and find_spec("nvidia.dali")):
        reasons["dali"] = "NVIDIA DALI is not installed"
    for item in items:
        if any(
            value == "dali"
            for value in getattr(item, "callspec", NO_PARAMETERS).params.values()
            if isinstance(value, str)
        ):
            item.add_marker("dali")
    kept, skipped = [], []
    for item in items:
        marker = next((name for name in reasons if item.get_closest_marker(name)), None)
        (kept if marker is None else skipped).append(item)
        if marker is not None:
            config.stash[SKIPPED][f"marked {marker}: {reasons[marker]}"] += 1
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(
        session.config, "workeroutput"
    ):  # a process of pytest-xdist: only its parent can print
        session.config.workeroutput["skipped"] = dict(session.config.stash[SKIPPED])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    found = getattr(node, "workeroutput", {}).get("skipped", {})
    node.config.stash[SKIPPED] |= Counter(
        found
    )  # every process collects all tests: the largest count, not the sum


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if TRAINER_NEEDS:
        terminalreporter.write_line(
            f"skipped: all tests of the trainer, which needs {', '.join(TRAINER_NEEDS)}"
        )
    for reason, count in sorted(config.stash[SKIPPED].items()):
        terminalreporter.write_line(f"skipped: {count} tests {reason}")


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
                raise RuntimeError(
                    f"a test tried to connect to {address[0]!r}: tests must not need the network"
                )
            return real(self, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


def _is_local(host: str) -> bool:
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and similar return NaN or the largest integer, which shows unwritten memory."""

    def poisoned(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = real(*args, **kwargs)
            if out.dtype.is_floating_point or out.dtype.is_complex:
                return out.detach().fill_(float("nan")).requires_grad_(out.requires_grad)
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return empty

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _poison_ops(request: pytest.FixtureRequest) -> None:
    """Tests of the ops run on poisoned memory."""
    if REPOSITORY / "tests" / "kernels" in request.path.parents:
        request.getfixturevalue("poisoned_empty")
