"""The folder of a run before anything is written to it: whether one may be made there, whether it is a run's and has
nothing in it that leads out of it, and how much room a run takes.

A run that was set up can be resumed from its first checkpoint on. A process that is killed before that leaves a folder
with which nobody can go on. Nothing was computed in it, so the next `lowmem train` takes it over.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowmem.core.errors import UsageError
from lowmem.core.reading import shorten
from lowmem.runs.atomic import PARTIAL
from lowmem.runs.lock import LOCK_NAME, OWNER_NAME
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE

_LOCK = frozenset({LOCK_NAME, OWNER_NAME})
# What tells the folder of a job of several runs.
JOB = "job.json"
# There while a fork takes over rows and pictures of the old run; they are no work of this one.
FORKING = "forking"
# Of the other processes that train a run.
_OTHER_PLAN = re.compile(r"plan-[0-9]+\.json")
# What is written before the first checkpoint, and nothing else. The first event comes after it.
_SETUP = _LOCK | {
    "config.yaml", "env.json", "plan.json", EPOCH_TABLE.file_name, STEP_TABLE.file_name, "checkpoints", "weights",
    ".preflight", FORKING,
}  # fmt: skip


def never_began(path: Path) -> bool:
    """Whether this is a run's folder that was left before the first checkpoint: no more in it than what is made till
    then, no row of a step, no checkpoint, whole or damaged, no weights."""
    names = {entry.name.removesuffix(PARTIAL) for entry in path.iterdir()}
    names -= {name for name in names if _OTHER_PLAN.fullmatch(name)}
    if LOCK_NAME not in names or not names - ({"report"} if FORKING in names else set()) <= _SETUP:
        return False
    steps, saved, weights = path / STEP_TABLE.file_name, path / "checkpoints", path / "weights"
    rows = FORKING not in names and steps.is_file() and steps.stat().st_size > len(STEP_TABLE.header) + 1
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


@contextmanager
def leaving_no_trace(path: Path) -> Iterator[None]:
    """Around the making of a run folder: if it was discarded, the folders made on the way to it go too, and an empty
    one that was there before is there again."""
    was_there = path.is_dir()
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        if not path.exists():
            for folder in made[1:]:
                with suppress(OSError):
                    folder.rmdir()  # only if it is empty
            if was_there:
                with suppress(OSError):
                    path.mkdir()


# -- a folder that somebody else may have made


def require_run(path: Path) -> None:
    """Raises UsageError unless `path` looks like a run folder."""
    try:
        if not path.is_dir():
            what = "is no folder" if path.exists() else "does not exist"
            raise UsageError(f"{path} {what}: give the folder of a run, like runs/res110")
        if not (path / "config.yaml").is_file():
            if never_began(path):
                raise UsageError(start_again(path))
            if (path / JOB).is_file():
                raise UsageError(
                    f"{path} is the folder of a job of several runs: go on with `lowmem reproduce --out {path}`"
                )
            raise UsageError(
                f"{path} is no run folder (it has no config.yaml): give the folder of a run, like runs/res110"
            )
    except OSError as error:
        raise UsageError(f"{path} cannot be looked into ({error.strerror or error}): check its permissions") from None
    refuse_links(path)


_MOST_ENTRIES = 100_000


def refuse_links(run: Path) -> None:
    """Raises UsageError naming the first thing under `run` that is neither a file nor a folder of its own.

    Everything lowmem writes goes to a fixed name below the run folder. A symbolic link of that name (`metrics.csv`,
    `weights/last.safetensors.partial`) would make it write, truncate or delete somewhere else; a pipe or a device would
    make it wait for ever. `run` itself may be a link: that is the user's. What cannot be looked at cannot be followed
    either, and is left to its reader.

    Known limitation: the folder is looked at once, when it is opened. Who can change it at the same time has this
    user's rights already.
    """
    folders, seen = [run], 0
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > _MOST_ENTRIES:
                    raise UsageError(f"{run} holds more than {_MOST_ENTRIES:,} files: that is no run folder")
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if _is_link(status):
                    raise UsageError(
                        f"{shorten(entry.path)} is a link, and a run folder holds its own files only: "
                        "put what it leads to in its place"
                    )
                if stat.S_ISDIR(status.st_mode):
                    folders.append(Path(entry.path))
                elif not stat.S_ISREG(status.st_mode):
                    raise UsageError(
                        f"{shorten(entry.path)} is neither a file nor a folder: take it out of the run folder"
                    )


def _is_link(status: os.stat_result) -> bool:
    """Windows has two kinds: symbolic links, and junctions, which `S_ISLNK` does not know."""
    tag = getattr(status, "st_reparse_tag", 0)
    return stat.S_ISLNK(status.st_mode) or tag == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)


# -- room on the disk

# Generous: a row of metrics.csv with its `checkpoint` event, and one of steps.csv.
_EPOCH_BYTES, _STEP_BYTES = 1024, 64
_NORM_BYTES = 13  # of gradients.csv: six digits, an exponent, a comma


def rows_bytes(
    *,
    epochs: int,
    steps_per_epoch: int,
    log_every_steps: int,
    steps_between_saves: int | None,
    layers: int,
    grad_norms_every: int,
) -> int:
    """Bytes of metrics.csv, steps.csv, gradients.csv (of `layers` norms, every so many steps) and events.jsonl at the
    end of a run."""
    steps = epochs * steps_per_epoch
    saves = steps // steps_between_saves if steps_between_saves else 0
    gradients = (1 + steps // grad_norms_every) * (_STEP_BYTES + layers * _NORM_BYTES)
    logged = (steps // log_every_steps) * _STEP_BYTES
    return epochs * _EPOCH_BYTES + logged + saves * 2 * _STEP_BYTES + gradients


def kept_epochs(*, epochs: int, keep_every: int | None) -> int:
    """Checkpoints that checkpoint.keep_every keeps beside the newest, at the most: the last epoch's is one of those."""
    return 0 if keep_every is None else (epochs - 1) // keep_every


def run_bytes(
    *, checkpoint_bytes: int, parameter_bytes: int, keep: int, kept_epochs: int = 0, rows_bytes: int = 0
) -> int:
    """Bytes on disk that a run needs at its fullest.

    `checkpoint_bytes`: of one checkpoint, momentum included. One more generation than are kept exists while a new one
    is written; weights are exported twice and replaced aside.
    """
    return (keep + 1 + kept_epochs) * checkpoint_bytes + 3 * parameter_bytes + rows_bytes
