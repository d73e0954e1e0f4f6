"""The field's cls_labels_onehot.npy: a dict, image id -> one-hot float vector, pickled inside an .npy file.

Unpickling can run any code, and even an unpickler that knows nothing but numpy's arrays can be made to follow a pointer
out of the file, for numpy trusts the state that it is given. This file is passed from hand to hand. So nothing is
unpickled: pickletools reads the opcodes, which is parsing alone, and a small machine for those that such a file needs
makes plain Python values of them. Numpy's names stay names, and a vector is copied out of its bytes with one of a few
fixed number types.
"""

import math
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from cosa_fast.errors import UserError, first_line

# numpy.core became numpy._core in numpy 2; files of both kinds are about.
_NAMES = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{f"numpy.{core}.multiarray _reconstruct": "_reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": "scalar" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": "_frombuffer" for core in ("core", "_core")},
}
_NUMBERS = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"}
_OBJECT = "O8"
# Numpy's own texts, which may be keys: their encodings in little and in big endian.
_TEXTS = {"U": ("utf-32-le", "utf-32-be"), "S": ("utf-8", "utf-8")}

# Opcodes by what they do to the stack.
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_NOTHING = {"PROTO", "FRAME", "STOP"}


def read_onehot(path: Path, num_classes: int) -> dict[str | int, np.ndarray]:
    """Image id -> (num_classes,) bool; an id that the file holds as a number stays one. Never runs code from the file,
    nor rebuilds an object that it describes.

    UserError naming the file: unreadable, not such a dict, anything but plain arrays inside, or vectors of another
    length.
    """
    content = _read_object(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: wanted a dict of image id -> one-hot vector, got {type(content).__name__}; choose another file"
        )
    return {id: _row(path, id, vector, num_classes) for id, vector in content.items()}


@dataclass(frozen=True)
class _Name:
    """One of `_NAMES`, where a pickle asks for the function or class itself."""

    name: str


@dataclass
class _Dtype:
    """A number type: its code, and the byte order that a BUILD gives it."""

    code: str
    order: str = "<"


@dataclass
class _Array:
    """What `_reconstruct` would make: empty until a BUILD gives it its numbers, or the list of an object array."""

    content: Any = None


