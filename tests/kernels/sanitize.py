"""Every op of mae_kernels once, forward and backward, at small odd shapes: what compute-sanitizer watches (sanitize_run.py starts it).

    python tests/kernels/sanitize.py --list
    python tests/kernels/sanitize.py --op attention                          # on the GPU, with the kernels
    python tests/kernels/sanitize.py --device cpu --backend reference        # the cases themselves, without a GPU
    TRITON_INTERPRET=1 python tests/kernels/sanitize.py --device cpu         # the kernels, interpreted
    python tests/kernels/sanitize.py --self-test memcheck                    # a deliberate fault, which that tool must report

No torch.compile, and every tensor in an allocation of its own with its exact size, so that the checker knows the bounds. Inputs are
made on the CPU, where the reference runs as well: on the GPU nothing runs that is not the op's. The result may be off from fp64
by twice what the reference is off in the same dtype, and a small absolute term. Cases with a patch, token or box out of
range check that nothing of it is read: its result is NaN or zero, the other images are right.

Exit codes: 0 all right, 1 a result is wrong, 2 bad arguments or no device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "PYTORCH_NO_CUDA_MEMORY_CACHING", "1"
)  # read when torch makes its first tensor
sys.path[:0] = [
    str(Path(__file__).resolve().parents[2] / "kernels"),
    str(Path(__file__).resolve().parent),
]

import torch  # noqa: E402
from sanitize_cases import CASES, Case, Tensors  # noqa: E402
from torch import Tensor  # noqa: E402

import mae_kernels as mk  # noqa: E402
from mae_kernels import _runtime  # noqa: E402

BEGIN, END = "sanitize: begin ", "sanitize: end "  # around what a case prints, for sanitize_run.py

# ---- one case ----


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside the block, in order."""
    names: list[str] = []
    launch = _runtime.launch

    def recorded(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **constants)

    holders = [
        m
        for name, m in sys.modules.items()
        if name.startswith("mae_kernels.") and getattr(m, "launch", None) is launch
    ]
    for module in holders:
        module.launch = recorded  # type: ignore[attr-defined]
    try:
        yield names
    finally:
        for module in holders:
            module.launch = launch  # type: ignore[attr-defined]


def results(case: Case, leaves: Tensors, others: Tensors, upstream: Tensor | None) -> list[Tensor]:
    """All results, and the gradients of the first."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = case.call(leaves, others)
    out = [out] if isinstance(out, Tensor) else [x for x in out if x is not None]
    wanted = [x for x in leaves if x.requires_grad] if out[0].requires_grad else []
    upstream = (
        torch.ones_like(out[0]) if upstream is None or out[0].dim() == 0 else upstream.to(out[0])
    )
    gradients = torch.autograd.grad(out[0], wanted, upstream, allow_unused=True) if wanted else []
    return [x.detach() for x in (*out, *gradients) if x is not None]


def problem(case: Case, device: torch.device, backend: str) -> str | None:
    """What is wrong with the results; None where nothing is."""
    torch.manual_seed(0)
    leaves, others = case.make()
    leaves = tuple(x.to(case.dtype) for x in leaves)
    with mk.backend("reference"), torch.no_grad():
        first = case.call(leaves, others)
        first = first if isinstance(first, Tensor) else first[0]
    upstream = torch.randn(first.shape) if first.is_floating_point() else None
    there = others if case.spoil is None else case.spoil(others)
    with mk.backend(backend):
        got = results(
            case, tuple(x.to(device) for x in leaves), tuple(x.to(device) for x in there), upstream
        )
    got = [x.cpu() for x in got]
    with mk.backend("reference"):
        eager = results(case, leaves, others, upstream)
        wide = tuple(x.double() if x.is_floating_point() else x for x in others)
        exact = results(case, tuple(x.double() for x in leaves), wide, upstream)
    if case.spoil is not None:
        lost = got[0][0]
        if not (lost.isnan().any() if lost.is_floating_point() else (lost == 0).all()):
            return "what is out of range gave neither NaN nor zeros"
        got, eager, exact = [got[0][1:]], [eager[0][1:]], [exact[0][1:]]
    for i, (g, e, x) in enumerate(zip(got, eager, exact, strict=True)):
        told = difference(g, e, x)
        if told is not None:
            return f"result {i}: {told}"
    return None


def difference(got: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    if (got.shape, got.dtype) != (eager.shape, eager.dtype):
        return (
            f"{tuple(got.shape)} {got.dtype}, the reference has {tuple(eager.shape)} {eager.dtype}"
        )
    if got.dtype == torch.uint8:  # grey levels: the CPU's resize has weights of 16 bits
        off = (got.short() - eager.short()).abs().max().item()
        return None if off <= 2 else f"{off} grey levels from the reference"
    if not got.is_floating_point():
        return None if torch.equal(got, eager) else "not equal to the reference"
    error, allowed = ((x.double() - exact.double()).abs().max().item() for x in (got, eager))
    # sums in another order; a result in half precision is rounded once more or less
    room = 2e-5 + (torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0.0)
    allowed = 2 * allowed + room * max(1.0, exact.abs().max().item())
    return None if error <= allowed else f"error {error:.2e} against fp64, allowed {allowed:.2e}"


# ---- the command ----


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    if args.list:
        for name, case in CASES.items():
            print(f"{name:40} {case.op}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: torch finds no CUDA device; --device cpu runs the cases without one (see --help)",
            file=sys.stderr,
        )
        return 2
    if args.self_test:
        from sanitize_faults import FAULTS

        FAULTS[args.self_test]()
        torch.cuda.synchronize()
        return 0
    wrong = 0
    for name, case in CASES.items():
        if args.op and not {case.op, name} & set(args.op):
            continue
        if case.spoil is not None and args.device == "cpu":
            print(f"{name}: left out: on the CPU what is out of range is an error")
            continue
        print(f"{BEGIN}{name}", flush=True)
        told = one(case, torch.device(args.device), args.backend)
        wrong += not told.startswith("ok")
        print(f"{END}{name}: {told}", flush=True)
    return 1 if wrong else 0


def one(case: Case, device: torch.device, backend: str) -> str:
    """ "ok" with the kernels, or "wrong" or "fails" with the reason."""
    with launches() as kernels:
        try:
            told = problem(case, device, backend)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - the next cases still have their turn
            lines = str(error).splitlines()
            return f"fails: {type(error).__name__}: {lines[0] if lines else ''}"
    return f"wrong: {told}" if told else f"ok, {', '.join(dict.fromkeys(kernels)) or 'no kernel'}"


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the cases and their ops")
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", help="only these, by the op's name or the case's"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", choices=["triton", "reference"], default="triton")
    parser.add_argument(
        "--self-test", choices=["memcheck", "racecheck", "synccheck", "initcheck"], metavar="TOOL"
    )
    args = parser.parse_args(words)
    known = {case.op for case in CASES.values()} | set(CASES)
    for name in args.op or ():
        if name not in known:
            parser.error(f"argument --op: got {name!r}, needs an op or a case that --list names")
    return args


if __name__ == "__main__":
    sys.exit(main())
