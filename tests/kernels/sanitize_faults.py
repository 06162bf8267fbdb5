"""Deliberately wrong kernels, one for each tool of compute-sanitizer: a checker that does not report its fault sees nothing at all.

memcheck    writes 28 numbers behind the end of 100
racecheck   reads from shared memory what another warp writes, without a barrier between
synccheck   half of each warp comes to a barrier, the other half does not
initcheck   reads memory that nobody wrote
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

THREADS = 128  # four warps, one number each


@triton.jit
def fault_bounds_kernel(X, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(X + i, i.to(tl.float32))


# Triton puts a barrier where one is needed, so the fault stands in PTX: 128 bytes away lies the number of the next warp.
@triton.jit
def fault_race_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 fault_line[128];
        .reg .b32 thread, mine, theirs;
        mov.u32 thread, %tid.x;
        mov.u32 mine, fault_line;
        mad.lo.u32 mine, thread, 4, mine;
        xor.b32 theirs, mine, 128;
        st.volatile.shared.b32 [mine], $1;
        ld.volatile.shared.b32 $0, [theirs];
        }""",
        "=r,r",
        [tl.load(X + i)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(Y + i, y)


@triton.jit
def fault_barrier_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.inline_asm_elementwise(
        """{
        .reg .pred some;
        .reg .b32 lane;
        mov.u32 lane, %laneid;
        setp.lt.u32 some, lane, 16;
        @some bar.sync 0;
        mov.b32 $0, $1;
        }""",
        "=r,r",
        [tl.load(X + i)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(Y + i, y)


@triton.jit
def fault_unwritten_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i))


def _bounds() -> None:
    fault_bounds_kernel[(1,)](torch.zeros(100, device="cuda"), N=THREADS, num_warps=4)


def _pair(kernel: Callable[..., object], written: bool) -> Callable[[], None]:
    def fault() -> None:
        x, y = (torch.empty(THREADS, dtype=torch.int32, device="cuda") for _ in range(2))
        if written:
            x.zero_()
        kernel[(1,)](x, y, N=THREADS, num_warps=4)  # type: ignore[index]

    return fault


FAULTS: dict[str, Callable[[], None]] = {
    "memcheck": _bounds,
    "racecheck": _pair(fault_race_kernel, True),
    "synccheck": _pair(fault_barrier_kernel, True),
    "initcheck": _pair(fault_unwritten_kernel, False),
}
