"""A recorded launch compiled to SPIR-V by Triton's back-end for Intel GPUs (3.3), which needs no such GPU.

That back-end leaves out a barrier: where it converts the layout of a small vector through local memory, it writes cells
that slower warps have still to read. Every vector store to local memory therefore gets a barrier before it, in the LLVM
IR, unless it lies where not all threads come. Other than that the code is what Triton makes of the kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cosa_fast.kernels.launch.offline import specialise
from cosa_fast.kernels.launch.runtime import Launch

LANES = 32
_DEVICE = {
    "has_fp64": True, "max_work_group_size": 1024, "sub_group_sizes": [4, 8, 16, 32, 64],
    "has_subgroup_matrix_multiply_accumulate": False, "has_subgroup_2d_block_io": False,
    "has_bfloat16_conversions": False,
}  # fmt: skip
_BARRIER = "call void @_Z7barrierj(i32 1)"  # of local memory
_VECTOR_STORE = re.compile(r"^\s+store <\d+ x [^\n]*ptr addrspace\(3\)", re.MULTILINE)
# What the CPU's runtime refuses: the kernel attribute of register files, which has no meaning there.
_REFUSED_CAPABILITY, _REFUSED_MODE, _REFUSED_EXTENSION = 5892, 5893, b"SPV_INTEL_kernel_attributes"
_CAPABILITY, _EXTENSION, _EXECUTION_MODE = 17, 10, 16  # opcodes


class _NoDevice:
    """In place of the module that Triton would build to ask which device there is."""

    @staticmethod
    def parse_device_arch(code: int) -> str:
        """None that is known."""
        return ""


@dataclass(frozen=True)
class Program:
    """SPIR-V, the name of its kernel, warps and bytes of local memory; `signature`: the types of all parameters."""

    spirv: bytes
    name: str
    warps: int
    shared: int
    signature: dict[str, Any]
    barriers: int  # that were put in


def compile_launch(launch: Launch) -> Program:
    """The launch's kernel, specialised as Triton's own launcher specialises it."""
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    added: list[int] = []
    backend = backends["intel"].compiler
    make_llir = backend.make_llir

    def repaired(source: Any, metadata: Any, options: Any) -> str:
        text, count = with_barriers(make_llir(source, metadata, options))
        added.append(count)
        return text

    # It would ask a device that is not there.
    backend.__init__.__globals__["compile_module_from_src"] = lambda source, name: _NoDevice
    backend.make_llir = staticmethod(repaired)
    try:
        signature, constants, attributes = specialise(launch)
        source = ASTSource(launch.kernel, signature, constants, attributes)
        options = {
            "num_warps": launch.configuration.num_warps, "num_stages": launch.configuration.num_stages,
            "threads_per_warp": LANES,
        }  # fmt: skip
        binary = triton.compile(source, target=GPUTarget("xpu", _DEVICE, LANES), options=options)
    finally:
        backend.make_llir = staticmethod(make_llir)
    metadata = binary.metadata
    return Program(
        without_refused(binary.asm["spv"]), metadata.name, metadata.num_warps, metadata.shared, signature, sum(added)
    )


def with_barriers(text: str) -> tuple[str, int]:
    """LLVM IR with a barrier before every vector store to local memory, and how many were added."""
    count = len(_VECTOR_STORE.findall(text))
    if count:
        text = _VECTOR_STORE.sub(lambda store: f"  {_BARRIER}\n{store[0]}", text)
        if "@_Z7barrierj" not in text.partition("declare")[2]:
            text += "\ndeclare void @_Z7barrierj(i32)\n"
    return text, count


def without_refused(spirv: bytes) -> bytes:
    """A SPIR-V module without the declarations that the CPU's runtime does not know."""
    words = memoryview(spirv).cast("I")
    kept, place = list(words[:5]), 5
    while place < len(words):
        length, opcode = words[place] >> 16, words[place] & 0xFFFF
        instruction = words[place : place + length]
        refused = (
            (opcode == _CAPABILITY and instruction[1] == _REFUSED_CAPABILITY)
            or (opcode == _EXECUTION_MODE and instruction[2] == _REFUSED_MODE)
            or (opcode == _EXTENSION and bytes(instruction[1:]).startswith(_REFUSED_EXTENSION))
        )
        if not refused:
            kept += list(instruction)
        place += length
    return b"".join(word.to_bytes(4, "little") for word in kept)
