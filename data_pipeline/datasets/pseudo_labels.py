"""Training images with pseudo-labels in place of masks, as `predict --what cpl` writes them."""

import hashlib
from pathlib import Path

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.images import read_bytes
from cosa_fast.data_pipeline.datasets.masks import find_masks
from cosa_fast.data_pipeline.datasets.subset import Subset
from cosa_fast.errors import UserError

# So many files tell whether they are those of an earlier start: on a network disk each takes its time.
SAMPLE = 200


class PseudoLabelled(Subset):
    """The images of `whole`, whose masks are FOLDER/masks/ID.png, or FOLDER/ID.png.

    UserError: no such folder, or an image without a pseudo-label; the message says how to write those of `split`.
    """

    def __init__(self, whole: ImageDataset, folder: Path, split: str) -> None:
        super().__init__(whole, range(len(whole)))
        if not folder.is_dir():
            raise UserError(f"data.pseudo_labels = {folder}: no such folder; {_remedy(folder, split)}")
        found = find_masks([folder / "masks", folder], self.ids).files
        missing = [id for id, path in zip(self.ids, found or (), strict=False) if not path.is_file()]
        if found is None or missing:
            missing = missing or list(self.ids)
            raise UserError(
                f"data.pseudo_labels = {folder}: {len(missing)} of {len(self)} training images have none, first "
                f"{missing[0]}; {_remedy(folder, split)}"
            )
        self._masks, self.has_masks = tuple(found), True

    has_mask = ImageDataset.has_mask
    mask = ImageDataset.mask
    check_masks = ImageDataset.check_masks

    def fingerprint(self) -> str:
        """sha256 in hex over that of the images' set and up to SAMPLE pseudo-labels, evenly spread over it."""
        digest = hashlib.sha256(self._whole.fingerprint().encode())
        for path in (self._masks or ())[:: len(self) // SAMPLE + 1]:
            digest.update(read_bytes(path))
        return digest.hexdigest()


def _remedy(folder: Path, split: str) -> str:
    return f"write them with: python -m cosa_fast.predict CHECKPOINT --split {split} --what cpl -o {folder}"
