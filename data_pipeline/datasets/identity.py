"""Which images a set holds, wherever its folder lies: digests of their names and of what is in their files."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.errors import UserError

# Of so many images the content counts: enough to tell sets apart whose files happen to have the same names.
LOOKED_INTO = 16


def identity(dataset: ImageDataset) -> str:
    """sha256 in hex of the images' names and of what is in a few of them. A copy of a set and a link to it have the
    same."""
    return digest((*dataset.ids, *contents(dataset, LOOKED_INTO)))


def contents(dataset: ImageDataset, count: int) -> Iterator[str]:
    """sha256 in hex of up to `count` images' files, evenly spread over the set; one that cannot be read is left out:
    whoever needs it says so."""
    for index in range(0, len(dataset), len(dataset) // count + 1):
        with suppress(UserError):
            yield hashlib.sha256(dataset.encoded(index)).hexdigest()


def digest(items: Iterable[str]) -> str:
    """sha256 in hex of several texts."""
    return hashlib.sha256("\0".join(items).encode("utf-8", "surrogateescape")).hexdigest()
