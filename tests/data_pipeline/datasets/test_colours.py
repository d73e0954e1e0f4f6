"""prepare --masks-from-colours: masks that show classes as colours become masks of indices; the originals stay."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.masks import voc_palette
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError
from cosa_fast.prepare import main

VALUES = np.array([[0, 1, 2, 0, 0, 0]] * 3 + [[255] * 6], np.uint8)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write two images of the given classes, and masks by name; returns ROOT."""

    def make_it(masks: dict[str, Image.Image], *classes: str) -> Path:
        for id in "ab":
            Image.new("RGB", (6, 4)).save(tmp_path / f"{id}.jpg")
        (tmp_path / "labels.csv").write_text(f"a,{classes[0]}\nb,{classes[-1]}\n")
        (tmp_path / "classes.txt").write_text("\n".join(classes))
        (tmp_path / "masks").mkdir()
        for name, image in masks.items():
            image.save(tmp_path / "masks" / name)
        return tmp_path

    return make_it


def convert(root: Path) -> int:
    return main(["folder", "--root", str(root), "--masks-from-colours"])


def coloured(colours: np.ndarray) -> Image.Image:
    return Image.fromarray(colours.astype(np.uint8)[VALUES])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_voc_become_indices(
    make: Callable[..., Path], mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = coloured(voc_palette()).convert(mode, **({"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}))
    root = make({"a.png": image, "b.tif": image}, "cat", "dog")
    with pytest.raises(UserError, match="masks-from-colours"):
        open_dataset("folder", root, "train").check_masks()
    before = (root / "masks/b.tif").read_bytes()
    assert convert(root) == 0
    dataset = open_dataset("folder", root, "train")
    assert all(np.array_equal(dataset.mask(k), VALUES) for k in range(2))
    assert (root / "masks_colours/b.tif").read_bytes() == before
    assert f"{root / 'masks'}: 2 masks as indices; as they were: {root / 'masks_colours'}" in capsys.readouterr().out


def test_colours_may_be_named(make: Callable[..., Path]) -> None:
    colours = np.full((256, 3), 9)
    colours[:3] = (10, 20, 30), (255, 0, 0), (0, 255, 0)
    root = make({"a.png": coloured(colours)}, "traffic light", "dog")
    with pytest.raises(UserError, match=r"a\.png: the colour \(0, 255, 0\) \(3 pixels\) is that of no class; name the"):
        convert(root)
    (root / "colours.txt").write_text(
        "# as painted\nTraffic_Light 255 0 0\ndog: 0,255,0\nbackground 10 20 30\nignore 9 9 9\n"
    )
    assert convert(root) == 0
    assert np.array_equal(open_dataset("folder", root, "train").mask(0), VALUES)
    for line, message in (("dog 0 255", "is not NAME RED GREEN BLUE"), ("dgo 1 2 3", r"'dgo' is no class \(did you")):
        (root / "colours.txt").write_text(line)
        (root / "masks_colours").rename(root / "older")
        with pytest.raises(UserError, match=message):
            convert(root)
        (root / "older").rename(root / "masks_colours")


def test_white_is_the_one_class(make: Callable[..., Path]) -> None:
    white = Image.fromarray(np.where(VALUES == 1, 255, 0).astype(np.uint8))
    root = make({"a.png": white, "b.png": white}, "cat")
    with pytest.raises(UserError, match="hold 0 and 255 alone"):
        open_dataset("folder", root, "train").check_masks()
    assert convert(root) == 0
    assert np.array_equal(open_dataset("folder", root, "train").mask(0), VALUES == 1)


def test_indices_stay(make: Callable[..., Path]) -> None:
    root = make({"a.png": coloured(voc_palette()), "b.png": Image.fromarray(VALUES)}, "cat", "dog")
    assert convert(root) == 0
    dataset = open_dataset("folder", root, "train")
    assert all(np.array_equal(dataset.mask(k), VALUES) for k in range(2))


def test_what_cannot_be_converted_changes_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    root = make({"a.png": coloured(voc_palette()), "b.jpg": coloured(voc_palette())}, "cat", "dog")
    with pytest.raises(UserError, match=r"b\.jpg: JPEG changes the colours"):
        convert(root)
    (root / "masks/b.jpg").unlink()
    (root / "masks/a.tif").write_bytes((root / "masks/a.png").read_bytes())
    with pytest.raises(UserError, match="another mask of that name"):
        convert(root)
    (root / "masks/a.tif").unlink()
    (root / "masks_colours").mkdir()
    with pytest.raises(UserError, match="masks_colours: is there already"):
        convert(root)
    assert [path.name for path in (root / "masks").iterdir()] == ["a.png"]
    assert sorted(path.name for path in root.iterdir() if path.name.startswith(".")) == []
    (root / "masks/a.png").unlink()
    (root / "masks_colours").rmdir()
    with pytest.raises(UserError, match="no masks in it"):
        convert(root)
    (root / "masks").rmdir()
    with pytest.raises(UserError, match="no masks there"):
        convert(root)
    with pytest.raises(UserError, match="of a voc or folder set, not of coco"):
        main(["coco", "--root", str(tmp_path), "--masks-from-colours"])
