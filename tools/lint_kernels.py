"""Compile every kernel for every supported architecture, and check the machine code.

    PYTHONPATH=kernels python tools/lint_kernels.py                 # all kernels, all architectures
    PYTHONPATH=kernels python tools/lint_kernels.py --arch 80 90 --op attention

The "model" samples of mae_kernels.samples() run forward and backward on meta tensors, so what is
compiled is what the ops launch at real sizes. Rules:

    a cubin is built              no trap instead of the kernel
    no stack, so no spills        shared memory within the limit of a block
    no fp64 arithmetic            tensor-core instructions in every kernel with a dot, from sm_80 on
    loads or stores of 16 bytes, where the layout allows them

Prints a Markdown table. Exit codes: 0 all rules hold, 1 a rule is broken, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mae_kernels as mk
from mae_kernels._runtime import INTERPRET, Launch, record_launches

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("lint_kernels.py needs triton, which is not installed: pip install triton")

# sm: KiB of shared memory that one block may use (CUDA C++ Programming Guide, compute capabilities)
SHARED_LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ARCHITECTURES = tuple(SHARED_LIMITS)
# before sm_80 Triton multiplies matrices without tensor cores
TENSOR_CORES_FROM = 80
# images per call; a kernel's specialisation does not depend on it, if it is a multiple of 16
BATCH = 64
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}


class Row(NamedTuple):
    """One kernel of one sample, compiled for one architecture, and the rules that it breaks."""

    sample: str
    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    widest: int
    problems: tuple[str, ...]


def lint(arch: int, select: Callable[[mk.Sample], bool] = lambda sample: True) -> list[Row]:
    """Compile what the selected "model" samples launch on sm_<arch>, each kernel variant once.

    Raises RuntimeError if a sample launches no kernel.
    """
    rows, seen = [], set()
    for sample in mk.samples():
        runs_here = sample.min_arch <= arch <= sample.max_arch
        if sample.size != "model" or not runs_here or not select(sample):
            continue
        for launch in launches(sample, arch):
            key = launch.kernel.fn.__name__ + repr(specialise(launch))
            if key not in seen:
                seen.add(key)
                rows.append(judge(str(sample), launch, arch, sample.wide))
    return rows


def launches(sample: mk.Sample, arch: int) -> list[Launch]:
    """What the sample launches on sm_<arch>, both ways. Raises RuntimeError if nothing."""
    draw = mk.Draw("meta", torch.float16 if arch < 80 else torch.bfloat16, BATCH)
    tensors, options = sample.make(draw)
    leaves = [tensors[name].requires_grad_() for name in sample.gradients]
    with mk.backend("triton"), record_launches(arch) as recorded:
        out = sample.function(**tensors, **options)
        if leaves:
            first = out if isinstance(out, Tensor) else out[0]
            torch.autograd.grad(first, leaves, torch.empty_like(first))
    if not recorded:
        raise RuntimeError(f"lint: {sample} launched no kernel for sm_{arch}")
    return recorded


Specialised = tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any], dict[str, Any]]


def specialise(launch: Launch) -> Specialised:
    """Signature, constants, attributes and options, as triton's JIT derives them from a launch."""
    parameters = launch.kernel.arg_names
    constants = {k: v for k, v in launch.constants.items() if k in parameters}
    options = {k: v for k, v in launch.constants.items() if k not in parameters}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    aligned = [["tt.divisibility", 16]]
    fixed = {p.name for p in launch.kernel.params if p.do_not_specialize}
    for i, (name, value) in enumerate(zip(parameters, launch.args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = aligned
        elif value is None or (value == 1 and name not in fixed):
            constants[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attributes[(i,)] = aligned
    signature |= dict.fromkeys(constants, "constexpr")
    return {name: signature[name] for name in parameters}, constants, attributes, options


def judge(sample: str, launch: Launch, arch: int, wide: bool = True) -> Row:
    """Compile one launch for sm_<arch>, check the rules; `wide`: 16-byte accesses are possible."""
    signature, constants, attributes, options = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, shared = built.asm["ptx"], built.metadata.shared
    registers, stack = resources(built.asm["cubin"])
    kernel = launch.kernel.fn.__name__.strip("_")
    vectors = re.findall(r"(?:ld|st)\.global\S*\.v(\d)\.b32", ptx)
    widest = max([4 * int(n) for n in vectors], default=4)
    needs_mma = "tt.dot" in built.asm["ttir"] and arch >= TENSOR_CORES_FROM
    has_mma = re.search(r"mma\.sync|wgmma|tcgen05\.mma", ptx)
    limit = SHARED_LIMITS[arch]
    rules = {
        f"{stack} bytes of stack": stack or "st.local" in ptx,
        f"{shared} bytes of shared memory, limit {limit} KiB": shared > limit * 1024,
        "fp64 arithmetic": re.search(r"\.f64\b", ptx),
        "a trap instead of the kernel": "trap;" in ptx,
        "a dot without tensor cores": needs_mma and not has_mma,
        f"no access of 16 bytes, widest {widest}": wide and widest < 16,
    }
    problems = tuple(problem for problem, broken in rules.items() if broken)
    return Row(sample, kernel, arch, registers, stack, shared, widest, problems)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, from the cuobjdump that comes with triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"lint: cuobjdump reported no resources: {printed[-300:]}")
    return int(found[1]), int(found[2]) + int(found[3])


def main(words: Sequence[str] | None = None) -> int:
    ops = list(dict.fromkeys(sample.op for sample in mk.samples()))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="SM"
    )
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="NAME")
    args = parser.parse_args(words)
    if INTERPRET:
        parser.error("got TRITON_INTERPRET=1, needs the compiler (unset it)")
    rows = [row for arch in args.arch for row in lint(arch, lambda s: s.op in args.op)]
    names = ("sample", "kernel", "sm", "registers", "stack B", "shared B", "widest access B")
    print("| " + " | ".join((*names, "problems")) + " |", "|---" * 8 + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(map(str, (*row[:-1], "; ".join(row.problems) or "none"))) + " |")
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
