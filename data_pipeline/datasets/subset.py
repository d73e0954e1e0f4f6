"""Part of a data set: the images held out of the training, or those that have a mask."""

import hashlib
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import LabelTable, Say
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.errors import UserError, counted

HELD_OUT = 0.1


class Subset(ImageDataset):
    """The images of `whole` at `positions`, in that order."""

    def __init__(self, whole: ImageDataset, positions: Sequence[int]) -> None:
        paths = [whole.image_path(position) for position in positions]
        super().__init__(whole.classes, [whole.ids[position] for position in positions], paths)
        self.has_masks = any(whole.has_mask(position) for position in positions)
        self.masks_absent = whole.masks_absent
        self.label_source = whole.label_source
        self._whole = whole
        self._positions = tuple(positions)

    def read_from(self, pack: Pack) -> None:
        self._whole.read_from(pack)

    def image_path(self, index: int) -> Path:
        return self._whole.image_path(self._positions[index])

    def encoded(self, index: int) -> bytes:
        return self._whole.encoded(self._positions[index])

    def image(self, index: int) -> Image.Image:
        return self._whole.image(self._positions[index])

    def labels(self, index: int) -> np.ndarray:
        return self._whole.labels(self._positions[index])

    def label_table(self) -> LabelTable | None:
        table, chosen = self._whole.label_table(), list(self._positions)
        return None if table is None else LabelTable(table.present[chosen], table.labelled[chosen])

    def size(self, index: int) -> tuple[int, int]:
        return self._whole.size(self._positions[index])

    def has_mask(self, index: int) -> bool:
        return self._whole.has_mask(self._positions[index])

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        return self._whole.mask(self._positions[index], size)

    def check_masks(self, indices: Sequence[int] | None = None, threads: int = 1) -> list[str]:
        chosen = self._positions if indices is None else [self._positions[index] for index in indices]
        return self._whole.check_masks(chosen, threads)

    def fingerprint(self) -> str:
        whole = self._whole.fingerprint()
        return hashlib.sha256("\0".join((whole, *map(str, self._positions))).encode()).hexdigest()


def hold_out(dataset: ImageDataset, share: float = HELD_OUT, say: Say | None = None) -> tuple[Subset, Subset]:
    """(training part, held-out part). Which image is held out depends on the hash of its id alone, so other images
    change nothing; at least one is in either part. The exception is a class that would be on no training image: of its
    images the one with the highest hash stays in the training, and say is told. UserError for fewer than two images.
    """
    if len(set(dataset.ids)) < 2:
        raise UserError("one image cannot be trained on and held out; add images, or name a data.val_split")
    places = {id: int(hashlib.sha256(id.encode()).hexdigest()[:8], 16) / 2**32 for id in dataset.ids}
    order = sorted(places, key=lambda id: (places[id], id))
    held = {id for id in order[:-1] if places[id] < share} or {order[0]}
    kept = _needed(dataset, held, order) if len(held) > 1 else {}
    if kept and say is not None:
        names = ", ".join(f"{id} ({', '.join(classes)})" for id, classes in list(kept.items())[:3])
        names += ", ..." * (len(kept) > 3)
        say(f"{counted(len(kept), 'image')} kept in the training, the only ones of a class: {names}")
    held -= kept.keys()
    positions = range(len(dataset))
    return (
        Subset(dataset, [position for position in positions if dataset.ids[position] not in held]),
        Subset(dataset, [position for position in positions if dataset.ids[position] in held]),
    )


def _needed(dataset: ImageDataset, held: Set[str], order: Sequence[str]) -> dict[str, list[str]]:
    """Of the held images those without which a class would be on no training image, with these classes; never all of
    them.
    """
    table = dataset.label_table()
    if table is None:
        return {}
    trained = np.array([id not in held for id in dataset.ids])
    lacking = set(np.flatnonzero(table.present.any(0) & ~table.present[trained].any(0)).tolist())
    rows = dict(zip(dataset.ids, table.present, strict=True))
    kept: dict[str, list[str]] = {}
    for id in reversed([id for id in order if id in held]):
        found = [column for column in np.flatnonzero(rows[id]).tolist() if column in lacking]
        if found and len(kept) < len(held) - 1:
            kept[id] = [dataset.classes[column] for column in found]
            lacking -= set(found)
    return kept


def masked_part(dataset: ImageDataset) -> ImageDataset:
    """The images that have a mask: the set itself where all of them, or none, have one."""
    positions = [position for position in range(len(dataset)) if dataset.has_mask(position)]
    return dataset if len(positions) in (0, len(dataset)) else Subset(dataset, positions)
