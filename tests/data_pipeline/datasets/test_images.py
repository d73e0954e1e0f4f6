"""Every kind of image file is converted as documented or refused in one line that names it."""

import io
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

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


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [1, 8, 9, 10, 12, 14, 15, 16])
def test_fewer_than_sixteen_bits_are_stretched(bits: int, suffix: str, tmp_path: Path) -> None:
    """To the upper 8 of the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value."""
    depth = next(depth for depth in (8, 10, 12, 14, 16) if bits <= depth)
    largest = (1 << bits) - 1
    values = np.array([[0, largest // 2, largest]], dtype=np.uint16)
    image = read_image(saved(Image.fromarray(values), tmp_path / f"x.{suffix}"))
    assert np.asarray(image)[0, :, 0].tolist() == (values[0] >> (depth - 8)).tolist()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(tmp_path: Path, *chunks: bytes) -> Path:
    """A red PNG with these chunks before its pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), RED).save(stream, "PNG")
    content = stream.getvalue()
    (tmp_path / "x.png").write_bytes(content[:33] + b"".join(chunks) + content[33:])
    return tmp_path / "x.png"


LARGE = b"x" * (3 << 20)
EXTRAS = {
    "text": [chunk(b"tEXt", b"Comment\0" + LARGE)],
    "compressed text": [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE))],
    "international text": [chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LARGE))],
    "many texts": [chunk(b"tEXt", b"Comment\0" + LARGE[: 900 << 10])] * 80,
    "large profile": [chunk(b"iCCP", b"profile\0\0" + zlib.compress(LARGE))],
    "broken profile": [chunk(b"iCCP", b"profile\0\0nothing")],
    "broken text": [chunk(b"zTXt", b"Comment\0\0nothing"), chunk(b"iTXt", b"\0")],
    "wrong checksum": [chunk(b"tEXt", b"Comment\0x")[:-4] + b"0000"],
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_texts_and_profiles_do_not_matter(extra: str, tmp_path: Path) -> None:
    path = png_with(tmp_path, *EXTRAS[extra])
    assert read_image(path).getpixel((1, 1)) == RED
    assert upright_size(path) == (4, 6)


def test_the_orientation_in_a_png_s_xmp_is_kept(tmp_path: Path) -> None:
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    path = png_with(tmp_path, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    assert (read_image(path).size, upright_size(path)) == ((4, 6), (6, 4))


def test_sixteen_bit_colours_of_few_bits_are_refused(tmp_path: Path) -> None:
    """PIL keeps the high byte of each, so that little would be left of them."""

    def colours(value: int) -> Path:
        row = b"\0" + struct.pack(">H", value) * 18
        head = struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0)
        parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(row * 4)), chunk(b"IEND", b""))
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        return tmp_path / "x.png"

    assert read_image(colours(0x8000)).getpixel((0, 0)) == (128, 128, 128)
    assert read_image(colours(0)).getpixel((0, 0)) == (0, 0, 0)
    assert "of its 16 bits per colour only 12 are in use" in refusal(colours(4095))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0nothing",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    ],
    ids=["no TIFF", "offset beyond the end", "cut off", "a text", "99"],
)
def test_broken_exif_turns_nothing(exif: bytes, suffix: str, tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (6, 4), RED), tmp_path / f"x.{suffix}", exif=exif)
    assert (read_image(path).size, upright_size(path)) == ((6, 4), (4, 6))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pil(orientation: int, suffix: str, tmp_path: Path) -> None:
    stored = Image.effect_noise((8, 4), 90).convert("RGB").resize((48, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / f"x.{suffix}", exif=exif, quality=95)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(expected))
    assert upright_size(path) == (expected.height, expected.width)


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
