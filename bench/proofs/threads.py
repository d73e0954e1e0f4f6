"""What every thread of a program computes, as far as it follows from the thread's number alone.

Addresses in shared memory are such values, in nearly all of what Triton makes. A value is known as the numbers that the
threads hold, or as a few alternatives of them where it depends on the way through the program. Of every other value it
is known on which bits of the thread's number it may depend: a sum over a warp's lanes, exchanged bit by bit, depends on
none of the lane's bits any more, so that a branch on it is taken by the whole warp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from bench.proofs.arithmetic import ARITHMETIC, COMPARED, Numbers, extreme, ordered, reduction, unsigned, wrapped
from bench.proofs.graph import Graph
from bench.proofs.ir import Instruction, arguments, bracketed, callee, names_in, untyped
from bench.proofs.words import Words, call_arguments, shuffle_order

MOST = 16  # alternatives of a value; with more it counts as unknown
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}
_THREAD = ("llvm.nvvm.read.ptx.sreg.tid.x", "llvm.amdgcn.workitem.id.x")
# Results by which the operands' order does not matter: what a butterfly exchange combines is the same on both sides.
_SYMMETRIC = ("add", "fadd", "mul", "fmul", "and", "or", "xor")
_SYMMETRIC_CALLS = re.compile(
    r"llvm\.(?:[su](?:min|max)|maxnum|minnum|maximum|minimum|maximumnum|minimumnum|nvvm\.f(?:min|max)|nvvm\.add)\b"
)

_ELEMENTWISE = re.compile(r"llvm\.(?:[su](?:min|max)|(?:max|min)(?:num|imum)|fabs|fmuladd|fma|sqrt|exp2|floor)\.v")
_BETWEEN_LANES = re.compile(r"shfl|permlane|dpp|ds\.bpermute|ds\.swizzle|mbcnt|laneid|elect|vote")


@dataclass(frozen=True)
class Value:
    """Alternatives of the numbers that the threads hold (none: not reached yet; None: unknown), and the bits of the
    thread's number on which they may depend; of a vector, `parts`."""

    alternatives: tuple[Numbers, ...] | None
    bits: int = 0
    parts: tuple[Value, ...] = ()

    def same(self, other: Value) -> bool:
        """Whether nothing new is known."""
        if self.bits != other.bits or (self.alternatives is None) != (other.alternatives is None):
            return False
        if len(self.parts) != len(other.parts) or not all(map(Value.same, self.parts, other.parts)):
            return False
        return self.alternatives is None or len(self.alternatives) == len(other.alternatives or ())


UNREACHED = Value(())


