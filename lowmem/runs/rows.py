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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Generic, TypeVar

from lowmem.core.reading import Unreadable, parse_json, shorten
from lowmem.core.units import counted

_COUNT = re.compile(r"[0-9]{1,15}")  # curves are drawn with floats, which hold these exactly
# As many digits as a float can have: without a bound, a line of nothing but digits takes a time of its square.
_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,9})?|nan|inf)")
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
    # Of the card, by its driver, as the steps of the epoch were logged (after a resume of those that were left); empty
    # on the CPU. The highest temperature; means; the share of looks at which it was held back, and NVML's bits of why.
    gpu_temperature_c: float | None = None
    gpu_power_watts: float | None = None
    gpu_clock_mhz: float | None = None
    gpu_utilization_pct: float | None = None
    gpu_throttled_pct: float | None = None
    gpu_throttle_reasons: int | None = None

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
    """A line of gradients.csv: the layers' norms in one step, to six digits; infinite or NaN where it overflowed."""

    step: int
    epoch: int
    norms: tuple[float, ...]


@dataclass(frozen=True)
class GradientRows:
    """What gradients.csv holds; `layers` are parameter names from the input to the output."""

    layers: tuple[str, ...] = ()
    rows: tuple[GradientRow, ...] = ()


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl: its kind, its time as written, and everything else it says."""

    kind: str
    time: str | float | None
    detail: Mapping[str, object]


Row = TypeVar("Row")


@dataclass(frozen=True)
class RowTable(Generic[Row]):
    """A table with the columns that it has in one file: by name, of which numbers they are (int: whole ones from zero),
    and whether they are never empty. `key`: the one that rises from line to line; `row`: what a line becomes; `older`:
    how many of the columns older versions wrote."""

    file_name: str
    key: str
    row: Callable[..., Row]
    columns: Mapping[str, tuple[type[int | float], bool]]
    older: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def header(self) -> str:
        return ",".join(self.columns)

    def read_header(self, line: str) -> RowTable[Row]:
        """With the columns that the first line of a file says: some of the table's, in any order; older versions had
        fewer. Raises Unreadable."""
        names = line.split(",")
        unknown = [name for name in names if name not in self.columns]
        missing = [name for name, (_, needed) in self.columns.items() if needed and name not in names]
        if unknown or missing or len(set(names)) != len(names):
            wrong = f"no column {missing[0]!r}" if missing else "doubled column"
            wrong = f"unknown column {shorten(unknown[0])!r}" if unknown else wrong
            raise Unreadable(f"{wrong}: the columns are {self.header}")
        return replace(self, columns={name: self.columns[name] for name in names})

    def read_row(self, line: str) -> Row:
        """A line without its end. Raises Unreadable."""
        texts, values = line.split(",") if line else [], dict[str, Any]()
        if len(texts) != len(self.columns):
            raise Unreadable(f"{counted(len(texts), 'field')} where the header has {len(self.columns)}")
        for (name, (number, needed)), text in zip(self.columns.items(), texts, strict=True):
            if not text and needed:
                raise Unreadable(f"{name} is empty")
            if text and not (_COUNT if number is int else _NUMBER).fullmatch(text):
                raise Unreadable(f"{name} is {shorten(text)!r}, which is no number")
            values[name] = number(text) if text else None
        return self.row(**values)


def _table(file_name: str, row: type[Row], older: tuple[int, ...] = ()) -> RowTable[Row]:
    """Of a dataclass whose first field is the key."""
    of_row: Sequence[Any] = fields(row)  # type: ignore[arg-type]
    columns = {one.name: (int if one.type.startswith("int") else float, one.default is MISSING) for one in of_row}
    return RowTable(file_name, of_row[0].name, row, columns, older)


class _GradientTable(RowTable[GradientRow]):
    """Its further columns are the network's own layers, in the order of the forward pass."""

    def of_layers(self, layers: Sequence[str]) -> RowTable[GradientRow]:
        return replace(self, columns=_FIXED | dict.fromkeys(layers, (float, True)))

    def read_header(self, line: str) -> RowTable[GradientRow]:
        names = line.split(",")
        each_once = len(set(names)) == len(names) > 2
        if names[:2] != ["step", "epoch"] or not each_once or not line.isprintable():
            raise Unreadable("the columns must be step, epoch and a layer each, every one once")
        return self.of_layers(names[2:])


_FIXED: dict[str, tuple[type[int | float], bool]] = {"step": (int, True), "epoch": (int, True)}
EPOCH_TABLE, STEP_TABLE = _table("metrics.csv", EpochRow, older=(14,)), _table("steps.csv", StepRow)
GRADIENT_TABLE = _GradientTable(
    "gradients.csv", "step", lambda step, epoch, **norms: GradientRow(step, epoch, tuple(norms.values())), _FIXED
)


def csv_line(names: Sequence[str], row: Mapping[str, Any]) -> str:
    """A line of a table without its end. Floats keep every digit; None is empty. Raises KeyError for a foreign name."""
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
    kind, time = values.pop("event"), values.pop("time", None)
    return Event(kind, time if isinstance(time, str | int | float) else None, values)
