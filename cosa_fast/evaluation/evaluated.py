"""Which images the figures of an evaluation are of, and what must be said beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cosa_fast.errors import counted

# What a split is called that has no name: a part of the training split.
HELD_OUT = "held out"
COLUMNS = 100


@dataclass(frozen=True)
class Evaluated:
    """What every result says of its images.

    images: how many the figures are of. set_size: images of the whole set, where only some were evaluated. identity: of
    the whole set (datasets/identity.py). bias: what must be said beside the figures of a network that was chosen by
    its figures on such images.
    """

    images: int
    set_size: int | None = field(default=None, kw_only=True)
    identity: str = field(default="", kw_only=True, repr=False, compare=False)
    bias: str | None = field(default=None, kw_only=True, compare=False)

    @property
    def extent(self) -> str:
        """How many images were evaluated, in words."""
        return extent(self.images, self.set_size)

    def evaluated_on(self, split: str | None) -> dict[str, Any]:
        """The same for a file: images, of (of how many), split, identity."""
        of = self.images if self.set_size is None else self.set_size
        return {"images": self.images, "of": of, "split": split or HELD_OUT, "identity": self.identity}

    def below_table(self) -> list[str]:
        """Lines of at most 100 columns that stand below a table of figures."""
        return [f"evaluated: {self.extent}", *textwrap.wrap(self.bias or "", COLUMNS)]


def extent(images: int, set_size: int | None) -> str:
    """ "50 images", or "50 of 1449 images" where only a part was evaluated."""
    return counted(images, "image") if set_size in (None, images) else f"{images} of {counted(set_size, 'image')}"


def described(evaluated_on: Mapping[str, Any]) -> str:
    """ "50 of 1449 images of val", or "7 images held out of the training", of what `Evaluated.evaluated_on` gives; of
    less, what is known."""
    images, split = evaluated_on.get("images"), evaluated_on.get("split")
    number = extent(images, evaluated_on.get("of")) if isinstance(images, int) else "images"
    where = f"{HELD_OUT} of the training" if split == HELD_OUT else f"of {split}"
    return f"{number} {where}" if split else number
