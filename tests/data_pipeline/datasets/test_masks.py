"""Masks: every file that holds class indices is read, everything else refused before a run starts, and so are sets
that cannot be the truth."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast import prepare
from cosa_fast.config.parsing import config_from_dict
from cosa_fast.data_pipeline.datasets.masks import read_mask, voc_palette
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError
from cosa_fast.run.data import open_datasets

TILE = Image.new("RGB", (6, 4), (90, 90, 90))
VALUES = np.array([[0, 1, 2, 0, 0, 0]] * 4, np.uint8)


def grayscale_png(values: np.ndarray, bits: int) -> bytes:
    """A grayscale PNG of so many bits per pixel, which PIL cannot write."""
    rows = [b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes() for row in values]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"".join(rows))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def paletted(values: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(values)
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images with a label file, three of them for evaluation; no masks yet."""
    for id in "abcdef":
        TILE.save(tmp_path / f"{id}.jpg")
    (tmp_path / "labels.csv").write_text("".join(f"{id},{'cat' if id in 'abd' else 'dog'}\n" for id in "abcdef"))
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "val.txt").write_text("d\ne\nf\n")
    (tmp_path / "masks").mkdir()
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Callable[[], list[str]]:
    """Open the sets of a run as training does; returns what is said."""

    def call() -> list[str]:
        data = {"format": "folder", "root": str(folder), "train_split": "train", "val_split": "val", "workers": 2}
        said: list[str] = []
        open_datasets(config_from_dict({"data": data}, where="here"), said.append)
        return said

    return call


def refusal(start: Callable[[], list[str]]) -> str:
    with pytest.raises(UserError) as caught:
        start()
    return str(caught.value)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grayscale_of_any_depth_holds_indices(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(grayscale_png(VALUES, bits))
    assert np.array_equal(read_mask(path, 2), VALUES)


def test_one_bit_and_sixteen_bits_hold_indices(tmp_path: Path) -> None:
    Image.fromarray(VALUES == 1).save(tmp_path / "one.png")
    assert np.array_equal(read_mask(tmp_path / "one.png", 2), (VALUES == 1).astype(np.uint8))
    wide = VALUES.astype(np.uint16)
    wide[0, :2] = (255, 65535)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    mask = read_mask(tmp_path / "wide.png", 2)
    assert (mask.dtype, mask[0, :2].tolist(), mask[1].tolist()) == (np.uint8, [255, 255], VALUES[1].tolist())


def test_more_than_254_classes_have_wide_masks(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 300, 65535]], np.uint16)).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", 300)
    assert (mask.dtype, mask.tolist()) == (np.int16, [[0, 255, 300, -1]])
    with pytest.raises(UserError, match="value 300 is neither a class"):
        read_mask(tmp_path / "m.png", 299)
    Image.fromarray(np.array([[0, 7, 255]], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", 300).tolist() == [[0, 7, -1]], "a byte has no room for a class 255"


@pytest.mark.parametrize("name", ["val/d.png", "d.png", "d.PNG", "d.tif", "d.bmp", "d.gif"])
def test_masks_of_other_suffixes_are_found(folder: Path, name: str, start: Callable[[], list[str]]) -> None:
    (folder / "masks" / name).parent.mkdir(exist_ok=True)
    Image.fromarray(VALUES).save(folder / "masks" / name)
    dataset = open_dataset("folder", folder, "val")
    assert np.array_equal(dataset.mask(0), VALUES)
    assert "val: masks of 1 of 3 images; only these are evaluated" in start()


def test_a_jpeg_is_no_mask(folder: Path, start: Callable[[], list[str]]) -> None:
    Image.fromarray(VALUES).save(folder / "masks/d.jpg")
    assert "d.jpg: JPEG changes the values of a mask; save masks as PNG" in refusal(start)


def test_masks_of_other_names_are_explained(folder: Path, start: Callable[[], list[str]]) -> None:
    assert "no masks, so no mIoU" in start()[-1], "an empty folder is none"
    for id in "def":
        Image.fromarray(VALUES).save(folder / "masks" / f"{id}_mask.png")
    message = refusal(start)
    assert "masks: 3 files, first d_mask.png" in message
    assert "none is named after an image of the evaluation, first d; name masks ID.png" in message


def test_masks_of_other_images_are_no_mistake(folder: Path, start: Callable[[], list[str]]) -> None:
    Image.fromarray(VALUES).save(folder / "masks/a.png")
    assert "no masks, so no mIoU" in start()[-1]


def test_prepare_points_at_masks_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(VALUES * 0).save(folder / "masks/d.png")
    arguments = ["folder", "--root", str(folder), "--split", "val", "--workers", "1"]
    assert prepare.main(arguments) == 0
    assert "warning: " in (out := capsys.readouterr().out)
    assert "no mask has a pixel of any class" in out
    (folder / "masks/d.png").rename(folder / "masks/d_mask.png")
    assert prepare.main(arguments) == 0
    assert "none is named after an image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: Image.new("RGB", (6, 4), (128, 0, 0)).save(path),
            "shows colours (mode RGB); write indices with:",
        ),
        (lambda path: Image.new("RGBA", (6, 4)).save(path), "shows colours (mode RGBA)"),
        (lambda path: Image.fromarray(VALUES[:3]).save(path), "the mask is 6x3 but its image"),
        (lambda path: Image.fromarray(VALUES + 1).save(path), "value 3 is neither a class (0..2) nor 255"),
        (lambda path: path.write_bytes(b"nothing"), "not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read"),
    ],
    ids=["colours", "transparent", "size", "index", "no image", "truncated"],
)
def test_an_unusable_mask_is_named_before_training(
    folder: Path, start: Callable[[], list[str]], spoil: Callable, message: str
) -> None:
    for id in "def":
        Image.fromarray(VALUES).save(folder / "masks" / f"{id}.png")
    assert start()[-1] == "val: 3 images with masks"
    spoil(folder / "masks/e.png")
    assert f"{folder / 'masks/e.png'}: " in refusal(start)
    assert message in refusal(start)
    spoil(folder / "masks/f.png")
    assert "(2 of 3 masks cannot be used)" in refusal(start)


