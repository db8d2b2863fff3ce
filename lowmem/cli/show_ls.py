"""`lowmem ls`: a line a run, or JSON. No torch here: it must be there at once."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem.cli.printed import printable
from lowmem.core.units import format_size
from lowmem.runs.listing import RunSummary, list_runs

_HEADER = ("run", "state", "epoch", "last error", "best error", "on disk", "fork --at")
_RIGHT = {2, 3, 4, 5}
_MOST_SHOWN = 6  # checkpoints; all of them are in --json


def show_ls(folder: Path, as_json: bool) -> None:
    """Prints the runs in `folder`. Raises UsageError if it does not exist."""
    runs = list_runs(folder)
    if as_json:
        print(json.dumps([run.to_json() for run in runs], indent=1))
        return
    if not runs:
        print(f"there are no runs in {printable(str(folder))}: start one with `lowmem train`")
        return
    rows = [_HEADER, *(_cells(run, folder) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    for run in runs:
        for words in run.trouble:
            print(f"{printable(_name(run, folder))}: {printable(words)}")


def _cells(run: RunSummary, folder: Path) -> tuple[str, ...]:
    epochs = run.config.train.epochs if run.config else "?"
    state = run.state if run.writer is None else f"{run.state} ({run.writer})"
    best = "" if run.best_error_pct is None else f"{_percent(run.best_error_pct)} (epoch {run.best_epoch})"
    return (
        printable(_name(run, folder)),
        printable(state),
        f"{'?' if run.epoch is None else run.epoch}/{epochs}",
        _percent(run.last_error_pct),
        best,
        format_size(run.size_bytes),
        _places(run),
    )


def _places(run: RunSummary) -> str:
    """The newest checkpoints, as `fork --at` takes them. The one before the first step is nothing to fork from."""
    places = [kept.at for kept in run.checkpoints if kept.step > 0]
    more = len(places) - _MOST_SHOWN
    return ", ".join(([f"{more} more"] if more > 0 else []) + places[-_MOST_SHOWN:])


def _name(run: RunSummary, folder: Path) -> str:
    return run.path.name or str(run.path) if run.path == folder else str(run.path.relative_to(folder))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"