class Threads:
    """All values of a program of `count` threads, in warps of `warp`."""

    def __init__(self, graph: Graph, count: int, warp: int) -> None:
        self.graph, self.count, self.warp = graph, count, warp
        self.values: dict[str, Value] = {}
        self._every = count - 1
        self._definitions = {i.result: i for block in graph.blocks.values() for i in block.instructions if i.result}
        self._words = Words(self._definitions, self._step)
        self._block = graph.order[0]
        self._solve()

    @cached_property
    def reached(self) -> dict[str, NDArray[np.bool_]]:
        """By block, which threads may come there."""
        found = {name: np.zeros(self.count, bool) for name in self.graph.order}
        found[self.graph.order[0]][:] = True
        changed = True
        while changed:
            changed = False
            for name in self.graph.order:
                block = self.graph.blocks[name]
                for index, follower in enumerate(block.followers):
                    way = found[name] & (self._taken(block.condition, index) if len(block.followers) == 2 else True)
                    if (way & ~found[follower]).any():
                        found[follower] |= way
                        changed = True
        return found

    def _taken(self, condition: str, index: int) -> NDArray[np.bool_]:
        """Which threads may leave by the `index`-th way."""
        alternatives = self.value(condition).alternatives
        if alternatives is None or not condition:
            return np.ones(self.count, bool)
        return np.any([(each == 0) == bool(index) for each in alternatives], axis=0)

    def branch_bits(self, name: str) -> int:
        """The bits of the thread's number on which the way out of a block may depend."""
        block = self.graph.blocks[name]
        return self.value(block.condition).bits if block.condition else 0

    def value(self, operand: str) -> Value:
        """Of an operand, a constant or a name."""
        operand = operand.strip()
        if operand.startswith("%"):
            return self.values.get(operand, UNREACHED if operand in self._definitions else Value(None))
        if operand.startswith("getelementptr"):
            return self._address(bracketed(operand)[0])
        if operand.startswith(("ptrtoint", "addrspacecast")):  # of a constant address
            inner = bracketed(operand)[0].rpartition(" to ")[0]
            return self.value(untyped(inner))
        if operand.startswith("@"):  # Triton has one array in shared memory, which starts at 0
            return self._constant(0)
        words = {"true": 1, "false": 0, "null": 0, "undef": 0, "poison": 0, "zeroinitializer": 0}
        if operand in words:
            return self._constant(words[operand])
        return self._constant(int(operand)) if re.fullmatch(r"-?\d+", operand) else Value(None)

    def _constant(self, number: int) -> Value:
        return Value((np.full(self.count, number, np.int64),))

    def _solve(self) -> None:
        """Until nothing changes; alternatives and bits only grow."""
        users: dict[str, list[str]] = {}
        for name, definition in self._definitions.items():
            for operand in names_in(definition.rest):
                users.setdefault(operand, []).append(name)
        conditions = {block.condition for block in self.graph.blocks.values() if block.condition}
        stale = set(self._definitions)
        while stale:
            for name in self.graph.order:
                self._block = name
                for instruction in self.graph.blocks[name].instructions:
                    if instruction.result not in stale:
                        continue
                    stale.discard(instruction.result)
                    before = self.values.get(instruction.result, UNREACHED)
                    after = self._widened(before, self._valued(instruction), self._surroundings(name, instruction))
                    if not after.same(before):
                        self.values[instruction.result] = after
                        turned = instruction.result in conditions and after.bits != before.bits
                        stale |= set(self._definitions if turned else users.get(instruction.result, ()))

    def _surroundings(self, name: str, instruction: Instruction) -> int:
        """Bits that come from the way by which a block is reached: at a join, and in loops that threads leave apart."""
        deciding = set(self.graph.loop_exits(name))
        if instruction.opcode == "phi":
            deciding |= self.graph.before_join(name)
        bits = 0
        for block in deciding:
            bits |= self.branch_bits(block)
        return bits

    def _widened(self, before: Value, now: Value, surroundings: int) -> Value:
        alternatives: tuple[Numbers, ...] | None
        if before.alternatives is None or now.alternatives is None:
            alternatives = None
        else:
            alternatives = _distinct((*before.alternatives, *now.alternatives))
        bits = before.bits | now.bits
        if now.parts:
            old = before.parts or (UNREACHED,) * len(now.parts)
            parts = tuple(self._widened(*each, surroundings) for each in zip(old, now.parts, strict=True))
            return Value(None, _bits(*parts), parts)
        if alternatives is not None and len(alternatives) == 1:
            return Value(alternatives, self._exact_bits(alternatives[0]))
        return Value(alternatives, bits | surroundings)

    def _exact_bits(self, numbers: Numbers) -> int:
        thread, bits, bit = np.arange(self.count), 0, 1
        while bit < self.count:
            bits |= bit * bool((numbers != numbers[thread ^ bit]).any())
            bit *= 2
        return bits

    # --- one instruction ----------------------------------------------------------------------------------------------

    def _valued(self, instruction: Instruction) -> Value:
        """The result of an instruction."""
        places = _places(instruction)
        if not places:
            return self._computed(instruction, None)
        parts = tuple(self._computed(instruction, place) for place in range(places))
        return Value(None, _bits(*parts), parts)

    def _computed(self, instruction: Instruction, place: int | None) -> Value:
        """The result; of an instruction on vectors what it has at `place`."""
        opcode, rest = instruction.opcode, instruction.rest
        if opcode == "call" and place is None:
            return self._called(instruction)
        if opcode == "load":
            return Value(None, self.value(untyped(arguments(rest)[1])).bits)
        if opcode == "phi":
            return self._joined(instruction, place)
        if opcode == "atomicrmw":
            return Value(None, self._every)
        if opcode == "shufflevector" and place is not None:
            return self._shuffled(rest, place)
        bits = self._united(instruction, names_in(rest), place)
        if place is not None:
            rest = re.sub(r"<\d+ x (\w+)>", r"\1", rest)  # as if they were single numbers
        elif "<" in rest and opcode not in ("extractelement", "extractvalue"):
            return Value(None, bits)
        if opcode in _RESULTS:
            return _RESULTS[opcode](self, rest, place)
        found = re.match(r"(?:[a-z]+ )*?i(\d+) ", rest)
        if found is None or opcode not in ARITHMETIC:
            return Value(None, bits)
        width = int(found[1])
        one, other = (self._at(operand, place) for operand in arguments(rest[found.end() :]))
        return _each(lambda a, b: wrapped(ARITHMETIC[opcode](a, b, width), width), one, other, bits=bits)

    def _step(self, index: str) -> int:
        """The bit by which lanes differ from those that an index of bytes names; 0 if it names others."""
        alternatives = self.value(index).alternatives
        if alternatives is None or len(alternatives) != 1:
            return 0
        lane = np.arange(self.count) % self.warp
        steps = np.unique(lane ^ (alternatives[0] >> 2))
        return int(steps[0]) if len(steps) == 1 and (int(steps[0]) & (int(steps[0]) - 1)) == 0 else 0

    def _united(self, instruction: Instruction, operands: list[str], place: int | None = None) -> int:
        """The bits of all operands; without the bit over which two of them were exchanged."""
        bits = _bits(*(self._at(operand, place) for operand in operands))
        symmetric = instruction.opcode in _SYMMETRIC or _SYMMETRIC_CALLS.match(callee(instruction))
        if symmetric and len(operands) == 2:
            bits &= ~(self._words.exchanged(*operands) | self._words.exchanged(*operands[::-1]))
        return bits

    def _at(self, operand: str, place: int | None) -> Value:
        """An operand, or what it has at a place if it is a vector."""
        if place is None:
            return self.value(operand)
        if not operand.startswith("%"):
            listed, splat = re.fullmatch(r"<(.*)>", operand), re.fullmatch(r"splat \(\S+ (.*)\)", operand)
            return self.value(untyped(arguments(listed[1])[place]) if listed else splat[1] if splat else operand)
        value = self.value(operand)
        return value.parts[place] if place < len(value.parts) else value

    def _inserted(self, rest: str, place: int | None) -> Value:
        vector, element, index = (_untyped_vector(part) for part in arguments(rest))
        if not index.isdigit():
            return Value(None, _bits(*map(self.value, (vector, element, index))))
        return self.value(element) if int(index) == place else self._at(vector, place)

    def _shuffled(self, rest: str, place: int) -> Value:
        one, other, order = arguments(rest)
        count, chosen = int(re.findall(r"<(\d+) x", one)[0]), shuffle_order(order)[place]
        if chosen is None:
            return self._constant(0)  # poison: anything
        return self._at(_untyped_vector(one if chosen < count else other), chosen % count)

    def _joined(self, instruction: Instruction, place: int | None) -> Value:
        bits, known = 0, True
        alternatives: list[Numbers] = []
        for operand in re.findall(r"\[ (.*?), %", instruction.rest):
            value = self._at(operand, place)
            bits |= value.bits
            known &= value.alternatives is not None
            alternatives += value.alternatives or ()
        return Value(_distinct(tuple(alternatives)) if known else None, bits)

    def _element(self, rest: str, place: int | None = None) -> Value:
        """extractelement; with constant indices out of anything, else unknown."""
        vector, index = (untyped(part) for part in arguments(rest))
        if not index.isdigit():
            return Value(None, self.value(vector).bits | self.value(index).bits)
        return self._at(vector, int(index))

    def _address(self, rest: str, place: int | None = None) -> Value:
        """getelementptr of a type without inner structure."""
        rest = re.sub(r"^(?:(?:inbounds|nuw|nusw|inrange\([^)]*\)) )+", "", rest)
        kind, *operands = arguments(rest)
        values = [self.value(untyped(operand)) for operand in operands]
        bits, size = _bits(*values), _size(kind)
        if size is None or len(values) != 2:
            return Value(None, bits)
        return _each(lambda base, index: base + size * index, *values, bits=bits)

    def _selected(self, rest: str, place: int | None) -> Value:
        parts = arguments(re.sub(r"^(?:(?:nnan|ninf|nsz|arcp|contract|afn|reassoc|fast) )+", "", rest))
        condition, yes, no = (self._at(_untyped_vector(part), place) for part in parts)
        bits = _bits(condition, yes, no)
        if condition.alternatives is None:  # each thread may take either
            if yes.alternatives is None or no.alternatives is None:
                return Value(None, bits)
            return Value(_distinct((*yes.alternatives, *no.alternatives)), bits)
        return _each(lambda c, a, b: np.where(c != 0, a, b), condition, yes, no, bits=bits)

    def _converted(self, opcode: str, rest: str, place: int | None) -> Value:
        source, _, target = rest.partition(" to ") if "(" not in rest else rest.rpartition(" to ")
        found = re.match(r"(?:nneg |nuw |nsw )*(\S+?)(?: addrspace\(\d\))? ", source)
        value = self._at(_untyped_vector(source), place)
        if found is None or value.alternatives is None or not re.fullmatch(r"i\d+|ptr", found[1]):
            return Value(None, value.bits)
        width = int(found[1][1:]) if found[1][0] == "i" else 32
        if opcode == "zext":
            return _each(lambda a: unsigned(a, width), value, bits=value.bits)
        if opcode == "trunc":
            return _each(lambda a: wrapped(a, int(target[1:])), value, bits=value.bits)
        if opcode == "sext" and width == 1:
            return _each(lambda a: -(a & 1), value, bits=value.bits)
        if opcode == "bitcast" and not re.match(r"i\d+$|ptr", target):
            return Value(None, value.bits)
        return value

    def _extracted(self, rest: str, place: int | None) -> Value:
        """A field of a result; of assembler that hands an operand on, the operand."""
        name, field = names_in(rest)[0], rest.rpartition(", ")[2]
        definition = self._definitions[name]
        if callee(definition) == "llvm.nvvm.elect.sync" and field == "1":  # always the same lane: say, the first
            return Value(((np.arange(self.count) % self.warp == 0).astype(np.int64),), self.warp - 1)
        if definition.opcode == "call" and " asm " in definition.rest:
            constraints = re.findall(r'"[^"]*"', definition.rest)[1].strip('"').split(",")
            results = sum(constraint.startswith("=") for constraint in constraints)
            given = arguments(bracketed(definition.rest, definition.rest.rindex('"'))[0])
            if field in constraints[results:]:
                return self.value(untyped(given[constraints[results:].index(field)]))
        return Value(None, self.value(name).bits)

    def _compared(self, rest: str, place: int | None) -> Value:
        found = re.match(r"(?:samesign )?([a-z]+) (\S+(?: addrspace\(\d\))?) ", rest)
        assert found is not None
        relation, kind = found[1], found[2]
        one, other = (self._at(operand, place) for operand in arguments(rest[found.end() :]))
        if not re.match(r"i\d+$|ptr", kind):
            return Value(None, _bits(one, other))
        width = int(kind[1:]) if kind[0] == "i" else 64
        function = COMPARED[relation if relation in ("eq", "ne") else relation[1:]]

        def compare(a: Numbers, b: Numbers) -> Numbers:
            if relation[0] == "u":
                a, b = ordered(a, width), ordered(b, width)
            return function(a, b).astype(np.int64)

        return _each(compare, one, other, bits=_bits(one, other))

    def _called(self, instruction: Instruction) -> Value:
        name, rest = callee(instruction), instruction.rest
        if name in _THREAD:
            return Value((np.arange(self.count),), self._every)
        lanes = self.warp - 1
        if not name:  # assembler: what it reads depends on where, what it computes on its operands
            bits = _bits(*(self.value(operand) for operand in names_in(rest[rest.rindex('"') :])))
            return Value(None, self._every if "atom" in rest else bits)
        given = call_arguments(instruction)
        bits = self._united(instruction, [each for each in given if each.startswith("%")])
        source, step = self._words.exchange(instruction.result)
        if step:
            return Value(None, self.value(source).bits)
        if "shfl.sync.idx" in name and given[2].isdigit():
            lane = (np.arange(self.count) & ~lanes) + int(given[2]) % self.warp
            return _each(lambda a: a[lane], self.value(given[1]), bits=bits & ~lanes)
        if "readfirstlane" in name and not any(map(self.branch_bits, self.graph.deciding(self._block))):
            first = np.arange(self.count) & ~lanes  # all lanes are there
            return _each(lambda a: a[first], self.value(given[0]), bits=bits & ~lanes)
        if "shfl.sync.idx" in name or "readlane" in name or "readfirstlane" in name:
            return Value(None, (bits & ~lanes) | (self.value(given[2]).bits if "idx" in name else 0))
        if "redux.sync" in name or "ballot" in name:
            return Value(None, bits & ~lanes)
        if _BETWEEN_LANES.search(name):
            return Value(None, bits | lanes)
        reduced = re.match(r"llvm\.vector\.reduce\.(xor|or|and|add)\.v(\d+)i(\d+)$", name)
        if reduced:
            parts = [self._at(given[0], place) for place in range(int(reduced[2]))]
            return _each(reduction(reduced[1], int(reduced[3])), *parts, bits=bits)
        kind = re.match(r"llvm\.([su](?:min|max))\.i(\d+)$", name)
        if kind is None:
            return Value(None, bits)
        return _each(extreme(kind[1], int(kind[2])), self.value(given[0]), self.value(given[1]), bits=bits)


