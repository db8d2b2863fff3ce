"""Decoded pictures kept on disk: one safetensors file and a manifest with its SHA-256.

The manifest is written last and is the commit record (invariant 9): what it does not name does not exist. A
cache that is missing, of another folder state, or does not verify is never an error, it is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lowmem.core.reading import read_json, read_limited

_MANIFEST = "manifest.json"
_FORMAT = 1


def read(folder: Path, signature: str) -> dict[str, Tensor] | None:
    """The tensors kept in `folder` for `signature`, or None if there are none that verify."""
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["format"] != _FORMAT or manifest["signature"] != signature:
            return None
        path = folder / _data_name(signature)
        # The size first: a foreign file of any length is not read into memory.
        if path.stat().st_size != manifest["size_bytes"]:
            return None
        data = read_limited(path, manifest["size_bytes"])
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            return None
        return safetensors.torch.load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def write(folder: Path, signature: str, tensors: dict[str, Tensor]) -> None:
    """Keeps `tensors` in `folder` for `signature`, in place of what was there.

    Raises OSError if that is not possible; what was there before is then intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(tensors)
    manifest = {
        "format": _FORMAT,
        "signature": signature,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
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
