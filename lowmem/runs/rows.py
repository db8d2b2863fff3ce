"""Cutting a table of rows back to a checkpoint. Its lines are numbers between commas, never quoted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from lowmem.errors import CorruptCheckpoint
from lowmem.reading import TABLE_LIMIT_BYTES, Unreadable, read_limited
from lowmem.runs.atomic import write_text_atomic

_COUNT = re.compile(r"[0-9]{1,15}")
_NUMBER = re.compile(r"[-+]?([0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?|[0-9]+\.|nan|inf)|")


def cut(path: Path, names: Sequence[str], key: str, last: int, *, every: bool = False) -> str | None:
    """Rewrites the table to its whole lines whose `key` is at most `last` and rises from line to line. `every`: there
    must be one for each of 1 … `last`.

    Returns None, or a sentence if anything but lines after `last` and a half last one is missing or had to be left
    out; the file as it was is then kept beside it as `damaged-<name>`. A missing file becomes one without rows. Raises
    CorruptCheckpoint for a file that is no table of these columns, OSError.
    """
    lines = _lines(path)
    header = ",".join(names)
    if lines and lines[0] != header and (len(lines) > 1 or not header.startswith(lines[0])):
        raise CorruptCheckpoint(
            f"{path} has other columns than this lowmem writes: restore its first line or use the lowmem that wrote "
            "it, or move the file away to go on without its rows"
        )
    column, kept = names.index(key), [header]
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
    missing = last - (len(kept) - 1) if every else 0
    if (lost or missing) and path.exists() and not (aside := path.with_name(f"damaged-{path.name}")).exists():
        shutil.copyfile(path, aside)
    write_text_atomic(path, "\n".join(kept) + "\n")
    if not lost and not missing:
        return None
    words = f"{lost} damaged lines were left out" + (f", {missing} of {last} rows are missing" if missing else "")
    return f"{path}: {words}; the file as it was is kept as damaged-{path.name}"


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
