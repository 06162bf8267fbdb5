"""The file of results: whole after every row, true about how the run ended, without paths, and refused where it is not one."""

from __future__ import annotations

import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, results
from benchmarks.measure import Time, Versus
from benchmarks.results import SCHEMA, Results, Row, dumps, load
from sssd_fast.errors import SssdError

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 3e10, "matmul_flops_per_s": {"fp32": 1e11}}


def opened(path: Path | None, *words: str, **more: Any) -> Results:
    return Results(
        "kernels",
        CPU,
        [torch.float32],
        words=["kernels", *words],
        path=path,
        ceilings=CEILINGS,
        **more,
    )


def strict(path: Path) -> dict[str, Any]:
    """As any JSON reader must be able to read it: Python's own also takes NaN and Infinity, which are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return document


def a_row(provider: str = "ours", **more: Any) -> Row:
    return Row("attention", "ViT-B, 8 images", "fp32", "forward", provider, **more)


# ---- writing ----


def test_the_file_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "x.json"
    with opened(path) as found:
        assert strict(path)["rows"] == []
        for count in range(1, 4):
            found.add(a_row(f"provider {count}"))
            document = strict(path)
            assert [row["provider"] for row in document["rows"]] == [
                f"provider {n + 1}" for n in range(count)
            ]
            assert document["finished"] is False
        found.add(a_row("a"), a_row("b"))
        assert len(strict(path)["rows"]) == 5
    assert strict(path)["finished"] is True
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]  # no temporary file is left


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_was_stopped_keeps_its_rows_and_says_so(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "x.json"

    def stopped() -> None:
        with opened(path) as found:
            found.add(a_row())
            raise error

    with pytest.raises(error):
        stopped()
    document = strict(path)
    assert document["finished"] is False
    assert len(document["rows"]) == 1


def test_the_head_says_what_was_measured_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = iter([{"clocks.sm": "1980 MHz"}, {"clocks.sm": "1755 MHz"}])
    monkeypatch.setattr(machine, "clocks", lambda device: next(clocks))
    with opened(tmp_path / "x.json", "--quick", quick=True, settings={"batch": 8}) as found:
        found.head["missing"]["xformers"] = "no kernel for the CPU"
    head = strict(tmp_path / "x.json")
    assert head["schema"] == SCHEMA == "sssd_fast.benchmarks/2"
    assert (head["kind"], head["quick"], head["settings"]) == ("kernels", True, {"batch": 8})
    assert head["command"] == "sssd-fast bench kernels --quick"
    assert head["clocks"] == {
        "before": {"clocks.sm": "1980 MHz"},
        "after": {"clocks.sm": "1755 MHz"},
    }
    assert head["ceilings"] == CEILINGS
    assert head["missing"] == {"xformers": "no kernel for the CPU"}
    assert head["left_out"] == []
    for name, value in machine.describe(CPU).items():
        assert head[name] == value
    started = datetime.datetime.fromisoformat(head["started"])
    assert abs(datetime.datetime.now(datetime.timezone.utc) - started) < datetime.timedelta(hours=1)
    assert head["seconds"] >= 0


def test_a_row_is_written_with_everything_in_it(tmp_path: Path) -> None:
    row = a_row(
        "eager", sizes={"B": 8}, error=1e-7, allowed=2e-7, time=Time(1.5, 1.25, 2.0, 50, 1.75, 1 / 6), peak_bytes=123_456_789,
        versus=Versus(1.5, 1.4, 1.6, "slower"), first_call_s=0.5, bytes=1e9, flops=2e9, sources="abc", more={"mfu": 0.5},
    )  # fmt: skip
    with opened(tmp_path / "x.json") as found:
        found.add(row, a_row("broken", reason="out of memory"))
    eager, broken = strict(tmp_path / "x.json")["rows"]
    assert eager == {
        "case": "attention", "shape": "ViT-B, 8 images", "dtype": "fp32", "phase": "forward", "provider": "eager",
        "sizes": {"B": 8}, "reason": None, "error": 1e-7, "allowed": 2e-7,
        "time": {"median_us": 1.5, "p20_us": 1.25, "p80_us": 2.0, "n": 50, "again_us": 1.75, "gap": 0.16667},
        "versus": {"ratio": 1.5, "low": 1.4, "high": 1.6, "verdict": "slower"}, "first_call_s": 0.5, "peak_bytes": 123_456_789,
        "bytes": 1e9, "flops": 2e9, "sources": "abc", "more": {"mfu": 0.5},
    }  # fmt: skip
    assert broken["reason"] == "out of memory"
    assert broken["time"] is None and broken["versus"] is None
    assert results.key(eager) == ("attention", "ViT-B, 8 images", "fp32", "forward", "eager")


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_an_error_that_is_no_number_leaves_the_file_readable(tmp_path: Path, error: float) -> None:
    """A provider that gives NaN has an infinite error; browsers and jq must still read its file."""
    with opened(tmp_path / "x.json") as found:
        found.add(a_row("wrong", reason="wrong", error=error, more={"loss": [error]}))
    assert strict(tmp_path / "x.json")["rows"][0]["reason"] == "wrong"


def test_numbers_keep_five_digits(tmp_path: Path) -> None:
    with opened(tmp_path / "x.json", settings={"deep": [(1.23456789e-7,)]}) as found:
        found.add(
            a_row(
                time=Time(123456.789, -0.000123456789, 1e300, 123456789),
                more={"text": "1.23456789", "yes": True},
            )
        )
    document = strict(tmp_path / "x.json")
    assert document["settings"] == {"deep": [[1.2346e-7]]}
    assert document["rows"][0]["time"] == {
        "median_us": 123460.0, "p20_us": -0.00012346, "p80_us": 1e300, "n": 123456789, "again_us": None, "gap": None,
    }  # fmt: skip
    assert document["rows"][0]["more"] == {"text": "1.23456789", "yes": True}


def test_every_row_is_one_line() -> None:
    rows = [{"provider": f"{n}", "time": {"median_us": 1.0}} for n in range(3)]
    text = dumps({"schema": SCHEMA, "versions": {"torch": "2"}, "rows": rows})
    assert json.loads(text) == {"schema": SCHEMA, "versions": {"torch": "2"}, "rows": rows}
    assert sum('"provider"' in line for line in text.splitlines()) == 3
    assert text.endswith("}\n")
    assert json.loads(dumps({"schema": SCHEMA, "rows": []})) == {"schema": SCHEMA, "rows": []}


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--json", "/disk/someone/a b/out.json"], "--json out.json"),
        (["--json", "results/out.json", "--dtype", "bf16"], "--json out.json --dtype bf16"),
        (["--json=/disk/someone/out.json"], "--json=out.json"),
        (["--data", "/disk/someone/slices/"], "--data slices"),
        (["--only", "ours", "a b"], "--only ours 'a b'"),
        ([], ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_command_has_no_folder_of_this_machine(
    tmp_path: Path, words: list[str], command: str
) -> None:
    assert (
        opened(tmp_path / "x.json", *words).head["command"]
        == f"sssd-fast bench kernels {command}".strip()
    )


def test_without_a_path_the_name_says_kind_device_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    with opened(None) as found:
        pass
    slug = machine.slug(found.head["device"]["name"])
    assert found.path.parent == tmp_path
    assert re.fullmatch(rf"kernels-{re.escape(slug)}-\d{{8}}-\d{{6}}\.json", found.path.name)
    assert strict(found.path)["finished"] is True


def test_the_ceilings_are_measured_where_none_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        machine, "ceilings", lambda device, dtypes: {"device": device.type, "dtypes": list(dtypes)}
    )
    found = Results("kernels", CPU, [torch.float32], words=[], path=tmp_path / "x.json")
    assert found.head["ceilings"] == {"device": "cpu", "dtypes": [torch.float32]}
    given = Results(
        "kernels", CPU, [torch.float32], words=[], path=tmp_path / "x.json", ceilings={}
    )
    assert given.head["ceilings"] == {}


# ---- reading ----


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    with opened(tmp_path / "x.json") as found:
        found.add(a_row(error=0.25))
    document = load(tmp_path / "x.json")
    assert document == load(str(tmp_path / "x.json")) == strict(tmp_path / "x.json")
    assert document["rows"][0]["error"] == 0.25


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ["no such file", "sssd-fast bench kernels"]),
        (b"", ["cannot be read as JSON", "give a file that `sssd-fast bench` wrote"]),
        (b'{"schema": "sssd_fast.bench', ["cannot be read as JSON", "give a file"]),
        (b"\x89PNG\xff\xfe", ["cannot be read as JSON", "give a file"]),
        (b"{}", ["schema is None", SCHEMA, "measure again"]),
        (b"[1, 2]", ["schema is None", SCHEMA]),
        (b'{"schema": "sssd_fast.benchmarks/1", "rows": []}', ["sssd_fast.benchmarks/1", SCHEMA, "measure again"]),
    ],
    ids=["missing", "empty", "cut off", "no text", "no schema", "a list", "an older schema"],
)  # fmt: skip
def test_what_is_no_result_is_refused_by_name(
    tmp_path: Path, content: bytes | None, says: list[str]
) -> None:
    path = tmp_path / "some result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SssdError) as error:
        load(path)
    for text in (str(path), *says):
        assert text in str(error.value)


def test_a_folder_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(SssdError, match="cannot be read as JSON"):
        load(tmp_path)


def test_the_results_of_the_repository_can_be_read() -> None:
    files = sorted(results.FOLDER.glob("*.json"))
    assert files
    for path in files:
        document = load(path)
        if not document["kind"].startswith("loader"):  # whose rows have a form of their own
            assert len({results.key(row) for row in document["rows"]}) == len(document["rows"]), (
                path.name
            )
