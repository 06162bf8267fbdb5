"""What compute-sanitizer is shown, and how its words are read, without a GPU.

The cases run with the reference and, under the interpreter, with the kernels. The checker's texts are those of NVIDIA's manual and of
reports about Triton kernels; a made-up compute-sanitizer prints them for the whole command.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mae_kernels as mk
from mae_kernels import _runtime
from tests.kernels import sanitize, sanitize_run
from tests.kernels.sanitize_run import Output, Refused, Report, Row, parse, place, rows

HERE = Path(__file__).parent
CASES = sanitize.CASES
OPS = {name: case.op for name, case in CASES.items()}
NOT_OPS = {"backend", "debug_checks", "info", "patch_model", "unpatch_model"}
# the slow ones under the interpreter; a smaller case launches the same kernels
SLOW = {
    "attention 133", "attention 197", "crop_resize rgb", "distillation_loss 1500", "embed_patches grey 192", "gelu_linear two steps",
    "linear_reconstruction_loss 64", "random_masking 300", "restore_tokens two steps",
}  # fmt: skip


# ---- the cases ----


def test_every_public_op_has_a_case() -> None:
    public = {name for name in mk.__all__ if inspect.isfunction(getattr(mk, name))} - NOT_OPS
    assert set(OPS.values()) == public == set(mk.info())


def package_kernels() -> set[str]:
    modules = [
        importlib.import_module(f"mae_kernels.{file.stem}")
        for file in sanitize_run.PACKAGE.glob("[!_]*.py")
    ]
    found = {name for module in modules for name, x in vars(module).items() if hasattr(x, "fn")}
    return {name for name in found if name.endswith("_kernel")}


def test_every_kernel_is_launched_and_right_and_reads_nothing_out_of_range() -> None:
    """In the interpreter, which has to be chosen before triton is imported; ids out of range go past the CPU's checks."""
    code = f"""
        import importlib, json, torch, sanitize
        for name in ("_checks", "crop_resize"):
            importlib.import_module("mae_kernels." + name).can_look = lambda x: False
        cases = {{name: case for name, case in sanitize.CASES.items() if name not in {sorted(SLOW)}}}
        print(json.dumps({{name: sanitize.one(case, torch.device("cpu"), "triton") for name, case in cases.items()}}))
    """
    path = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, str] = json.loads(done.stdout)
    assert {name for name, said in told.items() if not said.startswith("ok, _")} == set(), told
    assert set(told) == set(CASES) - SLOW
    launched = {
        kernel for said in told.values() for kernel in said.removeprefix("ok, ").split(", ")
    }
    assert launched == package_kernels() and len(launched) > 15
    slow_ops = {CASES[name].op for name in SLOW}
    assert slow_ops <= {CASES[name].op for name in told}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.spoil is None])
def test_the_cases_are_right_with_the_reference(name: str) -> None:
    if not CASES[name].dtype.is_floating_point or _runtime.INTERPRET:
        pytest.fail("the cases are made for floating point, and this process is no interpreter")
    assert sanitize.one(CASES[name], torch.device("cpu"), "reference") == "ok, no kernel"


