"""A disk that fails on demand, by injection at one operation, and a real one that is tiny."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lowmem.runs import atomic


class FailingDisk:
    """Counts every write, fsync and replace that goes through `lowmem.runs.atomic` (`operations`, by kind and file
    name), and refuses those for which `refuses(count)` holds. Of a refused write half the bytes arrive, as on a full
    disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations: list[tuple[str, str]] = []
        self.refuses: Callable[[int], bool] = lambda count: False
        self.code = errno.ENOSPC
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(atomic, "open", self._open, raising=False)
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(os, "replace", self._rename)

    def check(self, kind: str, name: str) -> None:
        self.operations.append((kind, name))
        if self.refuses(len(self.operations)):
            raise OSError(self.code, os.strerror(self.code))

    def _open(self, path: Path, *args: Any, **kwargs: Any) -> Any:
        return _File(open(path, *args, **kwargs), self, Path(path).name)

    def _sync(self, descriptor: int) -> None:
        self.check("fsync", "")
        self._fsync(descriptor)

    def _rename(self, source: Any, target: Any) -> None:
        self.check("replace", Path(target).name)
        self._replace(source, target)


class _File:
    def __init__(self, file: Any, disk: FailingDisk, name: str) -> None:
        self._file, self._disk, self._name = file, disk, name

    def write(self, data: Any) -> int:
        try:
            self._disk.check("write", self._name)
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return int(self._file.write(data))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def tiny_disk(folder: Path, size_bytes: int, entries: int = 0) -> Iterator[Path]:
    """A file system of its own of this size (and of so many files and folders, unless 0), mounted under `folder`; skips
    the test where that is not allowed."""
    point = folder / "tiny"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},nr_inodes={entries}", "lowmem-test", str(point)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tiny file system cannot be mounted here: {getattr(error, 'stderr', b'') or error!r}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, capture_output=True)


def fill(point: Path, leave_bytes: int = 0) -> Path:
    """Takes all room but `leave_bytes` -> the file that has it."""
    filler = point / "filler"
    with open(filler, "ab", buffering=0) as file:
        while (free := _free_bytes(point) - leave_bytes) > 0:
            try:
                if not file.write(bytes(min(free, 1 << 20))):
                    break
            except OSError:
                break
    return filler


def _free_bytes(point: Path) -> int:
    found = os.statvfs(point)
    return found.f_bavail * found.f_frsize
