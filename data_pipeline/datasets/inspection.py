"""Looking at every image of a set once: which files are bad, and what its masks show."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.images import IGNORE_INDEX
from cosa_fast.data_pipeline.datasets.labels import Labels
from cosa_fast.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One image: its id, the classes that its mask shows (empty if masks were not asked for), and the problem with its
    files, if any.
    """

    id: str
    names: tuple[str, ...]
    problem: str | None


def inspect(dataset: ImageDataset, *, masks: bool = False, workers: int = 0) -> Iterator[Finding]:
    """Decode every image fully, and with `masks` its mask too, in the order of the set. Bad files are findings, not
    exceptions.
    """
    loader = DataLoader(
        _Inspected(dataset, masks),
        batch_size=8,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    for findings in loader:
        yield from findings


def labels_of(findings: list[Finding]) -> Labels:
    """The label file's content as the masks show it."""
    return {finding.id: finding.names for finding in findings}


class _Inspected(Dataset[Finding]):
    def __init__(self, dataset: ImageDataset, masks: bool) -> None:
        self.dataset, self.masks = dataset, masks

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Finding:
        id = self.dataset.ids[index]
        try:
            self.dataset.image(index)
            names = self._names(index) if self.masks else ()
        except UserError as error:
            return Finding(id, (), str(error))
        return Finding(id, names, None)

    def _names(self, index: int) -> tuple[str, ...]:
        values = np.unique(self.dataset.mask(index))
        return tuple(self.dataset.classes[value - 1] for value in values if value not in (0, IGNORE_INDEX))
