"""Where pictures come from, and how they reach the network: `load` a `Dataset`, draw `TrainBatches` from it.

Every choice made here (subset, order, crop, flip) is a function of an address, see `lowmem.core.counter_rng`
(invariant 3).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowmem.config.paths import folder_of
from lowmem.config.sections import DataConfig
from lowmem.config.sources import SOURCES, path_in
from lowmem.core.counter_rng import derive_seed, permutation
from lowmem.core.errors import UsageError
from lowmem.core.units import counted, format_size, name_some
from lowmem.data import shapes
from lowmem.data.batches import TrainBatches, eval_batches
from lowmem.data.downloaded import DOWNLOADABLE
from lowmem.data.pictures import (
    MOST_HELD_BYTES,
    AnyPictures,
    Dataset,
    MappedPictures,
    Pictures,
    Progress,
    Selectable,
    Source,
    fingerprint,
    held_bytes,
    statistics,
)

__all__ = [
    "AnyPictures",
    "Dataset",
    "Found",
    "Pictures",
    "TestSet",
    "TrainBatches",
    "eval_batches",
    "find_pictures",
    "held_bytes",
    "load",
    "load_test",
]
_CLASSES_NAMED = 10


def load(config: DataConfig, seed: int, *, progress: Progress | None = None) -> Dataset:
    """The data set that `config` names, with its subsets chosen by `seed`; `progress` is told of what takes long.
    Raises DataError for missing or damaged data, UsageError for a subset or split that does not fit."""
    source = _read(config, progress=progress)
    chosen = choose(source, config, seed)
    train, test = (_sized(chosen[part].pictures(), config) for part in ("train", "test"))
    held_back = _sized(chosen["val"].pictures(), config) if "val" in chosen else None
    if progress is not None:
        progress("computing the pictures' mean, deviation and fingerprint")
    mean, std = statistics(train)
    return Dataset(
        source.name,
        source.classes,
        train,
        held_back,
        test,
        mean,
        std,
        fingerprint(train, held_back, test),
        notes=(f"{source.name}: {_describe_classes(source)}", *source.notes, *_describe_size(train)),
        warnings=(*source.warnings, *_emptied(source, chosen)),
        skipped=source.skipped,
        test_files=_files_of(source, chosen["test"]),
    )


def _files_of(source: Source, chosen: Chosen) -> tuple[str, ...]:
    names = source.files.get("train" if chosen.source is source.train else "test")
    return () if names is None else tuple(names[index] for index in chosen.indices)


@dataclass(frozen=True)
class TestSet:
    """Pictures to evaluate on. `classes`: their names, in the order of the labels; `files`: their paths, where they are
    files; `warnings`: sentences for the user."""

    __test__ = False  # for pytest, a class by such a name is one of tests

    name: str
    classes: tuple[str, ...]
    pictures: AnyPictures
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def load_test(config: DataConfig, *, progress: Progress | None = None) -> TestSet:
    """What a network that was trained on other pictures can be evaluated on: all test pictures of the source that
    `config` names, and where it has none apart all that it has. Raises DataError."""
    if config.source not in SOURCES:
        parts = {part for part in ("train", "test") if (folder_of(config.source) / part).is_dir()}
        if "train" not in parts:  # the folders are the classes, which is refused unless they are to be split
            classes = config.source + "/test" * len(parts)
            config = config.model_copy(update={"source": classes, "test_split": 1})
    source = _read(config, progress=progress)
    part = next(part for part in ("test", "val", "train") if getattr(source, part) is not None)
    pictures = _sized(getattr(source, part).take(None), config)
    return TestSet(source.name, source.classes, pictures, source.files.get(part, ()), source.warnings)


def _sized(pictures: AnyPictures, config: DataConfig) -> AnyPictures:
    """As the network sees them: those of a source of its own size are made grey here, and enlarged as a batch."""
    if isinstance(pictures, Pictures) and config.channels == 1:
        pictures = pictures.grey()
    if isinstance(pictures, MappedPictures) or pictures.side == config.image_size:
        return pictures
    return replace(pictures, enlarged_to=config.image_size)


def _describe_size(pictures: AnyPictures) -> Iterator[str]:
    """How they come to the network, where that is not as they are and from where it is."""
    size = format_size(len(pictures) * pictures.channels * pictures.side**2)
    square, wanted = (f"{side}x{side}" for side in (pictures.side, pictures.image_size))
    if isinstance(pictures, MappedPictures):
        yield f"training pictures stay on the disk, {size} of {square}: batches of {wanted} are cut from there"
        return
    if square != wanted:
        yield f"pictures of {square} are cropped at their own size and enlarged to {wanted} as a batch"
    if pictures.images.nbytes > MOST_HELD_BYTES:
        most = format_size(MOST_HELD_BYTES)
        yield f"training pictures take {size}, a card holds {most} of them at most: there every batch is copied"


def _read(config: DataConfig, *, progress: Progress | None = None, until: float | None = None) -> Source:
    if config.source in DOWNLOADABLE:
        return DOWNLOADABLE[config.source].read(Path(config.root).expanduser(), config.download, progress)
    if config.source == "shapes":
        return shapes.generate()
    from lowmem.data import folder  # Pillow

    return folder.read(config, progress=progress, until=until)


@dataclass(frozen=True)
class Chosen:
    """Some of the pictures of a source: rising indices, int64 [K]. `of`: what they are for, in words."""

    source: Selectable
    indices: NDArray[np.int64]
    of: str

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.source.labels.numpy()[self.indices]

    def pictures(self) -> AnyPictures:
        return self.source.take(None if len(self) == len(self.source.labels) else self.indices)


def choose(source: Source, config: DataConfig, seed: int) -> dict[str, Chosen]:
    """The pictures of train, test and perhaps val, by labels alone. Raises UsageError for what does not fit."""
    classes = len(source.classes)

    def balanced(part: Chosen, count: int, what: str) -> NDArray[np.int64]:
        return part.indices[choose_balanced(part.labels, classes, count, derive_seed(seed, what))]

    def limited(part: Chosen, count: int | None, what: str) -> Chosen:
        if count is not None and count > len(part):
            asked = f"data.{what} asks for {counted(count, 'picture')}, there are {len(part):,}"
            raise UsageError(f"{asked}: lower it or leave it out")
        return part if count in (None, len(part)) else replace(part, indices=balanced(part, count, what))

    def split(part: Chosen, count: int, what: str, of: str) -> tuple[Chosen, Chosen]:
        if count >= len(part):
            raise UsageError(
                f"data.{what} holds back {count:,} of {len(part):,} training pictures and leaves none "
                f"to train on: set it below {len(part):,}"
            )
        held = balanced(part, count, what)
        return replace(part, indices=np.setdiff1d(part.indices, held, assume_unique=True)), replace(
            part, indices=held, of=of
        )

    def whole(pictures: Selectable, of: str) -> Chosen:
        return Chosen(pictures, np.arange(len(pictures.labels)), of)

    train = whole(source.train, "train on")
    if source.test is not None and config.test_split is not None:
        raise UsageError(f"data.test_split is given, but {source.name} has test pictures: leave it out")
    if source.test is not None:
        test = whole(source.test, "test on")
    else:
        share = config.test_split or 0
        count = share if isinstance(share, int) else max(1, round(share * len(train)))
        train, test = split(train, count, "test_split", "test on")
    parts = {"train": limited(train, config.train_subset, "train_subset")}
    parts["test"] = limited(test, config.test_subset, "test_subset")
    if source.val is not None and config.val_split:
        raise UsageError(
            f"data.val_split is given, but {source.name} has pictures to hold back in val/: leave it out, or pass val/ "
            "over with --set data.val_folder=false"
        )
    if source.val is not None:
        parts["val"] = whole(source.val, "hold back")
    elif config.val_split:
        parts["train"], parts["val"] = split(parts["train"], config.val_split, "val_split", "hold back")
    return parts


def _emptied(source: Source, chosen: Mapping[str, Chosen]) -> Iterator[str]:
    """A sentence for each part that has none of some class."""
    for part in chosen.values():
        counts = np.bincount(part.labels, minlength=len(source.classes))
        if empty := [repr(source.classes[label]) for label in np.flatnonzero(counts == 0)]:
            of = f"{len(empty):,} of {len(source.classes):,} classes ({name_some(empty, 3)})"
            splits = "data.train_subset, test_subset, val_split or test_split"
            yield f"there is no picture to {part.of} of {of}: add some, or change {splits}"


def _describe_classes(source: Source) -> str:
    return f"{counted(len(source.classes), 'class')}: {name_some(source.classes, _CLASSES_NAMED)}"


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


@dataclass(frozen=True)
class Found:
    """In words, what there is of the pictures; where they would be downloaded from, None if they need not be; and what
    `train` would warn of."""

    words: str
    url: str | None = None
    warnings: tuple[str, ...] = ()


def find_pictures(config: DataConfig, seed: int = 0, *, seconds: float = 30.0) -> Found:
    """What `load` would read and choose, by the same code, but that it does not download, and of pictures in folders
    decodes those that are not kept yet for at most `seconds`, and keeps nothing. Raises what `load` would."""
    if kind := DOWNLOADABLE.get(config.source):
        root = Path(config.root).expanduser()
        place = kind.find(root, config.download)
        if place is None:
            size = format_size(kind.download_bytes)
            return Found(f"{kind.title} is not in {root}: {size} would be downloaded", kind.url())
    source = _read(config, until=time.monotonic() + seconds)
    chosen = choose(source, config, seed)
    warnings = (*source.warnings, *_emptied(source, chosen))
    if kind is not None:
        return Found(f"{kind.title} in {place}", None, warnings)
    if config.source == "shapes":
        return Found("shapes are drawn, no files needed", None, warnings)
    counts = ", ".join(f"{len(part):,} to {part.of}" for part in chosen.values())
    words = f"{path_in(config.source)} has pictures of {_describe_classes(source)}; {counts}"
    if source.unchecked:
        words += f"; {source.unchecked:,} were not looked at (more than {seconds:g} s), `lowmem train` does"
    return Found("; ".join((words, *source.notes)), None, warnings)
