"""Cutting a table of rows back to a checkpoint. Its lines are numbers between commas, never quoted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.errors import CorruptCheckpoint
from lowmem.reading import TABLE_LIMIT_BYTES, Unreadable, read_limited
from lowmem.runs.atomic import write_text_atomic

_COUNT = re.compile(r"[0-9]{1,15}")
_NUMBER = re.compile(r"[-+]?([0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?|[0-9]+\.|nan|inf)|")


@dataclass(frozen=True)
class Rows:
    """A table's lines. `kept`: whole, rising, at most the last that is asked for; `lost`: lines nothing can be made
    of; `missing`: rows that ought to be there; `beyond`: after the last asked for; `cut_off`: the last one has no line
    end."""

    kept: tuple[str, ...]
    lost: int
    missing: int
    beyond: int
    cut_off: bool

    @property
    def damage(self) -> str | None:
        """In words, None if there is none. What a crash cuts off, or what comes after a checkpoint, is none."""
        words = [f"{self.lost} damaged lines"] if self.lost else []
        words += [f"{self.missing} of {len(self.kept) + self.missing} rows are missing"] if self.missing else []
        return ", ".join(words) or None


def look(path: Path, names: Sequence[str], key: str, last: int, *, every: bool = False) -> Rows:
    """The table at `path` up to the row whose `key` is `last`. `every`: there must be one for each of 1 … `last`.
    A missing file has no rows.

    Raises CorruptCheckpoint for a file that is no table of these columns, OSError.
    """
    lines = _lines(path)
    header = ",".join(names)
    if lines and lines[0] != header and (len(lines) > 1 or not header.startswith(lines[0])):
        raise CorruptCheckpoint(
            f"{path} has other columns than this lowmem writes: restore its first line or use the lowmem that wrote "
            "it, or move the file away to go on without its rows"
        )
    column, kept = names.index(key), []
    lost = beyond = before = 0
    for line in lines[1:-1]:  # what follows the last line end was cut off by a crash, and will be repeated
        at = _key(line, len(names), column)
        if at is None or at <= before:
            lost += 1
        elif at > last:
            beyond += 1
        else:
            kept.append(line)
            # A line that only seems to be after `last`, since others follow it, is a damaged one.
            lost, beyond, before = lost + beyond, 0, at
    return Rows(tuple(kept), lost, last - len(kept) if every else 0, beyond, bool(lines and lines[-1]))


def cut(path: Path, names: Sequence[str], key: str, last: int, *, every: bool = False) -> str | None:
    """Rewrites the table to the rows that `look` keeps. Returns None, or a sentence if it is damaged; the file as it
    was is then kept beside it as `damaged-<name>`. Raises what `look` raises."""
    rows = look(path, names, key, last, every=every)
    aside = path.with_name(f"damaged-{path.name}")
    if rows.damage is not None and path.exists() and not aside.exists():
        shutil.copyfile(path, aside)
    write_text_atomic(path, "\n".join((",".join(names), *rows.kept)) + "\n")
    if rows.damage is None:
        return None
    return f"{path}: {rows.damage}; the run goes on without them, the file as it was is kept as {aside.name}"


def _key(line: str, fields: int, column: int) -> int | None:
    """None for a line that is damaged."""
    values = line.split(",")
    if len(values) != fields or not all(map(_NUMBER.fullmatch, values)) or not _COUNT.fullmatch(values[column]):
        return None
    return int(values[column])


def _lines(path: Path) -> list[str]:
    """Split at line ends: what follows the last one comes last, mostly nothing."""
    try:
        text = read_limited(path, TABLE_LIMIT_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except Unreadable as error:
        raise CorruptCheckpoint(f"{path} {error}: restore it, or move it away to go on without its rows") from None
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []
