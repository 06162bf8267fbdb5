"""The file of a run: complete after every row, readable later, and free of paths."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import mae_kernels
from benchmarks import results
from benchmarks.results import Results, Row, load
from sssd_fast.errors import SssdError
from tests.benchmarks.helpers import CPU


def new(out: Path, *words: str, **more: Any) -> Results:
    return Results("ops", CPU, [], words or ["ops"], out, ceilings={}, **more)


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
    words = ("loader", "/data/covid-ct", "--manifest=/data/split.csv", "--out", str(tmp_path))
    found = new(tmp_path / "rows.json", *words)
    expected = f"loader covid-ct --manifest=split.csv --out {tmp_path.name}"
    assert found.head["command"] == f"sssd-fast bench {expected}"
    text = json.dumps(found.head)
    assert str(Path.home()) not in text and str(Path(results.__file__).parent) not in text
    assert found.head["device"]["type"] == "cpu"
    assert found.head["versions"]["torch"] == torch.__version__
    assert found.head["ops"].keys() == mae_kernels.info().keys()


def test_results_name_kind_device_and_time_and_quick_runs_have_a_folder(tmp_path: Path) -> None:
    slow, quick = (new(tmp_path, quick=flag) for flag in (False, True))
    assert slow.path.parent == tmp_path and quick.path.parent == tmp_path / "quick"
    name = results.slug(slow.head["device"]["name"])
    assert slow.path.name.startswith(f"ops-{name}-20")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a result"), ("[]", "not a result"), ('{"schema": "x/1"}', "'x/1'")],
)
def test_load_names_a_file_that_is_not_a_result(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(SssdError, match=r"a\.json: no such file"):
        load(path)
    path.write_text(text)
    with pytest.raises(SssdError, match=message):
        load(path)
