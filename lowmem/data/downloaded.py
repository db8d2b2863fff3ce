"""What torchvision knows where to fetch: CIFAR-10 and CIFAR-100 in their usual folders, Fashion-MNIST in its IDX files.

CIFAR's batches are pickles, and a pickle can run code when read. They are therefore read only after every file has
the MD5 that torchvision knows for it; a file that does not is refused unread. Fashion-MNIST's 28x28 grey pictures
become 32x32 RGB without resampling: two black pixels on every side, the grey three times.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem.config.sources import SOURCE_SIDE as SIDE
from lowmem.core.errors import DataError
from lowmem.core.units import counted, format_size
from lowmem.data.pictures import CHANNELS, Pictures, Progress, Source

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them
_IDX_FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049
_GREY_SIDE = 28


def library(name: str) -> Any:
    """torchvision's class, imported when it is needed."""
    from torchvision import datasets

    return getattr(datasets, name)


def _fetch(name: str, root: Path, source: str, progress: Progress | None) -> str | None:
    """Why it cannot be downloaded; None if it was."""
    if progress is not None:
        known = DOWNLOADABLE[source]
        progress(f"downloading {known.title}, {format_size(known.download_bytes)}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The library's own bar would be control characters in a file, and in the way of ours on a terminal.
        with redirect_stderr(io.StringIO()):
            library(name)(str(root), download=True)
    except (OSError, RuntimeError, EOFError) as error:
        return " ".join(str(error).split())
    return None


def find_cifar(name: str, root: Path, download: bool) -> Path | None:
    """`root` if all files are under it, each with its MD5; None if some are missing and `download` would fetch them.
    `name`: torchvision's, `CIFAR10` or `CIFAR100`. Raises DataError for a damaged file, and for missing ones without
    `download`."""
    files, title, archive = _cifar_files(name, root), DOWNLOADABLE[name.lower()].title, library(name).filename
    if missing := [path for path in files if not path.is_file()]:
        if download:
            return None
        raise DataError(
            f"{title} is not in {root}: {missing[0]} is missing; unpack {archive} there, "
            f"point data.root to the folder that holds {library(name).base_folder}, or set data.download=true"
        )
    for path, md5 in files.items():
        with open(path, "rb") as file:
            same = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5
        if not same:
            raise DataError(
                f"{path} ({path.stat().st_size:,} bytes) does not have {title}'s MD5 and was not unpickled: "
                f"delete it, and it is fetched again, or unpack {archive} anew"
            )
    return root


def read_cifar(name: str, root: Path, download: bool, progress: Progress | None = None) -> Source:
    """Fetched first if it is missing and `download` is set; of CIFAR-100 the fine labels. Raises as `find_cifar`, and
    DataError if it cannot be fetched."""
    reader, source = library(name), name.lower()
    if find_cifar(name, root, download) is None:
        missing = next(path.name for path in _cifar_files(name, root) if not path.is_file())
        if (why := _fetch(name, root, source, progress)) is not None:
            raise DataError(
                f"{DOWNLOADABLE[source].title} is not in {root} ({missing} is missing) and cannot be downloaded "
                f"({why}): put {reader.filename} there and try again, use --data folder:PATH, or --data shapes, which "
                "needs no files"
            )
        find_cifar(name, root, False)
    try:
        parts = [reader(str(root), train=train, download=False) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        title = DOWNLOADABLE[source].title
        raise DataError(f"{title} in {root / reader.base_folder} cannot be read: {error}") from error
    images = [torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))) for part in parts]
    labels = [torch.tensor(part.targets, dtype=torch.int64) for part in parts]
    train, test = map(Pictures, images, labels)
    return Source(source, tuple(parts[0].classes), train, test)


def _cifar_files(name: str, root: Path) -> dict[Path, str]:
    """Every file that is read, and its MD5."""
    known = library(name)
    listed = [*known.train_list, *known.test_list, (known.meta["filename"], known.meta["md5"])]
    return {root / known.base_folder / name: md5 for name, md5 in listed}


def find_fashion(root: Path, download: bool) -> Path | None:
    """The folder that holds all four files: `root`, `root/fashion-mnist`, torchvision's place under `root`, or that of
    Debian's package. None if there is none and `download` would fetch them; without it raises DataError."""
    places = [root, root / "fashion-mnist", root / "FashionMNIST" / "raw", DEBIAN_FOLDER]
    found = {folder: _idx_files(folder) for folder in places}
    full = next((folder for folder, files in found.items() if len(files) == len(_IDX_FILES)), None)
    if full is not None or download:
        return full
    for folder, files in found.items():
        if files:  # naming the missing one helps more than saying that there is nothing
            missing = next(name for name in _IDX_FILES if name not in files)
            raise DataError(f"{folder / missing} (or .gz) is missing: Fashion-MNIST needs all four files in one folder")
    raise _no_fashion(root, "data.download is off")


