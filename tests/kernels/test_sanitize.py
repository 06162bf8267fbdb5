"""tools/sanitize.py without a GPU: its cases, its faults, and how the checker's output is read."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tests.kernels import calls
from tools import sanitize
from tools.sanitize import parse, rows

CASES = sanitize.cases([sample.op for sample in calls.SMALL])
# outputs as in NVIDIA's manual and in reports about Triton kernels
MEMCHECK = """\
========= COMPUTE-SANITIZER
sanitize: begin gather
sanitize: end gather: ok
sanitize: begin restore
========= Invalid __global__ write of size 4 bytes
=========     at _restore_kernel+0x90 in restore.py:86
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x74505bcccca0 is out of bounds
=========         Host Frame: main [0xae66] in python3
=========
========= Invalid __shared__ read of size 16 bytes
========= at _restore_kernel+0xa0 in restore.py:90
========= by thread (1,0,0) in block (0,0,0)
sanitize: end restore: ok
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
sanitize: begin gather
========= Error: Race reported between Write access at k+0x5ad20 in standard.py:237
=========     and Read access at k+0x5ad20 in standard.py:237 [6136 hazards]
=========
sanitize: end gather: ok
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "sanitize: begin gather\nsanitize: end gather: ok\n========= ERROR SUMMARY: 0 errors\n"


def test_cases_run_with_the_reference() -> None:
    regular = {name: case for name, case in CASES.items() if case.spoiled is None}
    assert {case.sample.op for case in regular.values()} == {s.op for s in calls.SMALL}
    assert {sanitize.run_case(case, torch.device("cpu")) for case in regular.values()} == {"ok"}
    # on a CPU an index out of range is an error, which the case reports
    for name in CASES.keys() - regular.keys():
        assert sanitize.run_case(CASES[name], torch.device("cpu")).startswith("ValueError"), name


def test_reports_are_assigned_to_cases() -> None:
    restore = [
        "Invalid __global__ write of size 4 bytes at _restore_kernel+0x90 in restore.py:86",
        "Invalid __shared__ read of size 16 bytes at _restore_kernel+0xa0 in restore.py:90",
    ]
    assert parse(MEMCHECK).reports == [("restore", text) for text in restore]
    first, second = rows("memcheck", parse(MEMCHECK), "", {"gather": "a", "restore": "b"})
    assert (first.ok, first.text) == (True, "ok, 1 cases")
    assert second == ("memcheck", "b", 2, f"restore: {restore[0]}", False)
    ((case, text),) = parse(RACECHECK).reports
    assert case == "gather"
    assert "Write access at k+0x5ad20" in text


@pytest.mark.parametrize(
    ("printed", "ended", "bad"),
    [
        (CLEAN, "", {}),
        (CLEAN.replace(": ok", ": RuntimeError: x"), "", {"a": "gather: RuntimeError"}),
        (CLEAN, "exit code 139", {"(all)": "exit code 139"}),
        (CLEAN.partition("=")[0], "", {"(all)": "no summary"}),
        (CLEAN.replace("0 err", "3 err"), "", {"(all)": "3 more in its summary"}),
        (CLEAN[:23], "stopped after 7 s", {"a": "gather: not run: stopped", "(all)": "stopped"}),
        ("========= Unknown\n" + CLEAN.replace("0 err", "1 err"), "", {"(all)": "Unknown"}),
    ],
)
def test_only_a_complete_run_without_reports_is_ok(
    printed: str, ended: str, bad: dict[str, str]
) -> None:
    found = [row for row in rows("memcheck", parse(printed), ended, {"gather": "a"}) if not row.ok]
    assert {row.op for row in found} == set(bad)
    assert all(row.text.startswith(bad[row.op]) for row in found)


@pytest.mark.parametrize("fault", [sanitize.TOOLS["memcheck"][1], "another error"])
def test_tool_that_misses_its_fault_is_blind(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checker = tmp_path / "compute-sanitizer"
    report = f"echo '========= {fault}'; echo '========= ERROR SUMMARY: 1 error'; exit 9"
    results = "".join(f"sanitize: end {n}: ok\n" for n in CASES) + "========= ERROR SUMMARY: 0 e"
    (tmp_path / "results").write_text(results)
    checker.write_text(
        f'#!/bin/sh\ncase "$*" in *"fault --tool"*) {report};; esac\ncat {tmp_path}/results\n'
    )
    checker.chmod(checker.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert sanitize.main(["--tool", "memcheck"]) == (fault == "another error")
    printed = capsys.readouterr().out
    assert ("BLIND" in printed) == (fault == "another error")


def test_faults_are_in_the_machine_code() -> None:
    """Neither Triton nor the assembler inserts the missing barrier."""

    def ptx(text: str) -> str:
        types = {"X": "*i32", "Y": "*i32", "N": "constexpr", "PTX": "constexpr"}
        constants = {"N": sanitize.THREADS, "PTX": text}
        source = ASTSource(sanitize.fault_ptx_kernel, types, constants)
        target = GPUTarget("cuda", 90, 32)
        return compile(source, target=target, options={"num_warps": 4}).asm["ptx"]

    race = ptx(sanitize.RACE)
    assert re.search(r"st\.volatile\.shared.*\n\s*ld\.volatile\.shared", race)
    assert "bar.sync" not in race
    assert "@some bar.sync" in ptx(sanitize.BARRIER)
    words = sanitize.command("checker", "synccheck", "cases")
    assert {"kns=fault_ptx_kernel", "kns=_restore_kernel"} <= set(words)
    assert "--kernel-name" not in sanitize.command("checker", "initcheck", "cases")
