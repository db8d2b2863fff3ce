"""Where pictures come from, and how they reach the network: `load` a `Dataset`, draw `TrainBatches` from it.

Every choice made here (subset, order, crop, flip) is a function of an address, see `lowmem.core.counter_rng`
(invariant 3).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowmem.config.schema import DataConfig
from lowmem.core.counter_rng import derive_seed, permutation
from lowmem.core.errors import DataError, UsageError
from lowmem.core.units import format_size
from lowmem.data import shapes
from lowmem.data.batches import TrainBatches, eval_batches
from lowmem.data.downloaded import DOWNLOADABLE
from lowmem.data.pictures import Dataset, Pictures, Progress, Selectable, Source, fingerprint, statistics

__all__ = ["Dataset", "Pictures", "TrainBatches", "eval_batches", "find_pictures", "load"]


def load(config: DataConfig, seed: int, *, progress: Progress | None = None) -> Dataset:
    """The data set that `config` names, with its subsets chosen by `seed`; `progress` is told of what takes long.
    Raises DataError for missing or damaged data, UsageError for a subset or split that does not fit."""
    source = _read(config, progress)
    classes = len(source.classes)

    def limited(pictures: Selectable, count: int | None, what: str) -> Pictures:
        there = len(pictures.labels)
        if count is None or count == there:
            return pictures.take(None)
        if count > there:
            raise UsageError(f"data.{what} asks for {count:,} pictures, there are {there:,}: lower it or leave it out")
        return pictures.take(choose_balanced(pictures.labels.numpy(), classes, count, derive_seed(seed, what)))

    train = limited(source.train, config.train_subset, "train_subset")
    test = limited(source.test, config.test_subset, "test_subset")
    val = None
    if count := config.val_split:
        if count >= len(train):
            raise UsageError(
                f"data.val_split holds back {count:,} of {len(train):,} training pictures and leaves none "
                f"to train on: set it below {len(train):,}"
            )
        held = choose_balanced(train.labels.numpy(), classes, count, derive_seed(seed, "val_split"))
        kept = np.setdiff1d(np.arange(len(train)), held, assume_unique=True)
        train, val = train.take(kept), train.take(held)
    if progress is not None:
        progress("computing the pictures' mean, deviation and fingerprint")
    mean, std = statistics(train)
    return Dataset(source.name, source.classes, train, val, test, mean, std, fingerprint(train, val, test))


def _read(config: DataConfig, progress: Progress | None) -> Source:
    if config.source in DOWNLOADABLE:
        return DOWNLOADABLE[config.source].read(Path(config.root).expanduser(), config.download, progress)
    if config.source == "shapes":
        return shapes.generate()
    from lowmem.data import folder  # Pillow

    return folder.read(config.source.removeprefix("folder:"), cache=config.cache, progress=progress)


def class_shares(class_counts: list[int], count: int) -> list[int]:
    """How many of each class make `count` in all: the largest remainder method; ties go to the lower class. Raises
    ValueError if there are fewer than `count`."""
    total = sum(class_counts)
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} pictures cannot be chosen")
    exact = [divmod(count * n, max(total, 1)) for n in class_counts]
    shares = [share for share, _ in exact]
    by_remainder = sorted(range(len(exact)), key=lambda c: -exact[c][1])
    for cls in by_remainder[: count - sum(shares)]:
        shares[cls] += 1
    return shares


def choose_balanced(labels: NDArray[np.int64], classes: int, count: int, key: int) -> NDArray[np.int64]:
    """Rising indices (int64 [count]) of a class-balanced choice: a function of the arguments alone (invariant 3)."""
    shuffled = permutation(key, len(labels))
    shares = class_shares(np.bincount(labels, minlength=classes).tolist(), count)
    picked = [shuffled[labels[shuffled] == cls][:share] for cls, share in enumerate(shares)]
    return np.sort(np.concatenate(picked))


def find_pictures(config: DataConfig) -> tuple[str, str | None]:
    """In words, what there is of the files that `load` would read (names, and for CIFAR-10 the MD5s, but no picture is
    decoded); and where they would be downloaded from, None if they need not be. Raises DataError where `load` would for
    what is missing, except that it does not try to download."""
    if kind := DOWNLOADABLE.get(config.source):
        root = Path(config.root).expanduser()
        if (place := kind.find(root, config.download)) is not None:
            return f"{kind.title} in {place}", None
        size = format_size(kind.download_bytes)
        return f"{kind.title} is not in {root}: {size} would be downloaded", kind.url()
    if config.source == "shapes":
        return "shapes are drawn, no files needed", None
    from lowmem.data import folder

    where = Path(config.source.removeprefix("folder:")).expanduser().resolve()
    try:
        classes, parts = folder.scan(where)
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror or error}): check --data") from None
    counts = " and ".join(f"{len(entries):,} {part}" for part, entries in parts.items())
    return f"{counts} pictures of {len(classes)} classes in {where}", None
