"""Where pictures come from: the data sources by name."""

from __future__ import annotations

import os
import re

from lowmem.core.reading import shorten

SOURCES = ("cifar10", "cifar100", "fashion-mnist", "shapes")  # and folder:PATH
SOURCE_SIDE = 32  # of their pictures


def canonical_source(source: str) -> str:
    """`CIFAR-10` is `cifar10`, `fashion_mnist` is `fashion-mnist`; the path of a folder, `pictures`, is
    `folder:pictures`. Raises ValueError for what is neither a source nor a folder."""
    if "\0" in source or source != source.encode("utf-8", "replace").decode():
        raise ValueError(f"{source!r} is no path in UTF-8, and a run records it as text: rename the folder")
    plain = re.sub(r"[-_ ]", "", source.lower())
    for known in SOURCES:
        if plain == known.replace("-", ""):
            return known
    if source.startswith("folder:") and len(source) > 7:
        return source
    if os.path.isdir(os.path.expanduser(source)):
        return f"folder:{source}"
    raise ValueError(f"{shorten(source)!r} is no data source and no folder: use {', '.join(SOURCES)} or folder:PATH")
