"""The runs in a folder with their state, for `lowmem ls`: quick, read-only, without torch.

A checkpoint counts if its commit record is there and its files have the recorded sizes; hashes are not computed. A run
that cannot be read is listed as damaged, with the reason: one bad folder must not hide the others.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from lowmem.config.schema import Config
from lowmem.core.errors import CorruptCheckpoint, LowmemError, UsageError
from lowmem.core.reading import shorten
from lowmem.runs.checkpoint import found
from lowmem.runs.checkpoint_state import Position, read_position
from lowmem.runs.history import EpochRow, read_epochs
from lowmem.runs.lock import LOCK_NAME, OWNER_NAME, read_owner

State = Literal["training", "finished", "stopped", "interrupted", "never started", "damaged"]
_DEEPEST = 3  # folders of folders of runs
_SIGNS = frozenset({"config.yaml", "metrics.csv", "checkpoints", "run.lock"})


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One run. `stopped`: by train.max_steps, as asked. `writer`: who trains it now, if anybody. `error_on`: the
    pictures by which the best epoch is told, `val` if any are held back, else `test`. Unknown is None."""

    path: Path
    state: State
    config: Config | None = None
    writer: str | None = None
    epoch: int | None = None  # completed
    step: int | None = None
    error_on: str | None = None
    last_error_pct: float | None = None
    best_error_pct: float | None = None
    best_epoch: int | None = None
    size_bytes: int = 0
    checkpoints: tuple[Position, ...] = ()  # oldest first
    trouble: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        model, train = (self.config.model, self.config.train) if self.config else (None, None)
        return {
            "path": str(self.path),
            "state": self.state,
            "writer": self.writer,
            "arch": model.arch if model else None,
            "block": model.block if model else None,
            "width": model.width if model else None,
            "epoch": self.epoch,
            "epochs": train.epochs if train else None,
            "step": self.step,
            "error_on": self.error_on,
            "last_error_pct": self.last_error_pct,
            "best_error_pct": self.best_error_pct,
            "best_epoch": self.best_epoch,
            "size_bytes": self.size_bytes,
            "checkpoints": [{"at": kept.at, "epoch": kept.epoch, "step": kept.step} for kept in self.checkpoints],
            "trouble": list(self.trouble),
        }


def list_runs(folder: Path) -> list[Listed]:
    """The runs in `folder` (or `folder` itself, if it is one) by name; links are not followed.

    Raises UsageError if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} does not exist: give the folder that holds the runs, like runs")
    return [look(path) for path in run_folders(folder)]


def run_folders(folder: Path) -> list[Path]:
    """The run folders in `folder` (or itself, if it is one) by name; links are not followed."""
    return list(_runs(folder, _DEEPEST))


def _runs(folder: Path, deep: int) -> Iterator[Path]:
    """What cannot be looked into may be a run, and is told with its reason."""
    try:
        with os.scandir(folder) as entries:
            inside = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except FileNotFoundError:
        return  # gone meanwhile
    except OSError:
        yield folder
        return
    if inside.keys() & _SIGNS:
        yield folder
        return
    for name in sorted(name for name, is_folder in inside.items() if is_folder) if deep else ():
        yield from _runs(folder / name, deep - 1)


def look(path: Path) -> Listed:
    """One run, whatever became of it."""
    positions, trouble = _positions(path / "checkpoints")
    known: dict[str, Any] = {"path": path, "checkpoints": positions, "size_bytes": _size(path)}
    known["writer"] = writer = writer_of(path)
    try:
        config, rows, notes = read_epochs(path)
    except (LowmemError, OSError) as error:
        # Somebody is writing it: then what was half written this moment is no damage.
        state: State = "damaged" if writer is None else "training"
        return Listed(state=state, trouble=(shorten(error, 1000), *trouble), **known)
    newest = positions[-1] if positions else None
    done = newest.epoch if newest else rows[-1].epoch if rows else 0
    step = newest.step if newest else rows[-1].step if rows else 0
    if not positions and (rows or trouble) and done < config.train.epochs:
        trouble.append("no usable checkpoint to go on from")
        state = "damaged"
    else:
        state = _state(config, done, step)
    if writer is not None:
        state = "training"
    return Listed(
        state=state, config=config, epoch=done, step=step, trouble=(*trouble, *notes), **known, **_errors(rows)
    )


def _state(config: Config, done: int, step: int) -> State:
    if done >= config.train.epochs:
        return "finished"
    if step == 0:
        return "never started"
    stopped = config.train.max_steps is not None and step >= config.train.max_steps
    return "stopped" if stopped else "interrupted"


def _positions(folder: Path) -> tuple[tuple[Position, ...], list[str]]:
    positions, trouble = [], []
    try:
        paths = found(folder)
    except (CorruptCheckpoint, OSError) as error:
        return (), [shorten(error, 1000)]
    for path in reversed(paths):
        try:
            positions.append(read_position(path))
        except CorruptCheckpoint as error:
            if not _gone(path):  # else it was pruned meanwhile
                trouble.append(f"a checkpoint is damaged: {error}")
    return tuple(positions), trouble


def _gone(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _errors(rows: tuple[EpochRow, ...]) -> dict[str, Any]:
    if not rows:
        return {}
    on = "val" if any(row.val_error_pct is not None for row in rows) else "test"

    def error(row: EpochRow) -> float | None:
        value = row.val_error_pct if on == "val" else row.test_error_pct
        return value if value is not None and math.isfinite(value) else None

    told = [(value, row.epoch) for row in rows if (value := error(row)) is not None]
    best = min(told, default=(None, None))
    return {"error_on": on, "last_error_pct": error(rows[-1]), "best_error_pct": best[0], "best_epoch": best[1]}


def _size(path: Path) -> int:
    """Bytes of all files below, links not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue  # gone meanwhile
    return total


def writer_of(run: Path) -> str | None:
    """Who holds the run's lock: `pid 1234`, `pid 1234 on HOST` for another machine; None if nobody does.

    The lock itself is tried only if its last owner may be alive: trying it holds it for an instant, in which the run
    could not be resumed.
    """
    lock, owner = run / LOCK_NAME, run / OWNER_NAME
    if not os.path.isfile(lock) or os.path.islink(lock) or not os.path.isfile(owner):
        return None
    known = read_owner(owner)
    pid, host = (known.pid, known.host) if known is not None and known.pid > 0 else (None, None)
    here = host is None or host == socket.gethostname()
    if pid is not None and here and not may_be_alive(pid):
        return None
    try:
        with FileLock(lock, timeout=0):
            return None
    except Timeout:
        words = "another process" if pid is None else f"pid {pid}"
        return words if here else f"{words} on {host}"
    except OSError:
        return None  # a medium that cannot be written to: nobody trains there


def may_be_alive(pid: int) -> bool:
    """Whether a process of this number is there, as far as that can be asked without touching it."""
    if os.name == "nt":
        return True  # there os.kill ends the process, whatever the signal
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
