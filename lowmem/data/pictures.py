"""The values this room hands on: pictures with labels, and a data set with its statistics and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem.config.sections import DataConfig
from lowmem.config.sources import SOURCE_SIDE, SOURCES
from lowmem.core.phases import Phase

CHANNELS = 3  # of pictures in colour; of grey ones 1
MAPPED_FROM = 64  # of a folder's pictures, by the side of what the network sees
# Of training pictures that a run holds on a card, where they are no larger; CIFAR-10's take 154 MB. Larger data stays
# in the host's memory, or on the disk, and every batch is copied.
MOST_HELD_BYTES = 256 << 20

Progress = Phase  # in pictures
PerChannel = tuple[float, ...]  # one, or of red, green and blue
Sums = tuple[int, NDArray[np.int64]]  # pixels of a channel; sums of their values and of the squares, int64 [2 C]

_CHUNK = 4096  # pictures of 32x32 at a time in passes over a whole set: temporaries stay in tens of MiB


class Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def are_mapped(config: DataConfig) -> bool:
    """Whether the decoded pictures stay on the disk, from where batches are cut."""
    return config.source not in SOURCES and config.image_size >= MAPPED_FROM


def stored_side(config: DataConfig) -> int:
    """Of the square pictures as they are stored: those of a source of its own size are enlarged as a batch, and those
    that are cut from the disk are 8/7 of what the network sees (256 for 224), rounded, to have something to cut off."""
    if config.source in SOURCES:
        return SOURCE_SIDE
    return (16 * config.image_size + 7) // 14 if are_mapped(config) else config.image_size


def held_bytes(config: DataConfig, count: int) -> int:
    """What `count` training pictures take on a card, where they are held on it."""
    size = count * config.channels * stored_side(config) ** 2
    return 0 if are_mapped(config) or size > MOST_HELD_BYTES else size


@dataclass(frozen=True)
class Pictures:
    """In memory, on the CPU: images uint8 [N, C, S, S], C 1 or 3, contiguous; labels int64 [N]. `enlarged_to`: side
    that they have as a batch, at least S; None: their own. Raises ValueError for anything else."""

    images: Tensor
    labels: Tensor
    enlarged_to: int | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, CHANNELS) or shape[2] != shape[3]:
            raise ValueError(f"images are {self.images.dtype} {list(shape)}, they must be uint8 [N, 1 or 3, S, S]")
        if self.enlarged_to is not None and self.enlarged_to < self.side:
            raise ValueError(f"pictures of {self.side}x{self.side} cannot be enlarged to {self.enlarged_to}")
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            raise ValueError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}, they must be int64 [{shape[0]}]"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def side(self) -> int:
        return self.images.shape[-1]

    @property
    def image_size(self) -> int:
        """Side of what the network sees."""
        return self.side if self.enlarged_to is None else self.enlarged_to

    def take(self, indices: NDArray[np.int64] | None) -> Pictures:
        """The pictures at `indices` (int64 [K]), in that order, as a copy; None: these themselves."""
        if indices is None:
            return self
        chosen = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return replace(self, images=self.images.index_select(0, chosen), labels=self.labels.index_select(0, chosen))

    def part(self, first: int, past: int) -> Pictures:
        """Those of [first, past), without a copy."""
        return replace(self, images=self.images[first:past], labels=self.labels[first:past])

    def sums(self) -> Sums:
        total = np.zeros((2, self.channels), np.int64)
        chunk = max(1, _CHUNK * 1024 // self.side**2)
        for start in range(0, len(self), chunk):
            pixels = self.images[start : start + chunk].numpy()
            total[0] += pixels.sum((0, 2, 3), dtype=np.int64)
            total[1] += np.square(pixels, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
        return len(self) * self.side**2, total.reshape(-1)

    def grey(self) -> Pictures:
        """Of one channel: luma by ITU-R BT.601 in 1/65536, rounded, as Pillow has it; what is grey stays as it is."""
        if self.channels == 1:
            return self
        grey, weights = self.images.new_empty(len(self), 1, self.side, self.side), torch.tensor([19595, 38470, 7471])
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            weighted = self.images[part].to(torch.int32) * weights.to(torch.int32).view(CHANNELS, 1, 1)
            grey[part] = weighted.sum(1, keepdim=True).add_(1 << 15) >> 16
        return replace(self, images=grey)

    def identify(self, digest: Hash) -> None:
        """Feeds it all pixels."""
        digest.update(self.images.contiguous().numpy().data)


@dataclass(frozen=True, eq=False)
class MappedPictures:
    """On the disk, mapped into memory. `pieces`: uint8 [K, S, S, C] each, C 1 or 3; `places`: piece and row of every
    picture, int64 [N, 2]; `labels`: int64 [N]; `digests`: of every picture's pixels, uint8 [N, 16]; `channel_sums`:
    of its values and of their squares, int64 [N, 2 C]. They are larger than `image_size`, and cropped."""

    pieces: Sequence[Tensor]
    places: NDArray[np.int64]
    labels: Tensor
    digests: NDArray[np.uint8]
    channel_sums: NDArray[np.int64]
    side: int
    image_size: int

    def __len__(self) -> int:
        return len(self.places)

    @property
    def channels(self) -> int:
        return self.channel_sums.shape[1] // 2

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [S, S, C], not copied."""
        piece, row = self.places[index]
        return self.pieces[piece][row]

    def take(self, indices: NDArray[np.int64] | None) -> MappedPictures:
        """As of `Pictures`, but that no pixel is read."""
        if indices is None:
            return self
        labels = self.labels[torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))]
        rows = {name: getattr(self, name)[indices] for name in ("places", "digests", "channel_sums")}
        return replace(self, labels=labels, **rows)

    def part(self, first: int, past: int) -> MappedPictures:
        return self.take(np.arange(first, past))

    def sums(self) -> Sums:
        return len(self) * self.side**2, self.channel_sums.sum(0)

    def identify(self, digest: Hash) -> None:
        """Feeds it the side and every picture's own digest, which was verified when the pictures were found: they are
        not read a second time."""
        digest.update(f"{self.side};".encode())
        digest.update(np.ascontiguousarray(self.digests).data)


