"""The rows of a run's files, and the one parser of each: metrics.csv, steps.csv, gradients.csv, events.jsonl.

    epoch,step,lr,...                            metrics.csv: a row for each epoch
    step,epoch,lr,loss                           steps.csv: a row for each logged step
    step,epoch,conv1.weight,...,linear.weight    gradients.csv: the gradient norm of every layer

A table is numbers between commas, never quoted. An unknown value is an empty field, never zero; a run that diverged has
losses that are not finite. Whoever reads a file whole, follows it or cuts it back (`lowmem.runs.tables`) reads its
lines by what stands here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Generic, TypeVar

from lowmem.core.reading import parse_json, shorten

_COUNT = r"[0-9]{1,15}"  # curves are drawn with floats, which hold these exactly
# As many digits as a float can have: without a bound, a line of nothing but digits takes a time of its square. Matched
# in one way only: with two ways a field, a line of n fields of which the last is bad takes a time of 2^n.
_NUMBER = r"[-+]?(?:(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,9})?|nan|inf)"
_LONGEST_SECONDS = 1e10


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """A line of metrics.csv; its columns in file order."""

    epoch: int  # 1-based, completed
    step: int  # optimizer steps done
    lr: float | None = None
    train_loss: float | None = None
    train_error_pct: float | None = None
    test_loss: float | None = None
    test_error_pct: float | None = None
    images_per_second: float | None = None  # training only, evaluation not counted
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    elapsed_seconds: float | None = None  # of the run, over all resumes
    # Only with data.val_split; last, so that the others keep their positions.
    val_loss: float | None = None
    val_error_pct: float | None = None

    def __post_init__(self) -> None:
        if self.elapsed_seconds is not None and not 0 <= self.elapsed_seconds < _LONGEST_SECONDS:
            object.__setattr__(self, "elapsed_seconds", None)  # a loss may be infinite, no run is


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A line of steps.csv; its columns in file order."""

    step: int
    epoch: int | None = None
    lr: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class GradientRow:
    """A line of gradients.csv: the norms of one step, in the order of the layers; infinite or NaN where the step
    overflowed. Six digits are kept: the figure is drawn over many decades, and a run of 110 layers writes some 1,600
    rows."""

    step: int
    epoch: int
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Gradients:
    """What gradients.csv holds; `layers` are parameter names from the input to the output."""

    layers: tuple[str, ...] = ()
    rows: tuple[GradientRow, ...] = ()


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl: its kind, its time as written, and everything else it says."""

    kind: str
    time: str | float | None
    detail: Mapping[str, object]


class BadLine(ValueError):
    """What is wrong with a line, in words that follow its file and number."""


class Columns:
    """The columns of a table. `key`: the one that rises from line to line; `counts`: those of whole numbers from zero;
    `needed`: those that are never empty."""

    def __init__(self, names: Sequence[str], key: str, counts: Container[str], needed: Container[str]) -> None:
        self.names, self.key = tuple(names), key
        self._counts, self._needed = counts, needed
        self._key_index = self.names.index(key)
        self._whole = re.compile(",".join(map(self._pattern, self.names)))

    @property
    def header(self) -> str:
        """The first line."""
        return ",".join(self.names)

    def parse(self, line: str) -> dict[str, float | int | None]:
        """A line without its end, by column. Raises BadLine."""
        self._check(line)
        values = zip(self.names, line.split(","), strict=True)
        return {name: (int if name in self._counts else float)(text) if text else None for name, text in values}

    def key_of(self, line: str) -> int:
        """The value of `key` in a line that `parse` takes. Raises BadLine."""
        self._check(line)
        return int(line.split(",", self._key_index + 1)[self._key_index])

    def _check(self, line: str) -> None:
        if self._whole.fullmatch(line):
            return
        texts = line.split(",") if line else []
        if len(texts) != len(self.names):
            raise BadLine(f"{len(texts)} fields where the header has {len(self.names)}")
        for name, text in zip(self.names, texts, strict=True):
            if not text and name in self._needed:
                raise BadLine(f"{name} is empty")
            if not re.fullmatch(self._pattern(name), text):
                raise BadLine(f"{name} is {shorten(text)!r}, which is no number")

    def _pattern(self, name: str) -> str:
        number = _COUNT if name in self._counts else _NUMBER
        return number if name in self._needed else f"(?:{number})?"


Row = TypeVar("Row")


class RowTable(Generic[Row]):
    """One of a run's tables: the name of its file, its key, and what a line of it becomes."""

    def __init__(self, file_name: str, key: str, row: Callable[..., Row]) -> None:
        self.file_name, self.key, self._row = file_name, key, row
        of_row: Sequence[Any] = fields(row)  # type: ignore[arg-type]
        self.names = tuple(field.name for field in of_row)
        self._counts = frozenset(field.name for field in of_row if str(field.type).startswith("int"))
        self._needed = frozenset(field.name for field in of_row if field.default is MISSING)
        self.columns = self._columns(self.names)

    def _columns(self, names: Sequence[str]) -> Columns:
        return Columns(names, self.key, self._counts, self._needed)

    def read_header(self, line: str) -> Columns:
        """What the first line of a file says: some of the table's columns, in any order; older versions had fewer.

        Raises BadLine."""
        names = line.split(",")
        unknown = [name for name in names if name not in self.names]
        missing = [name for name in self.names if name in self._needed and name not in names]
        if unknown or missing or len(set(names)) != len(names):
            wrong = f"no column {missing[0]!r}" if missing else "doubled column"
            wrong = f"unknown column {shorten(unknown[0])!r}" if unknown else wrong
            raise BadLine(f"{wrong}: the columns are {','.join(self.names)}")
        return self._columns(names)

    def read_row(self, columns: Columns, line: str) -> Row:
        """A line under that header. Raises BadLine."""
        return self._row(**columns.parse(line))


