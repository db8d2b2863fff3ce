"""A run's rows as TensorBoard's event files: of a finished run, or following one that is trained.

The tables are what is true, the event file is made from them: whole when an exporter begins, then a few records each
time rows have come. Where a resume, or going back from a broken loss, took rows out of the tables, it is made anew. It
begins with TensorBoard's own mark that what other files say no longer holds, and those before it are deleted: no point
is there twice. Only this module knows the package `tensorboard`, an extra, and nothing of it that imports torch.
"""

from __future__ import annotations

import io
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lowmem.core.errors import PreflightError
from lowmem.core.reading import shorten
from lowmem.core.units import MIB
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, EpochRow, GradientRow, RowTable, StepRow
from lowmem.runs.tables import News, TableFollower, follow_events

_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{1,15})\.lowmem")

# column -> tag
_STEP_TAGS = {"loss": "loss/step", "lr": "lr"}
_EPOCH_TAGS = {
    "epoch": "epoch",
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "test_loss": "loss/test",
    "train_error_pct": "error_pct/train",
    "val_error_pct": "error_pct/val",
    "test_error_pct": "error_pct/test",
    "images_per_second": "images_per_second",
    "peak_allocated_bytes": "memory_mib/peak_allocated",
    "peak_reserved_bytes": "memory_mib/peak_reserved",
    "device_used_bytes": "memory_mib/device_used",
}
_TABLES: tuple[RowTable[Any], ...] = (STEP_TABLE, GRADIENT_TABLE, EPOCH_TABLE)


def require_tensorboard() -> None:
    """Raises PreflightError if event files cannot be written here."""
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except Exception as error:  # protobuf of another version says so in ways of its own
        what, options = "the package tensorboard cannot be used here", "--upgrade "
        if isinstance(error, ImportError):
            what, options = "TensorBoard event files need a package that is not there", ""
        raise PreflightError(f'{what} ({shorten(error)}): pip install {options}"lowmem[tensorboard]"') from None


class EventFiles:
    """Exports one run to an event file in `folder`, by default `tensorboard/` in the run. Nothing is synced to the
    disk: what a power cut takes is written again by the next exporter."""

    def __init__(self, run: Path, folder: Path | None = None) -> None:
        """Raises PreflightError without the package. Writes nothing yet."""
        require_tensorboard()
        self.folder = folder or run / "tensorboard"
        self._run = run
        self._file: io.FileIO | None = None
        self._tables: list[TableFollower[Any]] = []

    def update(self) -> None:
        """Writes what the tables have and the file has not. Raises OSError; the next call makes the file anew."""
        news = [table.look() for table in self._tables]
        if self._file is None or any(rows.anew for rows in news):
            self._begin()
        elif any(news):
            self._write(news, lambda step: time.time())

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _begin(self) -> None:
        """A new file with everything up to now, then the older ones go."""
        self.close()
        self._tables = [TableFollower(self._run / table.file_name, table) for table in _TABLES]
        news = [table.look() for table in self._tables]
        self.folder.mkdir(parents=True, exist_ok=True)
        older = {int(match[1]): path for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        number = max([int(time.time()), *(known + 1 for known in older)])  # read in the order of their names
        # Without the machine's name, which others put there: a run folder is shown to strangers.
        self._file = open(self.folder / f"events.out.tfevents.{number:010d}.lowmem", "wb", buffering=0)  # noqa: SIM115
        self._write(news, _wall_times(self._run), begin=True)
        for path in older.values():
            with suppress(OSError):  # open in a TensorBoard on Windows; the session start outdates it all the same
                path.unlink()

    def _write(self, news: Sequence[News[Any]], clock: Callable[[int], float], *, begin: bool = False) -> None:
        """Records of the rows that came of each table, one event a step; before them, in a new file, the format's
        version and a session start that outdates what was written before."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        by_step: dict[int, dict[str, float]] = {}
        for follower, rows in zip(self._tables, news, strict=True):
            for row in rows.items:
                assert follower.table is not None
                by_step.setdefault(row.step, {}).update(_scalars(row, follower.table.names))
        events: list[Event] = []
        if begin:
            events.append(Event(wall_time=clock(0), file_version="brain.Event:2"))
            events.append(Event(wall_time=clock(0), step=0, session_log=SessionLog(status=SessionLog.START)))
        for step, scalars in sorted(by_step.items()):
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            if values:
                events.append(Event(wall_time=clock(step), step=step, summary=Summary(value=values)))
        buffer = io.BytesIO()
        records = RecordWriter(buffer)
        for event in events:
            records.write(event.SerializeToString())
        assert self._file is not None
        end, rest = self._file.tell(), buffer.getbuffer()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):  # half a record would hide all that come after it
                self._file.truncate(end)
            self.close()
            raise


def _scalars(row: EpochRow | StepRow | GradientRow, names: Sequence[str]) -> dict[str, float]:
    """Tag -> value. `names`: the table's columns."""
    if isinstance(row, GradientRow):
        tags = (f"gradient_norm/{layer.removesuffix('.weight')}" for layer in names[2:])
        return dict(zip(tags, row.norms, strict=True))
    columns = _STEP_TAGS if isinstance(row, StepRow) else _EPOCH_TAGS
    known = {name: value for name in columns if (value := getattr(row, name)) is not None}
    # People look at MiB.
    return {columns[name]: value / MIB if name.endswith("_bytes") else value for name, value in known.items()}


def _wall_times(run: Path) -> Callable[[int], float]:
    """When the row of a step was written, in seconds since 1970: worked out from when the run started and its own count
    of seconds, between two epochs in proportion."""
    start = time.time()
    for event in follow_events(run / "events.jsonl").look().items:
        with suppress(ValueError, OverflowError):
            start = datetime.strptime(str(event.time), "%Y-%m-%dT%H:%M:%S%z").timestamp()
            break
    rows = TableFollower(run / EPOCH_TABLE.file_name, EPOCH_TABLE).look().items
    marks = [(0, 0.0), *((row.step, row.elapsed_seconds) for row in rows if row.elapsed_seconds is not None)]

    def at(step: int) -> float:
        index = min(max(bisect_right(marks, (step, float("inf"))), 1), len(marks) - 1)
        (before, began), (after, ended) = marks[index - 1], marks[index]
        share = (step - before) / (after - before) if after > before else 1.0
        return start + began + share * (ended - began)

    return at if len(marks) > 1 else lambda step: start


def read_points(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) that TensorBoard would show of event files: without those that a session start outdates."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    points: list[tuple[str, int, float]] = []
    for path in sorted(path for path in folder.iterdir() if "tfevents" in path.name):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points