def _places(instruction: Instruction) -> int:
    """How many numbers a result has of which each is computed for itself; 0 if it is none such."""
    opcode, rest = instruction.opcode, instruction.rest
    if opcode == "shufflevector":
        return len(shuffle_order(arguments(rest)[2]))
    if opcode in ("load", "extractelement", "extractvalue", "getelementptr", "atomicrmw"):
        return 0
    if opcode == "call" and not _ELEMENTWISE.match(callee(instruction)):
        return 0
    counts = {int(count) for count in re.findall(r"<(\d+) x \w+>", rest.partition("@")[0])}
    if opcode == "bitcast" and ("<" not in rest.partition(" to ")[0] or "<" not in rest.partition(" to ")[2]):
        return 0
    return counts.pop() if len(counts) == 1 else 0


def _converter(opcode: str) -> Callable[[Threads, str, int | None], Value]:
    return lambda threads, rest, place: threads._converted(opcode, rest, place)


_RESULTS: dict[str, Callable[[Threads, str, int | None], Value]] = {
    "getelementptr": Threads._address, "extractelement": Threads._element, "extractvalue": Threads._extracted,
    "insertelement": Threads._inserted, "select": Threads._selected, "icmp": Threads._compared,
    **{opcode: _converter(opcode) for opcode in (
        "zext", "sext", "trunc", "freeze", "inttoptr", "ptrtoint", "bitcast", "addrspacecast",
    )},
}  # fmt: skip


