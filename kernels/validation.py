"""Argument checks of the public kernels: a ValueError that names the argument, what came and what is wanted.

Only what is known on the host is checked: values inside tensors are never read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

# Beside the background 0 and the ignore index 255 there is room for so many classes in uint8 categories.
MAX_UINT8_CLASSES = 254


def fail(name: str, came: object, wanted: str) -> ValueError:
    """The error for argument `name`."""
    return ValueError(f"{name}: got {came}, want {wanted}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise fail(name, repr(value), " or ".join(map(repr, choices)))


def check_number(
    name: str, value: object, low: float, high: float = float("inf"), *, open_low: bool = False, open_high: bool = False
) -> None:
    """A finite number between low and high, which belong to the range unless open."""
    wanted = f"a finite number in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fail(name, repr(value), wanted)
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (isfinite(value) and above and below):
        raise fail(name, value, wanted)


def check_threshold(threshold: object, shapes: Sequence[tuple[int, ...]] = ((),)) -> None:
    """ξ: a number strictly inside (0, 1), or a floating-point tensor of one of the shapes, whose value is not read."""
    if not isinstance(threshold, Tensor):
        check_number("threshold", threshold, 0, 1, open_low=True, open_high=True)
    elif not threshold.is_floating_point() or tuple(threshold.shape) not in shapes:
        wanted = "a floating-point tensor of shape " + " or ".join(map(str, shapes))
        raise fail("threshold", _describe(threshold), wanted)


def check_perplexity(alpha: object, beta: object) -> None:
    """λα strictly inside (0, 1), as −log(λα·d) must stay positive; λβ not negative."""
    check_number("alpha", alpha, 0, 1, open_low=True, open_high=True)
    check_number("beta", beta, 0)


def check_pair(name: str, value: object, low: float, high: float) -> None:
    """(a, b) with low ≤ a ≤ b ≤ high."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise fail(name, repr(value), "two numbers (low, high)")
    for number in value:
        check_number(name, number, low, high)
    if value[0] > value[1]:
        raise fail(name, repr(value), "low <= high")


def check_size(size: object) -> tuple[int, int]:
    """(H, W), both positive."""
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    raise fail("size", repr(size), "two positive integers (H, W)")


class TensorChecks:
    """Shapes by letters that must mean the same length in every argument, and one device for all of them."""

    def __init__(self, **lengths: int) -> None:
        self._lengths = lengths
        self._device: torch.device | None = None

    def __getitem__(self, letter: str) -> int:
        """The length that a letter stands for."""
        return self._lengths[letter]

    def with_pairs(self) -> TensorChecks:
        """The same with 2B known (images and their flips) and K = C + 1."""
        return TensorChecks(**{"2B": 2 * self["B"], "K": self["C"] + 1, **self._lengths})

    def check(self, name: str, value: object, shape: str, kind: str = "floating") -> None:
        """`shape` as in "B C h w" (a number is itself); kind: floating, float32, bfloat16, bool, integer, number."""
        wanted = f"a {kind} tensor of shape {self._wanted(shape)}"
        if not isinstance(value, Tensor):
            raise fail(name, type(value).__name__, wanted)
        if not _is_kind(value, kind):
            raise fail(name, f"dtype {value.dtype}", wanted)
        axes = shape.split()
        if value.ndim != len(axes):
            raise fail(name, f"shape {tuple(value.shape)}", wanted)
        for axis, length in zip(axes, value.shape, strict=True):
            expected = int(axis) if axis.isdigit() else self._lengths.setdefault(axis, length)
            if length != expected:
                raise fail(name, f"shape {tuple(value.shape)}", wanted)
        if value.numel() == 0:
            raise fail(name, f"shape {tuple(value.shape)}", f"{wanted}, not empty")
        self._device = value.device if self._device is None else self._device
        if value.device != self._device:
            raise fail(name, f"device {value.device}", f"the device of the other arguments, {self._device}")

    def check_optional(self, name: str, value: object, shape: str, kind: str) -> None:
        """The same for an argument that may be None."""
        if value is not None:
            self.check(name, value, shape, kind)

    def _wanted(self, shape: str) -> str:
        known = [f"{axis} = {self._lengths[axis]}" for axis in shape.split() if axis in self._lengths]
        return f"({', '.join(shape.split())})" + (f" with {', '.join(known)}" if known else "")


def check_scales(name: str, maps: object, checks: TensorChecks, channels: str) -> None:
    """Maps of several scales: a non-empty list of (2B, channels, h_s, w_s) tensors."""
    if not isinstance(maps, (list, tuple)) or not maps:
        came = "an empty list" if isinstance(maps, (list, tuple)) else type(maps).__name__
        raise fail(name, came, f"a list of (2B, {channels}, h_s, w_s) tensors, one per scale")
    for index, scale in enumerate(maps):
        checks.check(f"{name}[{index}]", scale, f"2B {channels} h{index} w{index}")


def check_category_type(category: Tensor, classes: int) -> None:
    """More than 254 classes need wider categories, or 255 would be a class and the ignore index at once."""
    if category.dtype == torch.uint8 and classes > MAX_UINT8_CLASSES:
        raise fail("category", f"uint8 for {classes} classes", f"int16 for more than {MAX_UINT8_CLASSES} classes")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _is_kind(tensor: Tensor, kind: str) -> bool:
    if kind == "floating":
        return tensor.is_floating_point()
    if kind == "integer":
        return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    if kind == "number":
        return not tensor.is_complex()
    return tensor.dtype == getattr(torch, kind)
