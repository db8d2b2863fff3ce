"""Whether the pictures of a run are there, without reading or downloading them: what `lowmem doctor` asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowmem.config.schema import DataConfig
from lowmem.core.errors import DataError
from lowmem.data import cifar10, fashion, folder

CIFAR10_DOWNLOAD_BYTES = 170_498_071  # cifar-10-python.tar.gz
FASHION_DOWNLOAD_BYTES = 30_878_645  # the four .gz files together


@dataclass(frozen=True)
class Presence:
    """`there`: complete on this disk. `url`: where it would be downloaded from, None if it need not be."""

    there: bool
    words: str
    download_bytes: int | None = None
    url: str | None = None


def find(config: DataConfig) -> Presence:
    """Looks for the files that `load` would read: names, and for CIFAR-10 the MD5s, but no picture is decoded.

    Raises DataError where `load` would for what is missing, except that it does not try to download.
    """
    root = Path(config.root).expanduser()
    if config.source == "cifar10":
        if cifar10.complete(root, download=config.download):
            return Presence(True, f"CIFAR-10 in {root}")
        return _to_fetch("CIFAR-10", root, CIFAR10_DOWNLOAD_BYTES, cifar10.CIFAR10.url)
    if config.source == "fashion-mnist":
        place = fashion.place(root, download=config.download)
        if place is not None:
            return Presence(True, f"Fashion-MNIST in {place}")
        return _to_fetch("Fashion-MNIST", root, FASHION_DOWNLOAD_BYTES, fashion.FashionMNIST.mirrors[0])
    if config.source == "shapes":
        return Presence(True, "shapes are drawn, no files needed")
    where = Path(config.source.removeprefix("folder:")).expanduser().resolve()
    try:
        classes, parts = folder.scan(where)
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror or error}): check --data") from None
    counts = " and ".join(f"{len(entries):,} {part}" for part, entries in parts.items())
    return Presence(True, f"{counts} pictures of {len(classes)} classes in {where}")


def _to_fetch(name: str, root: Path, size_bytes: int, url: str) -> Presence:
    return Presence(False, f"{name} is not in {root}", size_bytes, url)
