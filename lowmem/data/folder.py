"""Pictures in folders: `train/<class>/*`, `test/<class>/*` and perhaps `val/<class>/*`, of any size; or the classes
alone, of which `data.test_split` makes two parts (`lowmem.data.tree`).

They are decoded to square RGB (`lowmem.data.decoding`) and kept so: of a size below 64 in memory and in one file
(`lowmem.data.kept`), from there on with a border to crop from and on the disk (`lowmem.data.mapped`). Files that cannot
be used are all named at once, and with `data.skip_damaged` left out. What is no picture by its name is passed over, and
said.
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
from lowmem.config.sources import SOURCE_SIDE
from lowmem.core.errors import DataError
from lowmem.core.reading import user_cache_folder
from lowmem.core.units import name_some
from lowmem.data.decoding import decode_all
from lowmem.data.kept import KeptPictures
from lowmem.data.mapped import MappedStore
from lowmem.data.pictures import AnyPictures, Progress, Source, are_mapped, stored_side
from lowmem.data.tree import Tree, readable, scan, shown

_DECODER = "pillow bicubic {side}x{side} rgb 2"  # what is kept is of it: raise the number when pixels change
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
    store = _store(root, config, [file.key for file in files], progress, only_look=until is not None)
    troubles = {number: file.trouble for number, file in enumerate(files) if file.trouble}
    left = [number for number in np.flatnonzero(~store.there).tolist() if number not in troubles]
    looked_at, trouble = 0, None

    def put(number: int, pixels: NDArray[np.uint8]) -> None:
        store.put(left[number], pixels)

    try:
        paths = [files[i].path for i in left]
        with readable(root):
            found, looked_at = decode_all(paths, config.fit, stored_side(config), put, progress=progress, until=until)
    finally:  # also of those that came before a signal
        trouble = store.close() if until is None else None
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
    source = _assemble(root, tree, store, {*troubles}, config.image_size)
    return replace(source, warnings=tuple(said), skipped=tuple(skipped), unchecked=len(left) - looked_at)


def _assemble(root: Path, tree: Tree, store: Store, without: set[int], image_size: int) -> Source:
    """Raises DataError where a class has no picture (left) in a part that needs some of each."""
    parts: dict[str, AnyPictures] = {}
    names: dict[str, tuple[str, ...]] = {}
    first = 0
    for part, files in tree.parts.items():
        rows = [number for number in range(first, first + len(files)) if number not in without]
        names[part] = tuple(shown(files[number - first].path) for number in rows)
        labels = torch.tensor([files[number - first].label for number in rows], dtype=torch.int64)
        counts = torch.bincount(labels, minlength=len(tree.classes))
        if part != "val" and not counts.all():
            name = tree.classes[int((counts == 0).nonzero()[0])]
            left = " that can be used" if without else ""
            raise DataError(
                f"{shown(tree.places[part])}/{name} has no pictures{left}: fill it or take the class out of all parts"
            )
        if isinstance(store, MappedStore):
            parts[part] = store.pictures(rows, labels, image_size)
        else:
            parts[part] = store.pictures(first, first + len(files), rows, labels)
        first += len(files)
    notes = list(tree.notes)
    if tree.strays:
        notes.append(f"passed over in {shown(root)}, as no pictures of a class: {name_some(tree.strays, 5)}")
    name = f"folder:{shown(root.name)}"
    val = parts.get("val")
    return Source(name, tree.classes, parts["train"], parts.get("test"), val, tuple(notes), files=names)


Store = KeptPictures | MappedStore


def _store(
    root: Path, config: DataConfig, keys: Sequence[bytes], progress: Progress | None, *, only_look: bool
) -> Store:
    """What is kept already of the files with these keys, and will be of the others."""
    folder, side = _cache_folder(root, config), stored_side(config)
    decoder = f"{_DECODER.format(side=side)} {config.fit}"
    if are_mapped(config):
        return MappedStore(folder, decoder, keys, side, progress=progress, only_look=only_look)
    return KeptPictures(folder, decoder, keys, side)


def _cache_folder(root: Path, config: DataConfig) -> Path:
    """Of its own for each way to fit and size: an old run that goes on does not throw away what a new one has
    decoded."""
    named = os.fsencode(root) + (b"" if config.fit == "stretch" else b"\0crop")
    if stored_side(config) != SOURCE_SIDE:  # older versions had no other
        named += f"\0{stored_side(config)}".encode()
    kept = Path(config.cache).expanduser() if config.cache else user_cache_folder()
    return kept / f"folder-{hashlib.sha256(named).hexdigest()[:16]}"
