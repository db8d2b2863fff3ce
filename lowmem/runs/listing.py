"""The runs in a folder, a line each, for `lowmem ls`: quick, read-only, without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem.config.schema import Config
from lowmem.core.errors import LowmemError, UsageError
from lowmem.core.reading import shorten
from lowmem.runs.checkpoint_state import Position
from lowmem.runs.lock import writer_of
from lowmem.runs.rows import EpochRow
from lowmem.runs.view import RunView

_DEEPEST = 3  # folders of folders of runs
_SIGNS = frozenset({"config.yaml", "metrics.csv", "checkpoints", "run.lock"})


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run in a line. `stopped`: by train.max_steps, as asked. `writer`: who trains it now, if anybody. `error_on`:
    the pictures by which the best epoch is told, `val` if any are held back, else `test`. Unknown is None."""

    path: Path
    state: Literal["training", "finished", "stopped", "interrupted", "never started", "damaged"]
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


def list_runs(folder: Path) -> list[RunSummary]:
    """The runs in `folder` (or `folder` itself, if it is one) by name; links are not followed.

    Raises UsageError if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} does not exist: give the folder that holds the runs, like runs")
    return [summarize(path) for path in run_folders(folder)]


def run_folders(folder: Path) -> list[Path]:
    """The run folders in `folder` (or itself, if it is one) by name; links are not followed."""
    return list(_run_folders(folder, _DEEPEST))


def _run_folders(folder: Path, deep: int) -> Iterator[Path]:
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
        yield from _run_folders(folder / name, deep - 1)


def summarize(path: Path) -> RunSummary:
    """One run, whatever became of it: one bad folder must not hide the others."""
    run, writer = RunView(path), writer_of(path)
    known: dict[str, Any] = {"path": path, "writer": writer, "size_bytes": _size_bytes(path)}
    known["checkpoints"], trouble = run.checkpoints[::-1], run.damaged_checkpoints
    try:
        config, (epoch, step), rows = run.config, run.position, run.epochs
        notes, state = run.notes, run.state
        known |= {"config": config, "epoch": epoch, "step": step, **_errors(rows)}
    except (LowmemError, OSError) as error:
        # Somebody is writing it: then what was half written this moment is no damage.
        return RunSummary(
            state="damaged" if writer is None else "training", trouble=(shorten(error, 1000), *trouble), **known
        )
    lost = not run.checkpoints and (rows or trouble) and state != "finished"
    if lost:
        trouble = (*trouble, "no usable checkpoint to go on from")
    words = {"finished": "finished", "stopped": "stopped"}.get(state, "interrupted" if step else "never started")
    words = "training" if writer is not None else "damaged" if lost else words
    return RunSummary(state=words, trouble=(*trouble, *notes), **known)  # type: ignore[arg-type]


def _errors(rows: tuple[EpochRow, ...]) -> dict[str, Any]:
    if not rows:
        return {}
    on = "val" if any(row.val_error_pct is not None for row in rows) else "test"
    errors = [(getattr(row, f"{on}_error_pct"), row.epoch) for row in rows]
    finite = [(error, epoch) for error, epoch in errors if error is not None and math.isfinite(error)]
    last = finite[-1][0] if finite[-1:] == errors[-1:] else None
    best = min(finite, default=(None, None))
    return {"error_on": on, "last_error_pct": last, "best_error_pct": best[0], "best_epoch": best[1]}


def _size_bytes(path: Path) -> int:
    """Of all files below, links not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue  # gone meanwhile
    return total
