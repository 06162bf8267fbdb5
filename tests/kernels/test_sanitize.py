"""tools/sanitize.py without a GPU: its cases, its faults, and the verdict on an output."""

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

CASES = sanitize.cases([sample.op for sample in calls.SMALL])
# outputs as in NVIDIA's manual and in reports about Triton kernels
CLEAN = "sanitize: begin a\nsanitize: end a: ok\n========= ERROR SUMMARY: 0 errors\n"
REPORT = """\
sanitize: begin a
========= Invalid __global__ write of size 4 bytes
=========     at _restore_kernel+0x90 in restore.py:86
sanitize: end a: ok
========= ERROR SUMMARY: 1 error
"""
RACE = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"


def test_cases_run_with_the_reference() -> None:
    regular = {name: case for name, case in CASES.items() if case.spoiled is None}
    assert {case.sample.op for case in regular.values()} == {s.op for s in calls.SMALL}
    assert {sanitize.run_case(case, torch.device("cpu")) for case in regular.values()} == {"ok"}
    # on a CPU an index out of range is an error, which the case reports
    for name in CASES.keys() - regular.keys():
        assert sanitize.run_case(CASES[name], torch.device("cpu")).startswith("ValueError"), name


@pytest.mark.parametrize(
    ("printed", "ended", "expected"),
    [
        (CLEAN, "", "ok, 1 cases"),
        (CLEAN.replace("ERROR SUMMARY: 0", "RACECHECK SUMMARY: 0"), "", "ok, 1 cases"),
        (CLEAN.replace(": ok", ": RuntimeError: x"), "", "a: RuntimeError: x"),
        (REPORT, "", "errors in a"),
        (REPORT, "exit code 139", "errors in a"),
        (CLEAN, "exit code 139", "exit code 139"),
        (CLEAN[:18], "stopped after 7 s", "stopped after 7 s"),
        (CLEAN[:18], "", "1 cases were not run"),
        (CLEAN.partition("=")[0], "", "errors, or no summary"),
        (CLEAN.replace("0 err", "3 err"), "", "errors, or no summary"),
        (CLEAN.partition("=")[0] + RACE, "", "errors, or no summary"),
    ],
)
def test_only_a_complete_run_without_reports_is_ok(printed: str, ended: str, expected: str) -> None:
    assert sanitize.verdict(printed, ended, 1).startswith(expected)


@pytest.mark.parametrize("fault", [sanitize.TOOLS["memcheck"][1], "another error"])
def test_tool_that_misses_its_fault_is_blind(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checker = tmp_path / "compute-sanitizer"
    report = f"echo '========= {fault}'; exit 9"
    ended = "".join(f"sanitize: end {name}: ok\n" for name in CASES)
    (tmp_path / "results").write_text(ended + "========= ERROR SUMMARY: 0 errors\n")
    checker.write_text(
        f'#!/bin/sh\ncase "$*" in *"fault --tool"*) {report};; esac\ncat {tmp_path}/results\n'
    )
    checker.chmod(checker.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert sanitize.main(["--tool", "memcheck"]) == (fault == "another error")
    assert ("memcheck   BLIND" in capsys.readouterr().out) == (fault == "another error")


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
