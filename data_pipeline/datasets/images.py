"""Reading image and mask files: everything a disk can hold becomes an upright RGB image, a class-index mask, or one
clear UserError.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cosa_fast.errors import UserError, first_line

# PIL goes by a file's content, whatever its name, and knows fifty formats: an EPS named x.jpg would be handed to
# Ghostscript. These are the formats of `IMAGE_SUFFIXES`; a JPEG with several pictures counts as JPEG.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IGNORE_INDEX = 255

_REMEDY = "replace the file or take it off the list"
_ORIENTATION_TAG = 0x0112
_JPEG_END = b"\xff\xd9"
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)

# What PIL warns of is either harmless or an error below. Once for the process: images are read by many threads, and
# warnings.catch_warnings in one of them changes the filters of all.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: Path, data: bytes | None = None) -> Image.Image:
    """The fully decoded image, mode RGB, turned upright by its EXIF orientation. `data`: the content of the file, where
    it has been read already (from the file or from a pack).

    Grayscale, palette, CMYK and 16-bit images are converted (16 bits keep the high byte); transparent pixels are shown
    on white; of several frames the first is taken.
    UserError naming the file: missing, not an image of one of `FORMATS`, corrupt, truncated, floating point, or more
    pixels than PIL's decompression-bomb limit.
    """
    with opened(path, data) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, path)


def upright_size(path: Path, data: bytes | None = None) -> tuple[int, int]:
    """(height, width) of the upright image. Of a JPEG file nothing is read but its head. UserError as in `read_image`,
    as far as the head shows it.
    """
    with opened(path, data) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION_TAG) in _TRANSPOSED_ORIENTATIONS
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
            and image.getexif().get(_ORIENTATION_TAG, 1) == 1
            and data.endswith(_JPEG_END)
        )
        return (image.height, image.width) if plain else None


def lossless(image: Image.Image) -> bytes:
    """An RGB image as a BMP file, from which decoding gets the same pixels."""
    stream = BytesIO()
    image.save(stream, "BMP")
    return stream.getvalue()


def read_mask(path: Path, num_classes: int) -> np.ndarray:
    """(H, W) uint8 class indices in {0..num_classes, 255} from a palette or 8-bit grayscale file, as stored (masks are
    never rotated).

    UserError naming the file: unreadable, another mode, or a value that is no class.
    """
    with opened(path) as image:
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{path}: a mask is a palette or 8-bit grayscale image whose values are class indices, "
                f"this one has mode {image.mode}; convert it"
            )
        mask = np.array(image, dtype=np.uint8)
    unknown = mask[(mask > num_classes) & (mask != IGNORE_INDEX)]
    if unknown.size:
        raise UserError(
            f"{path}: value {unknown[0]} is neither a class (0..{num_classes}) nor 255; "
            "check the mask or the list of classes"
        )
    return mask


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
            Image.open(stream, formats=FORMATS) as image,
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
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UserError(f"{path}: a 32-bit image has no defined brightness range; convert it to 8 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))
