"""Compile recorded launches for an architecture, GPU or not, and read what the compiler says of them.

Needs a process without TRITON_INTERPRET. NVIDIA: registers and spills from ptxas; AMD: from the kernel's metadata.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .runtime import Launch

KERNELS = Path(__file__).resolve().parents[1]
# Target by architecture: back-end, its name there, threads of a warp, bytes of shared memory that a program may have.
ARCHITECTURES: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one compilation needs of a program's resources (spills and shared memory in bytes), and its code in the
    compiler's stages, by their names there."""

    module: str
    kernel: str
    architecture: str
    configuration: str
    registers: int
    spills: int
    shared: int
    shared_limit: int
    blocks: Mapping[str, int] = field(compare=False, repr=False)
    threads: int = field(compare=False, repr=False)
    warp: int = field(compare=False, repr=False)
    code: Mapping[str, Any] = field(compare=False, repr=False)

    def as_row(self) -> dict[str, Any]:
        """The resources by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.compare}


def source_hash(root: Path = KERNELS) -> str:
    """sha256 over names and contents of the Python files below `root`; with another one kernels may differ."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def compile_launches(
    launches: Iterable[Launch], architecture: str, known: dict[Any, Compiled] | None = None
) -> list[Compiled]:
    """Compile every distinct launch for an architecture of ARCHITECTURES.

    `known` collects what was compiled, so that a later call with it does not compile the same again.
    """
    known = {} if known is None else known
    keys: dict[Any, None] = {}
    for launch in launches:
        key = (launch.kernel, architecture, str(specialise(launch)), launch.configuration)
        if key not in known:
            known[key] = _compile(launch, architecture)
        keys[key] = None
    return [known[key] for key in keys]


def _compile(launch: Launch, architecture: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, name, warp, limit = ARCHITECTURES[architecture]
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.configuration.num_warps, "num_stages": launch.configuration.num_stages}
    printed = io.StringIO()
    # The report of the assembler run that makes the binary: another run, with other options, may differ. A binary from
    # the cache would have none.
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(printed):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=GPUTarget(backend, name, warp), options=options)
    registers, spills = _ptxas_report(printed.getvalue()) if backend == "cuda" else _amd_metadata(binary)
    blocks = " ".join(f"{key}={value}" for key, value in launch.configuration.blocks.items())
    described = f"{blocks} warps={launch.configuration.num_warps}".strip()
    shared = int(binary.metadata.shared)
    module = launch.kernel.__module__.rpartition(".")[2]
    return Compiled(
        module, launch.kernel.__name__, architecture, described, registers, spills, shared, limit,
        launch.configuration.blocks, warp * launch.configuration.num_warps, warp, dict(binary.asm),
    )  # fmt: skip


def specialise(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes as Triton's own launcher derives them: 1 is a constant, multiples of 16 are
    known as such."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = _type_of(value, (index,), constants, attributes)
    return signature, constants, attributes


def _type_of(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_type_of(item, (*path, index), constants, attributes) for index, item in enumerate(value))
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
        constants[path] = value
        return "constexpr"
    aligned = value.data_ptr() % 16 == 0 if isinstance(value, Tensor) else value % 16 == 0
    if aligned and isinstance(value, (Tensor, int)) and not isinstance(value, bool):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _ptxas_report(report: str) -> tuple[int, int]:
    """(registers, bytes of spill stores)."""
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores", report)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas: no resource usage in its report: {report}")
    return int(registers[1]), int(spills[1])


def _amd_metadata(binary: Any) -> tuple[int, int]:
    """(vector registers, spilled vector and scalar registers × 4 bytes)."""
    text = binary.asm["amdgcn"]
    values = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in (  # type: ignore[index]
        "vgpr_count", "vgpr_spill_count", "sgpr_spill_count",
    )}  # fmt: skip
    return values["vgpr_count"], 4 * (values["vgpr_spill_count"] + values["sgpr_spill_count"])
