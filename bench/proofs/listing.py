"""Machine instructions of a compiled kernel: how many, and per pixel, in all and of its inner loops.

NVIDIA: SASS, from the disassembler that comes with Triton. AMD: the assembler that Triton's back-end wrote.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

_SASS = re.compile(r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<code>[^;]+?)\s*;")
_TO = re.compile(r"\bBRA(?:\.\w+)* (?:!?U?P\d+, )?(?:`\()?(?P<to>0x[0-9a-f]+)")
_AMD = re.compile(r"^\t(?!s_nop)(?:s|v|ds|global|buffer|flat|scratch)_\w+")
# Blocks of classes, channels or bins: a pixel (of pairs: a pair) goes through all of them.
_NOT_PIXELS = {"CLASSES", "BLOCK_C", "BLOCK_K", "BLOCK_G", "BINS"}


def count(code: Mapping[str, Any], threads: int, blocks: Mapping[str, int]) -> dict[str, Any]:
    """`instructions` of the whole kernel; `per_pixel`: as many as a pixel of the tile costs where each is issued once;
    `loops_per_pixel`: the same of every loop without another inside, for one turn, in the order of the code (NVIDIA;
    the other assembler's loops do not lie in one piece)."""
    if "cubin" in code:
        instructions, loops = _sass(_disassembled(code["cubin"]))
    else:
        instructions, loops = _amd(code["amdgcn"]), []
    share = threads / prod(size for name, size in blocks.items() if name not in _NOT_PIXELS)
    inner = sorted({loop for loop in loops if not any(_inside(other, loop) for other in loops)})
    return {
        "instructions": instructions,
        "per_pixel": round(instructions * share, 2),
        "loops_per_pixel": [round((end - start + 1) * share, 2) for start, end in inner],
    }


def _inside(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and other[0] <= one[0] and one[1] <= other[1]


def _disassembled(cubin: bytes) -> str:
    import triton

    tools = triton.knobs.nvidia
    environment = {**os.environ, "PATH": f"{Path(tools.nvdisasm.path).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tools.cuobjdump.path, "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _sass(text: str) -> tuple[int, list[tuple[int, int]]]:
    """How many instructions, and (first, last) of each loop. What fills up the end is left out: no operations, and the
    jump to itself."""
    found = [(int(line["at"], 16), line["code"]) for line in map(_SASS.match, text.splitlines()) if line]
    jumps = [(at, int(jump["to"], 16)) for at, code in found if (jump := _TO.search(code))]
    found = [(at, code) for at, code in found if not code.startswith("NOP") and (at, at) not in jumps]
    place = {at: index for index, (at, _) in enumerate(found)}
    ordered = sorted(place)
    # A target that was left out stands for the instruction behind it.
    loops = [
        (place[next(each for each in ordered if each >= to)], place[at]) for at, to in jumps if to < at and at in place
    ]
    return len(found), loops


def _amd(text: str) -> int:
    return sum(bool(_AMD.match(line)) for line in text.splitlines())
