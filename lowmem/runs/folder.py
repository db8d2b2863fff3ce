"""The folder of a run as it is found: whether a run may be made there, whether it is a run's and has nothing in it that
leads out of it."""

from __future__ import annotations

import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.reading import shorten
from lowmem.runs.atomic import PARTIAL
from lowmem.runs.lock import LOCK_NAME, OWNER_NAME
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE

_DEEPEST = 3  # folders of folders of runs
_SIGNS = frozenset({"config.yaml", "metrics.csv", "checkpoints", "run.lock"})
JOB = "job.json"  # what tells the folder of a job of several runs
FORKING = "forking"  # there while a fork takes over rows and pictures of the old run; they are no work of this one
_LOCK = frozenset({LOCK_NAME, OWNER_NAME})
# What is written before the first checkpoint, and nothing else. The first event comes after it.
_SETUP = _LOCK | {
    "config.yaml", "env.json", "plan.json", EPOCH_TABLE.file_name, STEP_TABLE.file_name, "checkpoints", "weights",
    ".preflight", FORKING,
}  # fmt: skip
_OTHER_PLAN = re.compile(r"plan-[0-9]+\.json")  # of the other processes that train a run
_MOST_ENTRIES = 100_000


def never_began(path: Path) -> bool:
    """Whether this is a run's folder that was left before the first checkpoint, with which nobody can go on: no more
    in it than what is made till then, no row of a step, no checkpoint, whole or damaged, no weights. Nothing was
    computed in it, so the next `lowmem train` takes it over."""
    names = {entry.name.removesuffix(PARTIAL) for entry in path.iterdir()}
    names -= {name for name in names if _OTHER_PLAN.fullmatch(name)}
    if LOCK_NAME not in names or not names - ({"report"} if FORKING in names else set()) <= _SETUP:
        return False
    steps, saved, weights = path / STEP_TABLE.file_name, path / "checkpoints", path / "weights"
    rows = FORKING not in names and steps.is_file() and steps.stat().st_size > len(STEP_TABLE.header) + 1
    kept = saved.is_dir() and any(not entry.name.startswith(".aside-") for entry in saved.iterdir())
    return not rows and not kept and not (weights.is_dir() and any(weights.iterdir()))


def refuse_existing(path: Path) -> None:
    """Raises UsageError unless a run may be made here: nothing, an empty folder, or one of a run that never began;
    PreflightError if it may not be looked at, or if it could not be made."""
    try:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file: choose another folder with --out")
        if not path.is_symlink() and (not path.exists() or not any(path.iterdir()) or never_began(path)):
            refuse_unwritable(path)
            return
        if path.is_symlink() or not (path / "config.yaml").is_file():
            raise UsageError(f"{path} exists and is not an empty folder: choose another with --out")
    except OSError as error:
        raise PreflightError(
            f"{path} cannot be looked at ({error.strerror or error}): choose another folder with --out"
        ) from None
    raise UsageError(
        f"{path} exists and is never overwritten: go on with `lowmem resume {path}`, change its settings with "
        f"`lowmem fork {path}`, or choose another folder with --out"
    )


def refuse_unwritable(path: Path, way_out: str = "choose another folder with --out") -> None:
    """Raises PreflightError if nothing can be written at `path`, as far as can be told without writing."""
    place = path.absolute()
    nearest = next((one for one in (place, *place.parents) if os.path.lexists(one)), place)
    if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
        raise PreflightError(f"{path} cannot be written ({nearest} may not be written to): {way_out}")
    if nearest != place and not nearest.is_dir():
        raise PreflightError(f"{path} cannot be written ({nearest} is no folder): {way_out}")


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


# -- a folder that somebody else may have made


def refuse_unbegun(path: Path) -> None:
    """Raises UsageError for a run that never began: there is nothing to resume."""
    if never_began(path):
        raise UsageError(
            f"{path} was stopped before its first checkpoint, so no step was taken and nothing is lost: "
            "give the command that started it once more, it takes the folder over"
        )


def require_run(path: Path) -> None:
    """Raises UsageError unless `path` looks like a run folder."""
    try:
        if not path.is_dir():
            what = "is no folder" if path.exists() else "does not exist"
            raise UsageError(f"{path} {what}: give the folder of a run, like runs/res110")
        if not (path / "config.yaml").is_file():
            refuse_unbegun(path)
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


def refuse_links(run: Path) -> None:
    """Raises UsageError naming the first thing under `run` that is neither a file nor a folder of its own: by a link in
    place of a file lowmem would write, truncate or delete somewhere else; for a pipe or a device it would wait for
    ever. `run` itself may be a link: that is the user's. What cannot be looked at is left to its reader. Known
    limitation: it is looked at once, when it is opened; who can change it meanwhile has this user's rights already."""
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
                # Windows has two kinds: symbolic links, and junctions, which `S_ISLNK` does not know.
                junction = getattr(status, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)
                if stat.S_ISLNK(status.st_mode) or junction:
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


def run_folders(folder: Path, deep: int = _DEEPEST) -> list[Path]:
    """Those in `folder` (or itself, if it is one) by name; links are not followed. What cannot be looked into may be
    a run, and is told with its reason."""
    try:
        with os.scandir(folder) as entries:
            inside = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except FileNotFoundError:
        return []  # gone meanwhile
    except OSError:
        return [folder]
    if inside.keys() & _SIGNS:
        return [folder]
    names = sorted(name for name, is_folder in inside.items() if is_folder and deep)
    return [run for name in names for run in run_folders(folder / name, deep - 1)]