def _bits(*values: Value) -> int:
    bits = 0
    for value in values:
        bits |= value.bits
    return bits


def _each(function: Callable[..., Numbers], *values: Value, bits: int) -> Value:
    """The function of every combination of the values' alternatives."""
    known = [value.alternatives for value in values if value.alternatives is not None]
    if len(known) < len(values) or prod(len(each) for each in known) > 4 * MOST:
        return Value(None, bits)
    return Value(_distinct(tuple(function(*way) for way in product(*known))), bits)


def _untyped_vector(operand: str) -> str:
    """An operand without its type, where constants may be vectors."""
    found = re.search(r"(<[^<>]*>|splat \(.*\))$", operand)
    return found[1] if found else untyped(operand)


def _size(kind: str) -> int | None:
    """Bytes of an element. Those of a vector of truth values are packed."""
    bits = re.fullmatch(r"<(\d+) x i1>", kind)
    if bits:
        return -(-int(bits[1]) // 8)
    array = re.fullmatch(r"[\[<](\d+) x (.+)[\]>]", kind)
    if array:
        inner = _size(array[2])
        return None if inner is None else int(array[1]) * inner
    return _SIZES.get(kind)


def size_of(kind: str) -> int:
    """Bytes of an element; a type that is not known is taken for the widest access."""
    return _size(kind) or 16


def _distinct(alternatives: tuple[Numbers, ...]) -> tuple[Numbers, ...] | None:
    found = {each.tobytes(): each for each in alternatives}
    return tuple(found.values()) if len(found) <= MOST else None
