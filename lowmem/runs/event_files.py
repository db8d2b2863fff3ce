"""A run's rows as TensorBoard's event files: of a finished run, or following one that is trained.

The tables are what is true, the event file is made from them: whole when an exporter begins (the files before it are
replaced), then a few records each time rows have come. Rows that a resume, or going back from a broken loss, took out
of the tables are taken out of the curves by TensorBoard's own means, a session start at the first step that no longer
holds; what does hold from there on is written again. So no point is there twice, and none is missing.

The only module that knows the package `tensorboard`, which is an extra. Nothing of it imports torch or TensorFlow.
"""

from __future__ import annotations

import io
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.core.errors import PreflightError
from lowmem.core.reading import shorten
from lowmem.core.units import MIB
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, EpochRow, GradientRow, RowTable, StepRow
from lowmem.runs.tables import TableFollower, follow_events

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

FOLDER = "tensorboard"
_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{1,15})\.lowmem")

# column -> tag, and what a value is multiplied by: people look at MiB
_STEP_TAGS = {"loss": ("loss/step", 1.0), "lr": ("lr", 1.0)}
_EPOCH_TAGS = {
    "epoch": ("epoch", 1.0),
    "train_loss": ("loss/train", 1.0),
    "val_loss": ("loss/val", 1.0),
    "test_loss": ("loss/test", 1.0),
    "train_error_pct": ("error_pct/train", 1.0),
    "val_error_pct": ("error_pct/val", 1.0),
    "test_error_pct": ("error_pct/test", 1.0),
    "images_per_second": ("images_per_second", 1.0),
    "peak_allocated_bytes": ("memory_mib/peak_allocated", 1.0 / MIB),
    "peak_reserved_bytes": ("memory_mib/peak_reserved", 1.0 / MIB),
    "device_used_bytes": ("memory_mib/device_used", 1.0 / MIB),
}
_TABLES: tuple[RowTable[Any], ...] = (STEP_TABLE, GRADIENT_TABLE, EPOCH_TABLE)


@dataclass(frozen=True)
class ScalarPoint:
    """A scalar of a curve. `step`: optimizer steps done, for epochs as well."""

    tag: str
    step: int
    value: float


def require_tensorboard() -> None:
    """Raises PreflightError if event files cannot be written here."""
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        raise PreflightError(
            f"TensorBoard event files need a package that is not there ({shorten(error)}): "
            'pip install "lowmem[tensorboard]"'
        ) from None
    except Exception as error:  # protobuf of another version says so in ways of its own
        raise PreflightError(
            f"the package tensorboard cannot be used here ({shorten(error)}): "
            'pip install --upgrade "lowmem[tensorboard]"'
        ) from None


class EventFiles:
    """Exports one run to an event file in `folder`, by default `tensorboard/` in the run. Nothing is synced to the
    disk: what a power cut takes is written again by the next exporter."""

    def __init__(self, run: Path, folder: Path | None = None) -> None:
        """Raises PreflightError without the package. Writes nothing yet."""
        require_tensorboard()
        self.folder = folder if folder is not None else run / FOLDER
        self._run = run
        self._file: io.FileIO | None = None
        self._tables: list[_FollowedTable] = []

    def update(self) -> None:
        """Writes what the tables have and the file has not. Raises OSError; the next call makes the file anew."""
        if self._file is None:
            self._begin()
            return
        written = [len(table.marks) for table in self._tables]
        looked = [table.look() for table in self._tables]
        if all(fresh is not None for fresh in looked):
            points = [point for fresh in looked if fresh is not None for point in fresh]
            if points:
                self._write(_encode(points, _now))
            return
        before = [table.marks[:size] for table, size in zip(self._tables, written, strict=True)]
        points = self._read_all()
        deviations = [_deviation(old, table.marks) for old, table in zip(before, self._tables, strict=True)]
        first = min((step for step in deviations if step is not None), default=None)
        if first is not None:
            self._write(_encode([p for p in points if p.step >= first], _now, start=first))

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _read_all(self) -> list[ScalarPoint]:
        self._tables = [_FollowedTable(self._run, table) for table in _TABLES]
        return [point for table in self._tables for point in table.look() or ()]

    def _begin(self) -> None:
        """A new file with everything up to now, then the older ones go."""
        points = self._read_all()
        self.folder.mkdir(parents=True, exist_ok=True)
        older = {int(match[1]): path for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        number = max([int(time.time()), *(known + 1 for known in older)])  # read in the order of their names
        # Without the machine's name, which others put there: a run folder is shown to strangers.
        self._file = open(self.folder / f"events.out.tfevents.{number:010d}.lowmem", "wb", buffering=0)  # noqa: SIM115
        self._write(_encode(points, _wall_times(self._run), start=0, version=True))
        for path in older.values():
            with suppress(OSError):  # open in a TensorBoard on Windows; the session start outdates it all the same
                path.unlink()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        begin = self._file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):  # half a record would hide all that come after it
                self._file.truncate(begin)
            self.close()
            raise


