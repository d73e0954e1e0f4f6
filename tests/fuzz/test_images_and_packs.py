"""Images and packs of any content."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.oracle import damaged, fuzzed, held
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cosa_fast.data_pipeline.datasets.images import plain_jpeg_size, read_image, upright_size
from cosa_fast.data_pipeline.datasets.masks import read_mask
from cosa_fast.data_pipeline.datasets.packed import Pack, write_pack


def encoded(format: str, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 200, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, format, **options)
    return stream.getvalue()


def with_orientation() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


WHOLE = [
    encoded("JPEG"),
    encoded("JPEG", "CMYK"),
    encoded("JPEG", "L", progressive=True),
    with_orientation(),
    encoded("PNG"),
    encoded("PNG", "P", transparency=3),
    encoded("PNG", "LA"),
    encoded("PNG", "I;16"),
    encoded("GIF", "P"),
    encoded("BMP"),
    encoded("TIFF"),
    encoded("TIFF", compression="tiff_lzw"),
    encoded("TIFF", compression="jpeg"),
    encoded("TIFF", "F"),
    encoded("WEBP"),
    encoded("WEBP", "RGBA", lossless=True),
    encoded("PPM"),
    encoded("EPS"),
    encoded("ICO"),
    encoded("PDF"),
]


@fuzzed(250)
@given(st.sampled_from(WHOLE).flatmap(damaged) | st.binary(max_size=80))
def test_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    size = held(tmp_path, lambda: upright_size(path), "x.jpg")
    plain = held(tmp_path, lambda: plain_jpeg_size(path, content), "x.jpg")
    image = held(tmp_path, lambda: read_image(path), "x.jpg")
    mask = held(tmp_path, lambda: read_mask(path, 20), "x.jpg")
    assert mask is None or (mask.dtype == np.uint8 and ((mask <= 20) | (mask == 255)).all())
    if image is not None:
        assert image.mode == "RGB"
        assert size is not None, "a head that reads with the whole reads alone"
        assert plain in (None, (image.height, image.width))


def tar(format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data in (("a.jpg", b"one"), ("ü" * 120 + ".png", b"two" * 300), ("c.jpg", b"")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


TARS = [tar(tarfile.PAX_FORMAT), tar(tarfile.GNU_FORMAT)]
FIELDS = [(0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (345, 500)]


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """A tar with fields of its headers changed, and the headers' checksums made right again."""
    content = bytearray(draw(st.sampled_from(TARS)))
    for _ in range(draw(st.integers(1, 3))):
        block = 512 * draw(st.integers(0, len(content) // 512 - 1))
        begin, end = draw(st.sampled_from(FIELDS))
        sizes = st.sampled_from([b"77777777777\0", b"00000000000\0", b"\x80" + b"\0" * 10 + b"\x10", b"\xff" * 12])
        value = draw(
            sizes | st.sampled_from(b"0123457xgLKSDVNM").map(lambda kind: bytes([kind])) | st.binary(max_size=12)
        )
        content[block + begin : block + end] = value.ljust(end - begin, b"\0")[: end - begin]
        header = content[block : block + 512]
        header[148:156] = b" " * 8
        content[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    return bytes(content)


@fuzzed(250)
@given(st.one_of(forged(), st.sampled_from(TARS).flatmap(damaged), st.binary(max_size=80)))
def test_packs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    pack = held(tmp_path, lambda: Pack(path), "x.tar")
    if pack is not None:
        ids = [Path(name).stem for name in pack.names]
        held(tmp_path, lambda: [pack.read(id) for id in ids], "x.tar")


@fuzzed(40)
@given(st.dictionaries(st.text(st.characters(exclude_characters="/.\0", codec="utf-8"), min_size=1), st.binary()))
def test_whatever_is_packed_is_read_again(tmp_path: Path, images: dict[str, bytes]) -> None:
    path = tmp_path / "x.tar"
    held(tmp_path, lambda: write_pack(path, ((f"{id}.jpg", data) for id, data in images.items())), "x.tar")
    pack = held(tmp_path, lambda: Pack(path), "x.tar")
    assert pack is not None
    assert {id: pack.read(id) for id in images} == images
