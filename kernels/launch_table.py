"""Launch configurations: one row per kernel, architecture and size. Nothing is tuned at start-up.

The size of a row is what its kernel file names: classes, channels, or elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

UNLIMITED = 2**62


@dataclass(frozen=True)
class Configuration:
    """Block sizes (constexpr arguments of the kernel by name), warps of a program and pipeline stages."""

    num_warps: int = 4
    num_stages: int = 2
    block_items: tuple[tuple[str, int], ...] = ()

    @property
    def blocks(self) -> Mapping[str, int]:
        """Block sizes by the kernel's argument name."""
        return MappingProxyType(dict(self.block_items))


@dataclass(frozen=True)
class Row:
    """Serves sizes up to `up_to` on `architectures` (empty: all)."""

    configuration: Configuration
    up_to: int = UNLIMITED
    architectures: frozenset[str] = field(default_factory=frozenset)


def row(up_to: int = UNLIMITED, on: str = "", *, warps: int = 4, stages: int = 2, **blocks: int) -> Row:
    """A line of the table: sizes up to `up_to`, `on` architectures separated by spaces, blocks by name."""
    return Row(Configuration(warps, stages, tuple(blocks.items())), up_to, frozenset(on.split()))


# The first row that fits counts.
TABLE: dict[str, list[Row]] = {
    "perplexity": [row(BLOCK=1024)],
}


def configuration(kernel: str, size: int, architecture: str) -> Configuration:
    """The first row of `kernel` that serves this size and architecture."""
    for line in TABLE[kernel]:
        if size <= line.up_to and (not line.architectures or architecture in line.architectures):
            return line.configuration
    raise KeyError(f"{kernel}: no launch configuration for size {size} on {architecture}")


def candidates(kernel: str) -> list[Configuration]:
    """Every distinct configuration of `kernel`, in the table's order."""
    return list(dict.fromkeys(line.configuration for line in TABLE[kernel]))
