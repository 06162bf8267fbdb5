"""Blocks of an SM by NVIDIA's rules, each worked out by hand, and instructions counted in listings of machine code."""

from __future__ import annotations

import pytest

from benchmarks.occupancy import ARCHITECTURES, Code, Occupancy, code_in, occupancy, waves
from tools import lint_kernels as lint


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        # 75 * 32 = 2400 -> 2560 a warp; 16384 / 2560 = 6 in each partition, 24 in all; (24576 + 1024) of 233472 bytes: 9 blocks
        (90, 75, 24576, 4, Occupancy(6, 24, 64, "registers")),
        # 72 * 32 = 2304: 7 in each partition, 28 warps, 14 blocks of 2; 19456 bytes: 12 blocks
        (90, 72, 18432, 2, Occupancy(12, 24, 64, "shared memory")),
        # 236 * 32 = 7552 -> 7680: 2 in each partition
        (90, 236, 59392, 4, Occupancy(2, 8, 64, "registers")),
        # 168 * 32 = 5376 = 21 * 256: 3 in each partition; one register more is 5632: 2
        (90, 168, 0, 4, Occupancy(3, 12, 64, "registers")),
        (90, 169, 0, 4, Occupancy(2, 8, 64, "registers")),
        # 65536 / 5632 = 11, but no partition holds a third warp
        (90, 169, 0, 1, Occupancy(8, 8, 64, "registers")),
        # 20 * 32 = 640 -> 768: 21 in each partition, 84 warps, more than the SM has places for
        (90, 20, 0, 4, Occupancy(16, 64, 64, "warps")),
        (90, 36, 0, 1, Occupancy(32, 32, 64, "blocks")),
        # 32 registers would do for 64 warps; sm_86 has places for 48
        (86, 32, 0, 4, Occupancy(12, 48, 48, "warps")),
        (86, 32, 0, 1, Occupancy(16, 16, 48, "blocks")),
        # 16384 + 1024 of 102400 bytes: 5; on sm_75 nothing is reserved: 16384 of 65536
        (86, 32, 16384, 1, Occupancy(5, 5, 48, "shared memory")),
        (75, 32, 16384, 1, Occupancy(4, 4, 32, "shared memory")),
        # 99 KiB and the reserved one are all of sm_86; 128 bytes more are too much
        (86, 32, 99 * 1024, 4, Occupancy(1, 4, 48, "shared memory")),
        (86, 32, 99 * 1024 + 1, 4, Occupancy(0, 0, 48, "shared memory")),
        # 255 * 32 -> 8192: 2 in each partition, 8 warps; a block of 16 would need 131072 registers
        (80, 255, 0, 8, Occupancy(1, 8, 64, "registers")),
        (80, 255, 0, 16, Occupancy(0, 0, 64, "registers")),
        # 9 warps are checked as 12: 12 * 5632 = 67584 registers are refused, though 9 * 5632 would fit
        (80, 170, 0, 9, Occupancy(0, 0, 64, "registers")),
    ],
)
def test_occupancy_is_what_nvidia_counts(
    arch: int, registers: int, shared: int, warps: int, expected: Occupancy
) -> None:
    assert occupancy(arch, registers, shared, warps) == expected


def test_limits_agree_with_the_lint() -> None:
    """What a block may use is what an SM has less what the system keeps."""
    assert {
        arch: a.shared_kib - a.reserved // 1024 for arch, a in ARCHITECTURES.items()
    } == lint.SHARED_LIMITS


def test_waves() -> None:
    assert waves(3072, 132, 6) == pytest.approx(3072 / 792)
    assert waves(505, 132, 12) < 1


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
        /*0010*/               @P0 BRA 0x{skip} ;                  /* 0x0 */
        /*0020*/                   IMAD.MOV.U32 R2, RZ, RZ, 0x1 ;  /* 0x0 */
        /*0030*/                   CALL.REL.NOINC 0x00b0 ;         /* 0x0 */
        /*0040*/                   FADD R2, R2, R2 ;               /* 0x0 */
        /*0050*/                   NOP ;                           /* 0x0 */
        /*0060*/                   FADD R2, R2, R2 ;               /* 0x0 */
        /*0070*/              @!P1 EXIT ;                          /* 0x0 */
        /*0080*/              @UP2 BRA 0x{back} ;                  /* 0x0 */
        /*0090*/                   STG.E desc[UR4][R2.64], R3 ;    /* 0x0 */
        /*00a0*/                   EXIT ;                          /* 0x0 */
        /*00b0*/                   MUFU.RCP R4, R4 ;               /* 0x0 */
        /*00c0*/                   RET.REL.NODEC R2 0x0 ;          /* 0x0 */
        /*00d0*/                   BRA 0xd0;                       /* 0x0 */
        /*00e0*/                   NOP ;                           /* 0x0 */
"""


def test_instructions_up_to_the_last_exit_are_counted() -> None:
    """Neither NOPs, nor what is called behind the exit, nor the branch to itself at the end."""
    straight = code_in(LISTING.format(skip="30", back="a0"))
    assert straight == Code(10, False)
    assert straight.cycles(warps=5280, sms=132) == 10 * 5280 / 528
    looping = code_in(LISTING.format(skip="30", back="60"))
    skipping = code_in(LISTING.format(skip="70", back="a0"))
    assert looping == skipping == Code(10, True)  # 4 of the 10 are skipped
    assert looping.cycles(5280, 132) is None
    with pytest.raises(RuntimeError, match="listed no kernel: nothing"):
        code_in("nothing")
