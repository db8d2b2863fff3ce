"""Reading files that a run is still writing: only what is new, and noticing when what was read no longer holds.

A run appends whole lines, and a resume (or going back from a broken loss) replaces a table by a shorter one. Each look
opens the file, reads from the last known line on, and closes it: on Windows an open file is in the way of the
trainer's `os.replace`. A line without its end is being written, or was cut off by a crash: it waits for the next look.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from lowmem.core.reading import TABLE_LIMIT_BYTES

_ANCHOR_LIMIT_BYTES = 1 << 16  # of the last line, by which the file is known again


@dataclass(frozen=True)
class News:
    """Whole lines, without their ends. `anew`: what was read before no longer holds, and `lines` are all there are."""

    lines: tuple[str, ...] = ()
    anew: bool = False

    def __bool__(self) -> bool:
        return self.anew or bool(self.lines)


class Follower:
    """One growing text file. A file that is missing, or refuses to be read for a moment, has no news.

    Known limitation: a file rewritten in place, in the same length, with the same last line is not noticed; lowmem
    replaces files.
    """

    def __init__(self, path: Path, limit_bytes: int = TABLE_LIMIT_BYTES) -> None:
        self.path = path
        self._limit_bytes = limit_bytes
        self._mark: tuple[int, int, int] | None = None  # inode, size, time of change
        self._anchor = b""  # the end of what was read
        self._read_bytes = 0

    def look(self) -> News:
        """What came since the last look."""
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # a pipe would never end
                return News()
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                before, mark = self._mark, (status.st_ino, status.st_size, status.st_mtime_ns)
                if mark == before:
                    return News()
                # The number of a file that is gone is given to another: it tells that a file is another, not the same.
                known = before is not None and status.st_ino == before[0] and status.st_size >= self._read_bytes
                if known:
                    file.seek(self._read_bytes - len(self._anchor))
                    data = file.read(self._limit_bytes)
                    known = data.startswith(self._anchor)
                    data = data[len(self._anchor) :]
                if not known:
                    file.seek(0)
                    data = file.read(self._limit_bytes)
        except OSError:
            return News()
        self._mark = mark
        had_read = self._read_bytes > 0
        if not known:
            self._anchor, self._read_bytes = b"", 0
        whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self._read_bytes += len(whole)
            last = whole.rfind(b"\n", 0, -1) + 1
            self._anchor = whole[last:][-_ANCHOR_LIMIT_BYTES:]
        text = whole.decode("utf-8", errors="replace")
        return News(tuple(line.removesuffix("\r") for line in text.split("\n")[:-1]), had_read and not known)


@dataclass(frozen=True)
class Rows:
    """Rows of a table as column -> number, None for an empty field. `anew` as in `News`."""

    rows: tuple[dict[str, float | None], ...] = ()
    anew: bool = False

    def __bool__(self) -> bool:
        return self.anew or bool(self.rows)


class TableFollower:
    """A growing CSV table of numbers. A line that is none of its rows is left out: whoever only looks on has nothing
    to refuse."""

    def __init__(self, path: Path) -> None:
        self._lines = Follower(path)
        self.columns: tuple[str, ...] = ()

    def look(self) -> Rows:
        """The rows that came since the last look."""
        news = self._lines.look()
        lines = news.lines
        if news.anew:
            self.columns = ()
        if not self.columns and lines:
            self.columns, lines = tuple(lines[0].split(",")), lines[1:]
        rows = (parse_row(self.columns, line) for line in lines)
        return Rows(tuple(row for row in rows if row is not None), news.anew)


def parse_row(columns: tuple[str, ...], line: str) -> dict[str, float | None] | None:
    """A line of a CSV table of numbers, None if it is none. A diverged run has values that are not finite."""
    fields = line.split(",")
    if len(fields) != len(columns):
        return None
    try:
        return {name: float(field) if field else None for name, field in zip(columns, fields, strict=True)}
    except ValueError:
        return None


def count(value: float | None) -> int | None:
    """A field that counts something: None for what is unknown, or no count."""
    return int(value) if value is not None and math.isfinite(value) and value >= 0 else None
