"""Arithmetic of machine numbers, for all threads at once: vectors of int64 that hold signed numbers of some width."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
COMPARED: dict[str, Callable[[Numbers, Numbers], NDArray[np.bool_]]] = {
    "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_EXTREMES = {"smin": np.minimum, "umin": np.minimum, "smax": np.maximum, "umax": np.maximum}


def wrapped(numbers: Numbers, width: int) -> Numbers:
    """As signed numbers of so many bits; one bit as 0 or 1."""
    if width == 1:
        return numbers & 1
    if width >= 64:
        return numbers
    half = 1 << (width - 1)
    return ((numbers + half) & ((1 << width) - 1)) - half


def unsigned(numbers: Numbers, width: int) -> Numbers:
    return numbers if width >= 64 else numbers & ((1 << width) - 1)


def ordered(numbers: Numbers, width: int) -> Numbers:
    """So that signed comparisons order them as unsigned ones would."""
    return unsigned(numbers, width) if width < 64 else numbers ^ np.int64(-(2**63))


def _quotient(a: Numbers, b: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b == 0, 0, np.trunc(a / np.where(b == 0, 1, b))).astype(np.int64)


ARITHMETIC: dict[str, Callable[[Numbers, Numbers, int], Numbers]] = {
    "add": lambda a, b, width: a + b,
    "sub": lambda a, b, width: a - b,
    "mul": lambda a, b, width: a * b,
    "and": lambda a, b, width: a & b,
    "or": lambda a, b, width: a | b,
    "xor": lambda a, b, width: a ^ b,
    "shl": lambda a, b, width: a << b,
    "lshr": lambda a, b, width: unsigned(a, width) >> b,
    "ashr": lambda a, b, width: a >> b,
    "udiv": lambda a, b, width: _quotient(unsigned(a, width), unsigned(b, width)),
    "urem": lambda a, b, width: unsigned(a, width) - _quotient(unsigned(a, width), unsigned(b, width)) * b,
    "sdiv": lambda a, b, width: _quotient(a, b),
    "srem": lambda a, b, width: a - _quotient(a, b) * b,
}


def extreme(which: str, width: int) -> Callable[[Numbers, Numbers], Numbers]:
    """smin, smax, umin or umax of numbers of so many bits."""
    function = _EXTREMES[which]
    if which[0] == "s":
        return lambda a, b: function(a, b)
    return lambda a, b: wrapped(function(ordered(a, width), ordered(b, width)), width)


def reduction(opcode: str, width: int) -> Callable[..., Numbers]:
    """All operands of a symmetric operation, one after the other."""
    return lambda *operands: reduce(lambda a, b: wrapped(ARITHMETIC[opcode](a, b, width), width), operands)
