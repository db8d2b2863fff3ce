"""What is in a folder of pictures: its parts (`train/`, `test/`, `val/`, or the classes alone), the classes, their
files, and what is none of it. What can stand under a name (links in a circle, pipes, bytes that are no UTF-8) is met
here; nothing is decoded.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError
from lowmem.core.units import name_some
from lowmem.data.decoding import is_picture
from lowmem.data.kept import KEY_BYTES

PARTS = ("train", "test", "val")
# What file managers and storage leave behind; hidden files and folders are passed over too.
_LITTER = {"thumbs.db", "desktop.ini", "@eadir", "__macosx"}
_TEXT = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".md", ".html", ".htm", ".log", ".ini",
    ".py", ".ipynb", ".db", ".url", ".lnk", ".zip", ".tar", ".gz",
}  # fmt: skip


@dataclass(frozen=True)
class PictureFile:
    """A file that is to be a picture. `key` tells whether it is the same file in the same state as before; `trouble`:
    why it cannot be read at all, "" if it can."""

    path: str
    label: int
    key: bytes
    trouble: str = ""


@dataclass(frozen=True)
class Tree:
    """What is in a folder, or listed. `parts`: for those of `PARTS` that there are, their files, in a folder by class
    and name; `places`: there the folder of their classes; `strays`: what was passed over; `notes`, `warnings`:
    sentences for the user."""

    classes: tuple[str, ...]
    places: Mapping[str, Path]
    parts: Mapping[str, Sequence[PictureFile]]
    strays: Sequence[str]
    notes: Sequence[str]
    warnings: Sequence[str]


def scan(root: Path, config: DataConfig) -> Tree:
    """The classes (sorted), the files of each part, and what was passed over; no picture is decoded. Raises DataError,
    OSError."""
    places, notes = _places(root, config)
    strays: list[str] = []
    if root not in places.values():
        used = {place.name for place in places.values()}
        strays += [entry.name for entry in _entries(root) if entry.name not in used]
    found = {part: _folders(root, place, strays) for part, place in places.items()}
    names = found["train"]
    _refuse_unlike(places, found)
    if len(names) < 2:
        there = f"only one class ({shown(names[0])!r})" if names else "no class folders"
        raise DataError(
            f"{shown(places['train'])} has {there}: pictures belong in a folder for each class, two at the least, like "
            f"{shown(places['train'])}/cat/ and /dog/"
        )
    label = {name: number for number, name in enumerate(names)}
    parts = {
        part: [
            file for name in found[part] for file in _files(root, places[part] / name, label[name], strays)
        ]
        for part in PARTS if part in places
    }  # fmt: skip
    return Tree(tuple(map(shown, names)), places, parts, [shown(stray) for stray in strays], notes, look_alike(names))


def _places(root: Path, config: DataConfig) -> tuple[dict[str, Path], list[str]]:
    """Part -> the folder of its classes, and what of that must be said. Raises DataError."""
    there = {part: root / part for part in PARTS if os.path.isdir(root / part)}
    if not config.val_folder:
        there.pop("val", None)
    if "train" in there and "test" in there:
        return there, []
    belong = f"pictures belong in {shown(root)}/train/<class>/ and /test/<class>/"
    split = "add --test-split 0.2 to test on a fifth of"
    if "train" in there:
        if config.test_split is not None:
            return there, []
        if "val" in there:
            note = f"{shown(root)} has no test/: errors are measured on val/, and nothing is held back"
            return {"train": there["train"], "test": there["val"]}, [note]
        raise DataError(f"{shown(root / 'test')} is missing: {belong}; or {split} the training pictures")
    if "test" in there or not root.is_dir():
        raise DataError(f"{shown(root / 'train')} is missing: {belong}")
    if config.test_split is None:
        raise DataError(f"{shown(root / 'train')} is missing: {belong}; if its folders are the classes, {split} them")
    return {"train": root}, []


def _refuse_unlike(places: Mapping[str, Path], found: Mapping[str, Sequence[str]]) -> None:
    """Raises DataError unless train and test have the same classes, and val no others."""
    for there, here in (("train", "test"), ("test", "train"), ("val", "train")):
        absent = sorted(set(found.get(there, ())) - set(found[here])) if here in found else []
        if not absent:
            continue
        same = [name for name in found[here] if _normal(name) == _normal(absent[0])]
        if same:
            raise DataError(
                f"the class {code_points(absent[0])} of {there} is written {code_points(same[0])} in {here}: give both "
                "folders the same name"
            )
        raise DataError(
            f"{shown(places[here] / absent[0])} is missing, but {there} has {shown(absent[0])!r}: both parts need "
            f"the same classes ({len(found[there])} in {there}, {len(found[here])} in {here})"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _folders(root: Path, place: Path, strays: list[str]) -> list[str]:
    """The class folders in `place`; what else is there is added to `strays`."""
    names = []
    for entry in _entries(place):
        # Not the entry's own method, which raises for links in a circle.
        if os.path.isdir(entry.path) and not _is_litter(entry.name):
            names.append(entry.name)
        else:
            strays.append(os.path.relpath(entry.path, root))
    return names


def _files(root: Path, folder: Path, label: int, strays: list[str]) -> list[PictureFile]:
    found = []
    for entry in _entries(folder):
        name = os.path.relpath(entry.path, root)
        if _is_litter(entry.name):
            strays.append(name)
        elif os.path.isdir(entry.path):
            raise DataError(f"{shown(entry.path)} is a folder inside a class: move its pictures up or take it out")
        else:
            file = file_of(entry.path, name, label)
            strays.append(name) if _is_text(file) else found.append(file)
    return found


def file_of(path: str, name: str, label: int) -> PictureFile:
    """`name`: what it is called in its data set, by which a kept picture is found again."""
    try:
        # Not the entry's own, which knows no inode on Windows.
        status = os.stat(path)
    except OSError as error:
        broken = os.path.islink(path)
        return PictureFile(path, label, b"", "a link that leads nowhere" if broken else str(error.strerror or error))
    if not stat.S_ISREG(status.st_mode):  # a pipe would never end
        return PictureFile(path, label, b"", "no regular file")
    # Times alone do not tell: an archive sets them, and renaming keeps them.
    state = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0{status.st_ino}\0"
    key = hashlib.blake2b(state.encode() + os.fsencode(name), digest_size=KEY_BYTES).digest()
    return PictureFile(path, label, key, "" if status.st_size else "empty")


def picture_files(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Of each of `paths` the file, whatever its name, or of a folder all files in it and below, by name. There hidden
    ones, text that is no picture and links to folders are passed over. With each, why it cannot be read at all, "" if
    it can."""
    for path in paths:
        if not os.path.isdir(path):
            yield path, file_of(path, path, 0).trouble
            continue
        refused: list[OSError] = []
        for folder, folders, names in os.walk(path, onerror=refused.append):
            folders[:] = sorted(name for name in folders if not _is_litter(name))
            for name in sorted(name for name in names if not _is_litter(name)):
                file = file_of(os.path.join(folder, name), name, 0)
                if not _is_text(file):
                    yield file.path, file.trouble
        for error in refused:
            yield str(error.filename), str(error.strerror or error)


