"""Where in a run a checkpoint is, from its JSON alone: for lists, for choosing one and for keeping every n-th.

The tensors' hashes are not checked here (that reads hundreds of MiB); whoever goes on from a checkpoint verifies it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import shorten

_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Position:
    """A checkpoint that looks whole: `epoch` epochs are completed, `step_in_epoch` steps of the next are done. `sound`:
    no loss was exploding when it was made."""

    path: Path
    epoch: int
    step: int
    step_in_epoch: int
    sound: bool = True

    @property
    def at(self) -> str:
        """As `lowmem fork --at` takes it: `12` for the end of an epoch, `step:4692` in the middle of one."""
        return f"step:{self.step}" if self.step_in_epoch else f"{self.epoch}"

    def is_every(self, epochs: int | None) -> bool:
        """Whether it is one that `checkpoint.keep_every` keeps."""
        return epochs is not None and self.epoch > 0 and self.step_in_epoch == 0 and self.epoch % epochs == 0


def read_position(path: Path) -> Position:
    """The position of the checkpoint `path`, if its commit record is there and all files have the recorded size.

    Raises CorruptCheckpoint.
    """
    files = _read_json(path / "manifest.json").get("files")
    if not isinstance(files, dict) or not files:
        raise CorruptCheckpoint(f"{path}: the commit record lists no files")
    for name, entry in files.items():
        _check_size(path, name, entry.get("bytes") if isinstance(entry, dict) else None)
    run = _read_json(path / "state.json").get("run")
    values = [run.get(name) if isinstance(run, dict) else None for name in ("epoch", "step", "step_in_epoch")]
    epoch, step, step_in_epoch = (value if type(value) is int and value >= 0 else -1 for value in values)
    if min(epoch, step, step_in_epoch) < 0:
        raise CorruptCheckpoint(f"{path}: state.json holds no position")
    assert isinstance(run, dict)
    return Position(path, epoch, step, step_in_epoch, not run.get("exploded_losses"))


def _check_size(path: Path, name: str, expected: object) -> None:
    if Path(name).name != name:  # a name of somebody else's making must not lead out of the folder
        raise CorruptCheckpoint(f"{path}: the commit record names a file outside of the checkpoint")
    try:
        size = (path / name).lstat().st_size
    except (OSError, ValueError):
        raise CorruptCheckpoint(f"{path}: {shorten(name)} is missing") from None
    if size != expected:
        said = shorten(expected, 40)
        raise CorruptCheckpoint(f"{path}: {shorten(name)} has {size} bytes, the commit record says {said}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink() or path.stat().st_size > _LIMIT_BYTES:
            raise CorruptCheckpoint(f"{path} is no file of a checkpoint")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise CorruptCheckpoint(f"{path} is damaged") from None
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path} is damaged")
    return values
