"""Pictures in folders: `train/<class>/*`, `test/<class>/*` and perhaps `val/<class>/*`, of any size; or the classes
alone, of which `data.test_split` makes two parts (`lowmem.data.tree`).

They are decoded to 32x32 RGB (`lowmem.data.decoding`) and kept so (`lowmem.data.kept`). Files that cannot be used are
all named at once, and with `data.skip_damaged` left out. What is no picture by its name is passed over, and said.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem.config.paths import folder_of
from lowmem.config.schema import DataConfig
from lowmem.core.errors import DataError
from lowmem.core.reading import user_cache_folder
from lowmem.core.units import name_some
from lowmem.data.decoding import decode_all
from lowmem.data.kept import find_kept, keep
from lowmem.data.pictures import Pictures, Progress, Source
from lowmem.data.tree import Tree, readable, scan, shown

_DECODER = "pillow bicubic 32x32 rgb 2"  # what is kept is of it: raise the number when pixels change
_MOST_NAMED = 20


def read(config: DataConfig, *, progress: Progress | None = None, until: float | None = None) -> Source:
    """The pictures of the folder that `config` names, kept ones where a file has not changed. What is decoded is kept
    even if others are damaged; where that cannot be is a warning. `until`: only look, until then (of the monotonic
    clock, in seconds) and keep nothing; pictures that nobody looked at are black.

    Raises DataError for a missing part or class, files that are no pictures, and what cannot be read."""
    root = folder_of(config.source)
    with readable(root):
        tree = scan(root, config)
    files = [file for part in tree.parts.values() for file in part]
    folder = _cache_folder(root, config)
    decoder, keys = f"{_DECODER} {config.fit}", [file.key for file in files]
    images, there = find_kept(folder, decoder, keys)
    troubles = {number: file.trouble for number, file in enumerate(files) if file.trouble}
    left = [number for number in np.flatnonzero(~there).tolist() if number not in troubles]
    looked_at = 0

    def put(number: int, pixels: NDArray[np.uint8]) -> None:
        images[left[number]], there[left[number]] = pixels.transpose(2, 0, 1), True

    had = int(there.sum())
    try:
        paths = [files[i].path for i in left]
        with readable(root):
            found, looked_at = decode_all(paths, config.fit, put, progress=progress, until=until)
    finally:  # also of those that came before a signal
        trouble = _keep(folder, decoder, keys, images, there) if until is None and there.sum() > had else None
    troubles |= {left[number]: why for number, why in found.items()}
    skipped = [
        f"{shown(os.path.relpath(files[number].path, root))} ({troubles[number]})" for number in sorted(troubles)
    ]
    if skipped and not config.skip_damaged:
        raise DataError(
            f"{len(skipped):,} of {len(files):,} pictures in {shown(root)} cannot be used: "
            f"{name_some(skipped, _MOST_NAMED)}: replace them, take them out, or go on without them (--skip-damaged)"
        )
    said = [*tree.warnings, *([] if trouble is None else [trouble])]
    if skipped:
        said.append(f"{len(skipped):,} of {len(files):,} pictures are left out, as asked: {name_some(skipped, 3)}")
    source = _assemble(root, tree, images, {*troubles})
    return replace(source, warnings=tuple(said), skipped=tuple(skipped), unchecked=len(left) - looked_at)


def _assemble(root: Path, tree: Tree, images: NDArray[np.uint8], without: set[int]) -> Source:
    """Raises DataError where a class has no picture (left) in a part that needs some of each."""
    parts: dict[str, Pictures] = {}
    first = 0
    for part, files in tree.parts.items():
        rows = [number for number in range(first, first + len(files)) if number not in without]
        labels = torch.tensor([files[number - first].label for number in rows], dtype=torch.int64)
        mine = images[first : first + len(files)] if len(rows) == len(files) else images[rows]
        first += len(files)
        counts = torch.bincount(labels, minlength=len(tree.classes))
        if part != "val" and not counts.all():
            name = tree.classes[int((counts == 0).nonzero()[0])]
            left = " that can be used" if without else ""
            raise DataError(
                f"{shown(tree.places[part])}/{name} has no pictures{left}: fill it or take the class out of all parts"
            )
        parts[part] = Pictures(torch.from_numpy(mine), labels)
    notes = list(tree.notes)
    if tree.strays:
        notes.append(f"passed over in {shown(root)}, as no pictures of a class: {name_some(tree.strays, 5)}")
    name = f"folder:{shown(root.name)}"
    val = parts.get("val")
    return Source(name, tree.classes, parts["train"], parts.get("test"), val, tuple(notes))


def _cache_folder(root: Path, config: DataConfig) -> Path:
    """Of its own for each way to fit: an old run that goes on does not throw away what a new one has decoded."""
    named = os.fsencode(root) + (b"" if config.fit == "stretch" else b"\0crop")
    kept = Path(config.cache).expanduser() if config.cache else user_cache_folder()
    return kept / f"folder-{hashlib.sha256(named).hexdigest()[:16]}"


def _keep(
    folder: Path, decoder: str, keys: Sequence[bytes], images: NDArray[np.uint8], there: NDArray[np.bool_]
) -> str | None:
    """What is to be said where that is not possible."""
    chosen = np.flatnonzero(there).tolist()
    try:
        whole = len(chosen) == len(keys)
        keep(folder, decoder, [keys[number] for number in chosen], images if whole else images[chosen])
    except OSError as error:
        return (
            f"the decoded pictures could not be kept in {folder} ({error}): next time they are decoded again; set "
            "data.cache to a folder that can be written"
        )
    return None
