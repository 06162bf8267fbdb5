"""The file of a run: complete after every row, readable later, and free of paths."""

from __future__ import annotations

import json
import math
import subprocess
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mae_kernels
from benchmarks import results
from benchmarks.results import Results, Row, is_stale, load, sources_hash
from sssd_fast.errors import SssdError
from tests.benchmarks.helpers import CPU, document, row


def new(path: Path | None, *words: str, **more: Any) -> Results:
    return Results("ops", CPU, [], words=words or ["ops"], path=path, ceilings={}, **more)


def test_results_are_complete_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a" / "rows.json"
    with new(path) as found:
        found.add(Row("op", "s", "fp32", "forward", "ours", error=1 / 3, load=math.nan))
        document = load(path)
        assert [one["provider"] for one in document["rows"]] == ["ours"]
        assert document["rows"][0]["error"] == 0.33333 and document["rows"][0]["load"] is None
        assert not document["finished"]
    assert load(path)["finished"]


def test_results_of_a_stopped_run_are_kept_as_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with suppress(KeyboardInterrupt), new(path) as found:
        found.add(Row("op", "s", "fp32", "forward", "ours"))
        raise KeyboardInterrupt
    document = load(path)
    assert len(document["rows"]) == 1 and not document["finished"]


def test_results_contain_no_folder_and_no_host_name(tmp_path: Path) -> None:
    words = ("loader", "/data/covid-ct", "--manifest=/data/split.csv", "--json", str(tmp_path))
    found = new(tmp_path / "rows.json", *words)
    expected = f"loader covid-ct --manifest=split.csv --json {tmp_path.name}"
    assert found.head["command"] == f"sssd-fast bench {expected}"
    text = json.dumps(found.head)
    assert str(Path.home()) not in text and str(Path(results.__file__).parent) not in text
    assert found.head["device"]["type"] == "cpu"
    assert found.head["versions"]["torch"] == torch.__version__
    assert found.head["ops"].keys() == mae_kernels.info().keys()


def test_results_name_kind_device_and_time_and_quick_runs_have_a_folder(tmp_path: Path) -> None:
    slow, quick = (new(None, folder=tmp_path, quick=flag) for flag in (False, True))
    assert slow.path.parent == tmp_path and quick.path.parent == tmp_path / "quick"
    name = results.slug(slow.head["device"]["name"])
    assert slow.path.name.startswith(f"ops-{name}-20")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "schema is None"), ('{"schema": "x/1"}', "'x/1'")],
)
def test_load_names_a_file_that_is_not_a_result(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(SssdError, match=r"a\.json: no such file"):
        load(path)
    path.write_text(text)
    with pytest.raises(SssdError, match=message):
        load(path)


def test_committed_results_can_be_read() -> None:
    files = sorted(results.FOLDER.glob("*.json"))
    assert len(files) >= 7
    for file in files:
        for one in load(file)["rows"]:
            assert set(one) >= set(row("op", "ours", 1.0)), file.name
            assert one["reason"] or one["time"] or one["peak_bytes"] or one["more"], file.name


def test_file_is_stale_if_the_sources_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = document("ops", [])
    assert not is_stale(found)
    (tmp_path / "restore.py").write_text("changed = 1")
    monkeypatch.setattr(results, "KERNELS", tmp_path)
    sources_hash.cache_clear()
    assert is_stale(found)
    sources_hash.cache_clear()


# ---- clocks ----


def test_clocks_are_those_of_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def smi(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout="1980 MHz, 2619 MHz, 1980 MHz, 70.1 W, 700.00 W, 33\n")

    properties = SimpleNamespace(uuid="1234-ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(subprocess, "run", smi)
    found = results.clocks(torch.device("cuda", 1))
    assert found is not None
    assert found["clocks.sm"] == "1980 MHz" and found["power.limit"] == "700.00 W"
    assert commands[0][:2] == ["nvidia-smi", "--id=GPU-1234-ab"]

    def fails(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(9, command)

    monkeypatch.setattr(subprocess, "run", fails)
    assert results.clocks(torch.device("cuda", 1)) is None
    assert results.clocks(CPU) is None
