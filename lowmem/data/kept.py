"""Decoded pictures, kept for the next time: one safetensors file and a manifest with its SHA-256, which is written last
and is the commit record (invariant 9).

A picture is found by the state of its file (name, size, times, inode), so that one that is added, replaced or renamed
is decoded and the others are not; labels are not kept, the folders say them. What is missing, of another decoder, or
does not verify is never an error: it is decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from lowmem.core.reading import read_json, read_limited
from lowmem.data.pictures import CHANNELS, Pictures

KEY_BYTES = 16
MANIFEST = "manifest.json"
_FORMAT = 2


class KeptPictures:
    """The pictures of the files with some keys, [N], in memory: those that were kept in `folder`, and those that are
    `put`. `there`: which there are, bool [N]; the others are black."""

    def __init__(self, folder: Path, decoder: str, keys: Sequence[bytes], side: int, channels: int = CHANNELS) -> None:
        self._folder, self._decoder, self._keys = folder, decoder, keys
        self.images, self.there = find_kept(folder, decoder, keys, (channels, side, side))  # uint8 [N, C, side, side]
        self._had = int(self.there.sum())

    def put(self, number: int, pixels: NDArray[np.uint8]) -> None:
        """uint8 [side, side, C]."""
        self.images[number], self.there[number] = pixels.transpose(2, 0, 1), True

    def close(self) -> str | None:
        """Keeps what is there. What is to be said where that is not possible."""
        chosen = np.flatnonzero(self.there).tolist()
        if len(chosen) <= self._had:
            return None
        try:
            images = self.images if len(chosen) == len(self._keys) else self.images[chosen]
            keep(self._folder, self._decoder, [self._keys[number] for number in chosen], images)
        except OSError as error:
            return (
                f"the decoded pictures could not be kept in {self._folder} ({error}): next time they are decoded "
                "again; set data.cache to a folder that can be written"
            )
        return None

    def pictures(self, first: int, past: int, rows: Sequence[int], labels: Tensor) -> Pictures:
        """Of `rows`, all in [first, past); without a copy where those are all of them."""
        images = self.images[first:past] if len(rows) == past - first else self.images[rows]
        return Pictures(torch.from_numpy(images), labels)


def find_kept(
    folder: Path, decoder: str, keys: Sequence[bytes], shape: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Of the files with these `keys` the pictures (uint8 [N, *shape], zeros where there is none) and which of
    them were kept (bool [N])."""
    tensors = read_cache(folder, decoder) or {}
    nothing = torch.empty(0)
    images, there = tensors.get("images", nothing), tensors.get("keys", nothing)
    usable = images.dtype == there.dtype == torch.uint8
    if not usable or images.shape[1:] != shape or there.shape != (len(images), KEY_BYTES):
        return np.zeros((len(keys), *shape), np.uint8), np.zeros(len(keys), np.bool_)
    rows = {key.tobytes(): row for row, key in enumerate(there.numpy())}
    at = np.array([rows.get(key, -1) for key in keys], np.int64)
    kept = at >= 0
    if np.array_equal(at, np.arange(len(images))):
        return images.numpy(), kept
    found = np.zeros((len(keys), *shape), np.uint8)
    found[kept] = images.numpy()[at[kept]]
    return found, kept


def keep(folder: Path, decoder: str, keys: Sequence[bytes], images: NDArray[np.uint8]) -> None:
    """In place of what was kept before. Raises OSError if that is not possible; that is then intact."""
    joined = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
    write_cache(folder, decoder, {"images": torch.from_numpy(images), "keys": joined})


def read_cache(folder: Path, decoder: str) -> dict[str, Tensor] | None:
    """The tensors kept in `folder` by `decoder`, or None if there are none that verify."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != _FORMAT or manifest["decoder"] != decoder:
            return None
        # A foreign file of any length is not read into memory.
        data = read_limited(folder / _data_name(manifest["sha256"]), manifest["size_bytes"])
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            return None
        return safetensors.torch.load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def write_cache(folder: Path, decoder: str, tensors: dict[str, Tensor]) -> None:
    """Keeps `tensors` in `folder`, in place of what was there. Raises OSError if that is not possible; what was there
    before is then intact."""
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(tensors)
    manifest = {"format": _FORMAT, "decoder": decoder, "size_bytes": len(data)}
    manifest["sha256"] = sha256 = hashlib.sha256(data).hexdigest()
    write_atomically(folder / _data_name(sha256), data)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    for old in folder.glob("pictures-*.safetensors"):
        if old.name != _data_name(sha256):
            old.unlink(missing_ok=True)


def _data_name(sha256: str) -> str:
    # Named by its content: two processes that keep different ones do not overwrite each other.
    return f"pictures-{sha256[:16]}.safetensors"


def write_atomically(path: Path, data: bytes) -> None:
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
