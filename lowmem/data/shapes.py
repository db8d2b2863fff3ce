"""A built-in data set: ten classes of shapes and textures, drawn by arithmetic, with nothing on disk.

It is for trials, tests and `doctor`: hard for a linear model (colours, polarity, place, size and angle are
random), easy for a small convolutional net. Pixels come from addressed words and integer arithmetic only, so
they are the same bits everywhere and with every seed of a run, as the pictures of any other data set are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem.config.sources import SOURCE_SIDE as SIDE
from lowmem.core import counter_rng as addressed
from lowmem.data.pictures import CHANNELS, DrawnWhenTaken, Pictures, Source

Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]

_UNIT = 64  # lengths are in 1/64 pixel
_TURN = 64  # directions in a full turn
# Cosines times 256, rounded: far enough from ties that every platform's library gives the same integers.
_COS = np.rint(256 * np.cos(np.arange(_TURN) * 2 * np.pi / _TURN)).astype(np.int32)
_SIN = np.rint(256 * np.sin(np.arange(_TURN) * 2 * np.pi / _TURN)).astype(np.int32)
_DATA_SEED = 20_261_101  # names this data set; another number would be another data set
_CHUNK = 1000  # pictures drawn at a time: temporaries stay in tens of MiB
_NOISE = 52  # noise is uniform in -_NOISE.._NOISE grey levels


def _dots(u: Ints, v: Ints, r: Ints) -> Mask:
    pitch = r * 3 // 4
    a, b = u % pitch - pitch // 2, v % pitch - pitch // 2
    return (a * a + b * b) * 12 < pitch * pitch


def _root(square: Ints) -> Ints:
    return np.sqrt(square.astype(np.float64)).astype(np.int32)  # IEEE: correctly rounded everywhere


# Of the coordinates u, v and the size r of a figure; the pixels that are in it.
_CLASSES: dict[str, Callable[[Ints, Ints, Ints], Mask]] = {
    # Smaller than a triangle: at 0.9 nets took one for the other.
    "disc": lambda u, v, r: (u * u + v * v) * 10 < r * r * 4,
    "bar": lambda u, v, r: (abs(u) * 3 < r * 4) & (abs(v) * 4 < r),
    # Outward normals 120 degrees apart.
    "triangle": lambda u, v, r: np.maximum(abs(u) * 222 + v * 128 >> 8, -v) * 3 < r * 2,
    "cross": lambda u, v, r: (np.minimum(abs(u), abs(v)) * 10 < r * 3) & (np.maximum(abs(u), abs(v)) < r),
    "ring": lambda u, v, r: (u * u + v * v < r * r) & ((u * u + v * v) * 100 > r * r * 36),
    "stripes": lambda u, v, r: u // (r // 3) % 2 == 0,
    "checker": lambda u, v, r: (u // (r * 3 // 5) + v // (r * 3 // 5)) % 2 == 0,
    "dots": _dots,
    "ripples": lambda u, v, r: _root(u * u + v * v) // (r // 3) % 2 == 0,
    "zigzag": lambda u, v, r: (v + abs(u % (r * 2 // 3 * 2) - r * 2 // 3)) // (r // 3) % 2 == 0,
}


def generate(train: int = 10_000, test: int = 2_000) -> Source:
    """The data set; picture i of a part is of class i % 10 and does not depend on how many there are."""
    return Source("shapes", tuple(_CLASSES), _part("train", train), _part("test", test))


def _part(part: str, count: int) -> DrawnWhenTaken:
    """A run of a few hundred pictures does not wait for all 12,000."""

    def take(indices: NDArray[np.int64] | None) -> Pictures:
        indices = np.arange(count) if indices is None else indices
        labels = indices % len(_CLASSES)
        images = np.empty((len(indices), CHANNELS, SIDE, SIDE), dtype=np.uint8)
        for start in range(0, len(indices), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            images[chunk] = _draw_pictures(part, indices[chunk], labels[chunk])
        return Pictures(torch.from_numpy(images), torch.from_numpy(labels))

    return DrawnWhenTaken(torch.arange(count) % len(_CLASSES), take)


def _uniform(part: str, name: str, indices: NDArray[np.int64], low: int, high: int) -> Ints:
    """One integer in low..high (both included) per index, shaped [K, 1, 1]."""
    words = addressed.draw_uint64(addressed.derive_seed(_DATA_SEED, "shapes", part, name), indices)
    value = (words >> np.uint64(16)) % np.uint64(high - low + 1)
    return (value.astype(np.int32) + np.int32(low)).reshape(-1, 1, 1)


def _draw_pictures(part: str, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [K, 3, 32, 32]: a mask in two colours, a shade across it, and noise."""
    mask, noise = _draw_masks(part, indices, labels), _noise(part, indices)
    canvas = np.empty((len(indices), CHANNELS, SIDE, SIDE), dtype=np.uint8)
    ramp = np.arange(SIDE, dtype=np.int32) * 2 - (SIDE - 1)
    for channel in range(CHANNELS):
        back, fore = _colours(part, channel, indices)
        across = _uniform(part, f"across{channel}", indices, -32, 32) * ramp.reshape(1, 1, SIDE)
        down = _uniform(part, f"down{channel}", indices, -32, 32) * ramp.reshape(1, SIDE, 1)
        plain = np.where(mask, fore, back) + (across + down >> 5)
        canvas[:, channel] = np.clip(plain + noise[:, channel], 0, 255)
    return canvas