class _Machine:
    """A pickle's stack, its marks and its memo, for the opcodes above. Every value on the stack is a str, bytes,
    number, None, tuple, list, dict, or of one of this file's own classes. ValueError for whatever is not of the
    field's form.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each open mark
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """The value that the pickle describes."""
        for opcode, argument, _ in pickletools.genops(pickled):
            self._step(opcode.name, argument)
        (value,) = self._stack
        return value

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in _PUTS:
            self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = stack[-1]
        elif opcode in _GETS:
            stack.append(self._memo[argument])
        elif opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            self._collapse(_TUPLES[opcode], tuple)
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())
        elif opcode == "MARK":
            self._below.append(stack)
            self._stack = []
        elif opcode in ("TUPLE", "LIST", "DICT"):
            items = self._to_mark()
            self._stack.append(items if opcode == "LIST" else tuple(items) if opcode == "TUPLE" else _pairs(items))
        elif opcode in ("APPENDS", "SETITEMS"):
            items = self._to_mark()
            self._extend(items if opcode == "APPENDS" else _pairs(items))
        elif opcode == "APPEND":
            self._extend([stack.pop()])
        elif opcode == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._extend(_pairs([key, value]))
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            if opcode == "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                argument = f"{_text(module)} {_text(name)}"
            stack.append(_name(argument))
        elif opcode == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif opcode not in _NOTHING:
            raise ValueError(f"it holds the opcode {opcode}, which no label file needs")

    def _collapse(self, count: int, kind: type) -> None:
        if len(self._stack) < count:
            raise ValueError("its stack runs out")
        self._stack[-count:] = [kind(self._stack[-count:])]

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _extend(self, items: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, dict) and isinstance(items, dict):
            target.update(items)
        elif isinstance(target, list) and isinstance(items, list):
            target.extend(items)
        else:
            raise ValueError("it adds to what is neither a dict nor a list")


def _pairs(items: list[Any]) -> dict[str | int, Any]:
    keys = [key.decode("utf-8") if isinstance(key, bytes) else key for key in items[::2]]
    # Others could take for ever to hash or to print: nested ones, or numbers of a million digits.
    if len(items) % 2 or not all(isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63) for key in keys):
        raise ValueError("a key of its dict is no image id")
    return dict(zip(keys, items[1::2], strict=True))


def _name(asked: str) -> _Name:
    if asked not in _NAMES:
        raise ValueError(f"it asks for {asked.replace(' ', '.', 1)}, which no label file needs")
    return _Name(_NAMES[asked])


def _call(function: Any, arguments: Any) -> Any:
    """What numpy's function of that name would give, as one of this file's classes."""
    match function, arguments:
        case _Name("dtype"), (str(code), bool() | int(), bool() | int()) if _is_known(code):
            return _Dtype(code)
        case _Name("_reconstruct"), (_Name("ndarray"), (0,), _):
            return _Array()
        case _Name("_frombuffer"), (bytes() | bytearray() as raw, _Dtype() as dtype, tuple(shape), "C"):
            return _Array(_numbers(raw, dtype, shape))
        case _Name("scalar"), (_Dtype(code=code, order=order), bytes() as raw) if code[0] in _TEXTS:
            return raw.decode(_TEXTS[code[0]][order == ">"]).rstrip("\0")
        case _Name("scalar"), (_Dtype() as dtype, bytes() | str() as raw):
            return _numbers(raw, dtype, ()).item()
    raise ValueError("it calls a function as no label file does")


def _is_known(code: str) -> bool:
    return code in _NUMBERS or code == _OBJECT or re.fullmatch(r"[US]\d{1,4}", code) is not None


def _build(target: Any, state: Any) -> None:
    match target, state:
        case _Dtype(), (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
            target.order = order
        case _Array(), (int(), tuple(), _Dtype(code=code), bool() | int(), list(items)) if code == _OBJECT:
            target.content = items
        case _Array(), (int(), tuple(shape), _Dtype() as dtype, bool() | int(), bytes() | str() as raw):
            target.content = _numbers(raw, dtype, shape)
        case _:
            raise ValueError("it gives an array or a number type a state that no label file has")


def _numbers(raw: bytes | bytearray | str, dtype: _Dtype, shape: tuple[Any, ...]) -> np.ndarray:
    """A copy of the numbers in `raw`, of which there must be exactly as many as `shape` has room for."""
    if isinstance(raw, str):
        raw = raw.encode("latin-1")  # bytes of Python 2
    if dtype.code not in _NUMBERS or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("an array is not of numbers")
    kind = np.dtype(dtype.order + dtype.code)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"an array of another size than its {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape).copy()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name in it is no text")
    return value


def _read_object(path: Path) -> Any:
    try:
        with open(path, "rb") as stream:
            dtype = _read_header(stream)
            if dtype != np.dtype(object):
                raise UserError(
                    f"{path}: wanted a pickled dict, got an array of {dtype}; is this cls_labels_onehot.npy?"
                )
            content = _Machine().run(stream.read())
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise UserError(
            f"{path}: refused ({first_line(error)}); build the labels yourself with: python -m cosa_fast.prepare"
        ) from None
    content = content.content if isinstance(content, _Array) else content
    return content[0] if isinstance(content, list) and len(content) == 1 else content


def _read_header(stream: IO[bytes]) -> np.dtype:
    version = npy_format.read_magic(stream)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    return read(stream)[2]


def _row(path: Path, id: object, vector: Any, num_classes: int) -> np.ndarray:
    row = np.asarray(_vector(vector), dtype=np.float32)
    if row.shape != (num_classes,):
        raise UserError(
            f"{path}: the label of image {id} has shape {row.shape}, wanted ({num_classes},); check the list of classes"
        )
    return row > 0


def _vector(vector: Any) -> Any:
    """The numbers of an array or of a flat list; an empty list for anything else."""
    if isinstance(vector, _Array):
        return vector.content if isinstance(vector.content, np.ndarray) else []
    flat = isinstance(vector, list | tuple) and all(isinstance(value, int | float) for value in vector)
    return [min(max(value, -1.0), 1.0) for value in vector] if flat else []
