"""Augmentation parameters (METHOD section 2): which pixels go where, how blurred, which colour operation. Pixels are
not touched here.

Every draw is a pure function of (seed, sample position) through the counter-based generator Philox. So any position can
be computed alone: resuming means setting one integer, and neither workers nor ranks nor the pixel library change the
result. Only raw uniforms are taken from the generator: numpy promises the same stream of them in every version, which
it does not for `integers` or `permutation`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

COLOUR_OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "solarize",
    "colour",
    "contrast",
    "brightness",
    "sharpness",
    "posterize",
)
MAGNITUDES = 9  # magnitudes are 1..9

# Philox counters of the independent streams under one key.
_AUGMENT_STREAM = 0
_ORDER_STREAM = 1


@dataclass(frozen=True)
class AugmentConfig:
    """The settings of the views; the configuration's data section inherits them.

    crop_size: side of the square crop. scale_range: factors of the native size. flip_probability, blur_probability: in
    [0, 1]. blur_radius: range of the Gaussian radius in pixels. strong: False makes the strong view equal the weak one.
    padding: of the colour that normalisation makes 0 (mean), or of pixel value 0 (black), as in the official release of
    CoSA. mean, std: per channel, for images in [0, 1].
    Raises ValueError for values outside their range.
    """

    crop_size: int = 448
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip_probability: float = 0.5
    blur_probability: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)
    strong: bool = True
    padding: Literal["mean", "black"] = "mean"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def padding_values(self) -> tuple[float, ...]:
        """What padding is after normalisation, per channel."""
        pairs = zip(self.mean, self.std, strict=True)
        return tuple(-mean / std if self.padding == "black" else 0.0 for mean, std in pairs)

    def __post_init__(self) -> None:
        (smallest, largest), (sharpest, softest) = self.scale_range, self.blur_radius
        if self.padding not in ("mean", "black"):
            raise ValueError(f"padding is {self.padding}; wanted mean or black")
        # Written so that NaN fails.
        for name, inside, wanted in (
            ("crop_size", 16 <= self.crop_size <= 16384, "at least 16, at most 16384"),
            ("scale_range", 0.01 <= smallest <= largest <= 16, "0.01 <= low <= high <= 16"),
            ("flip_probability", 0 <= self.flip_probability <= 1, "a value in [0, 1]"),
            ("blur_probability", 0 <= self.blur_probability <= 1, "a value in [0, 1]"),
            ("blur_radius", 0 <= sharpest <= softest <= 1000, "0 <= low <= high <= 1000"),
            ("mean", all(abs(value) <= 1e3 for value in self.mean), "values between -1000 and 1000"),
            ("std", all(1e-3 <= v <= 1e3 for v in self.std), "at least 0.001 and at most 1000 for every channel"),
        ):
            if not inside:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted {wanted}")


class Box(NamedTuple):
    """A rectangle in whole pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class AugmentParameters:
    """One sample's geometry and colours.

    The chain: scale the image to `scaled_size` (height, width); cut `region` out of it; mirror that if `flip`; blur
    with `blur_radius` (0: none); for the strong view apply `operation` with `magnitude`; place the result at `box` of a
    zero crop. `region` and `box` have the same height and width; outside `box` the crop is padding.
    """

    scaled_size: tuple[int, int]
    flip: bool
    region: Box
    box: Box
    blur_radius: float
    operation: str
    magnitude: int


def draw(seed: int, position: int, image_size: tuple[int, int], config: AugmentConfig) -> AugmentParameters:
    """The parameters of the sample at `position` for an image of (height, width) `image_size`.

    Each parameter has a uniform of its own, so changing one range leaves the other draws as they were. ValueError for
    a negative seed or position.
    """
    u = _generator(seed, position, _AUGMENT_STREAM).random(8)
    scale = _between(u[0], config.scale_range)
    scaled = (max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale)))
    region_top, box_top, height = _place(u[2], scaled[0], config.crop_size)
    region_left, box_left, width = _place(u[3], scaled[1], config.crop_size)
    return AugmentParameters(
        scaled_size=scaled,
        flip=bool(u[1] < config.flip_probability),
        region=Box(region_top, region_left, height, width),
        box=Box(box_top, box_left, height, width),
        blur_radius=_between(u[5], config.blur_radius) if u[4] < config.blur_probability else 0.0,
        operation=COLOUR_OPERATIONS[int(u[6] * len(COLOUR_OPERATIONS))] if config.strong else "identity",
        magnitude=1 + int(u[7] * MAGNITUDES),
    )


def image_index(seed: int, position: int, length: int) -> int:
    """Which of `length` images the sample at `position` shows: each exactly once per epoch (`length` positions),
    in a new order every epoch. ValueError for a negative seed or position, or length < 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}; wanted at least 1")
    epoch, offset = divmod(position, length)
    return int(_permutation(seed, epoch, length)[offset])


def _place(uniform: float, scaled: int, crop: int) -> tuple[int, int, int]:
    """Along one axis: (start in the scaled image, start in the crop, length). A long axis is cropped at random, a short
    one padded at random.
    """
    slack = abs(scaled - crop)
    offset = int(uniform * (slack + 1))
    return (offset, 0, crop) if scaled >= crop else (0, offset, scaled)


def _between(uniform: float, bounds: tuple[float, float]) -> float:
    return float(bounds[0] + uniform * (bounds[1] - bounds[0]))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.argsort(_generator(seed, epoch, _ORDER_STREAM).random(length), kind="stable")


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    if seed < 0 or number < 0:
        raise ValueError(f"seed and position are {seed} and {number}; wanted both >= 0")
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))
