"""Run every kernel under compute-sanitizer (part of the CUDA toolkit) and print one table.

    make sanitize-gpu                                                # all tools, all ops
    python tools/sanitize.py --tool memcheck --op attention          # one tool, one op
    python tools/sanitize.py cases --op attention                    # without the checker
    TRITON_INTERPRET=1 python tools/sanitize.py cases --device cpu   # the kernels, interpreted

    memcheck    accesses out of bounds or misaligned
    racecheck   hazards in shared memory
    synccheck   barriers that not all threads reach
    initcheck   reads of global memory that was never written

The cases are the "small" samples of mae_kernels.samples(), forward and backward, and each of them
again with an index out of range, which must not be read. Each tool runs in one process. Before it,
the tool must report a deliberate fault: if it does not, it is BLIND, and its silence means nothing.

Exit codes: 0 no errors, 1 errors found, failed or not run, 2 bad arguments or no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import mae_kernels as mk  # noqa: E402
from mae_kernels import _runtime  # noqa: E402
from mae_kernels._runtime import jit, tl  # noqa: E402

# exit code of the checker if it found something; Python itself uses 1 and 2
FOUND = 9
COMMON = (
    f"--error-exitcode {FOUND} --destroy-on-device-error kernel --launch-timeout 0 "
    "--target-processes application-only --show-backtrace device --print-limit 1000"
)
BEGIN, END = "sanitize: begin ", "sanitize: end "
# tool: its options, and how it reports the deliberate fault. API calls that fail raise in torch.
TOOLS = {
    "memcheck": (
        "--leak-check no --report-api-errors no --padding 256",
        "Invalid __global__ write",
    ),
    "racecheck": ("", "Race reported between"),
    "synccheck": ("", "Barrier error detected"),
    "initcheck": ("", "Uninitialized __global__ memory read"),
}


# ------------------------------------------------------------------------ deliberate faults
THREADS = 128
# Triton inserts every barrier that is needed, so these two faults are written in PTX.
# 128 bytes away is the number of the next warp.
RACE = """{
    .shared .align 4 .b32 fault_line[128];
    .reg .b32 thread, mine, theirs;
    mov.u32 thread, %tid.x;
    mov.u32 mine, fault_line;
    mad.lo.u32 mine, thread, 4, mine;
    xor.b32 theirs, mine, 128;
    st.volatile.shared.b32 [mine], $1;
    ld.volatile.shared.b32 $0, [theirs];
}"""
BARRIER = """{
    .reg .pred some;
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    setp.lt.u32 some, lane, 16;
    @some bar.sync 0;
    mov.b32 $0, $1;
}"""


@jit
def fault_store_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i))


@jit
def fault_ptx_kernel(X, Y, N: tl.constexpr, PTX: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    y = tl.inline_asm_elementwise(PTX, "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(Y + i, y)


def fault(tool: str) -> None:
    """Launch the fault that the tool must report."""
    options = {"dtype": torch.int32, "device": "cuda"}
    # initcheck: the input is never written; memcheck: 28 numbers after the end of 100 are written
    x = (torch.empty if tool == "initcheck" else torch.zeros)(THREADS, **options)
    y = torch.empty(100 if tool == "memcheck" else THREADS, **options)
    if tool in ("memcheck", "initcheck"):
        fault_store_kernel[(1,)](x, y, N=THREADS, num_warps=4)
    else:
        ptx = RACE if tool == "racecheck" else BARRIER
        fault_ptx_kernel[(1,)](x, y, N=THREADS, PTX=ptx, num_warps=4)
    torch.cuda.synchronize()


# -------------------------------------------------------------------------------- the cases
class Case(NamedTuple):
    """A sample, its dtype, and the name of the tensor that gets an index out of range."""

    sample: mk.Sample
    dtype: torch.dtype
    spoiled: str | None = None


def cases(ops: Sequence[str]) -> dict[str, Case]:
    """The small samples of the ops by name; every second one in half precision."""
    # the interpreter computes no bf16
    half = torch.float16 if _runtime.INTERPRET else torch.bfloat16
    found: dict[str, Case] = {}
    for i, sample in enumerate(s for s in mk.samples() if s.size == "small" and s.op in ops):
        dtype = half if sample.half_only or i % 2 else torch.float32
        found[str(sample)] = Case(sample, dtype)
        for name in sample.out_of_range:
            found[f"{sample}, {name} out of range"] = Case(sample, dtype, name)
    return found


def run_case(case: Case, device: torch.device) -> str:
    """Forward and backward of the case: "ok", or what is wrong.

    The backend "triton" raises if a kernel cannot run. On a CPU without the interpreter the
    reference runs, to test the case itself.
    """
    backend = "triton" if device.type == "cuda" or _runtime.INTERPRET else "reference"
    sample, generator = case.sample, torch.Generator().manual_seed(0)
    try:
        tensors, options = sample.make(mk.Draw(device, case.dtype, 3, generator))
        if case.spoiled is not None:
            spoiled = tensors[case.spoiled].clone()
            spoiled.view(3, -1)[0, -1] = sample.out_of_range[case.spoiled]
            tensors[case.spoiled] = spoiled
        leaves = [tensors[name].requires_grad_() for name in sample.gradients]
        with mk.backend(backend):
            out = sample.function(**tensors, **options)
            results = [out] if isinstance(out, Tensor) else [x for x in out if x is not None]
            if leaves:
                results += torch.autograd.grad(results[0], leaves, torch.ones_like(results[0]))
        finite = all(bool(x.isfinite().all()) for x in results)
    except Exception as error:  # noqa: BLE001 - the other cases still run
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "ok" if finite or case.spoiled else "a result is not finite"


# ------------------------------------------------------------------------------ run the tools
def command(sanitizer: str, tool: str, *words: str) -> list[str]:
    """Only the package's kernels are checked, except by initcheck, which must see who writes."""
    source = "".join(file.read_text() for file in (ROOT / "kernels/mae_kernels").glob("*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", source + Path(__file__).read_text(), re.M)
    filters = [word for name in kernels for word in ("--kernel-name", f"kns={name}")]
    options = f"--tool {tool} {TOOLS[tool][0]} {COMMON}".split()
    program = [sys.executable, str(Path(__file__).resolve()), *words]
    return [sanitizer, *options, *(filters if tool != "initcheck" else []), *program]


def run(words: Sequence[str], limit_s: float) -> tuple[str, str]:
    """What was printed, and "" or how the process ended. Ends the process group after limit_s."""
    # every tensor in its own allocation, so that the checker knows its bounds
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    env |= {"TRITON_INTERPRET": "0", "MAE_KERNELS_BACKEND": "auto"}
    out = subprocess.PIPE
    process = subprocess.Popen(
        words, env=env, start_new_session=True, stdout=out, stderr=subprocess.STDOUT
    )
    ended = ""
    try:
        printed, _ = process.communicate(timeout=max(limit_s, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, ended = process.communicate()[0], f"stopped after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if not ended and process.returncode not in (0, FOUND):
        ended = f"exit code {process.returncode}"
    return printed.decode(errors="replace"), ended


def verdict(printed: str, ended: str, cases: int) -> str:
    """ "ok, ..." only if the checker and all cases finished and reported nothing."""
    results = re.findall(rf"^{END}(.*?): (.*)$", printed, re.M)
    reported = re.findall(rf"^{BEGIN}(.*)\n=========", printed, re.M)
    failed = [f"{name}: {result}" for name, result in results if result != "ok"]
    if failed:
        return failed[0]
    if reported:
        return f"errors in {', '.join(reported)}"
    if ended or len(results) < cases:
        return ended or f"{cases - len(results)} cases were not run"
    if not re.search(r"^=+ \w+ SUMMARY: 0 ", printed, re.M):
        return "errors, or no summary of the checker; read its output"
    return f"ok, {cases} cases"


def check(sanitizer: str, tool: str, ops: Sequence[str], limit_s: float) -> str:
    """The verdict, BLIND if the tool does not report the deliberate fault."""
    start, expected = time.monotonic(), TOOLS[tool][1]
    printed, ended = run(command(sanitizer, tool, "fault", "--tool", tool), limit_s)
    if expected not in printed:
        why = ended or f"no report {expected!r} of the deliberate fault"
        found = f"BLIND: {why}; its cases were not run"
    else:
        words = command(sanitizer, tool, "cases", "--op", *ops)
        printed, ended = run(words, limit_s - (time.monotonic() - start))
        found = verdict(printed, ended, len(cases(ops)))
    if not found.startswith("ok"):
        print(printed[:20000], flush=True)
    return found


def check_all(args: argparse.Namespace) -> int:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        print(
            "error: compute-sanitizer is not in PATH or /usr/local/cuda/bin. It is part of the "
            "CUDA toolkit: install the toolkit or its package cuda-sanitizer-X-Y (X-Y = the "
            "toolkit's version, as in 13-0), or add its folder to PATH",
            file=sys.stderr,
        )
        return 2
    end, found = time.monotonic() + args.seconds, dict.fromkeys(args.tool, "interrupted")
    try:
        for i, tool in enumerate(found):
            limit_s = (end - time.monotonic()) / (len(found) - i)
            print(f"{tool}: at most {limit_s:.0f} s", flush=True)
            found[tool] = check(sanitizer, tool, args.op, limit_s)
    except KeyboardInterrupt:
        pass
    for tool, text in found.items():
        print(f"{tool:10} {text}")
    return 0 if all(text.startswith("ok") for text in found.values()) else 1


def run_cases(args: argparse.Namespace) -> int:
    results = []
    for name, case in cases(args.op).items():
        # on a CPU an index out of range is an error
        if case.spoiled and args.device == "cpu":
            continue
        print(f"{BEGIN}{name}", flush=True)
        results.append(run_case(case, torch.device(args.device)))
        print(f"{END}{name}: {results[-1]}", flush=True)
    return 0 if set(results) <= {"ok"} else 1


def run_fault(args: argparse.Namespace) -> int:
    fault(args.tool[0])
    return 0


ACTIONS = {"check": check_all, "cases": run_cases, "fault": run_fault}


def main(words: Sequence[str] | None = None) -> int:
    ops = list(dict.fromkeys(sample.op for sample in mk.samples()))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="check")
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all tools together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="of `cases`")
    args = parser.parse_args(words)
    if args.action != "check" and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; `cases --device cpu` runs without one")
    if args.device == "cuda" and torch.cuda.is_available():
        refused = {op: why for op, why in mk.info().items() if why and op in args.op}
        for op, why in refused.items():
            print(f"skipped: {op}: {why}", flush=True)
        args.op = [op for op in args.op if op not in refused]
        if not args.op:
            return 0
    return ACTIONS[args.action](args)


if __name__ == "__main__":
    sys.exit(main())
