"""How many processes share a batch, and how a failed one is reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sssd_fast.config import load_config
from sssd_fast.errors import ConfigError, EndedByMain, NumericsError
from sssd_fast.run import processes
from sssd_fast.run.device import SHARED_BATCH, World

BOTH = ("pretrain", "finetune")


@pytest.mark.parametrize(
    ("settings", "gain", "count", "why"),
    [
        ([], 2.0, 2, "2.0 times as much as one"),
        ([], 1.4, 1, "share their units"),
        (["pretrain.batch_size=33"], 2.0, 1, "cannot be divided over 2 cores"),
        (["finetune.batch_size=6"], 2.0, 1, "cannot be divided"),  # 3 images per process
        (["threads=8", "finetune.batch_size=24"], 8.0, 4, "4 threads at once"),
        (["threads=1"], 2.0, 1, "one core"),
        (["pretrain.batch=auto"], 2.0, 1, "chosen for one process"),
        (["processes=4"], 1.0, 4, "processes is 4"),
    ],
)
def test_auto_needs_independent_cores_and_a_batch_that_can_be_divided(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], gain: float, count: int, why: str
) -> None:
    monkeypatch.setattr(processes, "parallel_gain", lambda threads: gain)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sizes = ["pretrain.batch_size=32", "finetune.batch_size=32", "device=cpu"]
    found, reason = processes.pick_processes(load_config(None, [*sizes, *settings]), BOTH)
    assert found == count
    assert why in reason


def test_number_that_does_not_divide_a_batch_is_refused() -> None:
    config = load_config(None, ["processes=3", "pretrain.batch_size=32"])
    with pytest.raises(ConfigError, match=r"does not divide pretrain\.batch_size 32"):
        processes.pick_processes(config, ("pretrain",))


# torch's launcher leaves the log files of its processes to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_error_of_a_later_process_is_shown_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first process would run for a minute; the launcher ends it."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\n[ "$RANK" = 0 ] && exec sleep 60\necho boom >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(script))
    for name in ("OMP_NUM_THREADS", SHARED_BATCH, "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert processes.launch(["pretrain"], 2, 1) == 3
    assert capfd.readouterr().err.strip() == "boom"


def test_error_of_the_main_process_ends_all_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would otherwise wait in the next collective call until the connection ends."""
    sent: list[object] = []

    def broadcast(values: list[object], device: torch.device) -> None:
        if sent:
            values[:] = sent
        sent[:] = values

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    main, other = (World(torch.device("cpu"), rank, 2) for rank in (0, 1))

    def fail() -> None:
        raise NumericsError("not finite")

    for world, kind in ((main, NumericsError), (other, EndedByMain)):
        with pytest.raises(kind) as error:
            world.on_main(fail)
        assert error.value.exit_code == NumericsError.exit_code
    sent.clear()
    called: list[int] = []
    for world in (main, other):
        world.on_main(lambda: called.append(1))
    assert called == [1]
