"""A kernel's LLVM IR, as Triton hands it to the machine's code generator, as blocks of instructions.

Read from its text, as far as the proofs need it; what cannot be read is an error, never left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_DEFINITION = re.compile(r"^define .*? @(?P<name>[\w.$]+)\(.*?\n(?P<body>.*?)^}", re.DOTALL | re.MULTILINE)
_LABEL = re.compile(r'^(?P<name>"[^"]+"|[\w.$-]+):')
_RESULT = re.compile(r'^(?P<name>%(?:"[^"]+"|[\w.$-]+)) = ')
_METADATA = re.compile(r"(?:, ![\w.]+ ![\w]+)+$")
_NAME = re.compile(r'%(?:"[^"]+"|[\w.$-]+)')
_TARGET = re.compile(r'label %("[^"]+"|[\w.$-]+)')


class Unreadable(ValueError):
    """Compiled code that the proofs do not understand."""


@dataclass(frozen=True)
class Instruction:
    """`result = opcode rest`; `result` is empty where there is none."""

    result: str
    opcode: str
    rest: str

    def __str__(self) -> str:
        return f"{self.result} = {self.opcode} {self.rest}" if self.result else f"{self.opcode} {self.rest}"


@dataclass
class Block:
    """Instructions without a jump but for the last; `condition` decides between two followers, the first if true."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    followers: tuple[str, ...] = ()
    condition: str = ""


def read(text: str) -> dict[str, Block]:
    """The blocks of the only function in the module, in their order, by name; the first is the entry."""
    definitions = list(_DEFINITION.finditer(text))
    if len(definitions) != 1:
        raise Unreadable(f"{len(definitions)} functions in the module, want one")
    blocks: dict[str, Block] = {}
    current = None
    for line in _joined(definitions[0]["body"]):
        label = _LABEL.match(line)
        if label and not line.startswith(" "):
            current = blocks.setdefault(label["name"].strip('"'), Block(label["name"].strip('"')))
            continue
        if current is None:  # the entry's label may be left out
            current = blocks.setdefault("entry", Block("entry"))
        instruction = _instruction(line.strip())
        if instruction is not None:
            current.instructions.append(instruction)
            if instruction.opcode in ("br", "switch", "ret", "unreachable"):
                _end(current, instruction)
    if any(not block.instructions for block in blocks.values()):
        raise Unreadable("a block without an end")
    return blocks


def _joined(body: str) -> list[str]:
    """Lines of the body; a switch, which takes several, as one."""
    body = re.sub(r"\[\n(.*?)\n\s*\]", lambda found: "[" + " ".join(found[1].split("\n")) + "]", body, flags=re.DOTALL)
    return [line for line in body.splitlines() if line.strip() and not line.lstrip().startswith((";", "#dbg"))]


def _instruction(line: str) -> Instruction | None:
    line = _METADATA.sub("", line)
    result = _RESULT.match(line)
    name = result["name"] if result else ""
    rest = line[result.end() :] if result else line
    rest = re.sub(r"^(?:tail |musttail |notail )(?=call)", "", rest)
    opcode, _, rest = rest.partition(" ")
    return Instruction(name, opcode, rest)


def _end(block: Block, last: Instruction) -> None:
    block.followers = tuple(name.strip('"') for name in _TARGET.findall(last.rest))
    if (last.opcode == "br" and len(block.followers) == 2) or last.opcode == "switch":
        block.condition = arguments(last.rest)[0].split()[-1]


def arguments(text: str) -> list[str]:
    """The parts of a list at its outermost commas."""
    parts, depth, quoted, start = [], 0, False, 0
    for index, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in "([{<":
            depth += 1
        elif character in ")]}>":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def untyped(operand: str) -> str:
    """An operand without its type: a name, a number, or a constant expression."""
    found = re.search(r"((?:getelementptr|ptrtoint|inttoptr|addrspacecast)\b[^(]*\(.*\)|\S+)$", operand)
    return found[1] if found else ""


def bracketed(text: str, start: int = 0) -> tuple[str, int]:
    """What stands between the first parenthesis from `start` on and its partner, and the index behind it."""
    begin = text.index("(", start)
    depth, quoted = 0, False
    for index in range(begin, len(text)):
        character = text[index]
        if character == '"':
            quoted = not quoted
        elif not quoted and character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return text[begin + 1 : index], index + 1
    raise Unreadable(f"no end of the parenthesis in {text}")


def callee(instruction: Instruction) -> str:
    """The name of the function that a call calls; empty for assembler and other instructions."""
    if instruction.opcode != "call" or " asm " in instruction.rest:
        return ""
    found = re.search(r"@([\w.$]+)\(", instruction.rest)
    return found[1] if found else ""


def names_in(text: str) -> list[str]:
    """The values that an instruction uses, in their order."""
    return _NAME.findall(text)
