"""Machine instructions of a compiled kernel, in all and per pixel.

NVIDIA: SASS, of which every instruction takes 16 bytes of the binary. AMD: the assembler that Triton's back-end wrote.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

_AMD = re.compile(r"^\t(?!s_nop)(?:s|v|ds|global|buffer|flat|scratch)_\w+", re.MULTILINE)
_LENGTH, _NOP = 16, 0x918  # of SASS; the opcode is in the lowest 12 bits
# Blocks of classes, channels or bins: a pixel (of pairs: a pair) goes through all of them.
_NOT_PIXELS = {"CLASSES", "BLOCK_C", "BLOCK_K", "BLOCK_G", "BINS"}


def count(code: Mapping[str, Any], threads: int, blocks: Mapping[str, int]) -> dict[str, Any]:
    """`instructions` of the whole kernel, and `per_pixel`: as many as a pixel of the tile costs where each is issued
    once by all threads."""
    instructions = _sass(code["cubin"]) if "cubin" in code else len(_AMD.findall(code["amdgcn"]))
    pixels = prod(size for name, size in blocks.items() if name not in _NOT_PIXELS)
    return {"instructions": instructions, "per_pixel": round(instructions * threads / pixels, 2)}


def _sass(binary: bytes) -> int:
    """Without what fills up the end: no operations, and a jump to itself."""
    text = _section(binary, b".text.")
    opcodes = [int.from_bytes(text[at : at + 2], "little") & 0xFFF for at in range(0, len(text), _LENGTH)]
    return sum(opcode != _NOP for opcode in opcodes) - 1


def _section(binary: bytes, prefix: bytes) -> bytes:
    """The one section of a 64-bit ELF file whose name starts so."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, number, of_names = struct.unpack_from("<HHH", binary, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", binary, table + index * size) for index in range(number)]
    names = heads[of_names][4]
    found = [
        binary[start : start + length]
        for name, _, _, _, start, length in heads
        if binary.startswith(prefix, names + name)
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sections {prefix.decode()}*, want one")
    return found[0]
