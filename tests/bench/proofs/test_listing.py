"""Instructions of a kernel, in all, in its inner loops, per pixel."""

import pytest

from bench.proofs import listing

SASS = """
	code for sm_90a
		Function : _kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000e300000000800 */
        /*0010*/                   MOV R2, RZ ;                               /* 0x0 */
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;                    /* 0x0 */
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;                    /* 0x0 */
        /*0040*/                   NOP ;                                      /* 0x0 */
        /*0050*/               @P0 BRA 0x30 ;                                 /* 0x0 */
        /*0060*/               @P1 BRA.U 0x20 ;                               /* 0x0 */
        /*0070*/                   EXIT ;                                     /* 0x0 */
        /*0080*/                   BRA 0x80;                                  /* 0x0 */
        /*0090*/                   NOP;                                       /* 0x0 */
"""


def test_sass_is_counted_without_what_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_disassembled", lambda cubin: SASS)
    found = listing.count({"cubin": b""}, 32, {"ROWS": 4, "COLUMNS": 32, "CLASSES": 8})
    # 7 instructions by 32 threads for 128 pixels; of two loops, one in the other, the inner one has 2.
    assert found == {"instructions": 7, "per_pixel": 1.75, "loops_per_pixel": [0.5]}


def test_the_other_assembler_is_counted() -> None:
    lines = (
        "\t.text",
        "_kernel:",
        "; %bb.0:",
        "\ts_load_dwordx2 s[2:3], s[0:1], 0x0",
        "\ts_nop 0",
        "\tv_mov_b32_e32 v1, 0",
    )
    text = "\n".join([*lines, "\ts_endpgm"])
    found = listing.count({"amdgcn": text}, 64, {"BLOCK": 64})
    assert found == {"instructions": 3, "per_pixel": 3.0, "loops_per_pixel": []}
