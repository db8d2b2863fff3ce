"""A folder in which a run was set up, before its first checkpoint: from then on it can be resumed.

A process that is killed before that leaves a folder with which nobody can go on. Nothing was computed in it, so the
next `lowmem train` takes it over instead of refusing it.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from lowmem.core.errors import UsageError
from lowmem.runs import columns
from lowmem.runs.atomic import PARTIAL

_LOCK = frozenset({"run.lock", "run.owner.json"})
# What tells the folder of a job of several runs.
JOB = "job.json"
# There while a fork takes over rows and pictures of the old run; they are no work of this one.
FORKING = "forking"
# Of the other processes that train a run.
_OTHER_PLAN = re.compile(r"plan-[0-9]+\.json")
# What is written before the first checkpoint, and nothing else. The first event comes after it.
_SETUP = _LOCK | {
    "config.yaml", "env.json", "plan.json", "metrics.csv", "steps.csv", "checkpoints", "weights", ".preflight",
    FORKING,
}  # fmt: skip


def never_began(path: Path) -> bool:
    """Whether this is a run's folder that was left before the first checkpoint: no more in it than what is made till
    then, no row of a step, no checkpoint, whole or damaged, no weights."""
    names = {entry.name.removesuffix(PARTIAL) for entry in path.iterdir()}
    names -= {name for name in names if _OTHER_PLAN.fullmatch(name)}
    if "run.lock" not in names or not names - ({"report"} if FORKING in names else set()) <= _SETUP:
        return False
    steps, saved, weights = path / "steps.csv", path / "checkpoints", path / "weights"
    rows = FORKING not in names and steps.is_file() and steps.stat().st_size > len(",".join(columns.STEPS)) + 1
    kept = saved.is_dir() and any(not entry.name.startswith(".aside-") for entry in saved.iterdir())
    return not rows and not kept and not (weights.is_dir() and any(weights.iterdir()))


def refuse_existing(path: Path) -> None:
    """Raises UsageError unless a run may be made here: nothing, an empty folder, or one of a run that never began."""
    if not path.is_symlink() and (not path.exists() or (path.is_dir() and not any(path.iterdir()))):
        return
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{path} exists and is not an empty folder: choose another with --out")
    if never_began(path):
        return
    if not (path / "config.yaml").is_file():
        raise UsageError(f"{path} exists and is not an empty folder: choose another with --out")
    raise UsageError(
        f"{path} exists and is never overwritten: go on with `lowmem resume {path}`, change its settings with "
        f"`lowmem fork {path}`, or choose another folder with --out"
    )


def clear(path: Path, *, ignore_errors: bool = False) -> None:
    """Empties the folder of a run that never began, but for its lock, which the caller holds. Raises OSError;
    `ignore_errors`: leaves what cannot be deleted."""
    for entry in path.iterdir():
        if entry.name in _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=ignore_errors)
        else:
            with suppress(*[OSError] * ignore_errors):
                entry.unlink()


def start_again(path: Path) -> str:
    """The one line for who wants to resume a run that never began."""
    return (
        f"{path} was stopped before its first checkpoint, so no step was taken and nothing is lost: "
        "give the command that started it once more, it takes the folder over"
    )
