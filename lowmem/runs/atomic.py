"""Files that are there whole or not at all (invariant 9): write aside, flush, fsync, replace, fsync the folder. And
lines that are appended to a file, each once and in order, however long the disk refuses them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
_BLOCK_BYTES = 1 << 16


def fsync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable. Windows cannot open a folder for this, and orders renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_path(source: Path, target: Path) -> None:
    """`os.replace`. On Windows a reader or a virus scanner that has a file open makes it fail for a moment: tried
    again for two seconds. Raises OSError."""
    deadline = time.monotonic() + (2.0 if os.name == "nt" else 0.0)
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def write_synced(path: Path, data: bytes) -> None:
    """Writes `data` and waits until it is on the disk. Not atomic by itself. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when it is whole: a reader, or a crash, sees the old or the new content. Raises
    OSError; half a file does not stay, which on a full disk takes the room that a second try needs."""
    aside = path.with_name(path.name + PARTIAL)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_path(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def write_text_atomic(path: Path, text: str) -> None:
    write_bytes_atomic(path, text.encode("utf-8"))


def cut_file(path: Path, size_bytes: int) -> None:
    """Cuts a file to its first bytes, and waits until these are on the disk: no state in between. Raises OSError."""
    with open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END) > size_bytes:
            file.truncate(size_bytes)
            file.flush()
        os.fsync(file.fileno())


def append_lines(path: Path, lines: Sequence[str], *, after_bytes: int) -> int:
    """Appends whole lines after the first `after_bytes` and waits until they are on the disk; what is there beyond
    these (half a line of an earlier failure) is cut off. Returns the size of the file then. Raises OSError; the file
    then ends after `after_bytes`, unless not even that could be done."""
    new = not path.exists()
    # Unbuffered: a buffer would keep what the disk refused and write it when the file is closed.
    with open(path, "ab", buffering=0) as file:
        if file.tell() > after_bytes:
            file.truncate(after_bytes)
        rest = memoryview("".join(f"{line}\n" for line in lines).encode("utf-8"))
        end_bytes = after_bytes + len(rest)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(after_bytes)
            raise
    if new:
        fsync_folder(path.parent)
    return end_bytes


def whole_lines_bytes(path: Path) -> int:
    """The size of a file without the half line at its end, if there is one. Raises OSError."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _BLOCK_BYTES)
            file.seek(begin)
            if (found := file.read(end - begin).rfind(b"\n")) >= 0:
                return begin + found + 1
            end = begin
    return 0


class RowFile:
    """One append-only text file with the lines that are still to be written to it. Threads may share it. A failed
    write leaves nothing behind: the file is cut back to its last whole line, at once or before the next write; so is
    half a line that a process that died has left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []  # lines that the disk refused and that are in memory only
        self._good_bytes: int | None = None  # up to here the file is known to hold whole lines
        self._lock = threading.Lock()

    def append(self, lines: Sequence[str] = ()) -> None:
        """Writes the lines after those that wait. Raises OSError; then they wait, too."""
        with self._lock:
            lines = [*self.waiting, *lines]
            if not lines:
                return
            try:
                size = self.path.stat().st_size if self.path.exists() else 0
                if self._good_bytes is None or size < self._good_bytes:  # shorter: others have been at it
                    self._good_bytes = whole_lines_bytes(self.path) if size else 0
                self._good_bytes = append_lines(self.path, lines, after_bytes=self._good_bytes)
            except BaseException:
                self.waiting = lines
                raise
            self.waiting = []

    def replaced(self) -> None:
        """To be told after the file was replaced by other means."""
        with self._lock:
            self._good_bytes = None
