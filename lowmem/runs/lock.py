"""One writer per run: a lock that the system frees when its holder ends, and a file that says who the holder is.
(A job of several runs is locked the same way, by `job.lock`.)

`run.lock` is locked with the system's file lock, which excludes every process on this machine (and, where the network
file system passes locks on, on others). `run.owner.json` names the holder: process, host, since when. A holder that
leaves removes it. Found without the lock being held, it is of a holder that died: on this host that is certain, and
the run is taken over with a note. On another host nobody here can tell whether that process lives, for network
file systems do not all pass locks on; then the run is refused, and removing the file is the way out.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lowmem.core.errors import UsageError
from lowmem.runs.atomic import write_text_atomic

LOCK_NAME, OWNER_NAME = "run.lock", "run.owner.json"
_OWNER_LIMIT_BYTES = 1 << 12


@dataclass(frozen=True)
class Owner:
    """Who holds, or held, a run. `since` is in the holder's local time, with its offset."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class RunLock:
    """The lock of a run folder, held. `taken_over` is the owner that ended without leaving, or None."""

    def __init__(self, owner_file: Path, lock: FileLock, taken_over: Owner | None) -> None:
        self.taken_over = taken_over
        self._owner_file = owner_file
        self._lock = lock

    @classmethod
    def acquire(cls, path: Path, what: str = "run") -> RunLock:
        """Locks the folder `path` of a run (or of a job: `what`). Raises UsageError if somebody else writes it or may
        do so, OSError."""
        lock_file, owner_file = path / f"{what}.lock", path / f"{what}.owner.json"
        for file in (lock_file, owner_file):
            if file.is_symlink():
                raise UsageError(f"{file} is a link, which no {what} of lowmem has: delete it if you trust the folder")
        found = lock_file.exists()
        lock = FileLock(lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = read_owner(owner_file) or "another process"
            raise UsageError(f"{path} is being written by {who}: wait for it, or stop it first") from None
        try:
            before = read_owner(owner_file)
            if before is not None and before.host != socket.gethostname():
                raise UsageError(
                    f"{path} was being written by {before}, which cannot be checked from {socket.gethostname()}: if "
                    f"that process has ended, delete {owner_file} and try again"
                )
            since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            write_text_atomic(owner_file, json.dumps(owner) + "\n")
        except BaseException:
            if not found:  # a folder without a run stays one
                with suppress(OSError):
                    lock_file.unlink()
            lock.release()
            raise
        return cls(owner_file, lock, before)

    @property
    def held(self) -> bool:
        return self._lock.is_locked

    def release(self) -> None:
        """Leaves the run to others. May be called again."""
        if self._lock.is_locked:
            with suppress(OSError):  # the folder may be gone, or the disk: the next one takes it for a dead holder's
                self._owner_file.unlink(missing_ok=True)
        self._lock.release()

    def remove(self) -> None:
        """Releases the lock and removes it, and the folder if there is nothing else in it.

        The lock file goes while it is locked, and last: whoever makes a new one has a folder of its own from then on,
        and whoever has the old one open finds that it is gone.
        """
        lock_file = Path(self._lock.lock_file)
        for file in (self._owner_file, lock_file):
            with suppress(OSError):
                file.unlink()
        self._lock.release()
        if os.name == "nt":  # deletes no file that is open, not even by another
            with suppress(OSError):
                lock_file.unlink()
        with suppress(OSError):
            lock_file.parent.rmdir()


def read_owner(file: Path) -> Owner | None:
    """What an owner file says; None if there is none, or nothing that can be used."""
    try:
        if file.is_symlink() or file.stat().st_size > _OWNER_LIMIT_BYTES:
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        since = found.get("since", "a time it does not say")
        return Owner(int(found["pid"]), _printable(found["host"]), _printable(since))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


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


def _printable(text: object) -> str:
    """A stranger's folder must not write to the terminal what is no name."""
    if not isinstance(text, str):
        raise ValueError("no text")
    return "".join(c if c.isprintable() else "?" for c in text)[:100]
