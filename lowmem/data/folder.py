"""Pictures in folders: `train/<class>/*` and `test/<class>/*`, of any size, as 32x32 RGB.

They are decoded with Pillow, resized with its BICUBIC filter (which widens with the scale, so shrinking does not alias)
unless they are 32x32 already, and kept decoded in a cache: one safetensors file and a manifest with its SHA-256, which
is written last and is the commit record (invariant 9). A cache that is missing, of another state of the folder (a name,
a size, a modification time), or does not verify is never an error, it is rebuilt.

Known limitations: proportions are not kept; transparency is dropped; one frame of an animation is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lowmem.core.errors import DataError
from lowmem.core.reading import read_json, read_limited, user_cache_folder
from lowmem.data.pictures import CHANNELS, SIDE, Pictures, Progress, Source

PARTS = ("train", "test")
FILTER = Image.Resampling.BICUBIC
_DECODER = "pillow bicubic 32x32 rgb 1"  # part of the cache's signature: raise the number when pixels change
_IGNORED = {"thumbs.db", "desktop.ini"}  # files that a file manager leaves behind; hidden ones are ignored too
_MANIFEST = "manifest.json"
_FORMAT = 1  # of the cache
_CHUNK = 256  # pictures a task: few enough for a smooth progress, many enough that tasks cost nothing


@dataclass(frozen=True)
class PictureFile:
    """A picture file; `size_bytes` and `modified_ns` tell whether it changed."""

    path: str
    label: int
    size_bytes: int
    modified_ns: int


def read(path: str | Path, *, cache: str | Path | None, progress: Progress | None) -> Source:
    """The pictures under `path`, from the cache if nothing has changed since; one that cannot be written is a warning.
    Raises DataError for a missing part or class and for a file that is no picture."""
    root = Path(path).expanduser().resolve()
    classes, parts = scan(root)
    folder_name = f"folder-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}"
    keep = (Path(cache).expanduser() if cache else user_cache_folder()) / folder_name
    signature = _signature(root, classes, parts)
    pictures = _from_cache(keep, signature, parts)
    if pictures is None:
        pictures = _decode_parts(parts, progress)
        tensors = {f"{part}.{name}": getattr(pictures[part], name) for part in PARTS for name in ("images", "labels")}
        try:
            write_cache(keep, signature, tensors)
        except OSError as error:
            warnings.warn(
                f"the decoded pictures could not be kept in {keep} ({error}): next time they are decoded "
                "again; set data.cache to a folder that can be written",
                stacklevel=2,
            )
    return Source(f"folder:{root.name}", classes, pictures["train"], pictures["test"])


def scan(root: Path) -> tuple[tuple[str, ...], dict[str, list[PictureFile]]]:
    """Class names (sorted) and the files of each part, by class and name. Raises DataError."""
    for part in PARTS:
        if not (root / part).is_dir():
            raise DataError(f"{root / part} is missing: pictures belong in {root}/train/<class>/ and /test/<class>/")
    names = {part: [entry.name for entry in _entries(root / part) if entry.is_dir()] for part in PARTS}
    if not names["train"]:
        raise DataError(f"{root / 'train'} has no class folders: pictures belong in train/<class>/")
    for here, there in (("test", "train"), ("train", "test")):
        if absent := sorted(set(names[there]) - set(names[here])):
            raise DataError(
                f"{root / here / absent[0]} is missing, but {there} has {absent[0]!r}: both parts need "
                f"the same classes ({len(names['train'])} in train, {len(names['test'])} in test)"
            )
    classes = tuple(names["train"])
    return classes, {
        part: [file for label, name in enumerate(classes) for file in _files(root / part / name, label)]
        for part in PARTS
    }


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        kept = [one for one in entries if not one.name.startswith(".") and one.name.lower() not in _IGNORED]
    return sorted(kept, key=lambda entry: entry.name)


def _files(folder: Path, label: int) -> list[PictureFile]:
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            raise DataError(f"{entry.path} is a folder inside a class: move its pictures up or take it out")
        stat = entry.stat()
        if stat.st_size == 0:
            raise DataError(f"{entry.path} is empty: delete it or put the picture back")
        found.append(PictureFile(entry.path, label, stat.st_size, stat.st_mtime_ns))
    if not found:
        raise DataError(f"{folder} has no pictures: fill it or take the class out of both parts")
    return found


def _signature(root: Path, classes: tuple[str, ...], parts: dict[str, list[PictureFile]]) -> str:
    digest = hashlib.sha256("\0".join((_DECODER, *classes)).encode())
    for part in PARTS:
        for entry in parts[part]:
            name = os.path.relpath(entry.path, root)
            digest.update(f"\0{name}\0{entry.size_bytes}\0{entry.modified_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _from_cache(folder: Path, signature: str, parts: dict[str, list[PictureFile]]) -> dict[str, Pictures] | None:
    tensors = read_cache(folder, signature) or {}
    try:
        found = {part: Pictures(tensors[f"{part}.images"], tensors[f"{part}.labels"]) for part in PARTS}
    except (KeyError, ValueError):
        return None
    return found if all(len(found[part]) == len(parts[part]) for part in PARTS) else None


def _decode_parts(parts: dict[str, list[PictureFile]], progress: Progress | None) -> dict[str, Pictures]:
    """Every file decoded, in threads: Pillow lets others run while it decodes. After a damaged one the rest is left."""
    files = [file for part in PARTS for file in parts[part]]
    images = np.empty((len(files), CHANNELS, SIDE, SIDE), dtype=np.uint8)
    starts = range(0, len(files), _CHUNK)
    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 1)) as pool:
        decoded = pool.map(lambda start: [decode(file.path) for file in files[start : start + _CHUNK]], starts)
        for start, chunk in zip(starts, decoded, strict=True):
            images[start : start + len(chunk)] = np.stack(chunk).transpose(0, 3, 1, 2)
            if progress is not None:
                progress("decoding pictures", start + len(chunk), len(files))
    labels = torch.tensor([file.label for file in files], dtype=torch.int64)
    sizes = [len(parts[part]) for part in PARTS]
    split = map(Pictures, torch.from_numpy(images).split(sizes), labels.split(sizes))
    return dict(zip(PARTS, split, strict=True))


def decode(path: str) -> NDArray[np.uint8]:
    """A picture file as uint8 [32, 32, 3]. Raises DataError if it is none, damaged, or has 16-bit levels."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a channel ({picture.mode}): convert it to 8 bits")
            # RGB before resizing: palette indices must not be interpolated.
            rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
            if rgb.size != (SIDE, SIDE):
                rgb = rgb.resize((SIDE, SIDE), FILTER)
            return np.asarray(rgb)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no picture or is damaged ({error}): replace it or take it out") from error


def read_cache(folder: Path, signature: str) -> dict[str, Tensor] | None:
    """The tensors kept in `folder` for `signature`, or None if there are none that verify."""
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["format"] != _FORMAT or manifest["signature"] != signature:
            return None
        # A foreign file of any length is not read into memory.
        data = read_limited(folder / _data_name(signature), manifest["size_bytes"])
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            return None
        return safetensors.torch.load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def write_cache(folder: Path, signature: str, tensors: dict[str, Tensor]) -> None:
    """Keeps `tensors` in `folder` for `signature`, in place of what was there. Raises OSError if that is not possible;
    what was there before is then intact."""
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(tensors)
    manifest = {"format": _FORMAT, "signature": signature, "size_bytes": len(data)}
    manifest["sha256"] = hashlib.sha256(data).hexdigest()
    _write_atomically(folder / _data_name(signature), data)
    _write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
    for old in folder.glob("pictures-*.safetensors"):
        if old.name != _data_name(signature):
            old.unlink(missing_ok=True)


def _data_name(signature: str) -> str:
    # Named by its content's signature: two processes that build different states do not overwrite each other.
    return f"pictures-{signature[:16]}.safetensors"


def _write_atomically(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
