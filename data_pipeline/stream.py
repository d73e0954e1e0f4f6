"""What both pipelines share: which sample positions a batch holds, which image stands at a position, and what happens
where that image cannot be read.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar

from cosa_fast.data_pipeline.views.parameters import image_index
from cosa_fast.errors import UserError, counted

Unreadable = Literal["stop", "skip"]
T = TypeVar("T")


@dataclass(frozen=True)
class Positions:
    """The sample positions of one rank's batches, without end: batch k holds `length` positions, from start + k·step
    on.
    """

    start: int
    length: int
    step: int

    @classmethod
    def of(cls, batch_size: int, start: int, rank: int, ranks: int) -> "Positions":
        """Of each batch of `batch_size` positions from `start` on, the rank-th of `ranks` equal parts. ValueError for
        a batch that cannot be shared out evenly, an impossible rank, or a negative start.
        """
        if batch_size < 1 or batch_size % ranks:
            raise ValueError(f"batch_size is {batch_size}; wanted a positive multiple of ranks, {ranks}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}; wanted 0..{ranks - 1}")
        at_least(0, start=start)
        return cls(start + rank * batch_size // ranks, batch_size // ranks, batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in count(self.start, self.step):
            yield list(range(first, first + self.length))

    def after(self, batches: int) -> "Positions":
        """What remains when so many batches have been used."""
        return Positions(self.start + batches * self.step, self.length, self.step)


def at_least(low: int, **values: int) -> None:
    """ValueError naming the first of `values` below `low`."""
    for name, value in values.items():
        if value < low:
            raise ValueError(f"{name} is {value}; wanted at least {low}")


def read_at(
    seed: int, position: int, length: int, unreadable: Unreadable, read: Callable[[int], T]
) -> tuple[int, T, list[str]]:
    """(index, read(index), problems) of the image that the sample at `position` shows, in a set of `length` images.

    Where `read` raises UserError, "stop" lets it through; "skip" adds its text to the problems and takes the next
    readable image in the order of the set, so the choice depends on the files alone. UserError if none is readable.
    """
    first = image_index(seed, position, length)
    problems: list[str] = []
    for offset in range(length):
        index = (first + offset) % length
        try:
            return index, read(index), problems
        except UserError as error:
            if unreadable == "stop":
                raise
            problems.append(str(error))
    raise UserError(f"none of {counted(length, 'image')} can be read; the first: {problems[0]}")


class SkipNotes:
    """Says on stderr which files are skipped, each once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, problems: Sequence[str]) -> None:
        """Name those of `problems` that are new."""
        for problem in problems:
            if problem not in self._said:
                self._said.add(problem)
                print(f"skipped: {problem}", file=sys.stderr, flush=True)
