"""The values this room hands on: pictures with labels, and a data set with its statistics and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem.core.phases import Phase

SIDE = 32
CHANNELS = 3

Progress = Phase  # in pictures
Triple = tuple[float, float, float]

_CHUNK = 4096  # pictures at a time in passes over a whole set, so that temporaries stay in tens of MiB


@dataclass(frozen=True)
class Pictures:
    """On the CPU: images uint8 [N, 3, 32, 32], contiguous; labels int64 [N]. Raises ValueError for anything else."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or shape[1:] != (CHANNELS, SIDE, SIDE):
            raise ValueError(f"images are {self.images.dtype} {list(shape)}, they must be uint8 [N, 3, 32, 32]")
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            raise ValueError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}, they must be int64 [{shape[0]}]"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    def take(self, indices: NDArray[np.int64] | None) -> Pictures:
        """The pictures at `indices` (int64 [K]), in that order, as a copy; None: these themselves."""
        if indices is None:
            return self
        chosen = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return Pictures(self.images.index_select(0, chosen), self.labels.index_select(0, chosen))


@dataclass(frozen=True)
class DrawnWhenTaken:
    """As `Pictures`, of which only those that are taken are made."""

    labels: Tensor
    take: Callable[[NDArray[np.int64] | None], Pictures]


Selectable = Pictures | DrawnWhenTaken


@dataclass(frozen=True)
class Source:
    """What a source delivers before parts and subsets are drawn. `test`: None where training pictures are to be split
    off for it; `val`: held back by the source itself. `notes`, `warnings`: sentences for the user; `skipped`: files
    that were to be pictures and are left out, each with the reason; `unchecked`: pictures that nobody looked at."""

    name: str
    classes: tuple[str, ...]
    train: Selectable
    test: Selectable | None
    val: Selectable | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unchecked: int = 0


@dataclass(frozen=True)
class Dataset:
    """Ready to train on. `classes`: their names, in the order of the labels; `mean`, `std`: of the training pictures,
    see `statistics`; `fingerprint`: of all parts. The rest as in `Source`."""

    name: str
    classes: tuple[str, ...]
    train: Pictures
    val: Pictures | None
    test: Pictures
    mean: Triple
    std: Triple
    fingerprint: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What whoever uses a network that is trained on it must know, as JSON values; `classes` in the order of its
        outputs. Of a name that is no text, what can be told."""
        name, *classes = (text.encode("utf-8", "replace").decode() for text in (self.name, *self.classes))
        prepared = {"image_size": SIDE, "mean": list(self.mean), "std": list(self.std)}
        return {"data": name, "classes": classes, **prepared}


def statistics(pictures: Pictures) -> tuple[Triple, Triple]:
    """Mean and standard deviation per channel in [0, 1] units, of sums of integers: independent of threads and order.
    The deviation of a channel that is (nearly) constant is raised to 1/255, so that dividing by it is safe."""
    n, total, squares = len(pictures) * SIDE * SIDE, np.zeros(CHANNELS, np.int64), np.zeros(CHANNELS, np.int64)
    for start in range(0, len(pictures), _CHUNK):
        chunk = pictures.images[start : start + _CHUNK].numpy()
        total += chunk.sum((0, 2, 3), dtype=np.int64)
        squares += np.square(chunk, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
    sums = zip(total.tolist(), squares.tolist(), strict=True)
    r, g, b = ((one / n / 255, max((square * n - one * one) ** 0.5 / n, 1.0) / 255) for one, square in sums)
    return (r[0], g[0], b[0]), (r[1], g[1], b[1])


def fingerprint(*parts: Pictures | None) -> str:
    """SHA-256 (hex) over pixels and labels of every part, to tell that data is the same; a missing part and an empty
    one differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"none;" if part is None else f"{len(part)};".encode())
        if part is not None:
            digest.update(part.images.contiguous().numpy().data)
            digest.update(part.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
