"""Lines that are appended to a file, each once and in order, however long the disk refuses them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from lowmem.runs.atomic import append_lines, whole_lines_bytes


class RowFile:
    """One append-only text file with the lines that are still to be written to it. Threads may share it.

    A failed write leaves nothing behind: the file is cut back to its last whole line, at once or before the next
    write. The same is done to half a line that a process that died has left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._refused = False
        self._good_bytes: int | None = None  # up to here the file is known to hold whole lines
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Lines that the disk refused and that are in memory only."""
        return len(self._waiting) if self._refused else 0

    def append(self, lines: Sequence[str]) -> None:
        """Writes the lines after those that wait. Raises OSError; then they wait, too."""
        with self._lock:
            self._waiting += lines
            self._write()

    def flush(self) -> None:
        """Writes what waits. Raises OSError; then it goes on waiting."""
        with self._lock:
            self._write()

    def replaced(self) -> None:
        """To be told after the file was replaced by other means."""
        with self._lock:
            self._good_bytes = None

    def _write(self) -> None:
        if not self._waiting:
            return
        try:
            if self._good_bytes is None or _size(self.path) < self._good_bytes:  # shorter: others have been at it
                self._good_bytes = whole_lines_bytes(self.path) if self.path.exists() else 0
            self._good_bytes = append_lines(self.path, self._waiting, after_bytes=self._good_bytes)
        except OSError:
            self._refused = True
            raise
        self._waiting, self._refused = [], False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
