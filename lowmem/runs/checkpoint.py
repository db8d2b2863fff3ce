"""Checkpoints: a folder of safetensors and JSON that exists when its commit record does (invariants 8 and 9).

    checkpoints/step-00004692/   model.safetensors optimizer.safetensors state.json manifest.json

`manifest.json` holds the size and SHA-256 of the other files and is written last, in a folder that is still aside.
Then everything is read back and verified, the folder gets its name, and only then older ones are pruned.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.core.errors import (
    CorruptCheckpoint,
    DiskError,
    ForeignCheckpoint,
    LowmemError,
    OutOfMemory,
    UnreadableCheckpoint,
)
from lowmem.core.reading import RECORD_LIMIT_BYTES, Unreadable, parse_json, read_limited, shorten
from lowmem.core.units import format_size
from lowmem.runs.atomic import fsync_folder, replace_path, write_synced
from lowmem.runs.checkpoint_state import (
    FILES,
    FORMAT,
    TENSOR_FILES,
    VERSION,
    check_size,
    manifest_bytes,
    parse_header,
    read_manifest,
    read_position,
)

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_NAME = re.compile(r"step-([0-9]{8,})(\.old)?")
_ASIDE = ".aside-"
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """What was saved. Tensors are on the CPU and contiguous; `state` is plain JSON."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint that `checkpoint_folders` gave."""
    return int(path.name.removeprefix("step-").removesuffix(".old"))


# -- saving ------------------------------------------------------------------------------------------------------------


def save(folder: Path, checkpoint: Checkpoint, *, keep: int, keep_every: int | None = None) -> Path:
    """Writes `folder/step-N`, verifies it, then prunes all but the `keep` newest and, with `keep_every`, those of
    the end of every so many-th epoch. Returns its path. Raises DiskError if the disk refuses, CorruptCheckpoint if
    it gives back something else; what was saved before is then untouched."""
    target = folder / folder_name(checkpoint.step)
    aside = folder / f"{_ASIDE}{target.name}"
    with disk_errors(target):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_asides(folder)
            aside.mkdir()
            _write_files(aside, checkpoint)
            verify(aside)
            if target.exists():
                # The same step saved again (its evaluation was still to come the first time). A folder cannot replace
                # a folder in one call; the old one keeps a name that readers know until the new one is there.
                old = target.with_name(target.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                replace_path(target, old)
            replace_path(aside, target)
            fsync_folder(folder)
        except (OSError, LowmemError):
            shutil.rmtree(aside, ignore_errors=True)
            raise
    tidy(folder, keep=keep, keep_every=keep_every)
    return target


def _remove_asides(folder: Path) -> None:
    """What a killed writer left half written, of whichever step: it takes room. A run has one writer at a time."""
    for left in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)


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
    write_synced(aside / "manifest.json", manifest_bytes(manifest))
    fsync_folder(aside)


def tidy(folder: Path, *, keep: int, keep_every: int | None = None) -> None:
    """Deletes what a killed process left unfinished, and what is older than the `keep` newest and not kept for its
    epoch. While a loss explodes the newest from before it stays too: it is what a run can go back to. A folder loses
    its commit record first, so that a half-deleted one is never taken for a checkpoint. Failing to delete is no reason
    to stop a run. Only for the process that holds the run's lock, while nothing else is being saved."""
    _remove_asides(folder)
    for old in folder.glob("step-*.old"):
        if old.with_suffix("").is_dir():
            shutil.rmtree(old, ignore_errors=True)
    positions = {}
    paths = checkpoint_folders(folder)
    for path in paths:
        with suppress(CorruptCheckpoint):
            positions[path] = read_position(path)
    sound = next((path for path, at in positions.items() if not at.exploded_losses), None)
    for path in paths[max(keep, 2) :]:
        at = positions.get(path)
        if path == sound or (at and keep_every and at.epoch and not at.step_in_epoch and at.epoch % keep_every == 0):
            continue
        with suppress(OSError):
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)


# -- reading -----------------------------------------------------------------------------------------------------------


def named(folder: Path) -> list[Path]:
    """What bears the name of a checkpoint, newest first. A step has one name: with more zeros in front it would be
    there twice. Raises CorruptCheckpoint if the folder cannot be looked into."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CorruptCheckpoint(f"{folder} cannot be read ({error.strerror or error})") from None
    matches = [
        match for name in names if (match := CHECKPOINT_NAME.fullmatch(name)) and match[1] == f"{int(match[1]):08d}"
    ]
    matches.sort(key=lambda match: (-int(match[1]), match[2] is not None))
    return [folder / match[0] for match in matches]


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints by name, newest first, verified or not. Raises as `named` does."""
    return [path for path in named(folder) if _is_folder(path)]


def _is_folder(path: Path) -> bool:
    """Links and files are no checkpoints. By functions that take what may not be looked at for absent."""
    return not os.path.islink(path) and os.path.isdir(path)


