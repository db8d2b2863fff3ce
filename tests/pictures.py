"""Pictures to train on: photographs, where their archive lies beside the checkout, and class folders of noise."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10-jpeg.tar.xz"  # {train,test}/<class>/*.jpg
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def photographs(
    most: Mapping[str, int], classes: Collection[str] = CIFAR_CLASSES
) -> Iterator[tuple[str, str, str, bytes]]:
    """Of each part so many of each class, in the order of the archive: part, class, name and JPEG. Without the archive
    the test is skipped."""
    if not CIFAR.is_file():
        pytest.skip(f"needs pictures: {CIFAR}")
    wanted, count = len(classes) * sum(most.values()), Counter[tuple[str, str]]()
    with tarfile.open(CIFAR) as archive:
        for member in archive:
            if not member.isfile() or member.name.count("/") != 2:
                continue
            part, kind, name = member.name.split("/")
            if kind not in classes or count[part, kind] >= most.get(part, 0):
                continue
            count[part, kind] += 1
            file = archive.extractfile(member)
            assert file is not None
            yield part, kind, name, file.read()
            if count.total() == wanted:
                return
    raise AssertionError(f"the archive holds {count.total()} of {wanted} pictures")


def pets(folder: Path, train: int = 6, test: int = 2, *, size: tuple[int, int] = (40, 60)) -> Path:
    """Class folders `cat` and `dog` in `folder`/pets, with so many pictures of noise each; `size`: height, width."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for name in ("cat", "dog"):
            (folder / "pets" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "pets" / part / name / f"{number}.png")
    return folder / "pets"
