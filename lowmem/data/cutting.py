"""Batches cut from pictures on the disk: torchvision's `RandomResizedCrop` (scale 0.08 to 1, aspect 3/4 to 4/3, ten
attempts, then the whole picture) and a horizontal flip, of addressed draws; for evaluation the middle.

Every picture is read from its mapped piece, resized by torch's own uint8 kernel (bilinear, with antialiasing) into its
place in the batch, and mirrored there; threads take a part of the batch each. What else was tried is in
`benchmarks/loading.py`. Known limitation: on a processor without AVX2 that kernel may round some pixels otherwise, by
one level, so that a run that goes on there is not bit for bit the run that it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem.core import counter_rng as addressed
from lowmem.data.pictures import MappedPictures

SCALE, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10
_HALF = np.uint64(32)
_LEAST_A_THREAD = 16  # pictures: fewer are not worth waking one
_resize, _mirror = torch.ops.aten._upsample_bilinear2d_aa.out, torch.ops.aten.flip.out


def crop_boxes(seed: int, epoch: int, samples: NDArray[np.integer], side: int) -> NDArray[np.int64]:
    """Crops of square pictures, of (seed, epoch, index) alone: top, left, height, width, int64 [4, K]."""
    boxes = random_boxes(seed, epoch, samples, side, purpose="crop", areas=SCALE, aspects=ASPECT, most=side)
    boxes[2:, boxes[2] == 0] = side
    return boxes


def random_boxes(
    seed: int,
    epoch: int,
    samples: NDArray[np.integer],
    side: int,
    *,
    purpose: str,
    areas: tuple[float, float],
    aspects: tuple[float, float],
    most: int,
) -> NDArray[np.int64]:
    """Rectangles in square pictures, of (seed, purpose, epoch, index) alone: top, left, height, width, int64 [4, K].
    `areas`: as shares of the picture's, uniform between them; `aspects`: uniform in their logarithm; `most`: pixels of
    a side. All zeros where every attempt was out of bounds."""
    boxes = np.zeros((4, len(samples)), np.int64)
    left = np.arange(len(samples))
    for attempt in range(ATTEMPTS):
        of_area, of_aspect = _halves(seed, epoch, attempt, (purpose, "size"), samples[left])
        area = side * side * (areas[0] + of_area / 2**32 * (areas[1] - areas[0]))
        low, high = map(math.log, aspects)
        aspect = np.exp(low + of_aspect / 2**32 * (high - low))
        width, height = (np.rint(np.sqrt(one)).astype(np.int64) for one in (area * aspect, area / aspect))
        inside = (width > 0) & (width <= most) & (height > 0) & (height <= most)
        down, across = (
            one.astype(np.int64) for one in _halves(seed, epoch, attempt, (purpose, "place"), samples[left])
        )
        sizes = np.stack([height, width])
        corners = np.stack([down, across]) * (side - sizes + 1) >> 32
        boxes[:, left[inside]] = np.concatenate([corners, sizes])[:, inside]
        left = left[~inside]
        if not len(left):
            break
    return boxes


def _halves(
    seed: int, epoch: int, attempt: int, what: tuple[str, str], samples: NDArray[np.integer]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Two uniform integers below 2**32 for each."""
    words = addressed.draw_uint64(addressed.derive_seed(seed, *what, epoch, attempt), samples)
    return words >> _HALF, words & np.uint64(0xFFFFFFFF)


class Cutter:
    """Training batches of `pictures`. `ahead`: the batch after the one that is asked for is begun meanwhile, in pinned
    memory, for a step on a card."""

    def __init__(self, pictures: MappedPictures, seed: int, *, ahead: bool = False) -> None:
        self._pictures, self._seed = pictures, seed
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, "cut") if self._threads > 1 else None
        self._pin = ahead and torch.cuda.is_available()
        self._begun = ThreadPoolExecutor(1, "next-batch") if ahead else None
        self._next: tuple[Tensor, slice, Future[Tensor]] | None = None

    def boxes(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return crop_boxes(self._seed, epoch, samples, self._pictures.side)

    def cut(self, plan: Tensor, chosen: slice, following: slice, *, augment: bool) -> Tensor:
        """uint8 [B, C, N, N], channels-last, on the host. `plan`: int64 [6, K] of an epoch: index, top, left, height,
        width, flip; `chosen`: those of the batch; `following`: of what will probably be asked for next."""
        if self._begun is None:
            return self._make(plan[:, chosen], augment)
        begun, self._next = self._next, None
        known = begun is not None and begun[0] is plan and begun[1] == chosen
        images = begun[2].result() if begun is not None and known else self._make(plan[:, chosen], augment)
        if following.start < following.stop:
            self._next = (plan, following, self._begun.submit(self._make, plan[:, following], augment))
        return images

    def _make(self, plan: Tensor, augment: bool) -> Tensor:
        count = plan.shape[1]
        images = _batch(count, self._pictures, self._pin)
        rows: list[list[int]] = plan.T.tolist()
        parts = max(1, min(self._threads, count // _LEAST_A_THREAD)) if self._pool is not None else 1
        bounds = [count * part // parts for part in range(parts + 1)]

        def fill(first: int, past: int) -> None:
            if augment:
                self._resized(images[first:past], rows[first:past])
            else:
                _copy_middles(images[first:past], self._pictures, [row[0] for row in rows[first:past]])

        if self._pool is None or parts == 1:
            fill(0, count)
        else:
            list(self._pool.map(fill, bounds[:-1], bounds[1:]))
        return images

    def _resized(self, images: Tensor, rows: Sequence[Sequence[int]]) -> None:
        size = self._pictures.image_size
        unmirrored = _batch(1, self._pictures)
        for place, (index, top, left, height, width, flip) in enumerate(rows):
            cut = self._pictures[index][top : top + height, left : left + width].permute(2, 0, 1).unsqueeze(0)
            out = images[place : place + 1]
            _resize(cut, [size, size], False, None, None, out=unmirrored if flip else out)
            if flip:
                _mirror(unmirrored, [3], out=out)


def middles(pictures: MappedPictures, indices: Sequence[int]) -> Tensor:
    """Of those at `indices` the middle, not resized: uint8 [K, C, N, N], channels-last."""
    images = _batch(len(indices), pictures)
    _copy_middles(images, pictures, indices)
    return images


def middle_of(side: int, size: int) -> slice:
    """Of `side` rows or columns the middle ones."""
    return slice(border := (side - size) // 2, border + size)


def _copy_middles(images: Tensor, pictures: MappedPictures, indices: Sequence[int]) -> None:
    middle = middle_of(pictures.side, pictures.image_size)
    for place, index in enumerate(indices):
        images[place] = pictures[index][middle, middle].permute(2, 0, 1)


def _batch(count: int, pictures: MappedPictures, pin: bool = False) -> Tensor:
    size = pictures.image_size
    return torch.empty(count, size, size, pictures.channels, dtype=torch.uint8, pin_memory=pin).permute(0, 3, 1, 2)
