"""Where pictures come from: the data sources by name."""

from __future__ import annotations

import os
import re

from lowmem.core.reading import shorten

SOURCES = ("cifar10", "cifar100", "fashion-mnist", "shapes")
FOLDER, CSV = "folder:", "csv:"
OWN = (FOLDER, CSV)  # what the others begin with; then comes a path
SOURCE_SIDE = 32  # of their pictures


def canonical_source(source: str) -> str:
    """`CIFAR-10` is `cifar10`, `fashion_mnist` is `fashion-mnist`; the path of a folder, `pictures`, is
    `folder:pictures`, and that of a file, `list.csv`, is `csv:list.csv`. Raises ValueError for what is no source."""
    if "\0" in source or source != source.encode("utf-8", "replace").decode():
        raise ValueError(f"{source!r} is no path in UTF-8, and a run records it as text: rename it")
    plain = re.sub(r"[-_ ]", "", source.lower())
    for known in SOURCES:
        if plain == known.replace("-", ""):
            return known
    if source.startswith(OWN) and path_in(source):
        return source
    if os.path.isdir(os.path.expanduser(source)):
        return f"{FOLDER}{source}"
    if source.lower().endswith(".csv") and os.path.isfile(os.path.expanduser(source)):
        return f"{CSV}{source}"
    known = f"{', '.join(SOURCES)}, folder:PATH or csv:FILE"
    raise ValueError(f"{shorten(source)!r} is no data source and no folder: use {known}")


def path_in(source: str) -> str:
    """`pictures` of `folder:pictures` or `csv:pictures`; what is no such source comes back as it is."""
    begins = next((one for one in OWN if source.startswith(one)), "")
    return source[len(begins) :]