def test_a_case_out_of_range_is_noticed_where_it_gives_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the out-of-range id put right again the result has no NaN: that is a failure, not a pass."""
    case = CASES["gather_patches out of range"]._replace(spoil=lambda others: others)
    assert "neither NaN nor zeros" in sanitize.one(case, torch.device("cpu"), "reference")


def test_a_wrong_result_is_told() -> None:
    def wrong(x: Any, o: Any) -> torch.Tensor:
        sign = 1 if _runtime._backend == "reference" else -1
        return sign * x[0].square().sum()

    case = CASES["attention 10"]._replace(call=wrong)
    assert sanitize.one(case, torch.device("cpu"), "triton").startswith("wrong: result 0: error ")
    assert sanitize.one(case, torch.device("cpu"), "reference").startswith("ok")


@pytest.mark.parametrize(
    ("got", "told"),
    [
        (torch.tensor([1.0, 2.0]), None),
        (torch.tensor([1.0, 2.0 + 1e-5]), None),
        (torch.tensor([1.0, 2.001]), "error 1.00e-03"),
        (torch.tensor([1.0, float("nan")]), "error nan"),
        (torch.tensor([1.0, -2.0]), "error 4.00e"),
        (torch.tensor([1.0]), r"\(1,\) torch.float32, the reference has \(2,\)"),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), r"\(2,\) torch.float64, the reference has"),
    ],
)
def test_the_difference_to_the_reference(got: torch.Tensor, told: str | None) -> None:
    exact = torch.tensor([1.0, 2.0])
    found = sanitize.difference(got, exact, exact)
    assert found is None if told is None else re.match(told, str(found))


def test_integers_are_equal_and_grey_levels_nearly() -> None:
    x = torch.tensor([3, 250])
    assert sanitize.difference(x, x, x) is None
    assert sanitize.difference(x + 1, x, x) == "not equal to the reference"
    grey = x.to(torch.uint8)
    assert sanitize.difference(grey - 2, grey, grey) is None
    assert (
        sanitize.difference(grey + 5, grey, grey) == "5 grey levels from the reference"
    )  # 250 + 5 does not wrap


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sanitize.main(["--op", "attention 10", "no op"])
    assert stopped.value.code == 2
    assert "got 'no op', needs an op or a case that --list names" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert sanitize.main([]) == 2
        assert "--device cpu runs the cases without one" in capsys.readouterr().err


def test_the_command_runs_the_cases_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--backend", "reference", "--op", "random_masking", "attention 10"]
    assert sanitize.main(words) == 0
    printed = capsys.readouterr().out
    assert list(parse(printed).ended) == ["random_masking 37", "random_masking 300", "attention 10"]


# ---- the deliberate faults ----


def test_there_is_a_fault_for_every_tool_and_its_kernel_is_watched() -> None:
    from tests.kernels import sanitize_faults

    assert set(sanitize_faults.FAULTS) == set(sanitize_run.FAULTS) == set(sanitize_run.TOOLS)
    assert package_kernels() < set(sanitize_run.kernels())
    assert sum(name.startswith("fault_") for name in sanitize_run.kernels()) == len(
        sanitize_run.TOOLS
    )
    assert (sanitize.BEGIN, sanitize.END) == (sanitize_run.BEGIN, sanitize_run.END)


def test_the_faults_are_in_the_machine_code() -> None:
    """Neither Triton nor the assembler puts a mask or a barrier where one would be right."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.kernels import sanitize_faults as faults

    def ptx(kernel: Any, **types: str) -> str:
        source = ASTSource(kernel, {**types, "N": "constexpr"}, {"N": faults.THREADS})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert built.asm["cubin"]
        return built.asm["ptx"]

    pair = {"X": "*i32", "Y": "*i32"}
    bounds = ptx(faults.fault_bounds_kernel, X="*fp32")
    assert "st.global" in bounds and "@" not in re.sub(r"//.*", "", bounds)
    race = ptx(faults.fault_race_kernel, **pair)
    assert (
        re.search(r"st\.volatile\.shared.*\n\s*ld\.volatile\.shared", race)
        and "bar.sync" not in race
    )
    assert "@some bar.sync" in ptx(faults.fault_barrier_kernel, **pair)
    unwritten = ptx(faults.fault_unwritten_kernel, **pair)
    assert "ld.global" in unwritten and "st.global" in unwritten


# ---- the checker's words ----

