"""A run as it is at this moment, for who looks on from outside: read again and again, never written to.

Whether a process trains it is told by the run's lock (see `lowmem.runs.lock`). The lock itself is tried only where the
owner file leaves it open: at the first look, and when nothing has come from the run for a while. Trying a lock that is
free holds it for an instant; so that happens once, to a run that nobody trains any more.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from lowmem.config.schema import Config
from lowmem.core.errors import LowmemError
from lowmem.runs.lock import OWNER_NAME, Owner, may_be_alive, read_owner, writer_of
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE, EpochRow, Event, StepRow
from lowmem.runs.tables import TableFollower, follow_events
from lowmem.runs.view import RunView, State, state_of

RUNNING: frozenset[State] = frozenset({"starting", "training"})
_QUIET_SECONDS = 15.0  # without news, before the lock is tried again
_KEPT_LOSSES, _KEPT_EVENTS, _KEPT_MARKS = 4_000, 200, 30


@dataclass(frozen=True, kw_only=True)
class Live:
    """What is known; unknown is None. Losses are those of logged steps, oldest first.

    `epoch`: completed ones; `step`: the newest that is known of. `writer`: who trains it. `peak_bytes`: of tensors, as
    measured (the newest figure), `device_bytes`: in use on the device or by the process. `quiet_seconds`: since
    anything came from the run.
    """

    path: Path
    state: State
    config: Config | None = None
    writer: Owner | None = None
    epoch: int = 0
    step: int = 0
    steps_per_epoch: int | None = None
    lr: float | None = None
    losses: tuple[float, ...] = ()
    rows: tuple[EpochRow, ...] = ()
    images_per_second: float | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    budget_bytes: int | None = None
    elapsed_seconds: float | None = None
    seconds_left: float | None = None
    checkpoint: Event | None = None
    events: tuple[Event, ...] = ()
    quiet_seconds: float | None = None

    @property
    def running(self) -> bool:
        """Whether a process holds it."""
        return self.state in RUNNING

    @property
    def epochs(self) -> int | None:
        return None if self.config is None else self.config.train.epochs

    @property
    def step_in_epoch(self) -> int | None:
        """Steps done of the epoch in progress."""
        return None if self.steps_per_epoch is None else max(0, self.step - self.epoch * self.steps_per_epoch)


class Watched:
    """One run folder that is looked at again and again. Raises nothing for what is not there yet, or not any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = TableFollower(path / EPOCH_TABLE.file_name, EPOCH_TABLE)
        self._step_rows = TableFollower(path / STEP_TABLE.file_name, STEP_TABLE)
        self._event_lines = follow_events(path / "events.jsonl")
        self._view = RunView(path)
        self._config: Config | None = None
        self._read_marks: tuple[object, object] = (None, None)  # of config.yaml and plan.json, as they were read
        self._rows: list[EpochRow] = []
        self._logged: deque[StepRow] = deque(maxlen=_KEPT_LOSSES)
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._marks: deque[tuple[float, int]] = deque(maxlen=_KEPT_MARKS)  # when a step was seen first
        self._looked = False
        self._holder: Owner | None = None  # held the lock when it was tried, at `_tried_at` or since
        self._gone: Owner | None = None  # did not
        self._tried_at = 0.0

    def look(self) -> Live:
        """Everything that is known now."""
        now = time.monotonic()
        self._read_settings()
        config, grew = self._config, self._read_rows(now)
        owner = self._writer(now, grew)
        state = self._state(owner)
        last = self._rows[-1] if self._rows else EpochRow(epoch=0, step=0)
        step, per_epoch = self._step(), self._steps_per_epoch(last)
        rate = self._steps_per_second() if state == "training" else None
        speed = last.images_per_second if rate is None or config is None else rate * config.train.batch
        left = None
        if state == "training" and config is not None and per_epoch is not None:
            left = self._seconds_left(max(0.0, config.train.epochs - step / per_epoch), per_epoch, rate)
        return Live(
            path=self.path,
            state=state,
            config=config,
            writer=owner if state in RUNNING else None,
            epoch=last.epoch,
            step=step,
            steps_per_epoch=per_epoch,
            lr=self._logged[-1].lr if self._logged else last.lr,
            losses=tuple(row.loss for row in self._logged if row.loss is not None),
            rows=tuple(self._rows),
            images_per_second=speed,
            peak_bytes=last.peak_allocated_bytes or self._told("measured", "measured_peak_bytes"),
            device_bytes=last.device_used_bytes,
            budget_bytes=self._view.budget_bytes,
            elapsed_seconds=last.elapsed_seconds,
            seconds_left=left,
            checkpoint=self._newest("checkpoint"),
            events=tuple(self._events),
            quiet_seconds=self._quiet_seconds(),
        )

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read_settings(self) -> None:
        """Again only where a file was replaced. What vanished is as it was: it may be being replaced."""
        old = self._read_marks
        config, plan = (_mark(self.path / name) for name in ("config.yaml", "plan.json"))
        self._read_marks = (config or old[0], plan or old[1])
        if self._read_marks == old:
            return
        self._view = RunView(self.path)
        try:
            self._config = self._view.config
        except (LowmemError, OSError):
            self._config = None

    def _read_rows(self, now: float) -> bool:
        """Whether anything came."""
        metrics, steps, events = self._metrics.look(), self._step_rows.look(), self._event_lines.look()
        if metrics.anew:
            self._rows.clear()
        self._rows += metrics.items
        if steps.anew:
            self._logged.clear()
            self._marks.clear()
        self._logged.extend(row for row in steps.items if row.loss is not None)
        if events.anew:
            self._events.clear()
        self._events.extend(events.items)
        if metrics:
            self._marks.clear()  # an evaluation lies between
        elif steps and self._looked and (not self._marks or self._step() > self._marks[-1][1]):
            self._marks.append((now, self._step()))
        self._looked = True
        return bool(metrics or steps or events)

    def _step(self) -> int:
        logged = self._logged[-1].step if self._logged else 0
        return max(logged, self._rows[-1].step) if self._rows else logged

    def _newest(self, kind: str) -> Event | None:
        return next((event for event in reversed(self._events) if event.kind == kind), None)

    def _told(self, kind: str, name: str) -> int | None:
        """A number of the newest event of that kind."""
        event = self._newest(kind)
        value = None if event is None else event.detail.get(name)
        return value if type(value) is int and value > 0 else None

    def _quiet_seconds(self) -> float | None:
        """By the files' own times."""
        marks = [_mark(self.path / name) for name in (STEP_TABLE.file_name, EPOCH_TABLE.file_name, "events.jsonl")]
        newest = max((mark[1] for mark in marks if mark is not None), default=None)
        return None if newest is None else max(0.0, time.time() - newest / 1e9)

    # -- who trains it ---------------------------------------------------------------------------------------------

    def _writer(self, now: float, grew: bool) -> Owner | None:
        owner = read_owner(self.path / OWNER_NAME)
        if owner is None or owner == self._gone:
            return None
        if owner.host != socket.gethostname():
            return owner  # cannot be told from here
        if not may_be_alive(owner.pid):
            return None
        if grew and owner == self._holder:
            self._tried_at = now
        elif owner != self._holder or now - self._tried_at > _QUIET_SECONDS:
            self._tried_at = now
            if writer_of(self.path) is None:
                self._gone = owner
                return None
            self._holder = owner
        return owner

    def _state(self, writer: Owner | None) -> State:
        if writer is not None:
            begun = any(event.kind in {"start", "resume"} for event in self._events)
            return "training" if begun or self._logged else "starting"
        left_owner = (self.path / OWNER_NAME).exists()
        epoch, step = (self._rows[-1].epoch, self._rows[-1].step) if self._rows else (0, 0)
        for newest in RunView(self.path).checkpoints[:1]:
            epoch, step = newest.epoch, newest.step
        return state_of(self._config, epoch, step, tuple(self._events), left_owner=left_owner)

    # -- what follows from it --------------------------------------------------------------------------------------

    def _steps_per_epoch(self, last: EpochRow) -> int | None:
        if last.epoch and last.step:
            return max(1, last.step // last.epoch)
        return self._told("resume", "steps_per_epoch") or self._told("start", "steps_per_epoch")

    def _steps_per_second(self) -> float | None:
        """As seen from here; None until some rows came one after the other."""
        if len(self._marks) < 3:
            return None
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None

    def _seconds_left(self, epochs_left: float, per_epoch: int, rate: float | None) -> float | None:
        """By the last epochs, evaluation included; before the first by the steps seen from here."""
        if (an_epoch := epoch_seconds(self._rows)) is not None:
            return epochs_left * an_epoch
        return None if rate is None else epochs_left * per_epoch / rate


def epoch_seconds(rows: Sequence[EpochRow]) -> float | None:
    """Of an epoch: the median of the last few, by the run's own clock, which stands still while nobody trains it. None
    if nothing is known: a first row tells only if it is of the first epoch, and not after a fork."""
    marks = [(row.epoch, row.elapsed_seconds) for row in rows[-6:] if row.elapsed_seconds is not None]
    each = [
        (after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(marks) if after[0] > before[0]
    ]
    if not each and marks and marks[-1][0] == 1:
        each = [marks[-1][1]]
    seconds = [one for one in each if math.isfinite(one) and one > 0]
    return median(seconds) if seconds else None


def _mark(path: Path) -> tuple[int, int] | None:
    """By which a file that was replaced is known: its number and its time. None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
