"""Dies at the k-th thing that a process does to the files of a run: the real calls, with a count before each.

Counted are openings for writing, writes, flushes, closings, fsyncs, truncations, replacements, deletions and new
folders under one folder, from whichever thread. It works in the process it is installed in, and only there.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_WRITING = set("wax+")


class Hook:
    """Counts what is done under `root` and writes a line of it to `log`. Before number `die_at`, or before the first
    whose line matches the pattern `die_on`, it sends `death` to its own process. `half`: if that is a write, the first
    half of its bytes reaches the file. `power`: see Disk."""

    def __init__(
        self,
        root: Path,
        log: Path,
        *,
        die_at: int | None = None,
        die_on: str | None = None,
        half: bool = False,
        power: bool = False,
        death: int = signal.SIGKILL,
    ) -> None:
        self._root = os.path.realpath(root)
        self._die_at, self._die_on, self._half, self._death = die_at, die_on, half, death
        self._sent = False
        self._done = 0
        self._dying = False
        self._lock = threading.RLock()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._disk = Disk() if power else None
        self._open, self._write, self._fsync, self._replace = io.open, os.write, os.fsync, os.replace
        self._os_open, self._sendfile = os.open, getattr(os, "sendfile", None)

    def before(self, kind: str, path: str, cut: Callable[[], Any] | None = None) -> None:
        """Called before each operation. `cut` does the half of a write."""
        with self._lock:
            if self._dying:
                return
            self._done += 1
            line = f"{kind} {os.path.relpath(path, self._root)}"
            self._write(self._log, f"{line}\n".encode())
            matches = self._die_on is not None and fnmatchcase(line, self._die_on)
            if self._sent or not (matches or self._done == self._die_at):
                return
            self._sent = True
            self._dying = self._death == signal.SIGKILL
            if self._half and cut is not None:
                cut()
            if self._disk is not None:
                self._disk.lose()
            os.kill(os.getpid(), self._death)
            while self._dying:
                time.sleep(1)

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The whole path if it is under the folder that is watched. The folder itself counts."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        whole = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(whole):
            whole = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), whole)
        whole = os.path.join(os.path.realpath(os.path.dirname(whole) or "."), os.path.basename(whole))
        return whole if whole == self._root or whole.startswith(self._root + os.sep) else None

    def install(self) -> None:
        """For good: the process ends with it."""
        builtins.open = io.open = self._opened  # type: ignore[assignment]
        os.write = self._os_write
        os.open = self._os_opened
        if self._sendfile is not None:
            os.sendfile = self._sent_file
        os.fsync = self._os_fsync
        os.replace, os.rename = (self._moving(move) for move in (os.replace, os.rename))
        os.unlink, os.remove, os.rmdir = (self._one("delete", call) for call in (os.unlink, os.remove, os.rmdir))  # type: ignore[assignment]
        os.mkdir = self._one("mkdir", os.mkdir)
        os.truncate = os.ftruncate = self._one("truncate", os.truncate)

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        path = self.inside(file) if _WRITING & set(mode) else None
        if path is None:
            return self._open(file, mode, *args, **kwargs)
        self.before("open", path)
        if self._disk is not None:
            self._disk.opened(path, emptied="w" in mode)
        return _File(self, path, self._open(file, mode, *args, **kwargs))

    def _os_opened(self, file: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        """Path.touch and the lock."""
        path = self.inside(file, kwargs.get("dir_fd")) if flags & (os.O_WRONLY | os.O_RDWR) else None
        if path is not None:
            self.before("open", path)
            if self._disk is not None:
                self._disk.opened(path, emptied=bool(flags & os.O_TRUNC))
        return self._os_open(file, flags, *args, **kwargs)

    def _sent_file(self, to: int, source: int, offset: int, count: int) -> int:
        """The data of shutil.copyfile."""
        assert self._sendfile is not None
        send = self._sendfile
        if (path := self._of(to)) is not None:
            half = min(count, os.fstat(source).st_size) // 2
            self.before("write", path, lambda: send(to, source, offset, half))
        return int(send(to, source, offset, count))

    def _os_write(self, descriptor: int, data: Any) -> int:
        if (path := self._of(descriptor)) is not None:
            self.before("write", path, lambda: self._write(descriptor, bytes(data)[: len(data) // 2]))
        return self._write(descriptor, data)

    def _of(self, descriptor: int) -> str | None:
        try:
            return self.inside(descriptor)
        except OSError:
            return None

    def _os_fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = self._of(descriptor)
        if path is not None:
            self.before("fsync", path)
        self._fsync(descriptor)
        if path is not None and self._disk is not None:
            self._disk.synced(path)

    def _moving(self, move: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any, **kwargs: Any) -> None:
            path = self.inside(target)
            if path is None:
                return move(source, target, **kwargs)
            self.before("replace", path)
            if self._disk is not None:
                return self._disk.move(os.path.realpath(source), path, move)
            return move(source, target, **kwargs)

        return moved

    def _one(self, kind: str, call: Callable[..., None]) -> Callable[..., None]:
        def done(path: Any, *args: Any, **kwargs: Any) -> None:
            whole = self.inside(path, kwargs.get("dir_fd"))
            if whole is not None:
                self.before(kind, whole)
            return call(path, *args, **kwargs)

        return done


class _File:
    """A file open for writing, with a count before each operation."""

    def __init__(self, hook: Hook, path: str, file: Any) -> None:
        self._hook, self._path, self._file = hook, path, file

    def write(self, data: Any) -> int:
        self._hook.before("write", self._path, lambda: self._cut(data))
        return self._file.write(data)

    def _cut(self, data: Any) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()

    def flush(self) -> None:
        self._hook.before("flush", self._path)
        self._file.flush()

    def truncate(self, size: int | None = None) -> int:
        self._hook.before("truncate", self._path)
        return self._file.truncate(size)

    def close(self) -> None:
        if not self._file.closed:
            self._hook.before("close", self._path)
        self._file.close()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Disk:
    """What a power cut would leave, at its worst: of each file what was fsynced, of each replacement none whose folder
    was not. New names are taken to last, as on the usual file systems once the file is fsynced; deletions too.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._moves: list[tuple[str, str, bytes | None]] = []  # source, target, what was there before

    def opened(self, path: str, *, emptied: bool) -> None:
        if emptied:
            self._sizes[path] = 0
        self._sizes.setdefault(path, os.path.getsize(path) if os.path.exists(path) else 0)

    def synced(self, path: str) -> None:
        if os.path.isdir(path):
            self._moves = [move for move in self._moves if os.path.dirname(move[1]) != path]
        else:
            self._sizes[path] = os.path.getsize(path)

    def move(self, source: str, target: str, move: Callable[..., None]) -> None:
        before = Path(target).read_bytes() if os.path.isfile(target) else None
        self._moves.append((source, target, before))
        move(source, target)
        for path in [one for one in self._sizes if one == source or one.startswith(source + os.sep)]:
            self._sizes[target + path[len(source) :]] = self._sizes.pop(path)

    def lose(self) -> None:
        for path, size in self._sizes.items():
            if os.path.isfile(path) and os.path.getsize(path) > size:
                os.truncate(path, size)
        for source, target, before in reversed(self._moves):
            if not os.path.exists(target) or os.path.exists(source):
                continue
            os.rename(target, source)
            if before is not None:
                Path(target).write_bytes(before)
