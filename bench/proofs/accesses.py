"""Where a kernel touches shared memory, and what orders it: the events of its blocks.

Every instruction that could touch shared memory is either understood or an error, so that nothing is proved by being
overlooked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.proofs.arithmetic import Numbers
from bench.proofs.ir import Instruction, Unreadable, arguments, bracketed, callee, untyped
from bench.proofs.threads import Threads, Value, size_of

_ASSEMBLER = re.compile(r'asm (?:sideeffect )?(?:alignstack )?"(?P<code>[^"]*)", "(?P<constraints>[^"]*)"')
_STATEMENT = re.compile(r"^(?:@(?P<not>!?)\$(?P<guard>\d+) )?(?P<opcode>[a-z][\w.:]*)(?P<rest>.*)$", re.DOTALL)
_PLACE = re.compile(r"\[ ?\$(?P<operand>\d+)(?: \+ (?P<offset>\d+))? ?\]")
# What may order or touch shared memory by another name than "shared".
_SUSPECT = re.compile(r"shared|mbarrier|cp\.async|wgmma|tcgen05|\bbar\b|barrier|fence|matrix|addrspace\(3\)|lds|dsmem")
# tcgen05: moves between registers and tensor memory, which belongs to the lanes that move.
_HARMLESS = re.compile(
    r"wgmma\.fence|sched\.barrier|sched\.group\.barrier|iglp|griddepcontrol"
    r"|tcgen05\.(?:st|ld|wait|relinquish_alloc_permit|dealloc|fence)\b"
)
# Rows of a swizzled atom of 8 in bytes, by the descriptor's mode: of wgmma (two bits) and tcgen05 (three).
_SWIZZLES = {"wgmma": (62, 3, {1: 128, 2: 64, 3: 32}), "tcgen05": (61, 7, {1: 128, 2: 128, 4: 64, 6: 32})}
_ORDINARY = re.compile(
    r"(?P<what>ld|st|atom)\.shared(?:::cta)?(?:\.(?!async)[a-z]+)?(?:\.v\d)?\.[bufs]\d+"
    r"|(?P<copy>cp\.async)\.c[ag]\.shared\.global"
)
_MATRIX = re.compile(r"(?P<kind>ld|st)matrix\.sync\.aligned\.m8n8\.x(?P<count>[124])")


@dataclass(frozen=True)
class Access:
    """Bytes of shared memory that threads read or write by one instruction.

    `starts`: alternatives of each thread's first byte (None: anywhere); `mask`: which threads may take part. An access
    of a warp is one by all its lanes together. `pending`: with the name of the groups in which it completes, later than
    the instruction. `bits`: those of the thread's number on which written values may depend.
    """

    number: int
    text: str
    kind: str  # read, write, atomic
    starts: tuple[Numbers, ...] | None
    width: int
    mask: NDArray[np.bool_]
    of_warp: bool = False
    pending: str = ""
    bits: int = 0


@dataclass(frozen=True)
class Barrier:
    """All threads of the program, or of a warp, have come here before one goes on; what they wrote is seen."""

    of_warp: bool
    text: str = field(compare=False, default="")


@dataclass(frozen=True)
class Group:
    """The end of a group of pending accesses, or (`left` given) the wait until no more than so many groups pend; of
    the groups that announce their end in shared memory, those that do so at `place`."""

    name: str
    left: int | None = None
    place: int = 0


@dataclass(frozen=True)
class ProxyFence:
    """Ordinary accesses before it are seen by the matrix units, which read shared memory by another way."""


Event = Access | Barrier | Group | ProxyFence


class Reader:
    """Events of one kernel, in its blocks' order."""

    def __init__(self, threads: Threads) -> None:
        self.threads = threads
        self.events: dict[str, list[Event]] = {}
        self._accesses = 0
        for name in threads.graph.order:
            self._mask = threads.reached[name]
            self.events[name] = [
                event for instruction in threads.graph.blocks[name].instructions for event in self._read(instruction)
            ]

    def _read(self, instruction: Instruction) -> Iterator[Event]:
        opcode, rest = instruction.opcode, instruction.rest
        if opcode == "load" and "addrspace(3)" in rest:
            kind, pointer = arguments(re.sub(r"^(?:volatile |atomic )+", "", rest))[:2]
            yield self._access(instruction, "read", self._pointer(pointer), size_of(kind))
        elif opcode == "store" and "addrspace(3)" in rest:
            value, pointer = arguments(re.sub(r"^(?:volatile |atomic )+", "", rest))[:2]
            kind, _, operand = value.rpartition(" ")
            bits = self.threads.value(operand).bits
            yield self._access(instruction, "write", self._pointer(pointer), size_of(kind), bits=bits)
        elif opcode in ("atomicrmw", "cmpxchg") and "addrspace(3)" in rest:
            pointer, value = arguments(re.sub(r"^(?:volatile )?\w+ ", "", rest))[:2]
            yield self._access(instruction, "atomic", self._pointer(pointer), size_of(value.split(" ")[0]))
        elif opcode == "fence":
            if "workgroup" not in rest:
                raise Unreadable(str(instruction))
        elif opcode == "call" and " asm " in rest:
            yield from self._assembler(instruction)
        elif opcode == "call":
            yield from self._intrinsic(instruction, callee(instruction))

    def _pointer(self, text: str) -> Value:
        return self.threads.value(untyped(text))

    def _access(
        self, instruction: Instruction, kind: str, place: Value, width: int, *, offset: int = 0,
        mask: NDArray[np.bool_] | None = None, of_warp: bool = False, pending: str = "", bits: int = 0,
    ) -> Access:  # fmt: skip
        starts = None if place.alternatives is None else tuple(each + offset for each in place.alternatives)
        taking_part = self._mask if mask is None else self._mask & mask
        self._accesses += 1
        return Access(self._accesses, str(instruction), kind, starts, width, taking_part, of_warp, pending, bits)

    def _intrinsic(self, instruction: Instruction, name: str) -> Iterator[Event]:
        given = [part for part in arguments(bracketed(instruction.rest, instruction.rest.index("@"))[0]) if part]
        matrix = _MATRIX.search(name)
        if name in ("llvm.nvvm.barrier.cta.sync.aligned.all", "llvm.amdgcn.s.barrier"):
            yield Barrier(False, str(instruction))
        elif name in ("llvm.nvvm.bar.warp.sync", "llvm.amdgcn.wave.barrier"):
            yield Barrier(True, str(instruction))
        elif name == "llvm.nvvm.cp.async.commit.group":
            yield Group("copy")
        elif name == "llvm.nvvm.cp.async.wait.group":
            yield Group("copy", int(given[0].split(" ")[1]))
        elif name == "llvm.nvvm.wgmma.commit_group.sync.aligned":
            yield Group("wgmma")
        elif name == "llvm.nvvm.wgmma.wait_group.sync.aligned":
            yield Group("wgmma", int(given[0].split(" ")[1]))
        elif name == "llvm.nvvm.fence.proxy.async.shared_cta":
            yield ProxyFence()
        elif matrix:
            kind, lanes = ("read" if matrix["kind"] == "ld" else "write"), 8 * int(matrix["count"])
            mask = np.arange(self.threads.count) % self.threads.warp < lanes
            bits = self.threads.warp - 1  # a row comes from four lanes, other ones for each row
            for value in given[1:]:
                bits |= self.threads.value(untyped(value)).bits
            yield self._access(instruction, kind, self._pointer(given[0]), 16, mask=mask, of_warp=True, bits=bits)
        elif (_SUSPECT.search(name) and not _HARMLESS.search(name)) or any("addrspace(3)" in part for part in given):
            raise Unreadable(str(instruction))

    # --- assembler written by Triton ----------------------------------------------------------------------------------

    def _assembler(self, instruction: Instruction) -> Iterator[Event]:
        found = _ASSEMBLER.search(instruction.rest)
        if found is None:
            raise Unreadable(str(instruction))
        results = sum(constraint.startswith("=") for constraint in found["constraints"].split(","))
        given = [part for part in arguments(bracketed(instruction.rest, found.end())[0]) if part]
        code = re.sub(r"//.*?(?=\\0A|$)", "", found["code"])
        for statement in re.split(r";|\\0A|\\09|\n", code):
            statement = statement.strip()
            if not _SUSPECT.search(statement):
                continue
            parts = _STATEMENT.match(statement)
            if parts is None:
                raise Unreadable(str(instruction))
            yield from self._statement(instruction, parts, [untyped(operand) for operand in given], results)

    def _statement(
        self, instruction: Instruction, parts: re.Match[str], given: list[str], results: int
    ) -> Iterator[Event]:
        opcode, rest = parts["opcode"], parts["rest"]

        def operand(number: str) -> Value:
            return self.threads.value(given[int(number) - results])

        mask = None
        if parts["guard"]:
            guards = operand(parts["guard"]).alternatives
            if guards is not None:
                mask = np.any([(each != 0) != bool(parts["not"]) for each in guards], axis=0)
        if _HARMLESS.match(opcode):
            return
        if opcode == "fence.proxy.async.shared::cta":
            yield ProxyFence()
            return
        if opcode.startswith("wgmma.wait_group"):
            yield Group("wgmma", int(rest))
            return
        if opcode.startswith("wgmma.mma_async"):
            columns, factors = re.search(r"\.m64n(\d+)k\d+", opcode), re.search(r"\}, \{[^}]*\}, \$(\d+),", rest)
            if columns is None or factors is None:
                raise Unreadable(str(instruction))
            yield self._factor(instruction, "wgmma", operand(factors[1]), int(columns[1]), None)
            return
        if opcode.startswith("tcgen05.mma"):
            factors = re.match(r" \[ \$\d+ \+ \d+ \], \[ \$\d+ \+ \d+ \], \$(\d+), \$(\d+),", rest)
            if factors is None:
                raise Unreadable(str(instruction))
            shape = self._number(instruction, operand(factors[2]))
            yield self._factor(instruction, "tcgen05", operand(factors[1]), (shape >> 17 & 63) * 8, mask)
            return
        place = _PLACE.search(rest)
        if place is not None and re.match(r"mbarrier|tcgen05\.(?:alloc|commit)", opcode):
            yield from self._announcement(instruction, opcode, operand(place["operand"]), mask)
            return
        ordinary = _ORDINARY.fullmatch(opcode)
        if ordinary is None or place is None:
            raise Unreadable(str(instruction))
        kind = {"ld": "read", "st": "write", "atom": "atomic", "cp.async": "write"}[
            ordinary["what"] or ordinary["copy"]
        ]
        if opcode.startswith("cp.async"):
            size = re.search(r"\], (0x[0-9a-f]+|\d+)", rest)
            if size is None:
                raise Unreadable(str(instruction))
            width, pending = int(size[1], 0), "copy"
        else:
            vector, element = re.search(r"\.v(\d)", opcode), re.search(r"\.[bufs](\d+)$", opcode)
            if element is None:
                raise Unreadable(str(instruction))
            width, pending = int(vector[1] if vector else 1) * int(element[1]) // 8, ""
        bits = 0
        if kind == "write":
            for number in re.findall(r"\$(\d+)", rest[place.end() :]):
                bits |= operand(number).bits
        yield self._access(
            instruction, kind, operand(place["operand"]), width,
            offset=int(place["offset"] or 0), mask=mask, pending=pending, bits=bits,
        )  # fmt: skip

    def _announcement(
        self, instruction: Instruction, opcode: str, place: Value, mask: NDArray[np.bool_] | None
    ) -> Iterator[Event]:
        """Cells of shared memory in which the end of a group is announced, and where tensor memory lies."""
        where = self._number(instruction, place)
        if opcode.startswith(("mbarrier.init", "mbarrier.inval", "tcgen05.alloc")):
            width = 4 if "alloc" in opcode else 8
            yield self._access(instruction, "write", place, width, mask=mask, of_warp="alloc" in opcode)
        elif opcode.startswith("tcgen05.commit"):
            yield self._access(instruction, "atomic", place, 8, mask=mask, pending="tcgen05")
            yield Group("tcgen05", place=where)
        elif opcode.startswith("mbarrier.try_wait"):
            yield self._access(instruction, "atomic", place, 8, mask=mask)
            yield Group("tcgen05", 0, where)
        else:
            raise Unreadable(str(instruction))

    def _number(self, instruction: Instruction, value: Value) -> int:
        """The one number that all threads hold."""
        if value.alternatives is None or len(value.alternatives) != 1 or value.bits:
            raise Unreadable(f"not one number: {instruction}")
        return int(value.alternatives[0][0])

    def _factor(
        self, instruction: Instruction, unit: str, value: Value, columns: int, mask: NDArray[np.bool_] | None
    ) -> Access:
        """What matrix units read by a descriptor: 14 bits of start, 14 of the distance between atoms of 8 rows, and
        the swizzle, which says how long a row is. All of the atoms counts as read."""
        descriptor = self._number(instruction, value)
        at, bits, rows = _SWIZZLES[unit]
        row = rows.get(descriptor >> at & bits)
        if row is None:
            raise Unreadable(str(instruction))
        start, distance = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        start -= start % (8 * row)
        place = Value((np.full(self.threads.count, start, np.int64),))
        width = (columns // 8 - 1) * distance + 8 * row
        return self._access(
            instruction, "read", place, width, mask=mask, of_warp=unit == "wgmma", pending=unit
        )  # fmt: skip
