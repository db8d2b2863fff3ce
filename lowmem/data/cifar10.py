"""CIFAR-10 from its usual folder, `cifar-10-batches-py`.

The batches are pickles, and a pickle can run code when read. They are therefore read only after every file
has the MD5 that torchvision knows for it; a file that does not is refused unread.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from lowmem.core.errors import DataError
from lowmem.data.pictures import Pictures, Source


def read(root: str | Path, *, download: bool) -> Source:
    """CIFAR-10 under `root`, fetched there first if it is missing and `download` is set.

    Raises DataError if it is missing and cannot be had, or if a file is not what it should be.
    """
    folder = Path(root).expanduser()
    if not complete(folder, download=download):
        _download(folder, _missing(folder))
        _verify(folder)
    try:
        train, test = (CIFAR10(str(folder), train=part, download=False) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(f"CIFAR-10 in {folder / CIFAR10.base_folder} cannot be read: {error}") from error
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


def _files() -> list[tuple[str, str]]:
    """(name, MD5) of every file that is read."""
    known: list[tuple[str, str]] = [(name, md5) for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list]]
    return [*known, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]


def _missing(folder: Path) -> list[Path]:
    paths = [folder / CIFAR10.base_folder / name for name, _ in _files()]
    return [path for path in paths if not path.is_file()]


def _verify(folder: Path) -> None:
    for name, md5 in _files():
        path = folder / CIFAR10.base_folder / name
        if not check_integrity(str(path), md5):
            raise DataError(
                f"{path} ({path.stat().st_size:,} bytes) does not have CIFAR-10's MD5 and was not unpickled: "
                "delete it, and it is fetched again, or unpack cifar-10-python.tar.gz anew"
            )


def _download(folder: Path, missing: list[Path]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        CIFAR10(str(folder), train=True, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"CIFAR-10 is not in {folder} ({missing[0].name} is missing) and cannot be downloaded "
            f"({' '.join(str(error).split())}): put cifar-10-python.tar.gz there and try again, use "
            "--data folder:PATH, or --data shapes, which needs no files"
        ) from error


def _pictures(part: CIFAR10) -> Pictures:
    images = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
    return Pictures(torch.from_numpy(images), torch.tensor(part.targets, dtype=torch.int64))
