"""Which values are the same bits in other clothes: words of 32 bits that travel through vectors and casts.

Needed for exchanges between lanes, which move one word at a time whatever the type: a lane gets the word of the lane
whose number differs in one bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from bench.proofs.ir import Instruction, arguments, bracketed, callee, names_in, untyped

_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
Word = tuple[str, int]  # a value that is not made of others, and which of its words
# AMD's moves within a row of 16 lanes, by control word: to lanes ^ 1, lanes ^ 2, and both halves of lanes ^ 4, ^ 8.
_QUADS = {"177": 1, "78": 2}
_HALVES = {("260", "5"): ("276", "10", 4), ("264", "3"): ("280", "12", 8)}
_SWIZZLE = 0x1F  # all lanes of 32 take part, each from the lane ^ bits 10 to 14


class Words:
    """Of the values that a function's instructions define; `step_of`, for an index of lanes (4 times their number),
    says over which bit they are exchanged, 0 if they are not."""

    def __init__(self, definitions: Mapping[str, Instruction], step_of: Callable[[str], int]) -> None:
        self._definitions, self._step_of = definitions, step_of
        self.of = cache(self._of)

    def exchanged(self, one: str, other: str) -> int:
        """The bit of the lane's number over which `other` was fetched from `one`, word by word; 0 if it was not."""
        steps = set()
        here, there = self.of(one), self.of(other)
        if len(here) != len(there):
            return 0
        for mine, (name, _) in zip(here, there, strict=True):
            if not name:  # nothing was ever put there
                continue
            source, step = self.exchange(name)
            if not step or self.of(source) != (mine,):
                return 0
            steps.add(step)
        return steps.pop() if len(steps) == 1 else 0

    def exchange(self, name: str) -> tuple[str, int]:
        """What a value was fetched from another lane of, and the bit in which the lanes' numbers differ; or no bit."""
        definition = self._definitions.get(name)
        called = "" if definition is None else callee(definition)
        if definition is None or not called:
            return "", 0
        given = call_arguments(definition)
        if "shfl.sync.bfly" in called and given[2].isdigit():
            return given[1], int(given[2])
        if "ds.swizzle" in called and int(given[1]) & 0x83FF == _SWIZZLE:
            return given[0], int(given[1]) >> 10 & 31
        if "ds.bpermute" in called:
            return given[1], self._step_of(given[0])
        if "update.dpp" in called:
            return self._moved(given)
        return "", 0

    def _moved(self, given: list[str]) -> tuple[str, int]:
        before, source, control, rows, banks = given[:5]
        if rows != "15":
            return "", 0
        if control in _QUADS and banks == "15":
            return source, _QUADS[control]
        half = _HALVES.get((control, banks))
        first = self._definitions.get(before)
        if half is None or first is None or "update.dpp" not in callee(first):
            return "", 0
        other = call_arguments(first)
        fits = (other[1], other[2], other[3], other[4]) == (source, half[0], "15", half[1])
        return (source, half[2]) if fits else ("", 0)

    def _of(self, name: str) -> tuple[Word, ...]:
        """The words of a value."""
        definition = self._definitions.get(name)
        if definition is None:
            return ((name, 0),)
        opcode, rest = definition.opcode, definition.rest
        if opcode == "freeze" or (opcode == "bitcast" and names_in(rest)):
            return self.of(names_in(rest)[0])
        if opcode == "insertelement":
            found = self._inserted(name, rest)
        elif opcode == "extractelement":
            found = self._extracted(rest)
        elif opcode == "shufflevector":
            found = self._shuffled(rest)
        else:
            found = None
        return found or tuple((name, place) for place in range(max(1, _bits(definition) // 32)))

    def _inserted(self, name: str, rest: str) -> tuple[Word, ...] | None:
        vector, element, index = (untyped(part) for part in arguments(rest))
        _, count, size = _vector(rest)
        if size % 32 or not index.isdigit():
            return None
        words = size // 32
        before = self.of(vector) if vector.startswith("%") else (("", 0),) * (count * words)
        inside = self.of(element) if element.startswith("%") else ((element, 0),) * words
        if len(before) != count * words or len(inside) != words:
            return None
        at = int(index) * words
        return before[:at] + inside + before[at + words :]

    def _extracted(self, rest: str) -> tuple[Word, ...] | None:
        vector, index = (untyped(part) for part in arguments(rest))
        _, count, size = _vector(rest)
        words, every = size // 32, self.of(vector)
        if size % 32 or not index.isdigit() or len(every) != count * words:
            return None
        return every[int(index) * words : (int(index) + 1) * words]

    def _shuffled(self, rest: str) -> tuple[Word, ...] | None:
        one, other, order = arguments(rest)
        _, count, size = _vector(rest)
        words = size // 32
        if size % 32:
            return None
        both: tuple[Word, ...] = ()
        for part in (one, other):
            vector = untyped(part)
            both += self.of(vector) if vector.startswith("%") else (("", 0),) * (count * words)
        if len(both) != 2 * count * words:
            return None
        found: tuple[Word, ...] = ()
        for place in shuffle_order(order):
            found += (("", 0),) * words if place is None else both[place * words : (place + 1) * words]
        return found


def call_arguments(call: Instruction) -> list[str]:
    """The operands of a call of a function."""
    return [untyped(part) for part in arguments(bracketed(call.rest, call.rest.index("@"))[0])]


def shuffle_order(mask: str) -> list[int | None]:
    """What a shufflevector puts at each place of its result; None: anything."""
    count, listed = re.findall(r"<(\d+) x i32>", mask)[0], mask.split("> ", 1)[-1]
    if not listed.startswith("<"):
        return [0 if listed == "zeroinitializer" else None] * int(count)
    return [int(place) if place.isdigit() else None for place in re.findall(r"i32 (\w+)", listed)]


def _vector(rest: str) -> tuple[str, int, int]:
    """(type, number, bits) of the elements of an instruction's first operand."""
    found = re.match(r"<(\d+) x (\S+?)>", rest)
    return ("", 0, 1) if found is None else (found[2], int(found[1]), _width(found[2]))


def _width(kind: str) -> int:
    return int(kind[1:]) if re.fullmatch(r"i\d+", kind) else _BITS.get(kind, 64 if kind == "ptr" else 1)


def _bits(definition: Instruction) -> int:
    """Of a result; 1 where it does not matter."""
    opcode, rest = definition.opcode, definition.rest
    if " to " in rest and opcode not in ("call", "load", "phi", "select"):
        rest = rest.rpartition(" to ")[2]
    elif opcode == "select":
        rest = arguments(rest)[1]
    elif opcode == "call":
        rest = rest[: max(rest.find("@"), 0)]
    elif opcode in ("icmp", "fcmp"):
        return 1
    found = re.search(r"<(\d+) x (\w+)>|\b(i\d+|half|bfloat|float|double)\b", rest)
    if found is None:
        return 1
    return int(found[1]) * _width(found[2]) if found[1] else _width(found[3])