AnyPictures = Pictures | MappedPictures


@dataclass(frozen=True)
class DrawnWhenTaken:
    """As `Pictures`, of which only those that are taken are made, or read."""

    labels: Tensor
    take: Callable[[NDArray[np.int64] | None], Pictures]


Selectable = AnyPictures | DrawnWhenTaken


@dataclass(frozen=True)
class Source:
    """What a source delivers before parts and subsets are drawn. `test`: None where training pictures are to be split
    off for it; `val`: held back by the source itself. `notes`, `warnings`: sentences for the user; `skipped`: files
    that were to be pictures and are left out, each with the reason; `unchecked`: pictures that nobody looked at;
    `files`: where the pictures of a part are files, by its name their paths in the order of the pictures."""

    name: str
    classes: tuple[str, ...]
    train: Selectable
    test: Selectable | None
    val: Selectable | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unchecked: int = 0
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Ready to train on. `classes`: their names, in the order of the labels; `mean`, `std`: of the training pictures,
    see `statistics`; `fingerprint`: of all parts; `test_files`: paths of the test pictures, where they are files. The
    rest as in `Source`."""

    name: str
    classes: tuple[str, ...]
    train: AnyPictures
    val: AnyPictures | None
    test: AnyPictures
    mean: PerChannel
    std: PerChannel
    fingerprint: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What whoever uses a network that is trained on it must know, as JSON values; `classes` in the order of its
        outputs. Of a name that is no text, what can be told."""
        name, *classes = (text.encode("utf-8", "replace").decode() for text in (self.name, *self.classes))
        prepared = {"image_size": self.train.image_size, "mean": list(self.mean), "std": list(self.std)}
        return {"data": name, "classes": classes, **prepared}


def statistics(pictures: AnyPictures) -> tuple[PerChannel, PerChannel]:
    """Mean and standard deviation per channel in [0, 1] units, of sums of integers: independent of threads and order.
    The deviation of a channel that is (nearly) constant is raised to 1/255, so that dividing by it is safe."""
    n, sums = pictures.sums()
    of_values, of_squares = sums.reshape(2, -1).tolist()
    pairs = zip(of_values, of_squares, strict=True)
    std = tuple(max((square * n - one * one) ** 0.5 / n, 1.0) / 255 for one, square in pairs)
    return tuple(one / n / 255 for one in of_values), std


def fingerprint(*parts: AnyPictures | None) -> str:
    """SHA-256 (hex) over pixels and labels of every part, to tell that data is the same; a missing part and an empty
    one differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"none;" if part is None else f"{len(part)};".encode())
        if part is not None:
            part.identify(digest)
            digest.update(part.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
