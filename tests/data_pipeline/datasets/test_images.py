"""Every kind of image file is converted as documented or refused in one line that names it."""

import io
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES, opened, read_image, upright_size
from cosa_fast.data_pipeline.datasets.masks import read_mask
from cosa_fast.errors import UserError

RED = (200, 30, 20)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "RGBA", "LA", "P"])
def test_other_colour_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    image = read_image(saved(Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode), tmp_path / f"x.{suffix}"))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(image, int) - 255).max() <= 2


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    image = read_image(saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), tmp_path / "x.jpg", quality=95))
    assert np.abs(np.asarray(image, int) - RED).max() <= 6


def test_transparent_palette_pixels_show_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    shown = read_image(saved(image, tmp_path / "x.png", transparency=0))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 1)) == RED


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    values = np.array([[0, 0x80FF], [0xFFFF, 0x0100]], dtype=np.uint16)
    image = read_image(saved(Image.fromarray(values), tmp_path / "x.png"))
    assert np.asarray(image)[..., 0].tolist() == [[0, 0x80], [0xFF, 1]]


def test_values_without_a_brightness_range_are_refused(tmp_path: Path) -> None:
    assert "floating-point" in refusal(saved(Image.new("F", (2, 2), 0.5), tmp_path / "float.tif"))
    assert "32-bit" in refusal(saved(Image.fromarray(np.full((2, 2), 70000, np.int32)), tmp_path / "long.tif"))


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (7, 3)), (6, (3, 0)), (8, (0, 7))])
def test_exif_rotation_is_applied(orientation: int, corner: tuple[int, int], tmp_path: Path) -> None:
    stored = Image.new("RGB", (8, 4), (0, 0, 0))
    stored.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / "x.png", exif=exif)
    image = read_image(path)
    assert image.getpixel(corner) == (255, 255, 255)
    assert upright_size(path) == (image.height, image.width)


def test_a_side_of_one_or_of_8000_pixels_is_read(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 8000), (8000, 2)):
        assert read_image(saved(Image.new("RGB", size), tmp_path / "x.png")).size == size


def test_damaged_files_are_refused_with_their_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    whole = buffer.getvalue()
    for name, content in {
        "truncated.jpg": whole[: len(whole) // 2],
        "header.jpg": whole[:200],
        "empty.jpg": b"",
        "text.jpg": b"<html>404</html>",
    }.items():
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)
    assert "no such file" in refusal(tmp_path / "absent.jpg")
    refusal(tmp_path)


def test_other_formats_are_refused_whatever_their_name(tmp_path: Path) -> None:
    """PIL goes by the content: an EPS would start Ghostscript, others reach decoders that nobody needs here."""
    started = []
    sys.addaudithook(lambda event, _: started.append(event) if event in ("subprocess.Popen", "os.system") else None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"
    (tmp_path / "photo.jpg").write_bytes(eps)
    with Image.open(tmp_path / "photo.jpg") as image:
        assert image.format == "EPS", "PIL by itself would take it"
    assert "not an image (JPEG, PNG, " in refusal(tmp_path / "photo.jpg")
    for format in ("PPM", "TGA", "PCX", "ICO", "PDF", "SGI", "DDS", "IM"):
        Image.new("RGB", (16, 16)).save(tmp_path / "x.png", format)
        refusal(tmp_path / "x.png")
        with pytest.raises(UserError, match=r"x\.png"):
            upright_size(tmp_path / "x.png")
    assert not started


def test_every_suffix_of_an_image_has_its_format(tmp_path: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        assert read_image(saved(Image.new("RGB", (16, 16)), tmp_path / f"x{suffix}")).size == (16, 16)
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 0))]
    path = saved(frames[0], tmp_path / "two.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(read_image(path), int) - RED).max() <= 6


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for size in ((10000, 9000), (60000, 60000)):
        buffer = io.BytesIO()
        Image.new("1", (8, 8)).save(buffer, "PNG")
        content = bytearray(buffer.getvalue())
        content[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
        (tmp_path / "bomb.png").write_bytes(bytes(content))
        assert "more than" in refusal(tmp_path / "bomb.png")


def test_reading_leaves_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    """In threads that overlap, one would else put back what another had set."""
    path = saved(Image.new("RGB", (2, 2)), tmp_path / "x.png")
    before = list(warnings.filters)
    first, second = opened(path), opened(path)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert list(warnings.filters) == before


def test_masks_are_palette_indices_and_anything_else_is_refused(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 255]], np.uint8)
    mask = Image.fromarray(values)
    mask.putpalette([(7 * k) % 256 for k in range(768)])
    path = saved(mask, tmp_path / "m.png")
    assert Image.open(path).mode == "P"
    assert np.array_equal(read_mask(path, 2), values)
    with pytest.raises(UserError, match=r"m\.png: value 2 is neither a class \(0\.\.1\)"):
        read_mask(path, 1)
    with pytest.raises(UserError, match="mode RGB"):
        read_mask(saved(Image.new("RGB", (2, 2)), tmp_path / "colours.png"), 2)
