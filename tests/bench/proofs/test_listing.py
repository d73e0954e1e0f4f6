"""Instructions of a kernel, in all and per pixel."""

import struct

import pytest

from bench.proofs import listing


def binary(*opcodes: int) -> bytes:
    """An ELF file with a section of such instructions."""
    text = b"".join((0xFEA0 << 112 | 7 << 12 | opcode).to_bytes(16, "little") for opcode in opcodes)
    names = b"\0.shstrtab\0.text._kernel\0"
    head, start = 0x40, 0x40 + len(names)
    sections = [
        struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, head, len(names), 0, 0, 1, 0),
        struct.pack("<IIQQQQIIQQ", 11, 1, 0, 0, start, len(text), 0, 0, 1, 0),
    ]
    header = bytearray(0x40)
    struct.pack_into("<Q", header, 0x28, start + len(text))
    struct.pack_into("<HHH", header, 0x3A, 0x40, len(sections), 0)
    return bytes(header) + names + text + b"".join(sections)


def test_sass_is_counted_without_what_fills_up() -> None:
    code = {"cubin": binary(0xB82, 0x947, 0x221, 0x94D, 0x947, 0x918, 0x918)}
    found = listing.count(code, 32, {"ROWS": 4, "COLUMNS": 32, "CLASSES": 8})
    assert found == {"instructions": 4, "per_pixel": 1.0}  # by 32 threads for 128 pixels


def test_a_file_without_a_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 sections"):
        listing.count({"cubin": binary().replace(b".text.", b".data.")}, 32, {"BLOCK": 32})


def test_the_other_assembler_is_counted() -> None:
    lines = (
        "\t.text",
        "_kernel:",
        "; %bb.0:",
        "\ts_load_dwordx2 s[2:3], s[0:1], 0x0",
        "\ts_nop 0",
        "\tv_mov_b32_e32 v1, 0",
    )
    found = listing.count({"amdgcn": "\n".join([*lines, "\ts_endpgm"])}, 64, {"BLOCK": 64})
    assert found == {"instructions": 3, "per_pixel": 3.0}