def test_held_out_masks_are_checked_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    for id in "abcdef":
        Image.fromarray(VALUES).save(folder / "masks" / f"{id}.png")
    (folder / "train.txt").unlink()
    (folder / "val.txt").unlink()
    data = {"format": "folder", "root": str(folder), "train_split": "train", "val_split": None}
    training_set, held = open_datasets(config_from_dict({"data": data}, where="here"))
    (folder / "masks" / f"{training_set.ids[0]}.png").write_bytes(b"nothing")
    open_datasets(config_from_dict({"data": data}, where="here"))
    (folder / "masks" / f"{held.ids[0]}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"{held.ids[0]}\.png: not an image"):
        open_datasets(config_from_dict({"data": data}, where="here"))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((VALUES == 1) * 255, "hold 0 and 255 alone"),
        (VALUES * 0, "no mask has a pixel of any class"),
        (VALUES * 0 + 255, "the masks hold 255 alone, which means: not known; give"),
    ],
)
def test_sets_without_foreground_are_refused(
    folder: Path, start: Callable[[], list[str]], mask: np.ndarray, message: str
) -> None:
    for id in "def":
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{id}.png")
    assert message in refusal(start)
    Image.fromarray(VALUES).save(folder / "masks/f.png")
    start()


def test_a_palette_that_was_sorted_anew_is_refused(folder: Path, start: Callable[[], list[str]]) -> None:
    """Image programs write only the colours that occur, in an order of their own."""
    (folder / "classes.txt").write_text("\n".join(f"class {k}" for k in range(20)) + "\ncat\ndog\n")
    for id in "def":
        Image.fromarray(VALUES).save(folder / "masks" / f"{id}.png")
    colours = voc_palette()
    paletted(VALUES, colours).save(folder / "masks/e.png")
    start()
    paletted(VALUES, colours // 2 + 7).save(folder / "masks/e.png")
    start()
    paletted(VALUES, colours[[0, 8, 12, *range(3, 256)]]).save(folder / "masks/e.png")
    message = refusal(start)
    assert "e.png: index 1 has the colour (64, 0, 0) of VOC's class 8: its palette was sorted anew" in message
    assert "prepare --masks-from-colours" in message
    gray = np.repeat(np.arange(256)[:, None], 3, axis=1)
    paletted(np.where(VALUES == 1, 20, 0).astype(np.uint8), gray).save(folder / "masks/e.png")
    start()
