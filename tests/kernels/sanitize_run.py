"""`make sanitize-gpu`: sanitize.py under each tool of compute-sanitizer, and one table of what they found.

    memcheck    accesses out of bounds or misaligned
    racecheck   hazards in shared memory
    synccheck   barriers that not all threads come to
    initcheck   global memory that is read and was never written

One process per tool. Before it, in a process of its own, the tool must report a deliberate fault (sanitize_faults.py): one that
sees nothing is a failure, not a clean result. A report belongs to the case between whose marks it was printed; its kernel and line
are the checker's own words. Only the kernels of this package are watched, but for initcheck, which must see who writes.

Exit codes: 0 nothing found, 1 something found, wrong or not reached, 2 bad arguments or no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "kernels" / "mae_kernels"
FOUND = 9  # the exit code for "something was found": not Python's 1 or 2
COMMON = [
    "--error-exitcode", str(FOUND), "--destroy-on-device-error", "kernel", "--target-processes", "application-only",
    "--launch-timeout", "0", "--show-backtrace", "device", "--print-limit", "1000",
]  # fmt: skip
# tool: (share of the time, its options). An API call that fails raises in torch and is told as the case's failure.
TOOLS: dict[str, tuple[float, list[str]]] = {
    "memcheck": (0.4, ["--leak-check", "no", "--report-api-errors", "no", "--padding", "256"]),
    "racecheck": (0.3, []),
    "synccheck": (0.15, []),
    "initcheck": (0.15, []),
}
# how the report of the deliberate fault reads (sanitize_faults.py)
FAULTS = {
    "memcheck": "Invalid __global__ write",
    "racecheck": "Race reported between",
    "synccheck": "Barrier error detected",
    "initcheck": "Uninitialized __global__ memory read",
}
BEGIN, END = "sanitize: begin ", "sanitize: end "  # the marks of sanitize.py
SHOWN_LINES = 40  # of what a tool said, where it found something


# ---- what the checker prints ----


@dataclass(frozen=True)
class Report:
    case: str | None
    what: str
    kernel: str | None = None
    where: str | None = None  # file:line

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.what, self.kernel, self.where]))


@dataclass
class Output:
    reports: list[Report] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)  # case: what sanitize.py says of it
    total: int | None = None  # of the summary; None where the checker did not come to its end


PREFIX = re.compile(r"^=========(\s*)(.*)$")
SUMMARY = re.compile(
    r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)"
)
# lines that belong to the report above them; the checker indents them, its manual does not always
FURTHER = (
    "at ", "by thread", "Address ", "Access to ", "and is ", "and Read access", "and Write access", "Saved host", "Host Frame",
    "Device Frame", "in ", "Read Thread", "Write Thread", "Current Value",
)  # fmt: skip
# No report of a kernel. That the program failed is told by its own marks and by the exit code.
NO_REPORT = (
    "COMPUTE-SANITIZER", "LEAK SUMMARY", "Error: process didn't terminate successfully", "Target application returned an error",
)  # fmt: skip
# "kernel()+0x50 in file.py:34", "kernel()+0x50", and as older versions have it "0x50 in path/file.py:34:kernel", "0x50 in kernel"
PLACE = re.compile(r"(?P<kernel>.+?)(?:\+|:)0x[0-9a-f]+(?: in (?P<file>.+):(?P<line>\d+))?")
OLD_PLACE = re.compile(r"0x[0-9a-f]+(?: in (?:(?P<file>.+?):(?P<line>\d+):)?(?P<kernel>.+))?")


def place(text: str) -> tuple[str | None, str | None]:
    """(kernel, file:line) of what follows the word "at"."""
    text = re.sub(r"\s*\[\d+ hazards?\]$", "", text.strip())
    found = OLD_PLACE.fullmatch(text) or PLACE.fullmatch(text)
    if found is None:
        return None, None
    kernel = found["kernel"] and found["kernel"].removesuffix("()")
    return kernel, f"{Path(found['file']).name}:{found['line']}" if found["file"] else None


def parse(text: str) -> Output:
    """Every line of the checker that is not known to be something else counts as a report: nothing is passed over."""
    out, case = Output(), None
    for line in text.splitlines():
        if line.startswith(BEGIN):
            case = line.removeprefix(BEGIN)
        elif line.startswith(END):
            name, _, told = line.removeprefix(END).partition(": ")
            out.ended[name], case = told, None
        elif match := PREFIX.match(line):
            _checker_line(out, case, match[1], match[2].strip())
    return out


def _checker_line(out: Output, case: str | None, indent: str, said: str) -> None:
    if summary := SUMMARY.match(said):
        out.total = int(summary[1] or summary[2])
    elif not said or said.startswith(NO_REPORT):
        return
    elif len(indent) > 1 or said.startswith(FURTHER):
        if out.reports and said.startswith("at ") and out.reports[-1].kernel is None:
            last = out.reports[-1]
            out.reports[-1] = Report(last.case, last.what, *place(said.removeprefix("at ")))
    else:
        what, access, rest = said.partition(
            " access at "
        )  # racecheck tells the place in its first line
        out.reports.append(
            Report(case, what + " access", *place(rest)) if access else Report(case, said)
        )


# ---- the table ----


@dataclass(frozen=True)
class Row:
    tool: str
    op: str
    errors: int
    told: str  # the first report, or why there is no result
    ok: bool


def rows(tool: str, out: Output, ended: str, cases: dict[str, str]) -> Iterator[Row]:
    """ended: "" or how the tool's process ended, where that was not as it should; cases: name -> op."""
    for op in dict.fromkeys(cases.values()):
        names = [name for name, its in cases.items() if its == op]
        reports = [r for r in out.reports if r.case in names]
        told = [f"{r.case}: {r}" for r in reports]
        for name in names:
            said = out.ended.get(name, f"not reached: {ended or 'the process ended before'}")
            told += (
                [] if said.startswith("ok, _") else [f"{name}: {said}"]
            )  # "ok" and the kernels that ran
        yield Row(tool, op, len(reports), told[0] if told else f"ok, {len(names)} cases", not told)
    outside = [r for r in out.reports if r.case not in cases]
    lost = 0 if out.total is None else out.total - len(out.reports)
    problems = [str(r) for r in outside]
    problems += (
        [f"{lost} more in its summary than were understood; read what it printed"]
        if lost > 0
        else []
    )
    problems += (
        [ended or "it gave no summary: it did not come to its end"]
        if ended or out.total is None
        else []
    )
    if problems:
        yield Row(tool, "(all)", len(outside) + max(lost, 0), problems[0], False)