MEMCHECK = """\
========= COMPUTE-SANITIZER
sanitize: begin gather_patches rgb
sanitize: end gather_patches rgb: ok, _gather_kernel
sanitize: begin restore_tokens 33
========= Invalid __global__ write of size 4 bytes
=========     at _restore_kernel+0x90 in restore.py:86
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x74505bcccca0 is out of bounds
=========     and is 161 bytes after the nearest allocation at 0x74505bccc800 of size 1,024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: main [0xae66] in python3
=========
========= Invalid __shared__ read of size 16 bytes
=========     at _restore_kernel+0xa0 in restore.py:90
=========     by thread (1,0,0) in block (0,0,0)
sanitize: end restore_tokens 33: wrong: result 0: error 1.00e+00 against fp64, allowed 2.00e-05
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
sanitize: begin attention 65
========= Error: Race reported between Write access at _attention_kernel+0x5ad20 in triton/language/standard.py:237
=========     and Write access at _attention_kernel+0x5ad20 in triton/language/standard.py:237 [6136 hazards]
=========
========= Warning: Race reported between Read access at RAW()+0xf0 in raceGroupBasic.cu:40
=========     and Write access at RAW()+0x280 in raceGroupBasic.cu:46 [4 hazards]
sanitize: end attention 65: ok, _attention_kernel
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_memcheck_is_read() -> None:
    out = parse(MEMCHECK)
    assert out.reports == [
        Report(
            "restore_tokens 33",
            "Invalid __global__ write of size 4 bytes",
            "_restore_kernel",
            "restore.py:86",
        ),
        Report(
            "restore_tokens 33",
            "Invalid __shared__ read of size 16 bytes",
            "_restore_kernel",
            "restore.py:90",
        ),
    ]
    assert out.total == 2
    assert out.ended["gather_patches rgb"] == "ok, _gather_kernel"
    assert out.ended["restore_tokens 33"].startswith("wrong: result 0: error")


def test_racecheck_is_read() -> None:
    out = parse(RACECHECK)
    assert out.reports == [
        Report(
            "attention 65",
            "Error: Race reported between Write access",
            "_attention_kernel",
            "standard.py:237",
        ),
        Report(
            "attention 65",
            "Warning: Race reported between Read access",
            "RAW",
            "raceGroupBasic.cu:40",
        ),
    ]
    assert out.total == 2
    assert (
        parse("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n").total
        == 0
    )
    assert (
        parse("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n").total == 1
    )


@pytest.mark.parametrize(
    ("said", "what", "kernel", "where"),
    [
        (
            "Barrier error detected. Divergent thread(s) in block.\n=========     at [clone myKernel(int *, int *)] outlineSync()+0x11f0 "
            "in test.cu:42\n=========     by thread (32,0,0) in block (0,0,0)\n"
            "=========     Device Frame: myKernel(int *, int *)+0xe40 in test.cu:60",
            "Barrier error detected. Divergent thread(s) in block.", "[clone myKernel(int *, int *)] outlineSync", "test.cu:42",
        ),
        (
            "Uninitialized __global__ memory read of size 4 bytes\n=========     at vectorAdd(int *)+0x70 in Initcheck/memset_error.cu:41\n"
            "=========     by thread (31,0,0) in block (1,0,0)\n=========     Address 0x7f3c7ec000fc",
            "Uninitialized __global__ memory read of size 4 bytes", "vectorAdd(int *)", "memset_error.cu:41",
        ),
        (  # as web pages show it, without the indentation
            "Invalid __global__ write of size 4 bytes\n========= at unaligned_kernel():0x160 in memcheck_demo.cu:6\n"
            "========= by thread (0,0,0) in block (0,0,0)\n========= Address 0x7f6510c00001 is misaligned",
            "Invalid __global__ write of size 4 bytes", "unaligned_kernel", "memcheck_demo.cu:6",
        ),
        ("Something that no manual names", "Something that no manual names", None, None),
        (
            "Internal Sanitizer Error: The Sanitizer encountered an error while launching kernel_name and didn't track the launch.",
            "Internal Sanitizer Error: The Sanitizer encountered an error while launching kernel_name and didn't track the launch.",
            None, None,
        ),
    ],
    ids=["synccheck", "initcheck", "without indentation", "unknown", "internal"],
)  # fmt: skip
def test_other_reports_are_read(
    said: str, what: str, kernel: str | None, where: str | None
) -> None:
    text = f"sanitize: begin attention 10\n========= {said}\n========= ERROR SUMMARY: 1 error\n"
    assert parse(text).reports == [Report("attention 10", what, kernel, where)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("matmul_kernel+0xec0 in matmul_triton2.py:43", ("matmul_kernel", "matmul_triton2.py:43")),
        ("unaligned_kernel()+0x50", ("unaligned_kernel", None)),
        (
            "0xda0 in moe/fused_moe.py:175:fused_moe_kernel",
            ("fused_moe_kernel", "fused_moe.py:175"),
        ),
        (
            "0x9670 in void f<short, unsigned int>(T2, T3)",
            ("void f<short, unsigned int>(T2, T3)", None),
        ),
        ("0x79d8", (None, None)),
        ("k()+0x280 in a.py:46 [4 hazards]", ("k", "a.py:46")),
        ("nowhere", (None, None)),
    ],
)
def test_places_of_old_and_new_versions(text: str, found: tuple[str | None, str | None]) -> None:
    assert place(text) == found


def test_what_the_checker_says_of_the_program_is_no_report_of_a_kernel() -> None:
    text = "========= Error: process didn't terminate successfully\n========= Target application returned an error\n"
    assert parse(text) == Output()


# ---- from its words to the table ----

TWO = {"gather_patches rgb": "gather_patches", "restore_tokens 33": "restore_tokens"}


def test_the_rows_name_the_first_report() -> None:
    first, second = rows("memcheck", parse(MEMCHECK), "", TWO)
    assert first == Row("memcheck", "gather_patches", 0, "ok, 1 cases", True)
    assert (second.op, second.errors, second.ok) == ("restore_tokens", 2, False)
    what = "restore_tokens 33: Invalid __global__ write of size 4 bytes, _restore_kernel, restore.py:86"
    assert second.told == what
    assert (
        sanitize_run.table([first, second]).splitlines()[2]
        == f"memcheck  restore_tokens  2       {what}"
    )


CLEAN = "sanitize: begin x\nsanitize: end x: ok, _a_kernel\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("printed", "ended", "bad"),
    [
        (CLEAN, "", {}),
        (CLEAN.replace("ok, _a_kernel", "ok, no kernel"), "", {"op": "x: ok, no kernel"}),
        (
            CLEAN.replace("ok, _a_kernel", "fails: RuntimeError: CUDA error"),
            "",
            {"op": "x: fails: RuntimeError"},
        ),
        (CLEAN, "exit code 139", {"(all)": "exit code 139"}),
        (CLEAN.partition("=")[0], "", {"(all)": "it gave no summary"}),
        (
            CLEAN.replace("0 errors", "3 errors"),
            "",
            {"(all)": "3 more in its summary than were understood"},
        ),
        (
            "sanitize: begin x\n",
            "cut off after 7 s",
            {"op": "x: not reached: cut off after 7 s", "(all)": "cut off"},
        ),
        ("", "", {"op": "x: not reached: the process ended before", "(all)": "it gave no summary"}),
        (
            "========= Invalid thing\n" + CLEAN.replace("0 errors", "1 error"),
            "",
            {"(all)": "Invalid thing"},
        ),
    ],
    ids=[
        "clean",
        "no kernel",
        "fails",
        "crashed",
        "no summary",
        "not understood",
        "cut off",
        "nothing",
        "before any case",
    ],
)
def test_only_a_clean_run_to_the_end_is_ok(printed: str, ended: str, bad: dict[str, str]) -> None:
    found = list(rows("memcheck", parse(printed), ended, {"x": "op"}))
    assert {row.op for row in found if not row.ok} == set(bad)
    for row in found:
        assert bad.get(row.op, "") in row.told


# ---- finding it ----


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_it_is_found_in_path_then_in_cuda_then_in_the_newest_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "local"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        Refused,
        match=r"not in PATH, .*cuda/bin or .*cuda-\*/bin.*install the toolkit or its package cuda-sanitizer",
    ):
        sanitize_run.find_sanitizer(root)
    old = executable(root / "cuda-9.2" / "bin" / "compute-sanitizer")
    assert sanitize_run.find_sanitizer(root) == old
    new = executable(root / "cuda-13.0" / "bin" / "compute-sanitizer")
    assert sanitize_run.find_sanitizer(root) == new
    usual = executable(root / "cuda" / "bin" / "compute-sanitizer")
    assert sanitize_run.find_sanitizer(root) == usual
    usual.chmod(0o644)
    assert sanitize_run.find_sanitizer(root) == new
    on_path = executable(tmp_path / "bin" / "compute-sanitizer")
    assert sanitize_run.find_sanitizer(root) == on_path


def test_without_it_the_command_fails_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(
        sanitize_run, "find_sanitizer", lambda find=sanitize_run.find_sanitizer: find(tmp_path)
    )
    assert sanitize_run.main([]) == 2
    assert "It is part of the CUDA toolkit: install" in capsys.readouterr().err


def test_a_run_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    started = time.monotonic()
    printed, ended = sanitize_run.run(
        ["sh", "-c", f"echo begun; sleep 60 & echo $! > '{pid}'; wait"], 1
    )
    assert (printed, ended) == ("begun\n", "cut off after 1 s")
    assert time.monotonic() - started < 10
    assert gone(int(pid.read_text()))


def gone(pid: int) -> bool:
    """Within a second; a zombie that nobody collected yet has ended as well."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


