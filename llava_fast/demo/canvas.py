"""Canvases of handwritten digits: 0 to 5 real scans laid out on a plain or photographic background.

The scans are the 1797 images of 8x8 pixels that scikit-learn ships (`sklearn.datasets.load_digits`, the
UCI "Optical Recognition of Handwritten Digits" test set); the photographs are its `china.jpg` and
`flower.jpg`. Canvases have sides of a few hundred pixels and many aspect ratios. Their digits are so small that an
AnyRes model needs the tiles: they are too small in the downscaled base view.

Training composes a canvas per sample, so composing takes only 1 to 2 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from llava_fast.errors import MissingPackageError

Box = tuple[int, int, int, int]

MAX_DIGITS = 5
NONE_SHARE = 0.05  # share of canvases without a digit if no count is given
GLYPH = 48  # side of an upsampled scan: 8 source pixels, 4 pixels each, and a margin of 8 on each side
GLYPH_CELL = 32
NOISE_SIDE = 512
VISIBLE = 64  # opacity (of 255) from which a pixel counts as ink
WHITE = (255, 255, 255)
MIN_CONTRAST = 90  # least luminance difference between the ink and any background pixel, before blur


@dataclass(frozen=True)
class Canvas:
    """One composed image and its digits.

    image: uint8 [height, width, 3], RGB. digits: values in reading order (lines top to bottom, each left to
    right). boxes: (left, top, right, bottom) of each digit's ink in pixels, right and bottom exclusive.
    """

    image: np.ndarray
    digits: list[int]
    boxes: list[Box]


def split_scans(seed: int = 0, held_out: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Split the 1797 scans into disjoint training and held-out index arrays (int64), stratified by digit."""
    _, targets = _scans()
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(targets == digit))
        cut = round(len(members) * held_out)
        test.append(members[:cut])
        train.append(members[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def compose(
    rng: np.random.Generator,
    scans: np.ndarray,
    count: int | None = None,
    long_side: tuple[int, int] = (90, 400),
    size: tuple[float, float] = (0.16, 0.24),
    aspect: float | None = None,
    plain: bool = False,
) -> Canvas:
    """Compose one canvas from the scans whose indices are given.

    count: number of digits, 0 to 5; None draws 0 with probability 0.05 and otherwise 1 to 5 uniformly.
    long_side: range of the longer side in pixels, drawn log-uniformly. size: range of a digit's cell as a
    share of the longer side, limited by the shorter side on long canvases. aspect: width over height; None draws
    nearly square, wide and tall canvases. plain: white ink on black, for the start of training.

    Reading order is unambiguous: digits of a line overlap vertically, lines do not, and the first digit is
    the topmost-leftmost one. Raises ValueError if count is out of range or `scans` is empty.
    """
    if count is None:
        count = 0 if rng.random() < NONE_SHARE else int(rng.integers(1, MAX_DIGITS + 1))
    if not 0 <= count <= MAX_DIGITS:
        raise ValueError(f"count is {count}; a canvas holds 0 to {MAX_DIGITS} digits")
    if len(scans) == 0:
        raise ValueError("scans is empty: pass the indices of the scans to draw from, see split_scans()")

    width, height = _sides(rng, long_side, aspect)
    cells = _layout(rng, width, height, count, size)
    ink, background = (WHITE, np.zeros((height, width, 3), np.uint8)) if plain else _colours(rng, width, height)
    glyphs, targets = _glyphs()

    canvas = Image.fromarray(background)
    curve = _stroke_curve(rng)
    tilt = rng.uniform(-6, 6)
    digits, boxes = [], []
    for x, y, cell in cells:
        index = int(scans[rng.integers(len(scans))])
        mask = curve[np.asarray(_render(rng, glyphs[index], cell, tilt))]
        left, top = round(x - mask.shape[1] / 2), round(y - mask.shape[0] / 2)
        canvas.paste(ink, (left, top), Image.fromarray(mask))
        rows, columns = np.flatnonzero(mask.max(1) >= VISIBLE), np.flatnonzero(mask.max(0) >= VISIBLE)
        digits.append(int(targets[index]))
        boxes.append((left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1))
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.8) * max(width, height) / 200))
    return Canvas(_add_noise(rng, np.asarray(canvas)), digits, boxes)