def table(found: Sequence[Row]) -> str:
    lines = [("tool", "op", "errors", "first report")]
    lines += [(row.tool, row.op, str(row.errors), row.told) for row in found]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]])
        for line in lines
    )


# ---- running ----


class Refused(Exception):
    """What is missing, and what to do."""


def find_sanitizer(root: Path = Path("/usr/local")) -> Path:
    """In PATH, in <root>/cuda/bin, or in the newest <root>/cuda-*/bin."""
    versions = sorted(
        root.glob("cuda-*"),
        key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)],
        reverse=True,
    )
    on_path = shutil.which("compute-sanitizer")
    places = [Path(on_path)] if on_path else []
    places += [folder / "bin" / "compute-sanitizer" for folder in (root / "cuda", *versions)]
    for path in places:
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise Refused(
        f"compute-sanitizer is not in PATH, {root}/cuda/bin or {root}/cuda-*/bin. It is part of the CUDA toolkit: install the toolkit "
        "or its package cuda-sanitizer-X-Y (X-Y = the toolkit's version, as 13-0), or put its folder into PATH"
    )


def list_cases() -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / "sanitize.py"), "--list"], capture_output=True, text=True
    )
    if done.returncode:
        raise Refused(f"the cases cannot be listed: {done.stderr.strip()[-300:]}")
    return done.stdout


def choose(listed: str, only: Sequence[str] | None) -> dict[str, str]:
    """name -> op"""
    known = {
        line.rpartition(" ")[0].strip(): line.rpartition(" ")[2] for line in listed.splitlines()
    }
    unknown = [name for name in only or () if name not in known and name not in known.values()]
    if unknown:
        raise Refused(
            f"--op: got {', '.join(unknown)}, needs ops or cases that sanitize.py --list names"
        )
    return {name: op for name, op in known.items() if not only or {name, op} & set(only)}


