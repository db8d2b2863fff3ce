"""From settings to a `Dataset`: read the source, draw subsets, hold back pictures, take statistics; or look whether
the pictures are there at all.

A source is imported when it is read: torchvision alone takes two seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowmem.config.schema import DataConfig
from lowmem.core.counter_rng import derive_seed, permutation
from lowmem.core.errors import DataError, UsageError
from lowmem.data import cifar10, fashion, shapes
from lowmem.data.pictures import Dataset, Pictures, Progress, Selectable, Source, fingerprint, statistics


def load(config: DataConfig, seed: int, *, progress: Progress | None = None) -> Dataset:
    """The data set that `config` names, with its subsets chosen by `seed`.

    `progress(what, done, total)` is called now and then where it takes long (decoding a folder).
    Raises DataError for missing or damaged data, UsageError for a subset or split that does not fit.
    """
    source = _read(config, progress)
    classes = len(source.classes)
    train = _limit(source.train, config.train_subset, classes, derive_seed(seed, "train_subset"), "train")
    test = _limit(source.test, config.test_subset, classes, derive_seed(seed, "test_subset"), "test")
    train, val = _hold_back(train, config.val_split, classes, derive_seed(seed, "val_split"))
    mean, std = statistics(train)
    return Dataset(source.name, source.classes, train, val, test, mean, std, fingerprint(train, val, test))


def _read(config: DataConfig, progress: Progress | None) -> Source:
    if config.source == "cifar10":
        return cifar10.read(config.root, download=config.download)
    if config.source == "fashion-mnist":
        return fashion.read(config.root, download=config.download)
    if config.source == "shapes":
        return shapes.generate()
    from lowmem.data import folder  # Pillow

    return folder.read(config.source.removeprefix("folder:"), cache=config.cache, progress=progress)


def _limit(pictures: Selectable, count: int | None, classes: int, key: int, what: str) -> Pictures:
    there = len(pictures.labels)
    if count is None or count == there:
        return pictures.take(None)
    if count > there:
        raise UsageError(
            f"data.{what}_subset asks for {count:,} pictures, there are {there:,}: lower it or leave it out"
        )
    return pictures.take(choose_balanced(pictures.labels.numpy(), classes, count, key))


def _hold_back(train: Pictures, count: int, classes: int, key: int) -> tuple[Pictures, Pictures | None]:
    if count == 0:
        return train, None
    if count >= len(train):
        raise UsageError(
            f"data.val_split holds back {count:,} of {len(train):,} training pictures and leaves none "
            f"to train on: set it below {len(train):,}"
        )
    held = choose_balanced(train.labels.numpy(), classes, count, key)
    kept = np.setdiff1d(np.arange(len(train)), held, assume_unique=True)
    return train.take(kept), train.take(held)


# -- subsets with the same share of every class ------------------------------------------------------------------------


def class_shares(class_counts: list[int], count: int) -> list[int]:
    """How many of each class make `count` in all: the largest remainder method; ties go to the lower class.

    Raises ValueError if there are fewer than `count`.
    """
    total = sum(class_counts)
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} pictures cannot be chosen")
    shares = [count * n // total for n in class_counts] if total else [0] * len(class_counts)
    remainders = [count * n % total for n in class_counts] if total else []
    by_remainder = sorted(range(len(remainders)), key=lambda c: -remainders[c])
    for cls in by_remainder[: count - sum(shares)]:
        shares[cls] += 1
    return shares


def choose_balanced(labels: NDArray[np.int64], classes: int, count: int, key: int) -> NDArray[np.int64]:
    """Rising indices (int64 [count]) of a class-balanced choice: a function of the arguments alone (invariant 3)."""
    shuffled = permutation(key, len(labels))
    shares = class_shares(np.bincount(labels, minlength=classes).tolist(), count)
    picked = [shuffled[labels[shuffled] == cls][:share] for cls, share in enumerate(shares)]
    return np.sort(np.concatenate(picked))


# -- whether the pictures are there: what `lowmem doctor` asks ---------------------------------------------------------


@dataclass(frozen=True)
class Presence:
    """`there`: complete on this disk. `url`: where it would be downloaded from, None if it need not be."""

    there: bool
    words: str
    download_bytes: int | None = None
    url: str | None = None


def find_pictures(config: DataConfig) -> Presence:
    """Looks for the files that `load` would read: names, and for CIFAR-10 the MD5s, but no picture is decoded.

    Raises DataError where `load` would for what is missing, except that it does not try to download.
    """
    root = Path(config.root).expanduser()
    if config.source == "cifar10":
        if cifar10.complete(root, download=config.download):
            return Presence(True, f"CIFAR-10 in {root}")
        return Presence(False, f"CIFAR-10 is not in {root}", cifar10.DOWNLOAD_BYTES, cifar10.library().url)
    if config.source == "fashion-mnist":
        if (place := fashion.place(root, download=config.download)) is not None:
            return Presence(True, f"Fashion-MNIST in {place}")
        url = fashion.library().mirrors[0]
        return Presence(False, f"Fashion-MNIST is not in {root}", fashion.DOWNLOAD_BYTES, url)
    if config.source == "shapes":
        return Presence(True, "shapes are drawn, no files needed")
    from lowmem.data import folder

    where = Path(config.source.removeprefix("folder:")).expanduser().resolve()
    try:
        classes, parts = folder.scan(where)
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror or error}): check --data") from None
    counts = " and ".join(f"{len(entries):,} {part}" for part, entries in parts.items())
    return Presence(True, f"{counts} pictures of {len(classes)} classes in {where}")
