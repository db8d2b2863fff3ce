"""Fashion-MNIST from its original IDX files, compressed or plain.

The 28x28 grey pictures become 32x32 RGB without resampling: two black pixels on every side, the grey three
times.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem.core.errors import DataError
from lowmem.data.pictures import CHANNELS, SIDE, Pictures, Source

if TYPE_CHECKING:
    from torchvision.datasets import FashionMNIST

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
DOWNLOAD_BYTES = 30_878_645  # the four .gz files together
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them

_GREY_SIDE = 28
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049
_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def library() -> type[FashionMNIST]:
    """torchvision's, which knows where to fetch it, imported when it is needed."""
    from torchvision.datasets import FashionMNIST

    return FashionMNIST


def read(root: str | Path, *, download: bool) -> Source:
    """Fashion-MNIST from `root`, `root/fashion-mnist`, torchvision's place under `root`, or Debian's package.

    Raises DataError if it is in none of them and cannot be fetched, or if a file is not what it should be.
    """
    base = Path(root).expanduser()
    folder = place(base, download=download) or _fetch(base)
    paths = _require_all(folder)
    return Source("fashion-mnist", CLASSES, _part(*paths[:2]), _part(*paths[2:]))


def place(base: Path, *, download: bool) -> Path | None:
    """The folder that holds all four files; None if there is none and `download` would fetch them.

    Raises DataError if they are missing without `download`.
    """
    places = [base, base / "fashion-mnist", base / "FashionMNIST" / "raw", DEBIAN_FOLDER]
    full = next((folder for folder in places if len(_files(folder)) == 4), None)
    if full is not None or download:
        return full
    if partly := next((folder for folder in places if _files(folder)), None):
        # With some of the files there, naming the missing one helps more than saying that there is nothing.
        _require_all(partly)
    raise _absent(base, "data.download is off")


def _fetch(base: Path) -> Path:
    try:
        base.mkdir(parents=True, exist_ok=True)
        library()(str(base), download=True)
        return base / "FashionMNIST" / "raw"
    except (OSError, RuntimeError, EOFError) as error:
        raise _absent(base, f"it cannot be downloaded: {' '.join(str(error).split())}") from error


def _absent(base: Path, why: str) -> DataError:
    return DataError(
        f"Fashion-MNIST is not in {base} ({why}): put its four files there (train-images-idx3-ubyte.gz ...), "
        "install Debian's dataset-fashion-mnist, or use --data shapes, which needs no files"
    )


def _files(folder: Path) -> dict[str, Path]:
    """Those of the four that are there, plain ones before compressed ones."""
    return {name: path for name in _NAMES for path in (folder / f"{name}.gz", folder / name) if path.is_file()}


def _require_all(folder: Path) -> list[Path]:
    """The four files in the order of `_NAMES`. Raises DataError for the first that is missing."""
    files = _files(folder)
    if missing := [name for name in _NAMES if name not in files]:
        raise DataError(f"{folder / missing[0]} (or .gz) is missing: Fashion-MNIST needs all four files in one folder")
    return list(files.values())


def _part(images_path: Path, labels_path: Path) -> Pictures:
    grey = read_idx(images_path, _IMAGES_MAGIC)
    labels = read_idx(labels_path, _LABELS_MAGIC)
    if grey.shape[1:] != (_GREY_SIDE, _GREY_SIDE):
        raise DataError(f"{images_path} holds pictures of {grey.shape[1]}x{grey.shape[2]}, Fashion-MNIST's are 28x28")
    if len(grey) != len(labels) or not len(grey):
        raise DataError(
            f"{images_path.name} holds {len(grey):,} pictures, {labels_path.name} {len(labels):,} labels: "
            f"one of them is of another data set; fetch both again into {images_path.parent}"
        )
    if labels.max() >= len(CLASSES):
        raise DataError(f"{labels_path} holds the label {labels.max()}, Fashion-MNIST's are 0 to 9: fetch it again")
    border = (SIDE - _GREY_SIDE) // 2
    padded = np.pad(grey, ((0, 0), (border, border), (border, border)))
    images = np.ascontiguousarray(np.broadcast_to(padded[:, None], (len(grey), CHANNELS, SIDE, SIDE)))
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """An IDX file of bytes, plain or gzip: uint8 with the shape its header says.

    Raises DataError for a wrong magic number, a size that is not the header's, or a damaged archive.
    """
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
