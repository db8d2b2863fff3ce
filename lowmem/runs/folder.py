"""The folder of a run as it is found: whether a run may be made there, whether it is a run's and has nothing in it that
leads out of it, and who holds it.

A run (and, by `job.lock`, a job of several) has one writer. `run.lock` is locked with the system's file lock, which is
freed when its holder ends and excludes every process on this machine (where the network file system passes locks on, on
others, too). `run.owner.json` names the holder, who removes it on leaving. Found without the lock being held, it is of
one that died: on this host that is certain, and the run is taken over with a note. Of another host nobody here can
tell; then the run is refused, and removing the file is the way out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, Field

from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.reading import read_json, shorten
from lowmem.runs.atomic import PARTIAL, write_text_atomic
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE

LOCK_NAME, OWNER_NAME = "run.lock", "run.owner.json"
_OWNER_LIMIT_BYTES = 1 << 12
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


# -- one writer


# A stranger's folder must not write to the terminal what is no name.
Name = Annotated[str, Field(strict=True), AfterValidator(lambda text: shorten(text, 100))]


class Owner(BaseModel, frozen=True):
    """Who holds, or held, a run. `since` is in the holder's local time, with its offset."""

    pid: Annotated[int, Field(strict=True, gt=0)]
    host: Name
    since: Name = "a time it does not say"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def may_be_alive(self) -> bool:
        """As far as that can be asked from here, without touching it."""
        if not self.here or os.name == "nt":
            return True  # os.kill ends the process there, whatever the signal
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            return True
        return True


class RunLock:
    """The lock of a run folder, held. `taken_over` is the owner that ended without leaving, or None."""

    def __init__(self, path: Path, what: str = "run") -> None:
        """Locks the folder of a run (or job: `what`). Raises UsageError if somebody else writes it or may, OSError."""
        lock_file, self._owner_file = path / f"{what}.lock", path / f"{what}.owner.json"
        for file in (lock_file, self._owner_file):
            if file.is_symlink():
                raise UsageError(f"{file} is a link, which no {what} of lowmem has: delete it if you trust the folder")
        found = lock_file.exists()
        self._lock = FileLock(lock_file, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            who = read_owner(self._owner_file) or "another process"
            raise UsageError(f"{path} is being written by {who}: wait for it, or stop it first") from None
        try:
            before = self.taken_over = read_owner(self._owner_file)
            if before is not None and not before.here:
                raise UsageError(
                    f"{path} was being written by {before}, which cannot be checked from {socket.gethostname()}: if "
                    f"that process has ended, delete {self._owner_file} and try again"
                )
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            write_text_atomic(self._owner_file, json.dumps(owner) + "\n")
        except BaseException:
            if not found:  # a folder without a run stays one
                with suppress(OSError):
                    lock_file.unlink()
            self._lock.release()
            raise

    @property
    def held(self) -> bool:
        return self._lock.is_locked

    def release(self, *, remove: bool = False) -> None:
        """Leaves the run to others. May be called again. `remove`: without a lock file, which goes while it is locked,
        and last: whoever makes a new one has a folder of its own then, whoever has the old one open finds it gone."""
        lock_file = Path(self._lock.lock_file)
        if self._lock.is_locked:
            for file in (self._owner_file, lock_file) if remove else (self._owner_file,):
                with suppress(OSError):  # the folder may be gone, or the disk: the next takes it for a dead holder's
                    file.unlink()
        self._lock.release()
        if remove and os.name == "nt":  # deletes no file that is open, not even by another
            with suppress(OSError):
                lock_file.unlink()


def read_owner(file: Path) -> Owner | None:
    """What an owner file says; None if there is none, or nothing that can be used."""
    try:
        return None if file.is_symlink() else Owner.model_validate(read_json(file, _OWNER_LIMIT_BYTES))
    except (OSError, ValueError):
        return None


def writer_of(run: Path) -> str | None:
    """Who holds the run's lock: `pid 1234`, `pid 1234 on HOST` for another machine; None if nobody does. The lock
    itself is tried only if its last owner may be alive: trying it holds it for an instant, in which the run could
    not be resumed."""
    lock, owner_file = run / LOCK_NAME, run / OWNER_NAME
    if not os.path.isfile(lock) or os.path.islink(lock) or not os.path.isfile(owner_file):
        return None
    owner = read_owner(owner_file)
    if owner is not None and not owner.may_be_alive:
        return None
    try:
        with FileLock(lock, timeout=0):
            return None
    except Timeout:
        if owner is None:
            return "another process"
        return f"pid {owner.pid}" if owner.here else f"pid {owner.pid} on {owner.host}"
    except OSError:
        return None  # a medium that cannot be written to: nobody trains there
