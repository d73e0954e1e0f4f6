"""Where the labels of a split come from, image by image: the first source that has one for it. So no source hides
another: a label file of three images leaves the others theirs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosa_fast.data_pipeline.datasets.labels import (
    ImageNames,
    Labels,
    LabelTable,
    Say,
    encode_labels,
    read_labels,
)
from cosa_fast.data_pipeline.datasets.layout import Layout
from cosa_fast.errors import UserError, first_line


@dataclass(frozen=True)
class Sources:
    """Labels of a split, by source. places: what was read, in the order in which it counts. origins: per image the
    place that its label is from; None where it has none. notes: which sources cannot be used, and why.
    """

    places: tuple[Path, ...]
    origins: tuple[Path | None, ...]
    notes: tuple[str, ...]
    _labels: dict[Path, Labels]

    def names(self) -> list[str]:
        """The class names of all sources, sorted."""
        return sorted({name for labels in self._labels.values() for row in labels.values() for name in row})

    def table(self, ids: Sequence[str], classes: Sequence[str]) -> LabelTable:
        """The multi-hot table of the images. UserError as in `encode_labels`."""
        present = np.zeros((len(ids), len(classes)), dtype=np.uint8)
        for place, labels in self._labels.items():
            rows = [row for row, origin in enumerate(self.origins) if origin == place]
            present[rows] = encode_labels(labels, [ids[row] for row in rows], classes, str(place)).present
        return LabelTable(present, np.array([origin is not None for origin in self.origins], dtype=bool))

    def in_words(self) -> str:
        """What has labels for images of the split, as `in_words` has it; where nothing has, what was read."""
        return in_words(self.places, self.origins) or " and ".join(map(str, self.places))


def read_sources(layout: Layout, given: Path | None, images: ImageNames, say: Say | None) -> Sources:
    """Read the given file alone, else what `layout` names, until every image has a label; all label files where only
    they name the classes. UserErrors as in `read_labels` and `encode_labels` of the first source that is there;
    another that cannot be used is noted.
    """
    read: dict[Path, Labels] = {}
    origins: dict[str, Path] = {}
    notes: list[str] = []
    for place, labels_of in _readers(layout, given, images, say):
        missing = [id for id in layout.ids if id not in origins]
        if read and not missing and layout.classes is not None:
            break
        try:
            labels = labels_of(missing)
            found = [id for id in missing if id in labels]
            if read and layout.classes is not None:
                encode_labels(labels, found, layout.classes, str(place))
        except UserError as error:
            if not read:
                raise
            notes.append(f"{place} is not used: {first_line(error)}")
            continue
        read[place] = labels
        origins.update(dict.fromkeys(found, place))
    return Sources(tuple(read), tuple(map(origins.get, layout.ids)), tuple(notes), read)


def in_words(places: Sequence[Path | str], origins: Sequence[Path | str | None]) -> str:
    """ "/set/labels.json (3) and cls_labels_onehot.npy (1997)": from where how many images have their labels; without
    numbers where it is one place, and nothing where it is none. places: in the order in which they count."""
    counts = Counter(origins)
    used = [place for place in places if counts[place]]
    if len(used) < 2:
        return "".join(map(str, used))
    names = Counter(Path(place).name for place in used)
    shown = []
    for number, place in enumerate(used):
        # The first is shown in full, and so is a place whose name alone does not tell which it is.
        name = Path(place).name
        tells = number > 0 and name and names[name] == 1
        shown.append(f"{name if tells else place} ({counts[place]})")
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _readers(
    layout: Layout, given: Path | None, images: ImageNames, say: Say | None
) -> Iterator[tuple[Path, Callable[[Sequence[str]], Labels]]]:
    """(place, how to read the labels of some images) of every source that is there, in the order in which it counts."""
    for path in (given,) if given is not None else layout.label_files:
        if path is given or path.is_file():
            yield path, _of_file(path, layout, images, say)
    if given is None and layout.annotations is not None and layout.annotations[0].exists():
        yield layout.annotations


def _of_file(path: Path, layout: Layout, images: ImageNames, say: Say | None) -> Callable[[Sequence[str]], Labels]:
    return lambda some: read_labels(path, layout.classes, images, say)
