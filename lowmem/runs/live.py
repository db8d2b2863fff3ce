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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Generic, Literal, TypeVar

from lowmem.config.schema import Config
from lowmem.core.errors import UsageError
from lowmem.core.reading import PLAN_LIMIT_BYTES, Unreadable, read_json
from lowmem.runs.columns import INTEGER, METRICS
from lowmem.runs.follow import Follower, TableFollower, count
from lowmem.runs.history import EpochRow, Event, parse_event, read_settings
from lowmem.runs.listing import may_be_alive, writer_of
from lowmem.runs.lock import Owner, read_owner

State = Literal["starting", "training", "finished", "stopped", "interrupted", "diverged", "stuck", "ended", "died"]
RUNNING: frozenset[State] = frozenset({"starting", "training"})
_OWNER = "run.owner.json"
_QUIET_SECONDS = 15.0  # without news, before the lock is tried again
_LONGEST_SECONDS = 1e10
_KEPT_LOSSES, _KEPT_EVENTS, _KEPT_MARKS = 4_000, 200, 30
_ENDS: dict[str, State] = {
    "done": "finished",
    "stop": "stopped",
    "signal": "interrupted",
    "diverged": "diverged",
}


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
        self._metrics, self._steps = TableFollower(path / "metrics.csv"), TableFollower(path / "steps.csv")
        self._event_lines = Follower(path / "events.jsonl")
        self._config = _Cached(path / "config.yaml", lambda _: read_settings(path))
        self._budget = _Cached(path / "plan.json", _budget_bytes)
        self._rows: list[EpochRow] = []
        self._losses: deque[tuple[int, float, float | None]] = deque(maxlen=_KEPT_LOSSES)  # step, loss, lr
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._marks: deque[tuple[float, int]] = deque(maxlen=_KEPT_MARKS)  # when a step was seen first
        self._looked = False
        self._holder: Owner | None = None  # held the lock when it was tried, at `_tried_at` or since
        self._gone: Owner | None = None  # did not
        self._tried_at = 0.0

    def look(self) -> Live:
        """Everything that is known now."""
        now = time.monotonic()
        config, grew = self._config.get(), self._read(now)
        owner = self._writer(now, grew)
        state = self._state(owner)
        last = self._rows[-1] if self._rows else EpochRow(epoch=0, step=0)
        epoch, step = last.epoch, self._step()
        per_epoch = self._steps_per_epoch(last)
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
            epoch=epoch,
            step=step,
            steps_per_epoch=per_epoch,
            lr=self._losses[-1][2] if self._losses else last.lr,
            losses=tuple(loss for _, loss, _ in self._losses),
            rows=tuple(self._rows),
            images_per_second=speed,
            peak_bytes=last.peak_allocated_bytes or _size(self._newest("measured"), "measured_peak_bytes"),
            device_bytes=last.device_used_bytes,
            budget_bytes=self._budget.get(),
            elapsed_seconds=last.elapsed_seconds,
            seconds_left=left,
            checkpoint=self._newest("checkpoint"),
            events=tuple(self._events),
            quiet_seconds=self._quiet_seconds(),
        )

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self, now: float) -> bool:
        """Whether anything came."""
        metrics, steps, events = self._metrics.look(), self._steps.look(), self._event_lines.look()
        if metrics.anew:
            self._rows.clear()
        self._rows += [row for values in metrics.rows if (row := _epoch_row(values)) is not None]
        if steps.anew:
            self._losses.clear()
            self._marks.clear()
        for values in steps.rows:
            step, loss = count(values.get("step")), values.get("loss")
            if step is not None and loss is not None:
                self._losses.append((step, loss, values.get("lr")))
        if events.anew:
            self._events.clear()
        self._events.extend(event for line in events.lines if (event := parse_event(line)) is not None)
        if metrics:
            self._marks.clear()  # an evaluation lies between
        elif steps and self._looked and (not self._marks or self._step() > self._marks[-1][1]):
            self._marks.append((now, self._step()))
        self._looked = True
        return bool(metrics or steps or events)

    def _step(self) -> int:
        logged = self._losses[-1][0] if self._losses else 0
        return max(logged, self._rows[-1].step) if self._rows else logged

    def _newest(self, kind: str) -> Event | None:
        return next((event for event in reversed(self._events) if event.kind == kind), None)

    def _quiet_seconds(self) -> float | None:
        """By the files' own times."""
        newest = [
            moment for file in ("steps.csv", "metrics.csv", "events.jsonl") if (moment := _mtime(self.path / file))
        ]
        return max(0.0, time.time() - max(newest)) if newest else None

    # -- who trains it ---------------------------------------------------------------------------------------------

    def _writer(self, now: float, grew: bool) -> Owner | None:
        owner = read_owner(self.path / _OWNER)
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
            return "training" if begun or self._losses else "starting"
        for event in reversed(self._events):
            if event.kind in _ENDS:
                return _ENDS[event.kind]
            if event.kind == "stuck" and event.detail.get("stopped") is True:
                return "stuck"
            if event.kind in {"start", "resume"}:
                break
        return "died" if (self.path / _OWNER).exists() else "ended"

    # -- what follows from it --------------------------------------------------------------------------------------

    def _steps_per_epoch(self, last: EpochRow) -> int | None:
        if last.epoch and last.step:
            return max(1, last.step // last.epoch)
        for kind in ("resume", "start"):
            event = self._newest(kind)
            if event is not None and (size := _size(event, "steps_per_epoch")):
                return size
        return None

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


def _epoch_row(values: dict[str, float | None]) -> EpochRow | None:
    known = {name: count(value) if name in INTEGER else value for name, value in values.items() if name in METRICS}
    if known.get("epoch") is None or known.get("step") is None:
        return None
    elapsed = known.get("elapsed_seconds")
    if elapsed is not None and not 0 <= elapsed < _LONGEST_SECONDS:  # a loss may be infinite, no run is
        known["elapsed_seconds"] = None
    return EpochRow(**known)  # type: ignore[arg-type]


def _size(event: Event | None, name: str) -> int | None:
    value = None if event is None else event.detail.get(name)
    return value if type(value) is int and value > 0 else None


T = TypeVar("T")


class _Cached(Generic[T]):
    """What is made of a file, made again only when the file was replaced; None where nothing can be made of it."""

    def __init__(self, path: Path, make: Callable[[Path], T | None]) -> None:
        self._path, self._make = path, make
        self._mark: tuple[int, int] | None = None
        self._value: T | None = None

    def get(self) -> T | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return self._value  # vanished, or being replaced
        mark = (status.st_ino, status.st_mtime_ns)
        if mark != self._mark:
            self._mark = mark
            try:
                self._value = self._make(self._path)
            except (OSError, Unreadable, UsageError):
                self._value = None
        return self._value


def _budget_bytes(plan: Path) -> int | None:
    values = read_json(plan, PLAN_LIMIT_BYTES)
    size = values.get("budget_bytes") if isinstance(values, dict) else None
    return size if type(size) is int and 0 < size < 1 << 62 else None


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