def _sides(rng: np.random.Generator, long_side: tuple[int, int], aspect: float | None) -> tuple[int, int]:
    """Draw (width, height). Without an aspect, half of the canvases are nearly square, the others wide or tall."""
    if aspect is None:
        aspect = math.exp(rng.uniform(0, math.log(1.8))) if rng.random() < 0.5 else rng.uniform(1.9, 3.6)
        aspect = aspect if rng.random() < 0.5 else 1 / aspect
    longer = math.exp(rng.uniform(math.log(long_side[0]), math.log(long_side[1])))
    shorter = round(longer * min(aspect, 1 / aspect))
    longer = round(shorter * max(aspect, 1 / aspect))
    return (longer, shorter) if aspect >= 1 else (shorter, longer)


def _layout(
    rng: np.random.Generator, width: int, height: int, count: int, size: tuple[float, float]
) -> list[tuple[float, float, float]]:
    """Centre x, centre y and side of each digit's cell, in reading order."""
    if count == 0:
        return []
    lines = _lines(rng, width / height, count)
    longest = max(lines)
    cell = rng.uniform(*size) * max(width, height)
    cell = min(cell, 0.9 * width / (0.85 * longest + 0.3), 0.9 * height / (1.15 * len(lines)))

    # Gaps between neighbours: from nearly touching to the largest that fits, biased towards small ones.
    step_x = cell * rng.uniform(0.85, 1.15)
    if longest > 1:
        step_x += rng.random() ** 2 * max(0.0, (width - cell * 1.2) / (longest - 1) - step_x)
        step_x = min(step_x, (width - 1.1 * cell) / (longest - 1))
    step_y = cell * rng.uniform(1.1, 1.3)
    if len(lines) > 1:
        step_y += rng.random() ** 2 * max(0.0, (height - cell * 1.2) / (len(lines) - 1) - step_y)
        step_y = min(step_y, (height - 1.05 * cell) / (len(lines) - 1))

    block_width = step_x * (longest - 1) + cell
    block_height = step_y * (len(lines) - 1) + cell
    left = rng.uniform(0, max(0.0, width - block_width)) + cell / 2
    top = rng.uniform(0, max(0.0, height - block_height)) + cell / 2
    cells = []
    for row, in_line in enumerate(lines):
        # No line starts further left than the first, so that its first digit is the one at the top left.
        indent = 0.0 if row == 0 else rng.uniform(0, 0.25) * cell
        slope = rng.uniform(-0.08, 0.08)
        for column in range(in_line):
            side = cell * rng.uniform(0.88, 1.0)
            x = left + indent + step_x * column + rng.uniform(-0.04, 0.04) * cell
            y = top + step_y * row + (slope * column + rng.uniform(-0.05, 0.05)) * cell
            x = min(max(x, side / 2), width - side / 2)
            y = min(max(y, side / 2), height - side / 2)
            cells.append((x, y, side))
    return cells


def _lines(rng: np.random.Generator, aspect: float, count: int) -> list[int]:
    """Number of digits of each line: one line if wide, one digit per line if tall, else one or two lines."""
    if aspect > 1.85:
        return [count]
    if aspect < 1 / 1.85:
        return [1] * count
    if count == 1 or (count <= 4 and rng.random() < 0.35):
        return [count]
    first = (count + int(rng.integers(0, 2))) // 2
    return [first, count - first]


