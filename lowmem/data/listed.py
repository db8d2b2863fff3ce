"""Pictures that a CSV file lists, a line each: `path,label`, or `path,label,split` with train, val or test.

Paths are meant from the file's own folder; labels are names or numbers. A first line that names columns `path` and
`label` (and `split`) is a header: they may then stand anywhere, and other columns are passed over. Between columns
stands a comma, or where the first line has none a semicolon or a tab; text is UTF-8, with or without a mark before it.
The order of the lines is that of the pictures: a run goes on with another file whose paths alone are others.

Known limitation: blanks around a path are not part of it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError
from lowmem.core.reading import Unreadable, read_limited, shorten
from lowmem.core.units import counted
from lowmem.data.tree import PARTS, Tree, file_of, look_alike, shown

_COLUMNS = ("path", "label", "split")
_LIMIT_BYTES = 1 << 28  # two million lines


class Line(NamedTuple):
    """A picture; `number`: of the line that lists it."""

    number: int
    path: str
    label: str
    part: str | None


def read_list(file: Path, config: DataConfig) -> Tree:
    """The classes (sorted; numbers as such) and the files of each part, in the order of the lines. No picture is
    decoded, and one that is not there is its own `trouble`. Raises DataError, which names the line, and OSError."""
    root, lines = str(file.parent), list(_lines(file))
    parts, notes = _parts(file, lines, config)
    names = _sorted({line.label for line in lines})
    if len(names) < 2:
        raise DataError(f"{shown(file)} has only one class ({names[0]!r}): two are needed at the least")
    label, first = {name: number for number, name in enumerate(names)}, dict[str, int]()
    for line in lines:
        place = os.path.normcase(os.path.normpath(os.path.join(root, line.path)))
        if (before := first.setdefault(place, line.number)) != line.number:
            raise _error(file, line.number, f"{shown(line.path)} is in line {before} already: take one of them out")
    files = {
        part: [
            replace(one, trouble=one.trouble and f"line {line.number}: {one.trouble}")
            for line in of_part
            for one in [file_of(os.path.join(root, line.path), line.path, label[line.label])]
        ]
        for part, of_part in parts.items()
    }  # fmt: skip
    return Tree(names, {}, files, (), notes, look_alike(names))


def _parts(file: Path, lines: Sequence[Line], config: DataConfig) -> tuple[dict[str, list[Line]], list[str]]:
    """As of a folder: of `PARTS` those that there are, and what of that must be said. Raises DataError."""
    found = {part: [line for line in lines if (line.part or "train") == part] for part in PARTS}
    notes = []
    if (val := found["val"]) and not config.val_folder:
        notes.append(f"{counted(len(found.pop('val')), 'picture')} of val passed over, as asked")
    elif val and not found["test"] and config.test_split is None:
        notes.append(f"{shown(file)} has no split test: errors are measured on val, and nothing is held back")
        found = {"train": found["train"], "test": val}
    there = {part: of_part for part, of_part in found.items() if of_part}
    if "train" not in there:
        raise DataError(f"{shown(file)} lists no pictures to train on: give some lines train in the column split")
    if "test" not in there and config.test_split is None:
        raise DataError(
            f"{shown(file)} lists no pictures to test on: add --test-split 0.2 to test on a fifth of them, or a third "
            "column, split, with train, val or test in every line"
        )
    return there, notes


def _sorted(names: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


# -- its lines ---------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[Line]:
    """Raises DataError."""
    rows = _rows(file)
    number, first = next(rows, (0, []))
    names, width = [cell.lower() for cell in first], len(first)
    if "path" in names and "label" in names:
        at = [names.index(name) for name in _COLUMNS if name in names]
    else:
        at, rows = list(range(width)), chain([(number, first)] if first else [], rows)
        if width not in (0, 2, 3):
            wanted = "path,label or path,label,split are wanted, or a first line that names these among others"
            raise _error(file, number, f"{counted(width, 'column')}: {wanted}")
        if first and not os.path.splitext(first[0])[1] and not os.path.exists(os.path.join(file.parent, first[0])):
            raise _error(file, number, f"{shorten(first[0])} is no file: a header has the names path and label in it")
    none = True
    for number, cells in rows:
        if len(cells) != width:
            told = f"{counted(len(cells), 'column')}, and the first line has {width}"
            raise _error(file, number, f"{told}: give them all as many, and quote what has a comma in it")
        path, label, *split = (cells[place] for place in at)
        part = split[0].lower() if split else None
        if not path or not label or "\0" in path:
            raise _error(
                file, number, f"no {'label' if path and not label else 'path'}: write it, or take the line out"
            )
        if part is not None and part not in PARTS:
            raise _error(file, number, f"split is {shorten(split[0])!r}: write {', '.join(PARTS[:2])} or {PARTS[2]}")
        none = False
        yield Line(number, path, " ".join(label.split()), part)
    if none:
        raise DataError(f"{shown(file)} lists no pictures: write a line for each, path,label")


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of each line that is not empty, and its cells. Raises DataError."""
    try:
        data = read_limited(file, _LIMIT_BYTES)
        text = data.decode("utf-8-sig")
    except Unreadable as error:
        raise DataError(f"{shown(file)} {error}: give the path of a CSV file") from None
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise _error(file, number, f"the byte 0x{data[error.start]:02x} is no UTF-8: save it as CSV in UTF-8") from None
    first = text.partition("\n")[0]
    between = next((one for one in ",;\t" if one in first), ",")
    rows = csv.reader(StringIO(text, newline=""), delimiter=between, skipinitialspace=True, strict=True)
    try:
        for cells in rows:
            if any(stripped := [cell.strip() for cell in cells]):
                yield rows.line_num, stripped
    except csv.Error as error:
        raise _error(file, rows.line_num, f"{error}: check its quotes") from None


def _error(file: Path, number: int, what: str) -> DataError:
    return DataError(f"{shown(file)}, line {number}: {what}")
