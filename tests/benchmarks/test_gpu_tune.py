"""`bench tune` on a CUDA device; also where torch and triton are all there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command

pytestmark = pytest.mark.gpu


def test_the_launches_of_an_op_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tune.json"
    assert (
        command.main(["tune", "--op", "restore_tokens", "--batch", "16", "--json", str(path)]) == 0
    )
    document = json.loads(path.read_text())
    assert document["finished"] and document["device"]["type"] == "cuda"
    assert document["ceilings"]["copy_bytes_per_s"] > 1e10
    kernels = {row["more"]["kernel"] for row in document["rows"]}
    assert kernels == {"restore_kernel", "restore_backward_kernel"}
    for row in document["rows"]:
        assert row["reason"] is None, row
        assert row["error"] <= row["allowed"] and row["time"]["median_us"] > 0
    chosen = [row for row in document["rows"] if row["more"]["chosen"]]
    assert [row["more"]["verdict"].split()[0] in ("keep", "change") for row in chosen] == [
        True,
        True,
    ]
    assert "of copy" in capsys.readouterr().out


def test_a_run_without_time_names_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    words = [
        "tune",
        "--op",
        "restore_tokens",
        "gather_patches",
        "--batch",
        "2",
        "--minutes",
        "0.01",
    ]
    assert command.main([*words, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert all(row["reason"] is None for row in document["rows"])
    assert len(document["rows"]) + len(document["left_out"]) >= 3
