"""Decoded pictures that may be more than fit into memory: kept in pieces on the disk, which are mapped.

A piece is a safetensors file of about 64 MiB: `images` uint8 [K, S, S, C], and of each of them the `keys` of its file
(as in `lowmem.data.kept`), a digest and the sums of its channels. It is written aside, flushed and renamed; then it is
named in the manifest, which is the commit record (invariant 9): whoever is killed while decoding loses a piece. Pieces
are never changed. What is missing, cut off, of another decoder, or has not the pixels that its digest says, is never an
error: it is decoded again, into a new piece.

Known not to be optimal: every load reads all pictures once, to verify them (at about 1 GB a second and core); a piece
of which one picture is still wanted stays whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from lowmem.core.errors import DataError
from lowmem.core.reading import read_json
from lowmem.core.units import format_size
from lowmem.data.kept import KEY_BYTES, MANIFEST, write_atomically
from lowmem.data.pictures import CHANNELS, MappedPictures, Progress

PIECE_BYTES = 64 << 20
DIGEST_BYTES = 16
_FORMAT = 1
_MANIFEST_LIMIT_BYTES = 16 << 20  # of a terabyte of pieces it takes three
_INDEX = ("keys", "digests", "sums")
_STALE_SECONDS = 86_400  # a piece without a manifest that is so old is nobody's who writes now
_VERIFIED_AT_A_TIME = 256

Listed = dict[str, Any]  # a piece in the manifest: its name, how many pictures it has, the SHA-256 of their index


class MappedStore:
    """The pictures of the files with some keys, [N]: those in the pieces of `folder`, and those that are `put`, which
    are kept there. `there`: which there are, bool [N]. `only_look`: nothing is verified, and nothing written."""

    def __init__(
        self, folder: Path, decoder: str, keys: Sequence[bytes], side: int, *,
        channels: int = CHANNELS, progress: Progress | None = None, only_look: bool = False,
    ) -> None:  # fmt: skip
        self._folder, self._decoder, self._keys, self._side = folder, decoder, keys, side
        self._channels, self._only_look = channels, only_look
        self._pieces: list[Tensor] = []
        self.places = np.full((len(keys), 2), -1, np.int64)
        self._digests = np.zeros((len(keys), DIGEST_BYTES), np.uint8)
        self._sums = np.zeros((len(keys), 2 * channels), np.int64)
        self._waiting: list[tuple[int, NDArray[np.uint8]]] = []
        self._unused: list[Listed] = []
        self._has_room = False  # not known yet
        numbers = {key: number for number, key in enumerate(keys) if key}
        for piece in _manifest(folder, decoder):
            tensors = self._read(piece)
            used = tensors is not None and self._take(tensors, numbers)
            if not used:
                self._unused.append(piece)
        self.there = self.places[:, 0] >= 0
        if not only_look:
            self._verify(progress)

    def _read(self, piece: Listed) -> dict[str, Tensor] | None:
        """Its tensors, mapped; None if they are not what the manifest says."""
        try:
            count = int(piece["pictures"])
            tensors = safetensors.torch.load_file(self._folder / Path(piece["name"]).name)
            wanted = {
                "keys": (torch.uint8, (count, KEY_BYTES)),
                "digests": (torch.uint8, (count, DIGEST_BYTES)),
                "sums": (torch.int64, (count, 2 * self._channels)),
                "images": (torch.uint8, (count, self._side, self._side, self._channels)),
            }
            if {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()} != wanted:
                return None
            return tensors if _index_sha256(tensors) == piece["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def _take(self, tensors: dict[str, Tensor], numbers: dict[bytes, int]) -> bool:
        """Whether any picture of it is wanted. Later pieces have what earlier ones had damaged."""
        keys = tensors["keys"].numpy()
        pairs = [(numbers[key], row) for row, one in enumerate(keys) if (key := one.tobytes()) in numbers]
        if pairs:
            mine, rows = np.array(pairs, np.int64).T
            self.places[mine] = np.stack([np.full(len(rows), len(self._pieces)), rows], axis=1)
            self._digests[mine], self._sums[mine] = (tensors[name].numpy()[rows] for name in ("digests", "sums"))
            self._pieces.append(tensors["images"])
        return bool(pairs)

    def _verify(self, progress: Progress | None) -> None:
        """Takes out those whose pixels have not their digest."""
        kept = np.flatnonzero(self.there)
        kept = kept[np.lexsort(self.places[kept].T[::-1])]  # as they lie on the disk
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for start in range(0, len(kept), _VERIFIED_AT_A_TIME):
                part = kept[start : start + _VERIFIED_AT_A_TIME]
                images = [self._pieces[piece][row].numpy() for piece, row in self.places[part]]
                for number, digest in zip(part, pool.map(_digest, images), strict=True):
                    self.there[number] = digest == self._digests[number].tobytes()
                if progress is not None:
                    progress("verifying the decoded pictures", start + len(part), len(kept))

    # -- more of them --------------------------------------------------------------------------------------------------

    def put(self, number: int, pixels: NDArray[np.uint8]) -> None:
        """uint8 [S, S, C]. Raises DataError if it cannot be kept, or there is no room for those that are missing: they
        would have to fit into memory."""
        if not self._has_room:
            self._require_room(pixels.nbytes)
        self.there[number] = True
        if not self._only_look:
            self._waiting.append((number, pixels))
            if len(self._waiting) * pixels.nbytes >= PIECE_BYTES:
                self._write()

    def _require_room(self, size: int) -> None:
        """For all that are missing, before hours are spent on decoding them."""
        place = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        needed, free = int((~self.there).sum()) * size, shutil.disk_usage(place).free
        if free < needed:
            raise DataError(
                f"the decoded pictures take {format_size(needed)} in {self._folder}, and {format_size(free)} are free "
                "there: make room, set data.cache to a folder that has it, or lower --image-size"
            )
        self._has_room = True

    def close(self) -> str | None:
        """Keeps what was put and waits. Raises DataError if that is not possible."""
        if self._waiting:
            self._write()
        return None

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        numbers, pixels = [number for number, _ in waiting], [one for _, one in waiting]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            digests = np.frombuffer(b"".join(pool.map(_digest, pixels)), np.uint8).reshape(-1, DIGEST_BYTES)
            sums = np.stack(list(pool.map(_sums, pixels)))
        keys = np.frombuffer(b"".join(self._keys[number] for number in numbers), np.uint8).reshape(-1, KEY_BYTES)
        arrays = {"keys": keys, "digests": digests, "sums": sums, "images": np.stack(pixels)}
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        sha256 = _index_sha256(tensors)
        name = f"pictures-{sha256[:16]}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / name, safetensors.torch.save(tensors))
            self._commit({"name": name, "pictures": len(numbers), "sha256": sha256})
            mapped = safetensors.torch.load_file(self._folder / name)["images"]
        except OSError as error:
            size = format_size(len(self._keys) * pixels[0].nbytes)
            raise DataError(
                f"the decoded pictures cannot be kept in {self._folder} ({error}): all of them take {size} there, and "
                "are read from there; set data.cache to a folder that has the room"
            ) from error
        self.places[numbers] = np.stack([np.full(len(numbers), len(self._pieces)), np.arange(len(numbers))], axis=1)
        self._digests[numbers], self._sums[numbers] = digests, sums
        self._pieces.append(mapped)

    def _commit(self, piece: Listed) -> None:
        """Names it in the manifest, beside those that another process may have written meanwhile, and without those of
        which nothing is wanted."""
        unused, listed = {one["name"] for one in self._unused}, _manifest(self._folder, self._decoder)
        pieces = [*(one for one in listed if one["name"] not in {*unused, piece["name"]}), piece]
        manifest = {"format": _FORMAT, "decoder": self._decoder, "pieces": pieces}
        write_atomically(self._folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        self._unused = []
        named = {one["name"] for one in pieces}
        for path in self._folder.glob("pictures-*.safetensors"):
            with suppress(OSError):  # another process has taken it away, or on Windows mapped it
                old = path.name in unused or time.time() - path.stat().st_mtime > _STALE_SECONDS
                if path.name not in named and old:
                    path.unlink()

    def pictures(self, rows: Sequence[int], labels: Tensor, image_size: int) -> MappedPictures:
        """Of `rows`, of which none is missing unless it was only looked."""
        chosen = np.asarray(rows, np.int64)
        places, digests, sums = self.places[chosen], self._digests[chosen], self._sums[chosen]
        return MappedPictures(self._pieces, places, labels, digests, sums, self._side, image_size)


def _manifest(folder: Path, decoder: str) -> list[Listed]:
    """The pieces named in it; none if there is none of this decoder."""
    try:
        manifest = read_json(folder / MANIFEST, _MANIFEST_LIMIT_BYTES)
        if manifest["format"] != _FORMAT or manifest["decoder"] != decoder:
            return []
        return [piece for piece in manifest["pieces"] if isinstance(piece["name"], str)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _index_sha256(tensors: dict[str, Tensor]) -> str:
    """Of all but the pixels, which have digests in it."""
    digest = hashlib.sha256()
    for name in _INDEX:
        digest.update(tensors[name].numpy().astype("<i8" if name == "sums" else "u1").data)
    return digest.hexdigest()


def _digest(pixels: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=DIGEST_BYTES).digest()


def _sums(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of each channel's values, then of their squares; int64 [2 C]."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    squares = np.square(flat, dtype=np.uint16)
    return np.concatenate([flat.sum(0, dtype=np.int64), squares.sum(0, dtype=np.int64)])
