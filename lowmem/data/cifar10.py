"""CIFAR-10 from its usual folder, `cifar-10-batches-py`.

The batches are pickles, and a pickle can run code when read. They are therefore read only after every file
has the MD5 that torchvision knows for it; a file that does not is refused unread.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowmem.core.errors import DataError
from lowmem.data.pictures import Pictures, Source

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

DOWNLOAD_BYTES = 170_498_071  # cifar-10-python.tar.gz


def library() -> type[CIFAR10]:
    """torchvision's reader, imported when it is needed."""
    from torchvision.datasets import CIFAR10

    return CIFAR10


def read(root: str | Path, *, download: bool) -> Source:
    """CIFAR-10 under `root`, fetched there first if it is missing and `download` is set.

    Raises DataError if it is missing and cannot be had, or if a file is not what it should be.
    """
    folder = Path(root).expanduser()
    if not complete(folder, download=download):
        _download(folder, _missing(folder))
        _verify(folder)
    try:
        train, test = (library()(str(folder), train=part, download=False) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(f"CIFAR-10 in {folder / library().base_folder} cannot be read: {error}") from error
    return Source("cifar10", tuple(train.classes), _pictures(train), _pictures(test))


def complete(folder: Path, *, download: bool) -> bool:
    """Whether all files are there, each with its MD5; False if some are missing and `download` would fetch them.

    Raises DataError for a damaged file, and for missing ones without `download`.
    """
    missing = _missing(folder)
    if missing and not download:
        raise DataError(
            f"CIFAR-10 is not in {folder}: {missing[0]} is missing; unpack cifar-10-python.tar.gz there, "
            "point data.root to the folder that holds cifar-10-batches-py, or set data.download=true"
        )
    if not missing:
        _verify(folder)
    return not missing


def _files(folder: Path) -> dict[Path, str]:
    """Every file that is read, and its MD5."""
    known = library()
    listed = [*known.train_list, *known.test_list, (known.meta["filename"], known.meta["md5"])]
    return {folder / known.base_folder / name: md5 for name, md5 in listed}


def _missing(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if not path.is_file()]


def _verify(folder: Path) -> None:
    for path, md5 in _files(folder).items():
        with open(path, "rb") as file:
            same = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5
        if not same:
            raise DataError(
                f"{path} ({path.stat().st_size:,} bytes) does not have CIFAR-10's MD5 and was not unpickled: "
                "delete it, and it is fetched again, or unpack cifar-10-python.tar.gz anew"
            )


def _download(folder: Path, missing: list[Path]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        library()(str(folder), train=True, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"CIFAR-10 is not in {folder} ({missing[0].name} is missing) and cannot be downloaded "
            f"({' '.join(str(error).split())}): put cifar-10-python.tar.gz there and try again, use "
            "--data folder:PATH, or --data shapes, which needs no files"
        ) from error


def _pictures(part: CIFAR10) -> Pictures:
    images = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
    return Pictures(torch.from_numpy(images), torch.tensor(part.targets, dtype=torch.int64))
