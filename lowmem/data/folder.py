"""Pictures in folders: `train/<class>/*`, `test/<class>/*` and perhaps `val/<class>/*`, of any size; or the classes
alone, of which `data.test_split` makes two parts (`lowmem.data.tree`); or pictures that a file lists
(`lowmem.data.listed`).

They are decoded to square RGB, or grey (`lowmem.data.decoding`), and kept so: of a size below 64 in memory and in one
file (`lowmem.data.kept`), from there on with a border to crop from and on the disk (`lowmem.data.mapped`). Files that
cannot be used are all named at once, and with `data.skip_damaged` left out. What is no picture by its name is passed
over, and said.
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
from lowmem.config.sections import DataConfig
from lowmem.config.sources import CSV, SOURCE_SIDE
from lowmem.core.errors import DataError
from lowmem.core.reading import user_cache_folder
from lowmem.core.units import name_some
from lowmem.data.decoding import decode_all
from lowmem.data.kept import KeptPictures
from lowmem.data.listed import read_list
from lowmem.data.mapped import MappedStore
from lowmem.data.pictures import AnyPictures, Progress, Source, are_mapped, stored_side
from lowmem.data.tree import Tree, readable, scan, shown

# What is kept is of it: raise the number when pixels change.
_DECODER = {3: "pillow bicubic {side}x{side} rgb 2", 1: "pillow bicubic {side}x{side} grey 2"}
_MOST_NAMED = 20


def read(config: DataConfig, *, progress: Progress | None = None, until: float | None = None) -> Source:
    """The pictures of the folder or CSV file that `config` names, kept ones where a file has not changed. What
    is decoded is kept even if others are damaged; where that cannot be is a warning. `until`: only look, until then (of
    the monotonic clock, in seconds) and keep nothing; pictures that nobody looked at are black.

    Raises DataError for a missing part or class, files that are no pictures, and what cannot be read."""
    place = folder_of(config.source)
    is_listed = config.source.startswith(CSV)
    root = place.parent if is_listed else place
    with readable(place):
        tree = read_list(place, config) if is_listed else scan(place, config)
    files = [file for part in tree.parts.values() for file in part]
    store = _store(place, config, [file.key for file in files], progress, only_look=until is not None)
    troubles = {number: file.trouble for number, file in enumerate(files) if file.trouble}
    left = [number for number in np.flatnonzero(~store.there).tolist() if number not in troubles]
    looked_at, trouble = 0, None

    def put(number: int, pixels: NDArray[np.uint8]) -> None:
        store.put(left[number], pixels)

    try:
        paths = [files[i].path for i in left]
        with readable(root):
            found, looked_at = decode_all(
                paths, config.fit, stored_side(config), put, channels=config.channels, progress=progress, until=until
            )
    finally:  # also of those that came before a signal
        trouble = store.close() if until is None else None
    troubles |= {left[number]: why for number, why in found.items()}
    within = f"{root}{os.sep}"
    skipped = [f"{shown(files[number].path.removeprefix(within))} ({troubles[number]})" for number in sorted(troubles)]
    if skipped and not config.skip_damaged:
        raise DataError(
            f"{len(skipped):,} of {len(files):,} pictures in {shown(place)} cannot be used: "
            f"{name_some(skipped, _MOST_NAMED)}: replace them, take them out, or go on without them (--skip-damaged)"
        )
    said = [*tree.warnings, *([] if trouble is None else [trouble])]
    if skipped:
        said.append(f"{len(skipped):,} of {len(files):,} pictures are left out, as asked: {name_some(skipped, 3)}")
    source = _assemble(place, tree, store, {*troubles}, config)
    return replace(source, warnings=tuple(said), skipped=tuple(skipped), unchecked=len(left) - looked_at)


def _assemble(place: Path, tree: Tree, store: Store, without: set[int], config: DataConfig) -> Source:
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
            has = f"{shown(place)} has no pictures of {name} to {part} on"
            if part in tree.places:
                has = f"{shown(tree.places[part])}/{name} has no pictures"
            raise DataError(f"{has}{left}: add some, or take the class out of all parts")
        if isinstance(store, MappedStore):
            parts[part] = store.pictures(rows, labels, config.image_size)
        else:
            parts[part] = store.pictures(first, first + len(files), rows, labels)
        first += len(files)
    notes = list(tree.notes)
    if tree.strays:
        notes.append(f"passed over in {shown(place)}, as no pictures of a class: {name_some(tree.strays, 5)}")
    name = config.source.partition(":")[0] + f":{shown(place.name)}"
    val = parts.get("val")
    return Source(name, tree.classes, parts["train"], parts.get("test"), val, tuple(notes), files=names)


Store = KeptPictures | MappedStore


def _store(
    place: Path, config: DataConfig, keys: Sequence[bytes], progress: Progress | None, *, only_look: bool
) -> Store:
    """What is kept already of the files with these keys, and will be of the others."""
    folder, side, channels = _cache_folder(place, config), stored_side(config), config.channels
    decoder = f"{_DECODER[channels].format(side=side)} {config.fit}"
    if are_mapped(config):
        return MappedStore(folder, decoder, keys, side, channels=channels, progress=progress, only_look=only_look)
    return KeptPictures(folder, decoder, keys, side, channels)


def _cache_folder(place: Path, config: DataConfig) -> Path:
    """Of its own for each way to fit, size and channels: an old run that goes on does not throw away what a new one has
    decoded."""
    named = os.fsencode(place) + (b"" if config.fit == "stretch" else b"\0crop")
    if stored_side(config) != SOURCE_SIDE:  # older versions had no other
        named += f"\0{stored_side(config)}".encode()
    if config.channels == 1:
        named += b"\0grey"
    kept = Path(config.cache).expanduser() if config.cache else user_cache_folder()
    return kept / f"folder-{hashlib.sha256(named).hexdigest()[:16]}"
