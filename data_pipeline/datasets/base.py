"""What every dataset offers: images, image-level labels, and masks where there are some."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.images import read_bytes, read_image, upright_size
from cosa_fast.data_pipeline.datasets.labels import ImageNames, LabelTable
from cosa_fast.data_pipeline.datasets.masks import (
    ignore_index,
    mask_type,
    read_mask,
    require_sound,
    require_usable,
    values_in,
)
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.errors import UserError


class ImageDataset:
    """Images by index, in the order of the split's list. Opening one reads no image and no mask.

    classes: the C foreground names; class c has index c + 1 in masks, where 0 is background and 255 ignore (for more
    than 254 classes, in int16: -1). ids: one per image. has_masks: whether ground truth is at hand. labels: None where
    the set was opened without. masks: mask file per image; None where there are none. masks_absent: why mask files that
    are there are those of no image; empty otherwise. label_source: where the labels come from, in words.
    label_places: what was read of labels, files and folders, in the order in which it counts. label_origins: per image
    which of them its label is from; None where it has none, or not known.
    known: finds the images of the whole set, those of other splits included, by the names that files give them.
    notes: what the user is to know of how the files were found.
    """

    def __init__(
        self,
        classes: Sequence[str],
        ids: Sequence[str],
        images: Sequence[Path],
        labels: LabelTable | None = None,
        masks: Sequence[Path] | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.ids = tuple(ids)
        self.has_masks = masks is not None
        self._images = tuple(images)
        self._labels = labels
        self._masks = masks
        self._pack: Pack | None = None
        self.masks_absent = ""
        self.notes: tuple[str, ...] = ()
        self.label_source = ""
        self.label_places: tuple[Path, ...] = ()
        self.label_origins: tuple[Path | None, ...] = (None,) * len(self.ids)
        self.known = ImageNames()

    def __len__(self) -> int:
        return len(self.ids)

    def read_from(self, pack: Pack) -> None:
        """Take the images from `pack`, which holds every id, from now on."""
        self._pack = pack
        self._images = tuple(pack.image_path(id) for id in self.ids)

    def image_path(self, index: int) -> Path:
        """The image's file; PACK/NAME of an image in a pack."""
        return self._images[index]

    def encoded(self, index: int) -> bytes:
        """The image's file as it is. UserError naming the file if it cannot be read."""
        return read_bytes(self._images[index]) if self._pack is None else self._pack.read(self.ids[index])

    def image(self, index: int) -> Image.Image:
        """The decoded image: RGB, upright by EXIF. UserError naming the file if it is unreadable, truncated or too
        large.
        """
        return read_image(self._images[index], self.encoded(index))

    def labels(self, index: int) -> np.ndarray:
        """(C,) float32 multi-hot. UserError if the image has no label."""
        if self._labels is None or not self.has_label(index):
            raise UserError(
                f"{self._images[index]}: no image label; give data.labels or build a label file with: "
                "python -m cosa_fast.prepare"
            )
        return self._labels.present[index].astype(np.float32)

    def has_label(self, index: int) -> bool:
        """Whether `labels` gives any."""
        return self._labels is not None and bool(self._labels.labelled[index])

    def label_table(self) -> LabelTable | None:
        """The labels of all images; None where the set was opened without."""
        return self._labels

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the upright image, from the head of its file; of an image in a pack, the whole is read.
        UserError as in `image`, as far as the head shows it.
        """
        path = self._images[index]
        return upright_size(path) if self._pack is None else upright_size(path, self._pack.read(self.ids[index]))

    def has_mask(self, index: int) -> bool:
        """Whether ground truth of this image is at hand; no mask is opened."""
        return self.has_masks and (self._masks is None or self._masks[index].is_file())

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W) uint8 in {0..C, 255} (int16 in {-1..C} for more than 254 classes), as large as the upright image.
        size: that image's (height, width); None looks it up in its file. UserError if there is no mask, it is
        unreadable or of another size.
        """
        mask = self._read_mask(index)
        height, width = size or self.size(index)
        if mask.shape != (height, width):
            raise UserError(
                f"{self._mask_name(index)}: the mask is {mask.shape[1]}x{mask.shape[0]} but its image "
                f"{self._images[index]} is {width}x{height} upright; make the mask fit the image as displayed"
            )
        return mask

    def truth(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """The mask of an image of that (height, width); in a set without masks all ignored: nothing is known."""
        if self.has_masks:
            return self.mask(index, size)
        return np.full(size, ignore_index(len(self.classes)), mask_type(len(self.classes)))

    def check_masks(self, indices: Sequence[int] | None = None, threads: int = 1) -> list[str]:
        """What is to be known of the masks at `indices` (None: all) before they are used, in words. `threads` of them
        are read at a time, once each, and of their images no more than the size.

        UserError: masks that cannot be used, with how many there are; or masks that cannot be the truth.
        """
        if not self.has_masks:
            return []

        def look(index: int) -> tuple[np.ndarray, str]:
            try:
                return values_in(self.mask(index)), ""
            except UserError as error:
                return np.zeros(0, np.uint8), str(error)

        with ThreadPoolExecutor(max(1, threads), "cosa_fast masks") as pool:
            looks = list(pool.map(look, range(len(self)) if indices is None else indices))
        require_usable([problem for _, problem in looks if problem], len(looks))
        require_sound((shown for shown, _ in looks), self._masks_place())
        return []

    def fingerprint(self) -> str:
        """sha256 in hex over classes, ids and labels."""
        digest = hashlib.sha256("\0".join((*self.classes, "", *self.ids)).encode())
        if self._labels is not None:
            digest.update(self._labels.present.tobytes())
            digest.update(self._labels.labelled.tobytes())
        return digest.hexdigest()

    def _read_mask(self, index: int) -> np.ndarray:
        if self._masks is None:
            raise UserError(f"{self._images[index]}: this dataset has no masks; add them or choose a split that has")
        return read_mask(self._masks[index], len(self.classes))

    def _mask_name(self, index: int) -> str:
        return str(self._masks[index]) if self._masks is not None else "mask"

    def _masks_place(self) -> str:
        return str(self._masks[0].parent) if self._masks else "masks"
