"""The folder of a job while it is conducted: made, locked, and gone again if nothing came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowmem.core.errors import PreflightError, UsageError
from lowmem.reproduce.job import FILE_NAME, is_job
from lowmem.reproduce.members import ALL
from lowmem.runs.atomic import PARTIAL
from lowmem.runs.lock import RunLock
from lowmem.runs.setup import never_began

_LOCK = ("job.lock", "job.owner.json")
_OWN = {FILE_NAME, *_LOCK}


def refuse_other_folder(path: Path) -> None:
    """Raises UsageError unless `path` is a job's folder, empty, or not there."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: choose another folder with --out")
    if not path.exists() or is_job(path):
        return
    if any(entry.name.removesuffix(PARTIAL) not in _OWN for entry in path.iterdir()):
        raise UsageError(f"{path} exists and is not the folder of a job: choose another with --out")


@contextmanager
def held(path: Path) -> Iterator[RunLock]:
    """The job's folder under its lock. If no run was begun in it when this is left, nothing of it stays.

    Raises UsageError if it is another's, PreflightError if it cannot be read or written."""
    try:
        refuse_other_folder(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock.acquire(path, "job")
    except OSError as error:
        raise PreflightError(
            f"{path} cannot be written ({error.strerror or error}): choose another folder with --out"
        ) from None
    try:
        yield lock
    finally:
        try:
            nothing = not begun(path)
        except PreflightError:
            nothing = False
        lock.release()
        if nothing:
            _remove(path, made)


def begun(path: Path) -> bool:
    """Whether any run of the job was begun: from then on its settings are settled. Raises PreflightError."""
    return any(_begun(path / member.name) for member in ALL)


def _begun(folder: Path) -> bool:
    try:
        return folder.is_dir() and any(folder.iterdir()) and not never_began(folder)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(path: Path, error: OSError) -> PreflightError:
    return PreflightError(f"{path} cannot be read ({error.strerror or error}): check its permissions")


def _remove(path: Path, made: list[Path]) -> None:
    with suppress(OSError):
        for name in (FILE_NAME, f"{FILE_NAME}{PARTIAL}", *_LOCK):
            (path / name).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()  # only if it is empty
