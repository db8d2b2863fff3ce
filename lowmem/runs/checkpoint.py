"""Checkpoints: a folder of safetensors and JSON that exists when its commit record does (invariants 8 and 9).

    checkpoints/step-00004692/   model.safetensors optimizer.safetensors state.json manifest.json

`manifest.json` holds the size and SHA-256 of the other files and is written last, in a folder that is still aside.
Then everything is read back and verified, the folder gets its name, and only then older ones are pruned.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import CorruptCheckpoint, DiskError
from lowmem.runs.atomic import fsync_folder, replace_path, write_synced
from lowmem.runs.kept import read_position

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "lowmem-checkpoint"
VERSION = 1
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
_FILES = (*_TENSOR_FILES, "state.json")
_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_MANIFEST_LIMIT_BYTES = 1 << 20
_ASIDE = ".aside-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved. Tensors are on the CPU and contiguous; `state` is plain JSON."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: Path, checkpoint: Checkpoint, *, keep: int, keep_every: int | None = None) -> Path:
    """Writes `folder/step-N`, verifies it, then prunes all but the `keep` newest and, with `keep_every`, those of the
    end of every so-many-th epoch. Returns its path.

    Raises DiskError if the disk refuses; what was saved before is then untouched.
    """
    target = folder / folder_name(checkpoint.step)
    aside = folder / f"{_ASIDE}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write_files(aside, checkpoint)
        verify(aside, expected_step=checkpoint.step)
        _put_in_place(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(error, target) from error
    _prune(folder, keep, keep_every)
    return target


def _write_files(aside: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save as encode

    payload = {
        "model.safetensors": encode(dict(checkpoint.model)),
        "optimizer.safetensors": encode(dict(checkpoint.optimizer)),
        "state.json": json.dumps(checkpoint.state, indent=1).encode(),
    }
    files = {}
    for name, data in payload.items():
        write_synced(aside / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": FORMAT, "version": VERSION, "step": checkpoint.step, "files": files}
    write_synced(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
    fsync_folder(aside)


def _put_in_place(aside: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    if target.exists():
        # The same step saved again (its evaluation was still to come the first time). A folder cannot replace a
        # folder in one call; the old one keeps a name that readers know until the new one is there.
        shutil.rmtree(old, ignore_errors=True)
        replace_path(target, old)
    replace_path(aside, target)
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Deletes what is older than the `keep` newest and not kept for its epoch. A folder loses its commit record first,
    so that a half-deleted one is never taken for a checkpoint. Failing to delete is no reason to stop a run."""
    for path in found(folder)[max(keep, 2) :]:
        if keep_every is not None and _is_every(path, keep_every):
            continue
        try:
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError:
            continue


def _is_every(path: Path, epochs: int) -> bool:
    try:
        return read_position(path).is_every(epochs)
    except CorruptCheckpoint:
        return False


def found(folder: Path) -> list[Path]:
    """The checkpoints by name, newest first, verified or not. Links are no checkpoints."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    named = [(match, path) for match, path in named if not path.is_symlink()]
    return [path for match, path in sorted(named, key=lambda m: (-int(m[0][1]), m[0][2] is not None))]


def verify(path: Path, *, expected_step: int | None = None) -> dict[str, bytes]:
    """The bytes of each file, after checking sizes and hashes against the commit record.

    Raises CorruptCheckpoint saying which file and why.
    """
    try:
        return _verified(path, expected_step)
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read ({error.strerror or error})") from None


def _verified(path: Path, expected_step: int | None) -> dict[str, bytes]:
    manifest = _read_manifest(path)
    match = _NAME.fullmatch(path.name.removeprefix(_ASIDE))
    step = expected_step if expected_step is not None else int(match[1]) if match else None
    if manifest.get("step") != step:
        raise CorruptCheckpoint(
            f"{path}: the commit record is of step {manifest.get('step')}, the folder of step {step}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != set(_FILES):
        raise CorruptCheckpoint(f"{path}: the commit record does not list exactly {', '.join(_FILES)}")
    contents = {}
    for name in _FILES:
        entry, file = files[name], path / name
        if not isinstance(entry, dict):
            raise CorruptCheckpoint(f"{path}: the commit record of {name} is damaged")
        if file.is_symlink() or not file.is_file():
            raise CorruptCheckpoint(f"{file} is missing")
        size = file.stat().st_size
        if size != entry.get("bytes"):
            raise CorruptCheckpoint(f"{file} has {size} bytes, the commit record says {entry.get('bytes')}")
        contents[name] = file.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != entry.get("sha256"):
            raise CorruptCheckpoint(f"{file} does not have the hash of the commit record")
    return contents


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        if file.is_symlink() or file.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise CorruptCheckpoint(f"{file} is no commit record")
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path} has no commit record (manifest.json): its writing was cut off") from None
    except (ValueError, RecursionError):
        raise CorruptCheckpoint(f"{file} is damaged") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptCheckpoint(f"{file} is no commit record of lowmem")
    if manifest.get("version") != VERSION:
        raise CorruptCheckpoint(
            f"{file} is of format version {manifest.get('version')}, this lowmem reads {VERSION}: "
            "use the lowmem that wrote it"
        )
    return manifest


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint that verifies. Raises CorruptCheckpoint; never unpickles (invariant 8)."""
    from safetensors import SafetensorError
    from safetensors.torch import load as decode

    contents = verify(path)
    try:
        model, optimizer = (decode(contents[name]) for name in _TENSOR_FILES)
        state = json.loads(contents["state.json"])
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} cannot be decoded: {error}") from None
    match = _NAME.fullmatch(path.name)
    if not isinstance(state, dict) or match is None:
        raise CorruptCheckpoint(f"{path}: state.json holds no state")
    return Checkpoint(step=int(match[1]), model=model, optimizer=optimizer, state=state)


def load_newest(folder: Path) -> tuple[Checkpoint, Path, dict[Path, str]]:
    """The newest checkpoint that verifies, its path, and the newer ones that were skipped with the reason.

    Raises CorruptCheckpoint if none does.
    """
    skipped: dict[Path, str] = {}
    for path in found(folder):
        try:
            return load(path), path, skipped
        except CorruptCheckpoint as error:
            skipped[path] = str(error)
    detail = f" ({'; '.join(skipped.values())})" if skipped else ""
    raise CorruptCheckpoint(f"{folder} holds no usable checkpoint{detail}: start the run again under another --out")


def set_aside(damaged: Iterable[Path]) -> None:
    """Renames checkpoints that do not verify to `damaged-step-N`: they must not count among the generations that are
    kept, or pruning would delete good ones in their favour."""
    for path in damaged:
        target = path.with_name(f"damaged-{path.name}")
        try:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)
        except OSError:
            continue


def disk_error(error: OSError, path: Path) -> DiskError:
    """The one-line DiskError for an operating-system error while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"the disk is full: {path} could not be written; earlier checkpoints are intact, free some space"
        )
    return DiskError(f"{path} could not be written ({error.strerror or error}); earlier checkpoints are intact")