class _GradientTable(RowTable[GradientRow]):
    """Its columns are the network's own layers, in the order of the forward pass; `columns` has none."""

    def _columns(self, names: Sequence[str]) -> Columns:
        return self.of_layers(())

    def of_layers(self, layers: Sequence[str]) -> Columns:
        names = ("step", "epoch", *layers)
        return Columns(names, "step", ("step", "epoch"), frozenset(names))

    def read_header(self, line: str) -> Columns:
        names = line.split(",")
        each_once = len(set(names)) == len(names) > 2
        if names[:2] != ["step", "epoch"] or not each_once or not line.isprintable():
            raise BadLine("the columns must be step, epoch and a layer each, every one once")
        return self.of_layers(names[2:])

    def read_row(self, columns: Columns, line: str) -> GradientRow:
        step, epoch, *norms = columns.parse(line).values()
        return GradientRow(int(step or 0), int(epoch or 0), tuple(norm for norm in norms if norm is not None))


EPOCH_TABLE = RowTable("metrics.csv", "epoch", EpochRow)
STEP_TABLE = RowTable("steps.csv", "step", StepRow)
GRADIENT_TABLE = _GradientTable("gradients.csv", "step", GradientRow)


def csv_line(names: Sequence[str], row: Mapping[str, Any]) -> str:
    """One line of a table without its end. Floats keep every digit; None is empty. Raises KeyError for a foreign
    name."""
    if foreign := set(row) - set(names):
        raise KeyError(f"no such column: {', '.join(sorted(foreign))}")
    return ",".join("" if row.get(name) is None else str(row[name]) for name in names)


def gradient_line(step: int, epoch: int, norms: Sequence[float]) -> str:
    """One line of gradients.csv without its end."""
    return ",".join([str(step), str(epoch), *(f"{norm:.6g}" for norm in norms)])


def parse_event(line: str) -> Event | None:
    """A line of events.jsonl; None if it is none (a killed process leaves half a line, a bad disk anything)."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("event"), str):
        return None
    detail = {key: value for key, value in values.items() if key not in {"event", "time"}}
    time = values.get("time")
    return Event(values["event"], time if isinstance(time, str | int | float) else None, detail)