def _colours(part: str, channel: int, indices: NDArray[np.int64]) -> tuple[Ints, Ints]:
    """Grey levels of background and figure in one channel, [K, 1, 1] each, at least 64 apart.

    Which of the two is the brighter is drawn once for a picture, not once for a channel. With eight patterns of signs
    instead of two, Res20 finds its first filters so late in three epochs that rounding decides how far it gets.
    """
    dark = _uniform(part, f"dark{channel}", indices, 0, 191)
    light = dark + 64 + (_uniform(part, f"light{channel}", indices, 0, 255) * (191 - dark) >> 8)
    figure_is_light = _uniform(part, "polarity", indices, 0, 1) == 1
    return np.where(figure_is_light, dark, light), np.where(figure_is_light, light, dark)


def _draw_masks(part: str, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> Mask:
    """bool [K, 32, 32]: the class's figure at a random place, size and angle."""
    at = (np.arange(SIDE, dtype=np.int32) * _UNIT + _UNIT // 2)[None]
    x = at[:, None, :] - _uniform(part, "x", indices, 11 * _UNIT, 21 * _UNIT)
    y = at[:, :, None] - _uniform(part, "y", indices, 11 * _UNIT, 21 * _UNIT)
    angle = _uniform(part, "angle", indices, 0, _TURN - 1)
    cos, sin = _COS[angle], _SIN[angle]
    u, v = (x * cos + y * sin) >> 8, (y * cos - x * sin) >> 8
    size = _uniform(part, "size", indices, 9 * _UNIT, 13 * _UNIT)
    mask = np.empty(u.shape, dtype=np.bool_)
    for label, figure in enumerate(_CLASSES.values()):
        mine = labels == label
        mask[mine] = figure(u[mine], v[mine], size[mine])
    return mask


def _noise(part: str, indices: NDArray[np.int64]) -> Ints:
    """int32 [K, 3, 32, 32]: eight levels of noise from the eight bytes of each word."""
    words_each = CHANNELS * SIDE * SIDE // 8
    addresses = indices[:, None] * words_each + np.arange(words_each)
    words = addressed.draw_uint64(addressed.derive_seed(_DATA_SEED, "shapes", part, "noise"), addresses)
    levels = words.astype("<u8").view(np.uint8).astype(np.int32)  # little-endian: the same bytes everywhere
    return ((levels - 128) * _NOISE // 128).reshape(len(indices), CHANNELS, SIDE, SIDE)