def read_fashion(root: Path, download: bool, progress: Progress | None = None) -> Source:
    """Fetched first if it is missing and `download` is set. Raises DataError if it is missing and cannot be had, or if
    a file is not what it should be."""
    folder = find_fashion(root, download)
    if folder is None:
        if (why := _fetch("FashionMNIST", root, "fashion-mnist", progress)) is not None:
            raise _no_fashion(root, f"it cannot be downloaded: {why}")
        folder = find_fashion(root, False)
        assert folder is not None
    paths = list(_idx_files(folder).values())
    return Source("fashion-mnist", FASHION_CLASSES, _part(*paths[:2]), _part(*paths[2:]))


def _no_fashion(root: Path, why: str) -> DataError:
    return DataError(
        f"Fashion-MNIST is not in {root} ({why}): put its four files there (train-images-idx3-ubyte.gz ...), "
        "install Debian's dataset-fashion-mnist, or use --data shapes, which needs no files"
    )


def _idx_files(folder: Path) -> dict[str, Path]:
    """Those of the four that are there, in their order, plain ones before compressed ones."""
    return {name: path for name in _IDX_FILES for path in (folder / f"{name}.gz", folder / name) if path.is_file()}


def _part(images_path: Path, labels_path: Path) -> Pictures:
    grey = read_idx(images_path, _IMAGES_MAGIC)
    labels = read_idx(labels_path, _LABELS_MAGIC)
    if grey.shape[1:] != (_GREY_SIDE, _GREY_SIDE):
        raise DataError(f"{images_path} holds pictures of {grey.shape[1]}x{grey.shape[2]}, Fashion-MNIST's are 28x28")
    if len(grey) != len(labels) or not len(grey):
        raise DataError(
            f"{images_path.name} holds {counted(len(grey), 'picture')}, {labels_path.name} "
            f"{counted(len(labels), 'label')}: one of them is of another data set; "
            f"fetch both again into {images_path.parent}"
        )
    if labels.max() >= len(FASHION_CLASSES):
        raise DataError(f"{labels_path} holds the label {labels.max()}, Fashion-MNIST's are 0 to 9: fetch it again")
    border = (SIDE - _GREY_SIDE) // 2
    padded = np.pad(grey, ((0, 0), (border, border), (border, border)))
    images = np.ascontiguousarray(np.broadcast_to(padded[:, None], (len(grey), CHANNELS, SIDE, SIDE)))
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """An IDX file of bytes, plain or gzip: uint8 with the shape its header says. Raises DataError for a wrong magic
    number, a size that is not the header's, or a damaged archive."""
    again = "delete it and fetch it again"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): {again}") from error
    found = struct.unpack(">I", data[:4])[0] if len(data) >= 4 else None
    if found != magic:
        raise DataError(
            f"{path} begins with {found}, this kind of IDX file with {magic}: it is something else; {again}"
        )
    header = 4 + 4 * (magic & 0xFF)  # the last byte of the magic number counts the dimensions
    if len(data) < header:
        raise DataError(f"{path} ends within its header ({len(data)} of {header} bytes): {again}")
    shape = struct.unpack(f">{magic & 0xFF}I", data[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise DataError(f"{path} holds {len(data):,} bytes, its header says {expected:,}: it is damaged; {again}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


class Downloadable(NamedTuple):
    """`find` and `read` take the folder under which it is looked for, and whether it may be fetched."""

    title: str
    download_bytes: int
    url: Callable[[], str]
    find: Callable[[Path, bool], Path | None]
    read: Callable[[Path, bool, Progress | None], Source]


def _cifar(name: str, title: str, download_bytes: int) -> Downloadable:
    find, read = partial(find_cifar, name), partial(read_cifar, name)
    return Downloadable(title, download_bytes, lambda: library(name).url, find, read)


DOWNLOADABLE = {
    "cifar10": _cifar("CIFAR10", "CIFAR-10", 170_498_071),
    "cifar100": _cifar("CIFAR100", "CIFAR-100", 169_001_437),
    "fashion-mnist": Downloadable(
        "Fashion-MNIST", 30_878_645, lambda: library("FashionMNIST").mirrors[0], find_fashion, read_fashion
    ),
}
