"""How a kernel fills a multiprocessor (SM), from what the compiler made of it. No GPU is needed.

    registers of a warp = registers of a thread * 32, rounded up to 256
    warps by registers  = 4 * (16384 // registers of a warp)        an SM has four partitions of 16384 registers
    blocks = min(warps by registers // warps of a block, warps of an SM // warps of a block, blocks of an SM,
                 shared memory of an SM // (shared memory of a block + what the system keeps of it, rounded up))
    cycles = instructions of a warp * warps of the grid / (4 * SMs)     each partition issues one instruction of one warp a cycle

The blocks are an upper bound: the driver may give less of the SM's memory to shared memory, and a grid may be too small to fill it.
The cycles are a lower bound, for kernels without loops: nothing waits for anything.

Sources: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (blocks, warps, registers and shared
memory of an SM) and its sections on each compute capability (four schedulers; from 8.0 on the system keeps 1 KiB of each block);
the units of allocation and the partitions: NVIDIA's cuda_occupancy.h, which comes with CUDA and with triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from mae_kernels._runtime import Launch, triton_module
from tools import lint_kernels as lint

WARP = 32
PARTITIONS, PARTITION_REGISTERS = 4, 16384
REGISTER_UNIT = 256  # of a warp
MAX_THREADS = 1024  # of a block


class Architecture(NamedTuple):
    """Limits of an SM, and one card that has it: multiprocessors and the memory's rate by NVIDIA's data sheet."""

    blocks: int
    warps: int
    shared_kib: int
    reserved: int  # bytes of shared memory that the system keeps of each block
    shared_unit: int  # bytes
    card: str
    sms: int
    tb_per_s: float


ARCHITECTURES = {
    75: Architecture(16, 32, 64, 0, 256, "T4", 40, 0.32),
    80: Architecture(32, 64, 164, 1024, 128, "A100 SXM 80 GB", 108, 2.039),
    86: Architecture(16, 48, 100, 1024, 128, "RTX 3060 12 GB", 28, 0.36),
    89: Architecture(24, 48, 100, 1024, 128, "L4", 58, 0.3),
    90: Architecture(32, 64, 228, 1024, 128, "H100 SXM", 132, 3.35),
    100: Architecture(32, 64, 228, 1024, 128, "B200", 148, 8.0),
    120: Architecture(24, 48, 100, 1024, 128, "RTX 5090", 170, 1.792),
}


class Occupancy(NamedTuple):
    """blocks: resident on one SM, 0 where not even one fits; limit: what allows no more."""

    blocks: int
    warps: int
    of_warps: int
    limit: str


def occupancy(arch: int, registers: int, shared: int, warps: int) -> Occupancy:
    """Of blocks of `warps` warps with `shared` bytes of shared memory, whose threads have `registers` registers each."""
    limits = ARCHITECTURES[arch]
    of_warp = _round_up(registers * WARP, REGISTER_UNIT)
    by_registers = (
        PARTITIONS * (PARTITION_REGISTERS // of_warp) // warps if of_warp else limits.blocks
    )
    # a launch is refused as if each partition held as many warps of the block as the fullest one
    if of_warp * _round_up(warps, PARTITIONS) > PARTITIONS * PARTITION_REGISTERS:
        by_registers = 0
    of_block = _round_up(shared + limits.reserved, limits.shared_unit)
    by_shared = limits.shared_kib * 1024 // of_block if of_block else limits.blocks
    by_warps = limits.warps // warps if warps * WARP <= MAX_THREADS else 0
    blocks, limit = min(
        (by_registers, "registers"),
        (by_shared, "shared memory"),
        (by_warps, "warps"),
        (limits.blocks, "blocks"),
    )
    return Occupancy(blocks, blocks * warps, limits.warps, limit)


def waves(programs: int, sms: int, blocks: int) -> float:
    """How often all SMs fill up with blocks until the grid is done; below 1 some of the places stay empty."""
    return programs / (sms * blocks)


class Code(NamedTuple):
    """instructions: machine instructions up to the last exit; slow paths, as of 64-bit divisions, lie behind it.

    varies: loops repeat some of them, or programs skip more than a quarter of them: the number does not tell what a warp issues.
    """

    instructions: int
    varies: bool

    def cycles(self, warps: int, sms: int) -> float | None:
        """For so many warps in all; None where the number of instructions varies."""
        return None if self.varies else self.instructions * warps / (PARTITIONS * sms)


def code_of(launch: Launch, arch: int) -> Code:
    """Of a launch that the lint has just compiled, so that Triton has it in its cache; read with the cuobjdump that comes with triton."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton = triton_module()
    *source, options = lint.specialise(launch)
    built = triton.compile(
        ASTSource(launch.kernel, *source), target=GPUTarget("cuda", arch, WARP), options=options
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return code_in(
            subprocess.run(
                [tool, "-sass", file.name], capture_output=True, text=True, check=True
            ).stdout
        )


def code_in(listing: str) -> Code:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", listing)
    lines = [
        (int(at, 16), name, re.search(r"0x([0-9a-f]+)", rest))
        for at, name, rest in found
        if name != "NOP"
    ]
    exits = [number for number, (_, name, _) in enumerate(lines) if name == "EXIT"]
    if not exits:
        raise RuntimeError(f"cuobjdump listed no kernel: {listing[-300:]}")
    body = lines[: exits[-1] + 1]
    # a branch to itself ends every listing and is never reached
    jumps = [
        (at, int(to[1], 16))
        for at, name, to in lines
        if name.startswith("BRA") and to and int(to[1], 16) != at
    ]
    skipped = [sum(at < place < to for place, _, _ in body) for at, to in jumps]
    return Code(
        len(body), any(to < at for at, to in jumps) or 4 * max(skipped, default=0) > len(body)
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