def _is_text(file: PictureFile) -> bool:
    """By its name, and it is no picture all the same."""
    suffix = os.path.splitext(file.path)[1].lower()
    return suffix in _TEXT and (bool(file.trouble) or not is_picture(file.path))


@contextmanager
def readable(root: Path) -> Iterator[None]:
    """Turns what the system refuses into DataError."""
    try:
        yield
    except OSError as error:
        where = shown(error.filename or root)
        raise DataError(f"{where} cannot be read ({error.strerror or error}): check --data and permissions") from None


# -- names -------------------------------------------------------------------------------------------------------------


def shown(name: object) -> str:
    """A name of the file system as text that can be written anywhere: bytes that are no UTF-8 as `\\xe9`."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def code_points(name: str) -> str:
    """`caf<U+00E9>`: what looks alike can be told apart."""
    return "".join(one if one.isascii() else f"<U+{ord(one):04X}>" for one in name)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def look_alike(names: Sequence[str]) -> list[str]:
    """What is to be said of names of classes that differ in their normalisation or case only."""
    groups = (list(group) for _, group in groupby(sorted(names, key=_normal), key=_normal))
    alike = [" and ".join(map(code_points, group)) for group in groups if len(group) > 1]
    return [f"classes whose names look alike are kept apart: {name_some(alike, 3)}"] if alike else []
