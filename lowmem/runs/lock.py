"""The lock of a run: who writes it, and whether somebody does.

A run (and, by `job.lock`, a job of several) has one writer. `run.lock` is locked with the system's file lock, which is
freed when its holder ends and excludes every process on this machine (where the network file system passes locks on, on
others, too). `run.owner.json` names the holder, who removes it on leaving. Found without the lock being held, it is of
one that died: where the lock binds everybody who could hold it (`lock_decides`) that is certain, and the run is taken
over with a note. Of another machine on a network file system nobody here can tell; then the run is refused, and
removing the file is the way out.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, Field

from lowmem.core.errors import UsageError
from lowmem.core.reading import read_json, shorten
from lowmem.runs.atomic import write_text_atomic

LOCK_NAME, OWNER_NAME = "run.lock", "run.owner.json"
_OWNER_LIMIT_BYTES = 1 << 12

# A stranger's folder must not write to the terminal what is no name.
Name = Annotated[str, Field(strict=True), AfterValidator(lambda text: shorten(text, 100))]


class Owner(BaseModel, frozen=True):
    """Who holds, or held, a run. `since` is in the holder's local time, with its offset."""

    pid: Annotated[int, Field(strict=True, gt=0)]
    host: Name
    since: Name = "a time it does not say"
    boot: Name = ""  # of its kernel, which the containers of a machine share; unknown is empty

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


def lock_decides(owner: Owner) -> bool:
    """Whether a lock that nobody holds proves that `owner` has ended, even if it was on a host of another name: it ran
    under this kernel, as containers of one machine do."""
    boot = _boot()
    return owner.here or (boot != "" and owner.boot == boot)


def _boot() -> str:
    """Changes whenever a machine starts; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


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
            if before is not None and not before.here and not (self._excludes() and lock_decides(before)):
                raise UsageError(
                    f"{path} was being written by {before}, which cannot be checked from {socket.gethostname()}: if "
                    f"that process has ended, delete {self._owner_file} and try again"
                )
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            write_text_atomic(self._owner_file, json.dumps(owner | {"boot": _boot()}) + "\n")
        except BaseException:
            if not found:  # a folder without a run stays one
                with suppress(OSError):
                    lock_file.unlink()
            self._lock.release()
            raise

    def _excludes(self) -> bool:
        """Whether the lock, which is held, keeps others out: there are file systems that grant it to everybody."""
        try:
            with FileLock(self._lock.lock_file, timeout=0):
                return False
        except Timeout:
            return True

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


def writer_of(run: Path, what: str = "run") -> str | None:
    """Who holds the lock of the run (or job: `what`): `pid 1234`, `pid 1234 on HOST` for another machine; None if
    nobody does. The lock itself is tried only if its last owner may be alive: trying it holds it for an instant, in
    which the run could not be resumed."""
    lock, owner_file = run / f"{what}.lock", run / f"{what}.owner.json"
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