def _colours(rng: np.random.Generator, width: int, height: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """An ink colour and a background (uint8 [height, width, 3]), at least MIN_CONTRAST apart in luminance.

    The background stays in a luminance band away from the ink: dark ink on a light band or, inverted, light ink on
    a dark one.
    """
    inverted = rng.random() < 0.4
    ink_level = rng.uniform(0, 75)
    lowest = ink_level + MIN_CONTRAST
    band_low = lowest + rng.random() * (230 - lowest)
    if rng.random() < 0.35:
        band_low = lowest + rng.random() ** 2 * (230 - lowest)
        background = _photo(rng, width, height)
        background *= np.float32((255 - band_low) / 255)
        background += np.float32(band_low)
    else:
        level = rng.uniform(band_low, 255)
        reach = min(level - band_low, 255 - level, 40)
        ramp_x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(rng.uniform(-reach, reach) / 2)
        ramp_y = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(rng.uniform(-reach, reach) / 2)
        tint = _tint(rng, level, min(level - band_low, 255 - level, 25))
        background = (ramp_y[:, None] + ramp_x[None, :])[:, :, None] + tint
    np.clip(background, 0, 255, out=background)
    background = background.astype(np.uint8)
    ink = np.clip(_tint(rng, ink_level, min(ink_level, 60)), 0, 255).astype(np.uint8)
    if inverted:
        ink, background = 255 - ink, 255 - background
    return tuple(ink.tolist()), background


def _tint(rng: np.random.Generator, level: float, reach: float) -> np.ndarray:
    """A colour of the given luminance (float32 [3]) whose channels deviate from it by up to `reach`."""
    stray = rng.uniform(-reach, reach, 3)
    return (level + stray - stray @ _LUMA).astype(np.float32)


def _photo(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A random crop of one of the two photographs, resized: float32 [height, width, 3]."""
    photos = _photos()
    photo = photos[rng.integers(len(photos))]
    scale = rng.uniform(0.35, 1.0) * min(photo.width / width, photo.height / height)
    crop_width, crop_height = width * scale, height * scale
    left = rng.uniform(0, photo.width - crop_width)
    top = rng.uniform(0, photo.height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    return np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR, box=box), dtype=np.float32)


def _stroke_curve(rng: np.random.Generator) -> np.ndarray:
    """Lookup table from an upsampled scan to ink opacity: a soft threshold sets stroke width and edge."""
    threshold = rng.uniform(0.30, 0.56)
    softness = rng.uniform(0.15, 0.5)
    opacity = rng.uniform(0.8, 1.0)
    levels = np.clip((np.arange(256) / 255 - threshold) / softness + 0.5, 0, 1) * (255 * opacity)
    levels[0] = 0
    return levels.astype(np.uint8)


def _render(rng: np.random.Generator, glyph: Image.Image, cell: float, tilt: float) -> Image.Image:
    """Resample one upsampled scan into a cell of the given side, slightly rotated, sheared and stretched."""
    side = max(4, math.ceil(cell * GLYPH / GLYPH_CELL))
    angle = math.radians(np.clip(tilt + rng.uniform(-6, 6), -10, 10))
    shear = rng.uniform(-0.15, 0.15)
    zoom_x = GLYPH_CELL / (cell * rng.uniform(0.85, 1.1))
    zoom_y = GLYPH_CELL / (cell * rng.uniform(0.9, 1.0))
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = zoom_x * (cos + shear * sin), zoom_x * (-sin + shear * cos)
    d, e = zoom_y * sin, zoom_y * cos
    middle, centre = side / 2, GLYPH / 2
    matrix = (a, b, centre - a * middle - b * middle, d, e, centre - d * middle - e * middle)
    return glyph.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _add_noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add noise of a random strength to half of the canvases: a random crop of one fixed field."""
    height, width, _ = image.shape
    if rng.random() < 0.5 or height > NOISE_SIDE or width > NOISE_SIDE:
        return image
    top = int(rng.integers(NOISE_SIDE - height + 1))
    left = int(rng.integers(NOISE_SIDE - width + 1))
    noise = _noise()[int(rng.integers(3)), top : top + height, left : left + width]
    return np.clip(noise + image, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans (float64 [1797, 8, 8], ink 0 to 16) and their digits (int64 [1797])."""
    data = _sklearn().load_digits()
    return data.images, data.target


@lru_cache(maxsize=1)
def _glyphs() -> tuple[list[Image.Image], np.ndarray]:
    """Every scan upsampled bicubically to GLYPH_CELL pixels plus a margin, 8-bit greyscale; and their digits."""
    images, targets = _scans()
    margin = (GLYPH - GLYPH_CELL) // 2 // (GLYPH_CELL // 8)
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin))) * (255 / 16)
    resample = Image.Resampling.BICUBIC
    return [Image.fromarray(p.astype(np.uint8)).resize((GLYPH, GLYPH), resample) for p in padded], targets


@lru_cache(maxsize=1)
def _photos() -> list[Image.Image]:
    # Halved: crops are resized to a few hundred pixels, and smaller sources resize faster.
    return [Image.fromarray(_sklearn().load_sample_image(name)).reduce(2) for name in ("china.jpg", "flower.jpg")]


def _sklearn() -> Any:
    """The package with the scans and the photographs. Raises MissingPackageError."""
    try:
        import sklearn.datasets
    except ImportError:
        raise MissingPackageError("the digits demo", "scikit-learn", "demo") from None
    return sklearn.datasets


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """Fixed noise fields, int16 [3 strengths, side, side, 3]."""
    field = np.random.default_rng(0).standard_normal((NOISE_SIDE, NOISE_SIDE, 3), dtype=np.float32)
    return np.stack([np.round(field * strength) for strength in (2, 5, 9)]).astype(np.int16)


_LUMA = np.array([0.299, 0.587, 0.114])