class _FollowedTable:
    """One of the run's tables, and which of its rows were read."""

    def __init__(self, run: Path, table: RowTable[Any]) -> None:
        self._follower = TableFollower(run / table.file_name, table)
        self.marks: list[tuple[int, int]] = []  # step and hash of each row

    def look(self) -> list[ScalarPoint] | None:
        """The points of the rows that came; None if what was read no longer holds."""
        news = self._follower.look()
        if news.anew:
            return None
        # As text: no number is not equal to itself.
        self.marks += [(row.step, hash(str(row))) for row in news.items]
        return [point for row in news.items for point in self._points(row)]

    def _points(self, row: EpochRow | StepRow | GradientRow) -> Iterable[ScalarPoint]:
        if isinstance(row, GradientRow):
            table = self._follower.table
            for layer, norm in zip(table.names[2:] if table is not None else (), row.norms, strict=True):
                yield ScalarPoint(f"gradient_norm/{layer.removesuffix('.weight')}", row.step, norm)
            return
        for name, (tag, factor) in (_STEP_TAGS if isinstance(row, StepRow) else _EPOCH_TAGS).items():
            if (value := getattr(row, name)) is not None:
                yield ScalarPoint(tag, row.step, value * factor)


def _deviation(before: Sequence[tuple[int, int]], now: Sequence[tuple[int, int]]) -> int | None:
    """The least step of which the rows differ; None if none do."""
    same = 0
    while same < min(len(before), len(now)) and before[same] == now[same]:
        same += 1
    return min((step for step, _ in (*before[same:], *now[same:])), default=None)


def _wall_times(run: Path) -> Callable[[int], float]:
    """When the row of a step was written, in seconds since 1970: worked out from when the run started and its own count
    of seconds, between two epochs in proportion."""
    moments = (_moment(event.time) for event in follow_events(run / "events.jsonl").look().items)
    start = next((moment for moment in moments if moment is not None), time.time())
    rows = TableFollower(run / EPOCH_TABLE.file_name, EPOCH_TABLE).look().items
    marks = [(0, 0.0), *((row.step, row.elapsed_seconds) for row in rows if row.elapsed_seconds is not None)]

    def at(step: int) -> float:
        index = min(max(bisect_right(marks, (step, float("inf"))), 1), len(marks) - 1)
        (before, began), (after, ended) = marks[index - 1], marks[index]
        share = (step - before) / (after - before) if after > before else 1.0
        return start + began + share * (ended - began)

    return at if len(marks) > 1 else lambda step: start


def _now(step: int) -> float:
    return time.time()


def _moment(text: object) -> float | None:
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, OverflowError):
        return None


def _encode(
    points: Iterable[ScalarPoint], clock: Callable[[int], float], *, start: int | None = None, version: bool = False
) -> bytes:
    """Records: the format's version if it is a new file, a session start that outdates what was written of step
    `start` and later, then the points, one event a step."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    by_step: dict[int, list[ScalarPoint]] = {}
    for point in points:
        by_step.setdefault(point.step, []).append(point)
    events: list[Event] = []
    if version:
        events.append(Event(wall_time=clock(0), file_version="brain.Event:2"))
    if start is not None:
        events.append(Event(wall_time=clock(start), step=start, session_log=SessionLog(status=SessionLog.START)))
    for step, together in sorted(by_step.items()):
        values = [Summary.Value(tag=point.tag, simple_value=point.value) for point in together]
        events.append(Event(wall_time=clock(step), step=step, summary=Summary(value=values)))
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    for event in events:
        records.write(event.SerializeToString())
    return buffer.getvalue()


def read_points(folder: Path) -> list[ScalarPoint]:
    """What TensorBoard would show of the event files in `folder`: without the points that a session start outdates."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    points: list[ScalarPoint] = []
    for path in sorted(path for path in folder.iterdir() if "tfevents" in path.name):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point.step < event.step]
            points += [ScalarPoint(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points