def verify(path: Path, *, most_bytes: int | None = None) -> dict[str, bytes]:
    """The bytes of each file, after checking sizes and hashes against the commit record. A file of more than
    `most_bytes` is not read: whatever its record says, it is not the run's. Raises CorruptCheckpoint saying which
    file and why; UnreadableCheckpoint and OutOfMemory where nothing is known to be wrong with them."""
    try:
        manifest = read_manifest(path)
        match = CHECKPOINT_NAME.fullmatch(path.name.removeprefix(_ASIDE))
        step = int(match[1]) if match else None
        if type(manifest.get("step")) is not int or manifest["step"] != step:
            raise CorruptCheckpoint(
                f"{path}: the commit record is of step {shorten(manifest.get('step'))}, the folder of step {step}"
            )
        return {name: _verified_file(path / name, manifest["files"][name], most_bytes) for name in FILES}
    except OSError as error:
        raise UnreadableCheckpoint(f"{path} cannot be read ({error.strerror or error})") from None


def _verified_file(file: Path, entry: Mapping[str, Any], most_bytes: int | None) -> bytes:
    size = check_size(file, entry)
    try:
        limit = RECORD_LIMIT_BYTES if file.suffix == ".json" else most_bytes
        data = read_limited(file, size if limit is None else limit)
    except Unreadable as error:
        raise CorruptCheckpoint(f"{file} {error}") from None
    except MemoryError:
        raise _no_memory(file, size) from None
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CorruptCheckpoint(f"{file} does not have the hash of the commit record")
    return data


def _no_memory(path: Path, size: int) -> OutOfMemory:
    return OutOfMemory(
        f"there is no memory to read {path} ({format_size(size)}), and nothing is known to be wrong with it: free some "
        "and try again"
    )


def load(path: Path, most_bytes: int | None = None) -> Checkpoint:
    """Reads a checkpoint that verifies, of files of at most `most_bytes`. Raises as `verify` does; never unpickles."""
    from safetensors import SafetensorError
    from safetensors.torch import load as decode

    if not _is_folder(path):
        raise CorruptCheckpoint(f"{path} is no folder")
    contents = verify(path, most_bytes=most_bytes)
    try:
        for name in TENSOR_FILES:
            parse_header(io.BytesIO(contents[name]), len(contents[name]))
        model, optimizer = (decode(contents[name]) for name in TENSOR_FILES)
        state = parse_json(contents["state.json"])
    except MemoryError:
        raise _no_memory(path, sum(map(len, contents.values()))) from None
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be decoded: {shorten(error)}") from None
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"{path}: state.json holds no state")
    return Checkpoint(step_of(path), model, optimizer, state)


def load_newest(
    folder: Path, accept: Callable[[Checkpoint], object] = lambda checkpoint: None, most_bytes: int | None = None
) -> tuple[Checkpoint, Path, dict[Path, CorruptCheckpoint]]:
    """The newest checkpoint that verifies, its path, and the newer ones that were skipped with the reason. `accept`
    raises CorruptCheckpoint for one that is whole but another run's. Raises that if none is left, and OutOfMemory."""
    skipped: dict[Path, CorruptCheckpoint] = {}
    for path in named(folder):
        try:
            checkpoint = load(path, most_bytes)
            accept(checkpoint)
            return checkpoint, path, skipped
        except CorruptCheckpoint as error:
            # Another one, which does not hold what was read of it by its traceback.
            skipped[path] = type(error)(str(error) if str(path) in str(error) else f"{path}: {error}")
    for reason in skipped.values():
        if isinstance(reason, ForeignCheckpoint):  # whole: there is a way to go on
            raise ForeignCheckpoint(f"{folder} holds no usable checkpoint: {reason}")
    detail = f" ({'; '.join(map(str, skipped.values()))})" if skipped else ""
    raise CorruptCheckpoint(f"{folder} holds no usable checkpoint{detail}: start the run again under another --out")


_KINDS: dict[type, str] = {UnreadableCheckpoint: "unreadable", ForeignCheckpoint: "foreign"}


def set_aside(skipped: Mapping[Path, object]) -> None:
    """Renames checkpoints that a run does not go on from (path -> why, as `load_newest` gives them) to
    `damaged-step-N`; those that may be whole, to `unreadable-step-N` if the system did not let them be read, to
    `foreign-step-N` if they are of other settings. Under their own names they would count among those that are kept,
    and a later resume could take one that the rows have been cut back from."""
    for path, reason in skipped.items():
        kind = _KINDS.get(type(reason), "damaged")
        target = path.with_name(f"{kind}-{path.name}")
        with suppress(OSError):
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)


# -- errors ------------------------------------------------------------------------------------------------------------


def disk_error(error: OSError, path: Path) -> DiskError:
    """The one-line DiskError for an operating-system error while writing `path`."""
    if error.errno in FULL:
        return DiskError(
            f"the disk is full: {path} could not be written; earlier checkpoints are intact, free some space"
        )
    return DiskError(f"{path} could not be written ({error.strerror or error}); earlier checkpoints are intact")


@contextmanager
def disk_errors(path: Path) -> Iterator[Path]:
    """Around writing `path`: an OSError becomes the one-line DiskError."""
    try:
        yield path
    except OSError as error:
        raise disk_error(error, path) from error
