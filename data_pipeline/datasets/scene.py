"""Painting the demo's images: textured objects of five classes on scenes that partly give the class away.

Two of the classes nearly always come with a surrounding that is labelled nowhere ("stripes" lie on water, "checks"
stand on rails): the coexistence problem, where image labels alone cannot tell the object from its company. Everything
is a function of (seed, stream, index).
"""

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("stripes", "checks", "dots", "rings", "plasma")

_HUES = (0.02, 0.14, 0.85, 0.52, 0.33)  # the classes' colour tendency; jitter makes neighbours overlap
_HUE_JITTER = 0.06
_SURROUNDINGS = {0: "water", 1: "rails"}
_SURROUNDING_WITH_CLASS = 0.9
_SURROUNDING_WITHOUT = 0.08
_OBJECT_COUNTS = (1, 2, 2, 3)
_SAME_CLASS = 0.3  # probability that a further object repeats the first one's class
_RADIUS = (0.14, 0.30)  # of the image side
_MAX_OVERLAP = 0.15  # share of a new object that may cover earlier ones
_SUPERSAMPLE = 4


def paint(seed: int, stream: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (size, size, 3) uint8 and mask (size, size) uint8 in 0..len(CLASSES), at least one object."""
    key = np.array([seed, index], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))
    categories = _draw_categories(rng)
    canvas = _backdrop(rng, size)
    for category, name in _SURROUNDINGS.items():
        if rng.random() < (_SURROUNDING_WITH_CLASS if category in categories else _SURROUNDING_WITHOUT):
            texture = _TEXTURES[name](rng, size, _tint(rng, name))
            _blend(canvas, texture, _ground(rng, size))
    mask = np.zeros((size, size), dtype=np.uint8)
    for category in categories:
        coverage = _free_shape(rng, size, mask, low=category in _SURROUNDINGS)
        hue = _HUES[category] + rng.uniform(-_HUE_JITTER, _HUE_JITTER)
        _blend(canvas, _TEXTURES[CLASSES[category]](rng, size, hue), coverage)
        mask[coverage > 0.5] = category + 1
    canvas *= rng.uniform(0.85, 1.1)
    canvas += rng.normal(0, 0.02, canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), mask


def _draw_categories(rng: np.random.Generator) -> list[int]:
    categories = [int(rng.integers(len(CLASSES)))]
    for _ in range(rng.choice(_OBJECT_COUNTS) - 1):
        same = rng.random() < _SAME_CLASS
        categories.append(categories[0] if same else int(rng.integers(len(CLASSES))))
    return categories


def _blend(canvas: np.ndarray, texture: np.ndarray, coverage: np.ndarray) -> None:
    canvas += coverage[..., None] * (texture - canvas)


def _free_shape(rng: np.random.Generator, size: int, mask: np.ndarray, low: bool) -> np.ndarray:
    """The coverage in [0, 1] of a random shape that hides little of what is there; after some attempts the best one."""
    best, best_overlap = np.zeros(mask.shape), 2.0
    for _ in range(12):
        coverage = _shape(rng, size, low)
        inside = coverage > 0.5
        overlap = float((mask[inside] > 0).mean())
        if overlap < best_overlap:
            best, best_overlap = coverage, overlap
        if overlap <= _MAX_OVERLAP:
            break
    return best


def _shape(rng: np.random.Generator, size: int, low: bool) -> np.ndarray:
    """An ellipse, a rectangle or an irregular polygon, smooth at its edge. `low`: in the image's lower half, where the
    ground is.
    """
    radius = rng.uniform(*_RADIUS)
    stretch = rng.uniform(0.6, 1.0)
    turn = rng.uniform(0, 2 * np.pi)
    centre = np.array([rng.uniform(0.18, 0.82), rng.uniform(0.5, 0.82) if low else rng.uniform(0.18, 0.82)])
    match int(rng.integers(3)):
        case 0:
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            reach = np.ones(angles.size)
        case 1:
            angles = np.pi / 4 + np.arange(4) * np.pi / 2
            reach = np.ones(4)
        case _:
            corners = int(rng.integers(5, 9))
            angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
            reach = rng.uniform(0.6, 1.15, corners)
    points = radius * reach * np.stack([np.cos(angles), stretch * np.sin(angles)])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return _polygon((rotation @ points).T + centre, size)


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """The coverage of a surrounding: everything below an uneven horizon."""
    xs = np.linspace(0, 1, 9)
    heights = rng.uniform(0.38, 0.52) + rng.uniform(-0.05, 0.05, xs.size)
    return _polygon(np.concatenate([np.stack([xs, heights], 1), [[1, 1], [0, 1]]]), size)


def _polygon(points: np.ndarray, size: int) -> np.ndarray:
    large = Image.new("L", (size * _SUPERSAMPLE, size * _SUPERSAMPLE))
    ImageDraw.Draw(large).polygon([tuple(p) for p in points * size * _SUPERSAMPLE], fill=255)
    return np.asarray(large.reduce(_SUPERSAMPLE), dtype=np.float64) / 255


def _backdrop(rng: np.random.Generator, size: int) -> np.ndarray:
    """Meadow, sand or haze: a dull colour with soft blotches and a slow gradient."""
    hue, saturation, value = ((0.28, 0.35, 0.5), (0.11, 0.3, 0.75), (0.6, 0.15, 0.8))[int(rng.integers(3))]
    colour = _rgb(hue + rng.uniform(-0.04, 0.04), saturation, value * rng.uniform(0.8, 1.1))
    _, y = _grid(size)
    shade = 0.85 + 0.25 * _blotches(rng, size, 10) + 0.1 * rng.uniform(-1, 1) * y[..., None]
    return colour * shade * (0.95 + 0.1 * _blotches(rng, size, 40))


def _two_tone(rng: np.random.Generator, pattern: np.ndarray, hue: float) -> np.ndarray:
    """Mix a strong and a pale colour of one hue by a (size, size) pattern in [0, 1]."""
    strong = _rgb(hue, rng.uniform(0.6, 0.95), rng.uniform(0.55, 0.85))
    pale = _rgb(hue + rng.uniform(-0.05, 0.05), rng.uniform(0.1, 0.4), rng.uniform(0.8, 1.0))
    return strong + pattern[..., None] * (pale - strong)


def _stripes(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    u, _ = _turned(rng, size)
    return _two_tone(rng, _wave(u * rng.uniform(12, 18)), hue)


def _checks(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    u, v = _turned(rng, size)
    rate = rng.uniform(7, 11)
    return _two_tone(rng, 0.5 + 2 * (_wave(u * rate) - 0.5) * (_wave(v * rate) - 0.5), hue)


def _dots(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    u, v = _turned(rng, size)
    rate = rng.uniform(9, 13)
    distance = np.hypot((u * rate) % 1 - 0.5, (v * rate) % 1 - 0.5)
    return _two_tone(rng, ((0.36 - distance) * 12).clip(0, 1), hue)


def _rings(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    x, y = _grid(size)
    centre = rng.uniform(0.2, 0.8, 2)
    return _two_tone(rng, _wave(np.hypot(x - centre[0], y - centre[1]) * rng.uniform(12, 18)), hue)


def _plasma(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    return _two_tone(rng, (1.4 * _blotches(rng, size, 14)[..., 0] - 0.2).clip(0, 1), hue)


def _water(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    x, y = _grid(size)
    ripple = np.sin(
        2 * np.pi * (y * rng.uniform(9, 13) + 0.35 * np.sin(2 * np.pi * (x * rng.uniform(2, 4) + rng.random())))
    )
    return _rgb(hue, 0.55, 0.62) + 0.09 * ripple[..., None]


def _rails(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    """Gravel with sleepers and two rails that run towards the horizon."""
    x, y = _grid(size)
    depth = (y - 0.3).clip(0.05)
    texture = _rgb(hue, 0.12, 0.45) * (0.8 + 0.4 * _blotches(rng, size, 60))
    sleepers = ((2.2 / depth) % 1 < 0.4) & (np.abs(x - 0.5) < 0.62 * depth)
    rails = np.abs(np.abs(x - 0.5) - 0.45 * depth) < 0.035 * (0.3 + depth)
    texture[sleepers] = _rgb(0.07, 0.4, 0.3)
    texture[rails] = _rgb(0.6, 0.05, 0.75)
    return texture


_TEXTURES: dict[str, Callable[[np.random.Generator, int, float], np.ndarray]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "plasma": _plasma,
    "water": _water,
    "rails": _rails,
}


def _tint(rng: np.random.Generator, surrounding: str) -> float:
    return {"water": 0.57, "rails": 0.08}[surrounding] + rng.uniform(-0.03, 0.03)


def _wave(phase: np.ndarray) -> np.ndarray:
    """A square wave of period 1 with soft edges, in [0, 1]."""
    return (0.5 + 1.5 * np.sin(2 * np.pi * phase)).clip(0, 1)


def _turned(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _grid(size)
    turn, shift = rng.uniform(0, np.pi), rng.random(2)
    return x * np.cos(turn) + y * np.sin(turn) + shift[0], y * np.cos(turn) - x * np.sin(turn) + shift[1]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size) + 0.5) / size
    return np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))


def _blotches(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in [0, 1], (size, size, 1), with about `cells` blotches along a side."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)[..., None] / 255


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(1, saturation), min(1, value)))
