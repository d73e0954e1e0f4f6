"""Reading image files: everything a disk can hold becomes an upright RGB image or one clear UserError."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from cosa_fast.errors import UserError, first_line

# PIL goes by a file's content, whatever its name, and knows fifty formats: an EPS named x.jpg would be handed to
# Ghostscript. These are the formats of `IMAGE_SUFFIXES`; a JPEG with several pictures counts as JPEG.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

_REMEDY = "replace the file or take it off the list"
_JPEG_END = b"\xff\xd9"
_ORIENTATION_TAG = 0x0112
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Cameras and scanners store so many bits in files of 16.
_DEPTHS = (8, 10, 12, 14, 16)
_PNG = b"\x89PNG\r\n\x1a\n"
# Texts and colour profiles, which nothing here uses; PIL refuses a file in which one of them is large.
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_XMP = b"XML:com.adobe.xmp\0\0"  # uncompressed: it may hold the orientation

# What PIL warns of is either harmless or an error below. Once for the process: images are read by many threads, and
# warnings.catch_warnings in one of them changes the filters of all.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: Path, data: bytes | None = None) -> Image.Image:
    """The fully decoded image, mode RGB, turned upright by its EXIF orientation. `data`: the content of the file, where
    it has been read already (from the file or from a pack).

    Grayscale, palette, CMYK and 16-bit images are converted; transparent pixels are shown on white; of several frames
    the first is taken. Of 16-bit grayscale the depth is the smallest of 8, 10, 12, 14, 16 bits that holds the largest
    value, and the upper 8 bits of that depth are kept. An EXIF block that cannot be read turns nothing.
    UserError naming the file: missing, not an image of one of `FORMATS`, corrupt, truncated, floating point, 16 bits
    per colour of which 14 at most are in use, or more pixels than PIL's decompression-bomb limit.
    """
    with opened(path, data) as image:
        deep = raw_mode(image) in ("RGB;16B", "RGBA;16B", "RGB;16L", "RGBA;16L")
        image.load()
        shown = _to_rgb(image, path)
        if deep:
            _require_deep(shown, path)
        turn = _UPRIGHT.get(_orientation(image) or 1)
        return shown if turn is None else shown.transpose(turn)


def upright_size(path: Path, data: bytes | None = None) -> tuple[int, int]:
    """(height, width) of the upright image. Of a JPEG file nothing is read but its head. UserError as in `read_image`,
    as far as the head shows it.
    """
    with opened(path, data) as image:
        turned = _orientation(image) in _TRANSPOSED_ORIENTATIONS
        if turned and image.format == "TIFF":
            image.load()  # PIL turns these itself, its size before and its orientation after
            turned = _orientation(image) in _TRANSPOSED_ORIENTATIONS
        width, height = image.size
        return (width, height) if turned else (height, width)


def plain_jpeg_size(path: Path, data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file that every decoder reads as PIL does: gray or YCbCr, not to be turned, not cut
    short. None for anything else. UserError as in `read_image`, as far as the header shows it.
    """
    with opened(path, data) as image:
        plain = (
            image.format == "JPEG"
            and image.mode in ("L", "RGB")
            and image.info.get("adobe_transform", 1) != 0
            and _orientation(image) == 1
            and data.endswith(_JPEG_END)
        )
        return (image.height, image.width) if plain else None


def lossless(image: Image.Image) -> bytes:
    """An RGB image as a BMP file, from which decoding gets the same pixels."""
    stream = BytesIO()
    image.save(stream, "BMP")
    return stream.getvalue()


def raw_mode(image: Image.Image) -> str:
    """How the pixels of an image that is not decoded yet lie in its file, in PIL's words: "RGB;16B", "L;4"."""
    tile = getattr(image, "tile", None)  # of images that come from files
    if not tile:
        return ""
    arguments = tile[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def read_bytes(path: Path) -> bytes:
    """The file as it is. UserError naming it if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None


@contextmanager
def opened(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """PIL's lazy image; whatever goes wrong inside the block becomes a UserError that names the file."""
    try:
        with (
            open(path, "rb") if data is None else BytesIO(data) as stream,
            Image.open(_plain(stream), formats=FORMATS) as image,
        ):
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError  # PIL itself only warns up to twice as many
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down or take it off the list"
        ) from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image ({', '.join(FORMATS)}); {_REMEDY}") from None
    except Exception as error:  # decoders fail with OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {_REMEDY}") from None


def _missing(path: Path) -> str:
    return f"{path}: no such file; restore it or take it off the list"


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UserError(f"{path}: a floating-point image has no defined brightness range; convert it to 8 bits")
    if image.mode.startswith("I"):
        return _from_16_bits(image, path).convert("RGB")
    if image.has_transparency_data:
        # Colours under full transparency are arbitrary; show what a viewer shows.
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image, path: Path) -> Image.Image:
    values = np.asarray(image)
    largest = int(values.max())
    if values.min() < 0 or largest > 0xFFFF:
        raise UserError(f"{path}: a 32-bit image has no defined brightness range; convert it to 8 bits")
    depth = next(depth for depth in _DEPTHS if largest < 1 << depth)
    return Image.fromarray((values >> (depth - 8)).astype(np.uint8))


def _require_deep(image: Image.Image, path: Path) -> None:
    """UserError for a colour image of 16 bits per channel that uses the lower 14 at most: PIL has kept the upper 8."""
    brightest = int(np.asarray(image).max())
    if 0 < brightest < 64:
        raise UserError(
            f"{path}: of its 16 bits per colour only {8 + brightest.bit_length()} are in use, and the upper 8 are what "
            "is read; save it with 8 bits per colour"
        )


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 where there is none; None where the block is broken."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # PIL's parser fails in many ways; the pixels are none the worse
        return None


def _plain(stream: IO[bytes]) -> IO[bytes]:
    """The same file; a PNG without its texts and colour profiles."""
    head = stream.read(len(_PNG))
    stream.seek(0)
    return BytesIO(_without_texts(stream.read())) if head == _PNG else stream


def _without_texts(png: bytes) -> bytes:
    kept, at = [png[: len(_PNG)]], len(_PNG)
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        kind, content = png[at + 4 : at + 8], png[at + 8 : end - 4]
        small_xmp = kind == b"iTXt" and content.startswith(_XMP) and len(content) < 1 << 16
        if kind not in _TEXTS or small_xmp:
            kept.append(png[at:end])
        at = end
    return b"".join([*kept, png[at:]])
