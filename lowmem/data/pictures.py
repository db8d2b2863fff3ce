"""The values this room hands on: pictures with labels, and a data set with its statistics and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32
CHANNELS = 3

# (what is being done, pictures done, pictures in all)
Progress = Callable[[str, int, int], None]
Triple = tuple[float, float, float]

_CHUNK = 4096  # pictures at a time in passes over a whole set, so that temporaries stay in tens of MiB


@dataclass(frozen=True)
class Pictures:
    """Pictures and their classes on the CPU.

    images: uint8 [N, 3, 32, 32], contiguous. labels: int64 [N]. Raises ValueError for anything else.
    """

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


class Selectable(Protocol):
    """Pictures, or what can make those that are taken of it."""

    @property
    def labels(self) -> Tensor: ...

    def take(self, indices: NDArray[np.int64] | None) -> Pictures: ...


@dataclass(frozen=True)
class Source:
    """What a source delivers before subsets are drawn."""

    name: str
    classes: tuple[str, ...]
    train: Selectable
    test: Selectable


@dataclass(frozen=True)
class Dataset:
    """A data set ready to train on.

    mean, std: per channel, of the training pictures in [0, 1] units.
    fingerprint: SHA-256 (hex) of all pixels and labels of train, val and test, to tell that data is the same.
    """

    name: str
    classes: tuple[str, ...]
    train: Pictures
    val: Pictures | None
    test: Pictures
    mean: Triple
    std: Triple
    fingerprint: str


def statistics(pictures: Pictures) -> tuple[Triple, Triple]:
    """Mean and standard deviation per channel in [0, 1] units, from exact integer histograms.

    Integers make the result independent of threads and summation order. The deviation of a channel that is
    (nearly) constant is raised to 1/255, so that dividing by it is safe.
    """
    histogram = np.zeros((CHANNELS, 256), dtype=np.int64)
    for start in range(0, len(pictures), _CHUNK):
        chunk = pictures.images[start : start + _CHUNK].numpy()
        for channel in range(CHANNELS):
            histogram[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
    means, deviations = [], []
    for counts in histogram.tolist():
        n, total, squares = (sum(count * value**power for value, count in enumerate(counts)) for power in range(3))
        means.append(total / n / 255)
        deviations.append(max((squares * n - total * total) ** 0.5 / n, 1.0) / 255)
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def fingerprint(*parts: Pictures | None) -> str:
    """SHA-256 (hex) over pixels and labels of every part; a missing part and an empty one differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"none;" if part is None else f"{len(part)};".encode())
        if part is not None:
            digest.update(part.images.contiguous().numpy().data)
            digest.update(part.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
