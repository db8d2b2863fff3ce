"""Read back what a run left in its folder, as typed rows. No torch: a report is written on any machine.

A run may have died at any moment, so the last line of a file may be half written: a line without its line
end is left out and said in `History.notes`. Any other damage of `config.yaml`, `metrics.csv` or `steps.csv`
is an error that names the file and the line, because a curve with silent holes is worse than none.
`env.json`, `events.jsonl` and the weights' metadata only colour the report: what cannot be read there is
left out and noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from lowmem.config.schema import Config
from lowmem.core.errors import UsageError
from lowmem.core.reading import (
    SETTINGS_LIMIT_BYTES,
    TABLE_LIMIT_BYTES,
    Unreadable,
    parse_json,
    parse_yaml,
    read_json,
    read_limited,
    shorten,
)
from lowmem.runs import gradients as gradient_rows
from lowmem.runs.columns import INTEGER, METRICS, STEPS
from lowmem.runs.gradients import Gradients
from lowmem.runs.header import read_header
from lowmem.runs.symlink_guard import refuse_leads

State = Literal["finished", "stopped as planned", "unfinished"]


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """A line of metrics.csv. `None` is unknown; a diverged run has NaN or infinite losses."""

    epoch: int
    step: int
    lr: float | None = None
    train_loss: float | None = None
    train_error_pct: float | None = None
    test_loss: float | None = None
    test_error_pct: float | None = None
    images_per_second: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    elapsed_seconds: float | None = None
    val_loss: float | None = None
    val_error_pct: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A line of steps.csv."""

    step: int
    epoch: int | None = None
    lr: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl: its kind, its time as written, and everything else it says."""

    kind: str
    time: str | float | None
    detail: Mapping[str, object]


@dataclass(frozen=True)
class BestWeights:
    """What weights/best.safetensors says of itself. `chosen_on`: "val" or "test", the pictures it was chosen
    on.
    """

    epoch: int | None
    step: int | None
    error_pct: float | None
    chosen_on: str | None


@dataclass(frozen=True)
class History:
    """All that is known of a run. `classes`: outputs of the network, None if neither weights nor data set
    tell.
    """

    path: Path
    name: str
    config: Config
    env: Mapping[str, object]
    epochs: tuple[EpochRow, ...]
    steps: tuple[StepRow, ...]
    events: tuple[Event, ...]
    best: BestWeights | None
    classes: int | None
    notes: tuple[str, ...]
    gradients: Gradients = field(default_factory=Gradients)

    @property
    def last(self) -> EpochRow | None:
        """The newest completed epoch, or None before the first."""
        return self.epochs[-1] if self.epochs else None

    @property
    def epochs_done(self) -> int:
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def times_resumed(self) -> int:
        return sum(event.kind == "resume" for event in self.events)

    @property
    def state(self) -> State:
        """Finished when all epochs are there, "stopped as planned" if it ended before that by train.max_steps."""
        if self.epochs_done >= self.config.train.epochs:
            return "finished"
        for event in reversed(self.events):
            if event.kind == "done" or (event.kind, event.detail.get("reason")) == ("stop", "train.max_steps"):
                return "stopped as planned"
            if event.kind in {"start", "resume"}:
                break
        return "unfinished"


def read_history(run: Path) -> History:
    """Read a run folder. Raises UsageError if there is none at `run`, or if it is damaged (see the module's
    text).
    """
    run = Path(run)
    try:
        if not run.exists():
            raise UsageError(f"{run} does not exist: give the folder of a run, as in runs/res20")
        if not run.is_dir() or not (run / "config.yaml").is_file():
            raise UsageError(
                f"{run} is not a run folder (no config.yaml in it): give the folder of a run, as in runs/res20"
            )
    except OSError as error:
        raise UsageError(f"{run} cannot be looked into ({error.strerror or error}): check its permissions") from None
    refuse_leads(run)
    notes: list[str] = []
    config = read_settings(run)
    return History(
        path=run,
        name=shorten(run.resolve().name),  # "." and "runs/res20/" have a name as well
        config=config,
        env=_read_env(run / "env.json", notes),
        epochs=_read_table(run / "metrics.csv", METRICS, "epoch", EpochRow, notes),
        steps=() if _too_large(run / "steps.csv", notes) else _read_steps(run, notes),
        events=_read_events(run / "events.jsonl", notes),
        best=_read_best(run / "weights" / "best.safetensors", notes),
        classes=_count_classes(run, config),
        gradients=_read_gradients(run / gradient_rows.FILE_NAME, notes),
        notes=tuple(notes),
    )


def read_epochs(run: Path) -> tuple[Config, tuple[EpochRow, ...], tuple[str, ...]]:
    """Of a run only its settings, its epochs and the notes on them: what a list of runs needs, in milliseconds.

    Raises UsageError and OSError as `read_history` does.
    """
    notes: list[str] = []
    config = read_settings(run)
    return config, _read_table(run / "metrics.csv", METRICS, "epoch", EpochRow, notes), tuple(notes)


def read_settings(run: Path) -> Config:
    """What config.yaml says. Raises UsageError."""
    path = run / "config.yaml"
    try:
        values = parse_yaml(_bytes(path, SETTINGS_LIMIT_BYTES).decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}{where} cannot be read as YAML: restore the file") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings: restore the file")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: {shorten(key)}: {shorten(first['msg'])}: was it written by another version?"
        ) from error
    except UsageError as error:  # an unknown architecture or block speaks for itself
        raise UsageError(f"{path}: {shorten(error, 500)}") from error


def _bytes(path: Path, limit_bytes: int) -> bytes:
    """Raises UsageError for what cannot be read."""
    try:
        return read_limited(path, limit_bytes)
    except Unreadable as error:
        raise UsageError(f"{path} {error}: restore the file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from None


# --- CSV ------------------------------------------------------------------------------------------


def _whole_lines(path: Path, notes: list[str]) -> list[str]:
    """The lines that have their line end. A run killed while writing leaves one without; a power cut leaves
    NULs.
    """
    # A bad byte then fails as a number, with its line.
    text = _bytes(path, TABLE_LIMIT_BYTES).decode("utf-8", errors="replace")
    whole, _, rest = text.rpartition("\n")
    if rest:
        notes.append(f"the last line of {path.name} was half written and is left out")
    return [line.removesuffix("\r") for line in whole.split("\n")] if whole else []


Row = TypeVar("Row", EpochRow, StepRow)


def _read_table(path: Path, known: tuple[str, ...], rising: str, row: type[Row], notes: list[str]) -> tuple[Row, ...]:
    """Rows of a CSV file; none if it is not there yet. `rising`: the column that must rise from line to
    line.
    """
    if not path.exists():
        return ()
    lines = _whole_lines(path, notes)
    if not lines:
        return ()
    header = _read_header(path, lines[0], known, row)
    rows = [_read_row(path, number, line, header, row) for number, line in enumerate(lines[1:], start=2)]
    for number, (before, after) in enumerate(pairwise(rows), start=3):
        if getattr(after, rising) <= getattr(before, rising):
            raise UsageError(
                f"{path} line {number}: {rising} {getattr(after, rising)} follows {rising} "
                f"{getattr(before, rising)}: lines are doubled or out of order"
            )
    return tuple(rows)


def _read_gradients(path: Path, notes: list[str]) -> Gradients:
    if not path.exists() or _too_large(path, notes):
        return Gradients()
    return gradient_rows.parse(path, _whole_lines(path, notes))


def _read_steps(run: Path, notes: list[str]) -> tuple[StepRow, ...]:
    return _read_table(run / "steps.csv", STEPS, "step", StepRow, notes)


def _too_large(path: Path, notes: list[str]) -> bool:
    """A run that records every step of small batches may write more than there is room for here: not its fault."""
    if not path.is_file() or path.stat().st_size <= TABLE_LIMIT_BYTES:
        return False
    notes.append(f"{path.name} has {path.stat().st_size:,} bytes, more than are read: what it holds is left out")
    return True


def _read_header(path: Path, line: str, known: tuple[str, ...], row: type[Row]) -> list[str]:
    header = line.split(",")
    needed = [field.name for field in fields(row) if not _may_be_unknown(field.name, row)]
    unknown = [name for name in header if name not in known]
    missing = [name for name in needed if name not in header]
    if unknown or missing or len(set(header)) != len(header):
        wrong = (
            f"unknown column {shorten(unknown[0])!r}"
            if unknown
            else f"no column {missing[0]!r}"
            if missing
            else "doubled column"
        )
        raise UsageError(f"{path} line 1: {wrong}: the columns are {','.join(known)}")
    return header


def _read_row(path: Path, number: int, line: str, header: list[str], row: type[Row]) -> Row:
    values = line.split(",") if line else []  # numbers only: nothing is ever quoted
    if len(values) != len(header):
        raise UsageError(f"{path} line {number}: {len(values)} fields where the header has {len(header)}")
    parsed: dict[str, Any] = {}
    for name, value in zip(header, values, strict=True):
        convert: Callable[[str], int | float] = _integer if name in INTEGER else float
        try:
            parsed[name] = convert(value) if value else None
        except ValueError as error:
            raise UsageError(f"{path} line {number}: {name} is {shorten(value)!r}, which is no number") from error
        if parsed[name] is None and not _may_be_unknown(name, row):
            raise UsageError(f"{path} line {number}: {name} is empty")
    return row(**parsed)


def _integer(text: str) -> int:
    """Raises ValueError for what no count of a run can be: curves are drawn with floats."""
    value = int(text)
    if not 0 <= value < 1 << 53:
        raise ValueError(text)
    return value


def _may_be_unknown(name: str, row: type[Row]) -> bool:
    return name != "step" and not (name == "epoch" and row is EpochRow)


# --- JSON and weights -----------------------------------------------------------------------------


def _read_env(path: Path, notes: list[str]) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        values = read_json(path)
    except (ValueError, OSError):
        values = None
    if not isinstance(values, dict):
        notes.append(f"{path.name} cannot be read: hardware and versions are unknown")
        return {}
    return values


def read_events(run: Path) -> tuple[Event, ...]:
    """Whole lines of events.jsonl; what is none, or half written, is left out."""
    return _read_events(run / "events.jsonl", [])


def _read_events(path: Path, notes: list[str]) -> tuple[Event, ...]:
    if not path.exists():
        return ()
    events: list[Event] = []
    for number, line in enumerate(_whole_lines(path, notes), start=1):
        event = parse_event(line)
        if event is None:
            notes.append(f"{path.name} line {number} cannot be read and is left out")
        else:
            events.append(event)
    return tuple(events)


def parse_event(line: str) -> Event | None:
    """A line of events.jsonl; None if it is none."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("event"), str):
        return None
    detail = {key: value for key, value in values.items() if key not in {"event", "time"}}
    time = values.get("time")
    return Event(values["event"], time if isinstance(time, str | int | float) else None, detail)


def _read_best(path: Path, notes: list[str]) -> BestWeights | None:
    if not path.exists():
        return None
    try:
        metadata = read_header(path).metadata
    except (Unreadable, OSError):
        notes.append(f"weights/{path.name} cannot be read")
        return None
    epoch, step = (_number(metadata.get(name)) for name in ("epoch", "step"))
    return BestWeights(
        epoch=None if epoch is None else int(epoch),
        step=None if step is None else int(step),
        error_pct=_number(metadata.get("error_pct")),
        chosen_on=metadata.get("chosen_on") or None,
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _count_classes(run: Path, config: Config) -> int | None:
    """From the exported weights' last layer, else from what the data set is known to be."""
    for name in ("last.safetensors", "best.safetensors"):
        try:
            return read_header(run / "weights" / name).tensors["linear.bias"].shape[0]
        except (Unreadable, OSError, LookupError):
            continue
    return 10 if config.data.source in {"cifar10", "fashion-mnist"} else None
