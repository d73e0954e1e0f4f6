"""What losses are divided by, where one call sees only part of a batch: other ranks, or later calls, have the rest."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.kernels.sums import Whole


class Normalisers:
    """Normalisers of whole batches, by the name of the loss: sums over the ranks and, where a rank computes its images
    in several parts, over these. Such parts are counted first (`counting`)."""

    def __init__(self, ranks: Ranks = ALONE, parts: int = 1) -> None:
        self._ranks = ranks
        self._parts = parts
        self._sums: dict[str, Tensor] = {}
        self._counting = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, losses only add their normalisers up; from then on they are divided by these sums."""
        self._sums, self._counting = {}, True
        yield
        self._counting = False
        for total in self._sums.values():
            self._ranks.sum_(total)

    def of(self, name: str) -> Whole | None:
        """For the argument `whole` of a loss; None where its images are the whole batch."""
        if self._ranks.size == 1 and self._parts == 1:
            return None

        def whole(own: Tensor) -> Tensor:
            if self._counting:
                self._sums[name] = self._sums[name] + own if name in self._sums else own
                return own
            return self._sums[name] if self._parts > 1 else self._ranks.sum_(own)

        return whole