def command(sanitizer: Path, tool: str, words: Sequence[str]) -> list[str]:
    watched = (
        []
        if tool == "initcheck"
        else [w for name in kernels() for w in ("--kernel-name", f"kns={name}")]
    )
    tools = ["--tool", tool, *TOOLS[tool][1], *COMMON, *watched]
    return [str(sanitizer), *tools, sys.executable, str(HERE / "sanitize.py"), *words]


def kernels() -> list[str]:
    files = [*sorted(PACKAGE.glob("*.py")), HERE / "sanitize_faults.py"]
    return [
        name
        for file in files
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.M)
    ]


def run(words: list[str], limit_s: float) -> tuple[str, str]:
    """(what was printed, "" or how the process ended where not with 0 or FOUND). Ends the whole group after limit_s."""
    env = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "TRITON_INTERPRET": "0",
        "PYTHONUNBUFFERED": "1",
    }
    env.pop("MAE_KERNELS_BACKEND", None)
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "stdin": subprocess.DEVNULL,
    }
    process = subprocess.Popen(
        words, env=env, start_new_session=True, text=True, errors="replace", **pipes
    )
    try:
        printed, _ = process.communicate(timeout=max(limit_s, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], f"cut off after {limit_s:.0f} s"
    finally:
        if process.poll() is None:  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return printed, "" if process.returncode in (0, FOUND) else f"exit code {process.returncode}"


def check(
    sanitizer: Path,
    tool: str,
    ops: Sequence[str],
    cases: dict[str, str],
    limit_s: float,
    only_self: bool,
) -> list[Row]:
    """The self-test's row and, unless the tool is blind, one per op."""
    started, expected = time.monotonic(), FAULTS[tool]
    printed, ended = run(command(sanitizer, tool, ["--self-test", tool]), limit_s)
    seen = next((r for r in parse(printed).reports if expected in r.what), None)
    if seen is None:
        print(printed[-3000:], flush=True)
        why = ended or f"no report {expected!r} of the deliberate fault"
        return [Row(tool, "self-test", 0, f"BLIND: {why}; its cases were not run", False)]
    found = [Row(tool, "self-test", 1, f"ok, the fault is reported: {seen}", True)]
    if only_self:
        return found
    words = ["--op", *ops] if ops else []
    printed, ended = run(command(sanitizer, tool, words), limit_s - (time.monotonic() - started))
    found += rows(tool, parse(printed), ended, cases)
    if not all(row.ok for row in found):
        said = [
            line
            for line in printed.splitlines()
            if PREFIX.match(line) or not line.startswith("sanitize: ")
        ]
        print("\n".join(said[:SHOWN_LINES]), flush=True)
    return found


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace) -> int:
    try:
        sanitizer = find_sanitizer()
        print(f"{sanitizer}, {args.seconds:g} s for {', '.join(args.tool)}", flush=True)
        chosen = choose(list_cases(), args.op)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end = time.monotonic() + args.seconds
    found = list[Row]()
    left = list(args.tool)
    try:
        while left:
            tool = left[0]
            limit_s = (
                (end - time.monotonic()) * TOOLS[tool][0] / sum(TOOLS[name][0] for name in left)
            )
            print(f"{tool}: {limit_s:.0f} s at most", flush=True)
            found += check(sanitizer, tool, args.op or [], chosen, limit_s, args.self_test)
            left.pop(0)
            _save(args.json, found)
    except KeyboardInterrupt:
        found += [Row(tool, "(all)", 0, "interrupted", False) for tool in left]
        _save(args.json, found)
    print(table(found))
    bad = sum(not row.ok for row in found)
    print(f"{len(found) - bad} of {len(found)} lines ok" + (f", {bad} not" if bad else ""))
    return 1 if bad else 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _save(path: str | None, found: Sequence[Row]) -> None:
    if path:
        Path(path).write_text(
            json.dumps([asdict(row) for row in found], indent=1) + "\n", encoding="utf-8"
        )


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops or cases")
    parser.add_argument(
        "--self-test", action="store_true", help="only whether each tool reports a deliberate fault"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="for all of it (300)")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the table's lines there, after each tool"
    )
    args = parser.parse_args(words)
    if not args.seconds > 0:
        parser.error(f"argument --seconds: got {args.seconds:g}, needs more than 0")
    return args


if __name__ == "__main__":
    sys.exit(main())
