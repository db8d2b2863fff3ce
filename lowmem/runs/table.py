"""Cutting a table of rows back to a checkpoint. Its lines are numbers between commas, never quoted.

A table is read line by line: with every step recorded, small batches and many layers it grows beyond what there is
room for in memory.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from lowmem.core.errors import CorruptCheckpoint
from lowmem.runs.atomic import cut_file, replacing, write_text_atomic

_COUNT = re.compile(rb"[0-9]{1,15}")
# As many digits as a float can have: without a bound, a line of nothing but digits takes a time of its square.
_NUMBER = rb"(?:[-+]?(?:[0-9]{0,30}\.?[0-9]{1,30}(?:[eE][-+]?[0-9]{1,9})?|[0-9]{1,30}\.|nan|inf)|)"
_LONGEST_LINE_BYTES = 1 << 20  # a row of 1,200 layers has 16 KiB
# Far above any run (a row for each of 164 epochs of single pictures: 0.5 GiB), and soon read where it is one hole.
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Rows:
    """A table's lines, counted. `kept`: whole, rising, at most the last that is asked for; `lost`: lines nothing can
    be made of; `missing`: rows that ought to be there; `beyond`: after the last asked for; `cut_off`: the last one has
    no line end. `kept_bytes`: up to the end of the last kept one; None without a whole header."""

    kept: int
    lost: int
    missing: int
    beyond: int
    cut_off: bool
    kept_bytes: int | None = None

    @property
    def damage(self) -> str | None:
        """In words, None if there is none. What a crash cuts off, or what comes after a checkpoint, is none."""
        words = [f"{self.lost} damaged lines"] if self.lost else []
        words += [f"{self.missing} of {self.kept + self.missing} rows are missing"] if self.missing else []
        return ", ".join(words) or None


def look(
    path: Path,
    names: Sequence[str],
    key: str,
    last: int,
    *,
    every: bool = False,
    take: Callable[[bytes], object] = lambda line: None,
) -> Rows:
    """The table at `path` up to the row whose `key` is `last`. `every`: there must be one for each of 1 … `last`.
    `take` is given each row that is kept, without its line end. A missing file has no rows.

    Raises CorruptCheckpoint for a file that is no table of these columns, OSError.
    """
    missing = last if every else 0
    try:
        file = _open(path)
    except FileNotFoundError:
        return Rows(0, 0, missing, 0, False)
    with file:
        lines = _lines(file)
        header, first = ",".join(names).encode(), next(lines, None)
        if first is None:
            return Rows(0, 0, missing, 0, False)
        begun = first.text is not None and not first.ends and header.startswith(first.text)
        if first.text != header and not begun:
            raise CorruptCheckpoint(
                f"{path} has other columns than this lowmem writes: restore its first line or use the lowmem that "
                "wrote it, or move the file away to go on without its rows"
            )
        if not first.ends:  # cut off while it was made
            return Rows(0, 0, missing, 0, True)
        whole, column, kept_bytes = _whole_row(len(names)), names.index(key), first.end_bytes
        kept = lost = beyond = before = 0
        for line in lines:
            if not line.ends:  # cut off by a crash, and will be repeated
                return Rows(kept, lost, last - kept if every else 0, beyond, True, kept_bytes)
            at = _key(line.text, whole, column)
            if at is None or at <= before:
                lost += 1
            elif at > last:
                beyond += 1
            else:
                assert line.text is not None
                take(line.text)
                # A line that only seems to be after `last`, since others follow it, is a damaged one.
                kept, lost, beyond, before = kept + 1, lost + beyond, 0, at
                kept_bytes = line.end_bytes
    return Rows(kept, lost, last - kept if every else 0, beyond, False, kept_bytes)


def cut(path: Path, names: Sequence[str], key: str, last: int, *, every: bool = False) -> str | None:
    """Cuts the table to the rows that `look` keeps. Returns None, or a sentence if it is damaged; the file as it was is
    then kept beside it as `damaged-<name>`. Raises what `look` raises."""
    rows = look(path, names, key, last, every=every)
    aside = path.with_name(f"damaged-{path.name}")
    if rows.damage is not None and path.exists() and not aside.exists():
        with open(path, "rb") as old, replacing(aside) as copy:
            shutil.copyfileobj(old, copy)
    header = ",".join(names)
    if rows.kept_bytes is None:
        write_text_atomic(path, f"{header}\n")
    elif not rows.lost:
        cut_file(path, rows.kept_bytes)
    else:
        with replacing(path) as new:
            new.write(f"{header}\n".encode())
            look(path, names, key, last, take=lambda line: new.write(line + b"\n"))
    if rows.damage is None:
        return None
    return f"{path}: {rows.damage}; the run goes on without them, the file as it was is kept as {aside.name}"


@cache
def _whole_row(fields: int) -> re.Pattern[bytes]:
    return re.compile(b",".join([_NUMBER] * fields))


def _key(line: bytes | None, whole: re.Pattern[bytes], column: int) -> int | None:
    """None for a line that is damaged."""
    if line is None or not whole.fullmatch(line):
        return None
    value = line.split(b",", column + 1)[column]
    return int(value) if _COUNT.fullmatch(value) else None


@dataclass(frozen=True)
class _Line:
    """`text`: without its end, None for one that is longer than any can be; `ends`: whether it has one."""

    text: bytes | None
    ends: bool
    end_bytes: int


def _open(path: Path) -> BinaryIO:
    """Raises CorruptCheckpoint for what is no table of any run, OSError."""
    status = os.stat(path)
    way_out = "restore it, or move it away to go on without its rows"
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCheckpoint(f"{path} is no regular file: {way_out}")
    if status.st_size > _MOST_BYTES:
        raise CorruptCheckpoint(f"{path} has {status.st_size:,} bytes, at most {_MOST_BYTES:,} are read: {way_out}")
    return open(path, "rb")


def _lines(file: BinaryIO) -> Iterator[_Line]:
    end, long = 0, False
    while piece := file.readline(_LONGEST_LINE_BYTES):
        end += len(piece)
        if not piece.endswith(b"\n") and len(piece) == _LONGEST_LINE_BYTES:
            long = True
            continue
        ends = piece.endswith(b"\n")
        yield _Line(None if long else piece.removesuffix(b"\n").removesuffix(b"\r"), ends, end)
        long = False
    if long:
        yield _Line(None, False, end)
