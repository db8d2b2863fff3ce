"""Reading the files of rows: whole, line after line while a run still writes them, and up to a checkpoint. A run may
have died at any moment, so the last line of a file may be half written. With every step recorded, small batches and
many layers a file outgrows the memory: it is cut back line by line."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from lowmem.core.errors import CorruptCheckpoint, UsageError
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, read_limited, shorten
from lowmem.runs.atomic import cut_file, replacing, write_text_atomic
from lowmem.runs.rows import Event, Row, RowTable, parse_event

_LONGEST_LINE_BYTES = 1 << 20  # a row of 1,200 layers has 16 KiB
# Far above any run (a row for each of 164 epochs of single pictures: 0.5 GiB), and soon read where it is one hole.
_MOST_BYTES = 4 << 30
_ANCHOR_LIMIT_BYTES = 1 << 16  # of the last line, by which a file is known again


# -- whole -------------------------------------------------------------------------------------------------------------


def read_table(path: Path, table: RowTable[Row], notes: list[str]) -> tuple[RowTable[Row], tuple[Row, ...]]:
    """With its columns in this file, every row; none if it is not there yet. A half-written last line is left out and
    noted. Raises UsageError naming file and line for any other damage: silent holes in a curve are worse than none."""
    rows: list[Row] = []
    number, before = 0, -1
    try:
        for number, line in enumerate(_whole_lines(path, notes), start=1):
            if number == 1:
                table = table.read_header(line)
                continue
            rows.append(table.read_row(line))
            at = getattr(rows[-1], table.key)
            if at <= before:
                raise Unreadable(f"{table.key} {at} follows {table.key} {before}: lines are doubled or out of order")
            before = at
    except Unreadable as error:
        raise UsageError(f"{path} line {number}: {error}") from None
    return table, tuple(rows)


def read_events(path: Path, notes: list[str]) -> tuple[Event, ...]:
    """Of events.jsonl what can be read; what cannot is left out and noted."""
    events: list[Event] = []
    try:
        for number, line in enumerate(_whole_lines(path, notes), start=1):
            if (event := parse_event(line)) is None:
                notes.append(f"{path.name} line {number} cannot be read and is left out")
            else:
                events.append(event)
    except UsageError as error:
        notes.append(f"{shorten(error, 500)}; what it holds is left out")
    return tuple(events)


def _whole_lines(path: Path, notes: list[str]) -> list[str]:
    """The lines that have their line end. A run killed while writing leaves one without; a power cut leaves NULs."""
    try:
        text = read_limited(path, TABLE_LIMIT_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except Unreadable as error:
        raise UsageError(f"{path} {error}: restore the file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from None
    whole, _, rest = text.rpartition("\n")
    if rest:
        notes.append(f"the last line of {path.name} was half written and is left out")
    return [line.removesuffix("\r") for line in whole.split("\n")] if whole else []


# -- while it grows ----------------------------------------------------------------------------------------------------


Item = TypeVar("Item")


@dataclass(frozen=True)
class News(Generic[Item]):
    """What came. `anew`: what was read before no longer holds, and `items` are all there are."""

    items: tuple[Item, ...] = ()
    anew: bool = False

    def __bool__(self) -> bool:
        return self.anew or bool(self.items)


class Follower(Generic[Item]):
    """A growing text file: only what is new, and noticing when what was read no longer holds. It is open during a look
    only: on Windows an open file is in the way of the trainer's `os.replace`. A line without its end is being written,
    or was cut off by a crash: it waits for the next look. A file that is missing, or refuses to be read for a moment,
    has no news. Known limitation: a file rewritten in place (lowmem replaces files), in the same length, with the same
    last line is not noticed."""

    def __init__(self, path: Path, parse: Callable[[list[str], bool], Iterable[Item]]) -> None:
        """`parse(lines, from_the_beginning)`: the items of whole lines, without their ends."""
        self._path, self._parse = path, parse
        self._mark: tuple[int, int, int] | None = None  # inode, size, time of change
        self._anchor = b""  # the end of what was read
        self._read_bytes = 0

    def look(self) -> News[Item]:
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                return News()  # a pipe would never end
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                mark = (status.st_ino, status.st_size, status.st_mtime_ns)
                if mark == self._mark:
                    return News()
                # The number of a file that is gone is given to another: it tells that a file is another, not that it is
                # the same. That it begins with what was read, its last line tells.
                known = self._mark is not None and self._mark[0] == mark[0] and self._read_bytes <= status.st_size
                if known:
                    file.seek(self._read_bytes - len(self._anchor))
                    known = file.read(len(self._anchor)) == self._anchor
                begin = self._read_bytes if known else 0
                file.seek(begin)
                data = file.read(TABLE_LIMIT_BYTES)
        except OSError:
            return News()
        anew, self._mark = not known and self._read_bytes > 0, mark
        whole = data[: data.rfind(b"\n") + 1]
        self._read_bytes = begin + len(whole)
        if whole or not known:
            self._anchor = whole[whole.rfind(b"\n", 0, -1) + 1 :][-_ANCHOR_LIMIT_BYTES:]
        lines = [line.removesuffix("\r") for line in whole.decode("utf-8", errors="replace").split("\n")[:-1]]
        return News(tuple(self._parse(lines, begin == 0)), anew)


def follow_events(path: Path) -> Follower[Event]:
    """The events that come; a line that is none is left out."""
    return Follower(path, lambda lines, begins: [event for line in lines if (event := parse_event(line)) is not None])


class TableFollower(Follower[Row]):
    """The rows that come. A line that is none is left out: whoever only looks on has nothing to refuse. `table`: with
    the columns of the file; None before the first line, or where that is no header of this table."""

    def __init__(self, path: Path, table: RowTable[Row]) -> None:
        super().__init__(path, self._rows)
        self.table: RowTable[Row] | None = None
        self._known = table

    def _rows(self, lines: list[str], from_the_beginning: bool) -> Iterator[Row]:
        if from_the_beginning:
            self.table = None
            with suppress(Unreadable):
                self.table = self._known.read_header(lines.pop(0)) if lines else None
        for line in lines:
            with suppress(Unreadable):
                if self.table is not None:
                    yield self.table.read_row(line)


# -- up to a checkpoint ------------------------------------------------------------------------------------------------


def _lines(file: BinaryIO) -> Iterator[tuple[bytes | None, bool, int]]:
    """Each line without its end (None: it is longer than any can be), whether it has one, and the bytes up to there."""
    end, long = 0, False
    while piece := file.readline(_LONGEST_LINE_BYTES):
        end += len(piece)
        ends = piece.endswith(b"\n")
        if not ends and len(piece) == _LONGEST_LINE_BYTES:
            long = True
            continue
        yield None if long else piece.removesuffix(b"\n").removesuffix(b"\r"), ends, end
        long = False
    if long:
        yield None, False, end


@dataclass
class Scan:
    """A table's lines, counted. `kept`: whole, rising, at most the last that is asked for; `lost`: lines nothing can
    be made of; `missing`: rows that ought to be there; `beyond`: after the last asked for; `cut_off`: the last one has
    no line end; `columns_lacking`: how many less an older version wrote. `kept_bytes`: up to the end of the last kept
    one; None without a whole header."""

    kept: int = 0
    lost: int = 0
    missing: int = 0
    beyond: int = 0
    cut_off: bool = False
    columns_lacking: int = 0
    kept_bytes: int | None = None

    @property
    def damage(self) -> str | None:
        """In words, None if there is none. What a crash cuts off, or what comes after a checkpoint, is none."""
        words = [f"{self.lost} damaged lines"] if self.lost else []
        words += [f"{self.missing} of {self.kept + self.missing} rows are missing"] if self.missing else []
        return ", ".join(words) or None


def scan_table(
    path: Path, table: RowTable[Any], last: int | None, take: Callable[[bytes], object] = lambda line: None
) -> Scan:
    """The table at `path` up to the row whose key is `last` (None: all); of epochs there must be each from the first
    to that. `take` is given each row that is kept, without its line end. A missing file has no rows. Raises
    CorruptCheckpoint for a file that is no table of these columns, OSError."""
    rows = Scan(missing=last if table.key == "epoch" and last is not None else 0)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return rows
    way_out = "restore it, or move it away to go on without its rows"
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCheckpoint(f"{path} is no regular file: {way_out}")
    if status.st_size > _MOST_BYTES:
        raise CorruptCheckpoint(f"{path} has {status.st_size:,} bytes, at most {_MOST_BYTES:,} are read: {way_out}")
    before = 0
    with open(path, "rb") as file:
        lines, header = _lines(file), table.header.encode()
        first, whole, end_bytes = next(lines, (header, False, 0))
        begun = first is not None and not whole and header.startswith(first)
        for count in table.older if whole else ():
            if first == (older := ",".join(table.names[:count])).encode():
                rows.columns_lacking, header = len(table.names) - count, first
                table = table.read_header(older)
        if first != header and not begun:
            raise CorruptCheckpoint(
                f"{path} has other columns than this lowmem writes: restore its first line or use the lowmem that "
                "wrote it, or move the file away to go on without its rows"
            )
        rows.cut_off = end_bytes > 0 and not whole  # while it was made
        rows.kept_bytes = end_bytes if whole else None
        for line, whole, end_bytes in lines:
            if not whole:  # cut off by a crash, and will be repeated
                rows.cut_off = True
                break
            try:
                text = "" if line is None else line.decode("utf-8", errors="replace")
                at = getattr(table.read_row(text), table.key)
            except Unreadable:
                at = 0
            if at <= before:
                rows.lost += 1
            elif last is not None and at > last:
                rows.beyond += 1
            else:
                take(line or b"")
                rows.kept, rows.kept_bytes, before = rows.kept + 1, end_bytes, at
                # A line that only seems to be after `last`, since others follow it, is a damaged one.
                rows.lost, rows.beyond = rows.lost + rows.beyond, 0
    rows.missing = max(0, rows.missing - rows.kept)
    return rows


def cut_table(path: Path, table: RowTable[Any], last: int) -> str | None:
    """Cuts the table to the rows that `scan_table` keeps, with the columns that have come since. Returns None, or a
    sentence if it is damaged; the file as it was is then kept beside it as `damaged-<name>`. Raises what `scan_table`
    raises."""
    rows = scan_table(path, table, last)
    aside = path.with_name(f"damaged-{path.name}")
    if rows.damage is not None and path.exists() and not aside.exists():
        with open(path, "rb") as old, replacing(aside) as copy:
            shutil.copyfileobj(old, copy)
    if rows.kept_bytes is None:
        write_text_atomic(path, f"{table.header}\n")
    elif not rows.lost and not rows.columns_lacking:
        cut_file(path, rows.kept_bytes)
    else:
        with replacing(path) as new:
            new.write(f"{table.header}\n".encode())
            end = b"," * rows.columns_lacking + b"\n"
            scan_table(path, table, last, take=lambda line: new.write(line + end))
    if rows.damage is None:
        return None
    return f"{path}: {rows.damage}; the run goes on without them, the file as it was is kept as {aside.name}"
