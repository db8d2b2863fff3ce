"""Lines and tables for the width at hand: a phone's terminal has forty columns. What is piped has no width, and is as
wide as it is."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Collection, Sequence

from lowmem.core.units import aligned

_LEAST_LAST = 12  # columns of a table's last one, below which its rows had better be blocks
_NUMBER_AT_END = re.compile(r"(?P<name>.*\S) {2,}(?P<number>[-+]?[\d?–][^ ]*( \S{1,4})?)")


def room() -> int | None:
    """Columns of the terminal, or of `COLUMNS`; None where there is neither."""
    return shutil.get_terminal_size((0, 0)).columns or None


def table(rows: Sequence[Sequence[str]], right: Collection[int], columns: int | None) -> list[str]:
    """Lines of cells, the header first. Where they are too wide the last column wraps, and where that is too little a
    row is a block of its own: its first cell, and a line for each of the others that is not empty."""
    lines = aligned(rows, right)
    if columns is None or max(map(len, lines)) <= columns:
        return lines
    before = sum(max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:-1])
    if columns - before >= max(_LEAST_LAST, len(rows[0][-1])):
        return [part for line in lines for part in _wrapped(line, before, columns)]
    blocks = []
    for name, *cells in rows[1:]:
        named = [(f"  {title}", cell) for title, cell in zip(rows[0][1:], cells, strict=True) if cell]
        blocks += [name, *fold(aligned(named), columns)]
    return blocks


def fold(lines: Sequence[str], columns: int | None) -> list[str]:
    """The lines, those that are too wide wrapped under the beginning of their last column that leaves room for it. A
    command (`> …`) stays in one piece: it is there to be copied."""
    folded: list[str] = []
    for line in lines:
        if columns is None or len(line) <= columns or line.lstrip().startswith("> "):
            folded.append(line)
        elif (match := _NUMBER_AT_END.fullmatch(line)) and len(match["name"]) <= columns:
            name, number, left = match["name"], match["number"], columns - len(match["name"])
            fits = len(number) + 2 <= left
            folded += [f"{name}{number:>{left}}"] if fits else [name, f"{number:>{columns}}"]
        else:
            starts = [gap.end() for gap in re.finditer(r"^ +|(?<=\S) {2,}", line) if gap.end() <= columns // 2]
            folded += _wrapped(line, max(starts, default=2), columns)
    return folded


def _wrapped(line: str, indent: int, columns: int) -> list[str]:
    """At spaces, and after the first line from `indent` on. What is columns within begins a line where it does not fit
    in whole."""
    lines = [""]
    for cell in re.split(r" {2,}", line[indent:].rstrip()):
        if lines[-1] and indent + len(lines[-1]) + 2 + len(cell) <= columns:
            lines[-1] += f"  {cell}"
        else:
            lines += textwrap.wrap(cell, max(columns - indent, 1), break_long_words=False, break_on_hyphens=False)
    first, *others = list(filter(None, lines)) or [""]
    return [(line[:indent] + first).rstrip(), *(f"{'':{indent}}{other}" for other in others)]
