"""From settings to a `Dataset`: read the source, draw subsets, hold back pictures, take statistics."""

from __future__ import annotations

import numpy as np

from lowmem.config.schema import DataConfig
from lowmem.core.counter_rng import derive_seed
from lowmem.core.errors import UsageError
from lowmem.data import cifar10, fashion, folder, shapes, subset
from lowmem.data.pictures import Dataset, Pictures, Progress, Source, fingerprint, statistics


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
    return folder.read(config.source.removeprefix("folder:"), cache=config.cache, progress=progress)


def _limit(pictures: Pictures, count: int | None, classes: int, key: int, what: str) -> Pictures:
    if count is None or count == len(pictures):
        return pictures
    if count > len(pictures):
        raise UsageError(
            f"data.{what}_subset asks for {count:,} pictures, there are {len(pictures):,}: lower it or leave it out"
        )
    return pictures.take(subset.choose(pictures.labels.numpy(), classes, count, key))


def _hold_back(train: Pictures, count: int, classes: int, key: int) -> tuple[Pictures, Pictures | None]:
    if count == 0:
        return train, None
    if count >= len(train):
        raise UsageError(
            f"data.val_split holds back {count:,} of {len(train):,} training pictures and leaves none "
            f"to train on: set it below {len(train):,}"
        )
    held = subset.choose(train.labels.numpy(), classes, count, key)
    kept = np.setdiff1d(np.arange(len(train)), held, assume_unique=True)
    return train.take(kept), train.take(held)