# ---- the whole command with a made-up checker ----

# It prints the deliberate fault's report where asked for it, else what stands in the file beside it, and ends with 9 where there is one.
CHECKER = """#!{python}
import pathlib, sys
words, here = sys.argv[1:], pathlib.Path(__file__).parent
tool = words[words.index("--tool") + 1]
if "--self-test" in words:
    said = (here / "fault").read_text().replace("TOOL", tool)
else:
    said = (here / "cases").read_text()
(here / "words").write_text(" ".join(words))
print(said, end="")
sys.exit(9 if "=== Invalid" in said else 0)
"""


@pytest.fixture
def checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    executable(tmp_path / "compute-sanitizer", CHECKER.format(python=sys.executable))
    (tmp_path / "fault").write_text(
        "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 1 error\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(
        sanitize_run, "list_cases", lambda: "".join(f"{name:40} {op}\n" for name, op in TWO.items())
    )
    return tmp_path


CLEAN_CASES = "".join(f"sanitize: begin {n}\nsanitize: end {n}: ok, _k_kernel\n" for n in TWO)


def test_a_clean_run_passes(checker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checker / "cases").write_text(CLEAN_CASES + "========= ERROR SUMMARY: 0 errors\n")
    assert sanitize_run.main(["--tool", "memcheck", "--json", str(checker / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"^memcheck +self-test +1 +ok, the fault is reported: Invalid __global__ write",
        printed,
        re.M,
    )
    assert printed.splitlines()[-1] == "3 of 3 lines ok"
    assert [row["op"] for row in json.loads((checker / "rows.json").read_text())] == [
        "self-test",
        *TWO.values(),
    ]
    words = (checker / "words").read_text()
    assert "--tool memcheck --leak-check no" in words and "--error-exitcode 9" in words
    assert "--kernel-name kns=_gather_kernel" in words and "kns=fault_bounds_kernel" in words
    assert words.endswith("tests/kernels/sanitize.py")


def test_what_is_found_fails_the_run(checker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checker / "cases").write_text(MEMCHECK)
    assert sanitize_run.main(["--tool", "memcheck"]) == 1
    printed = capsys.readouterr().out
    assert "161 bytes after the nearest allocation" in printed, "what the checker said is shown"
    assert re.search(
        r"^memcheck +restore_tokens +2 +restore_tokens 33: Invalid __global__ write", printed, re.M
    )
    assert printed.splitlines()[-1] == "2 of 3 lines ok, 1 not"


def test_a_checker_that_sees_nothing_fails_and_its_cases_are_not_run(
    checker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checker / "cases").write_text(CLEAN_CASES + "========= ERROR SUMMARY: 0 errors\n")
    (checker / "fault").write_text(
        "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    )
    assert sanitize_run.main(["--tool", "memcheck", "racecheck"]) == 1
    printed = capsys.readouterr().out
    for tool in ("memcheck", "racecheck"):
        assert re.search(
            rf"^{tool} +self-test +0 +BLIND: no report .* of the deliberate fault", printed, re.M
        )
    assert "0 of 2 lines ok, 2 not" in printed


def test_initcheck_watches_every_kernel_since_all_of_them_write(checker: Path) -> None:
    assert "--kernel-name" not in sanitize_run.command(Path("x"), "initcheck", [])
    assert "--kernel-name" in sanitize_run.command(Path("x"), "synccheck", [])


def test_the_cases_are_listed_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert sanitize_run.choose(listed, None) == OPS
    assert set(sanitize_run.choose(listed, ["attention 65", "crop_resize"])) == {
        "attention 65", "crop_resize grey", "crop_resize rgb", "crop_resize out of range",
    }  # fmt: skip
    with pytest.raises(Refused, match="got no op, needs ops or cases"):
        sanitize_run.choose(listed, ["attention", "no op"])
