"""A run as it is at this moment, for who looks on from outside: read again and again, never written to.

Whether a process trains it is told by the run's lock, which is tried only where the owner file leaves it open: at the
first look, and when nothing has come from the run for a while. Trying a free lock holds it for an instant; so that
happens once, to a run that nobody trains any more."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from lowmem.config.schema import Config
from lowmem.core.errors import LowmemError
from lowmem.runs.checkpoint import CHECKPOINT_NAME
from lowmem.runs.lock import OWNER_NAME, Owner, lock_decides, read_owner, writer_of
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE, EpochRow, Event, StepRow
from lowmem.runs.tables import Item, News, TableFollower, follow_events
from lowmem.runs.view import RunView, State, position_of, state_of

_QUIET_SECONDS = 15.0  # without news, before the lock is tried again
_PLACES = ("resume", "checkpoint", "stop", "signal", "done")  # whose `step` is the run's
_KEPT_LOSSES, _KEPT_EVENTS, _KEPT_MARKS = 4_000, 200, 30


class Live:
    """One run folder that is looked at again and again, as it was at the last look. Raises nothing for what is not
    there yet, or not any more; unknown is None. `rows`: of metrics.csv; `logged`: of steps.csv, those with a loss;
    `writer`: who trains it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: State = "starting"
        self.writer: Owner | None = None
        self.config: Config | None = None
        self.rows: tuple[EpochRow, ...] = ()
        self.logged: tuple[StepRow, ...] = ()
        self.events: tuple[Event, ...] = ()
        self._metrics = TableFollower(path / EPOCH_TABLE.file_name, EPOCH_TABLE)
        self._steps = TableFollower(path / STEP_TABLE.file_name, STEP_TABLE)
        self._event_lines = follow_events(path / "events.jsonl")
        self._view = RunView(path)
        self._read_marks: tuple[object, object] = (None, None)  # of config.yaml and plan.json, as they were read
        self._marks: deque[tuple[float, int]] = deque(maxlen=_KEPT_MARKS)  # when a step was seen first
        self._looked = False
        self._holder: Owner | None = None  # held the lock when it was tried, at `_tried_at` or since
        self._gone: Owner | None = None  # did not
        self._tried_at = 0.0

    def look(self) -> Live:
        """Reads what has come, and returns itself."""
        now = time.monotonic()
        self._read_settings()
        grew = self._read_rows(now)
        self.writer = self._holds(now, grew)
        if self.writer is None:
            position = position_of(RunView(self.path).checkpoints, self.rows)
            self.state = state_of(self.path, self.config, position, self.events)
        else:
            begun = self.logged or any(event.kind in {"start", "resume"} for event in self.events)
            self.state = "training" if begun else "starting"
        self._tell()
        return self

    def _tell(self) -> None:
        """What follows from what was read."""
        config, last, rate = self.config, self.last, self._steps_per_second()
        self.running = self.writer is not None  # whether a process holds it
        self.epoch = last.epoch  # completed ones
        self.epochs = None if config is None else config.train.epochs
        told = self._told("steps_per_epoch", "resume", "start")
        self.steps_per_epoch = told or (max(1, last.step // last.epoch) if last.epoch and last.step else None)
        per_epoch = self.steps_per_epoch
        end = None if per_epoch is None or config is None else config.train.epochs * per_epoch
        self.end = end and min(end, (config and config.train.max_steps) or end)  # the last step
        self.step_in_epoch = None if per_epoch is None else max(0, self.step - self.epoch * per_epoch)  # steps done
        self.checkpoint = self._newest_checkpoint()
        self.lr = self.logged[-1].lr if self.logged else last.lr
        self.losses = tuple(row.loss for row in self.logged if row.loss is not None)  # of steps, oldest first
        self.images_per_second = last.images_per_second or self._told_speed()
        if rate is not None and config is not None:
            self.images_per_second = rate * config.train.batch
        # Of tensors, as measured: the newest figure; in use on the device or by the process; of the plan.
        measured = self._told("measured_peak_bytes", "measured") or self._told("peak_allocated_bytes", "progress")
        self.peak_bytes = last.peak_allocated_bytes or measured
        self.device_bytes = last.device_used_bytes or self._told("device_used_bytes", "progress")
        self.budget_bytes = self._view.budget_bytes
        self.host_bytes, self.hidden_share = self._view.in_host_memory
        self.card = self._card_load()
        self.elapsed_seconds, self.seconds_left = last.elapsed_seconds, self._seconds_left()
        quiet = quiet_seconds(self.path)
        self.quiet_seconds = quiet if math.isfinite(quiet) else None

    def _seconds_left(self) -> float | None:
        """Until the end, or until it stops as asked: by the last epochs, evaluation included; before the first by the
        speed of its steps."""
        config, per_epoch = self.config, self.steps_per_epoch
        if self.state != "training" or config is None or self.end is None or per_epoch is None:
            return None
        left = max(0, self.end - self.step)
        if (an_epoch := epoch_seconds(self.rows)) is not None:
            return left / per_epoch * an_epoch
        return left * config.train.batch / self.images_per_second if self.images_per_second else None

    def _steps_per_second(self) -> float | None:
        """While it is trained, as seen from here; None until some rows came one after the other."""
        if self.state != "training" or len(self._marks) < 3:
            return None
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None

    def _newest(self, *kinds: str) -> Event | None:
        return next((event for event in reversed(self.events) if event.kind in kinds), None)

    def _told(self, name: str, *kinds: str) -> int | None:
        """A number of the newest event of these kinds."""
        event = self._newest(*kinds)
        value = None if event is None else event.detail.get(name)
        return value if type(value) is int and 0 < value < 1 << 53 else None

    def _told_speed(self) -> float | None:
        event = self._newest("progress")
        value = None if event is None else event.detail.get("images_per_second")
        return value if type(value) is float and 1e-3 < value < 1e9 else None

    def _card_load(self) -> dict[str, float]:
        """How the card works, by column: of the last epoch, or as it was told since."""
        event, load = self._newest("progress"), vars(self.last)
        if event is not None and (self._told("step", "progress") or 0) > self.last.step:
            load = dict(event.detail)
        told = ((name, load.get(name)) for name in EPOCH_TABLE.names if name.startswith("gpu_"))
        return {name: value for name, value in told if isinstance(value, int | float) and 0 <= value < 1e6}

    def _read_settings(self) -> None:
        """Again only where a file was replaced. What vanished is as it was: it may be being replaced."""
        old = self._read_marks
        config, plan = (_mark(self.path / name) for name in ("config.yaml", "plan.json"))
        self._read_marks = (config or old[0], plan or old[1])
        if self._read_marks == old:
            return
        self._view = RunView(self.path)
        try:
            self.config = self._view.config
        except (LowmemError, OSError):
            self.config = None

    def _read_rows(self, now: float) -> bool:
        """Whether anything came."""
        metrics, steps, events = self._metrics.look(), self._steps.look(), self._event_lines.look()
        self.rows = _grown(self.rows, metrics)
        logged = News(tuple(row for row in steps.items if row.loss is not None), steps.anew)
        self.logged = _grown(self.logged, logged, _KEPT_LOSSES)
        grown = _grown(self.events, events)
        forks = (event for event in grown[:-_KEPT_EVENTS] if event.kind == "fork")  # the best is of the epochs since
        self.events = (*forks, *grown[-_KEPT_EVENTS:])
        self.last = self.rows[-1] if self.rows else EpochRow(epoch=0, step=0)
        self.step = self._newest_step()
        if steps.anew or metrics:
            self._marks.clear()  # an evaluation lies between, or steps are made again
        at = self.logged[-1].step if self.logged else 0
        if steps and not metrics and self._looked and (not self._marks or at > self._marks[-1][1]):
            self._marks.append((now, at))
        self._looked = True
        return bool(metrics or steps or events)

    def _newest_step(self) -> int:
        """That is known of: by its rows, or where it went on, saved or stopped between two of them, or went back to."""
        row = self.last.step
        if (fork := self._newest("fork")) is not None and fork.detail.get("epoch") == self.last.epoch:
            row = self._told("step", "fork") or 0  # rows that it took over may be counted in other steps
        place = _back_to(self._newest(*_PLACES, "rollback"))
        place = self._told("step", *_PLACES) if place is None else place
        return max(row, self.logged[-1].step if self.logged else 0, place or 0)

    def _newest_checkpoint(self) -> Event | None:
        """Of those that stand: a rollback sets aside what is newer than what it goes back to."""
        back = _back_to(self._newest("checkpoint", "rollback"))
        saved = (event for event in reversed(self.events) if event.kind == "checkpoint")
        return next((event for event in saved if back in (None, event.detail.get("step"))), None)

    def _holds(self, now: float, grew: bool) -> Owner | None:
        """Who trains it."""
        owner = read_owner(self.path / OWNER_NAME)
        if owner is None or owner == self._gone or not owner.may_be_alive:
            return None
        if not lock_decides(owner):
            return owner  # cannot be told from here
        if grew and owner == self._holder:
            self._tried_at = now
        elif owner != self._holder or now - self._tried_at > _QUIET_SECONDS:
            self._tried_at = now
            if writer_of(self.path) is None:
                self._gone = owner
                return None
            self._holder = owner
        return owner


def _grown(before: tuple[Item, ...], news: News[Item], most: int = 1 << 60) -> tuple[Item, ...]:
    return ((() if news.anew else before) + news.items)[-most:]


def _back_to(event: Event | None) -> int | None:
    """The step of the checkpoint that a rollback names; None for anything else."""
    named = event and event.kind == "rollback" and CHECKPOINT_NAME.fullmatch(str(event.detail.get("checkpoint")))
    return int(named[1]) if named else None


def epoch_seconds(rows: Sequence[EpochRow]) -> float | None:
    """Of an epoch: the median of the last few, by the run's own clock, which stands still while nobody trains it. None
    if nothing is known: a first row tells only if it is of the first epoch, and not after a fork."""
    marks = [(row.epoch, row.elapsed_seconds) for row in rows[-6:] if row.elapsed_seconds is not None]
    each = [(ended - began) / (last - first) for (first, began), (last, ended) in pairwise(marks) if last > first]
    if not each and marks and marks[-1][0] == 1:
        each = [marks[-1][1]]
    seconds = [one for one in each if math.isfinite(one) and one > 0]
    return median(seconds) if seconds else None


def quiet_seconds(run: Path) -> float:
    """Since anything came from it, by the files' own times; infinity if nothing did."""
    marks = [_mark(run / name) for name in (STEP_TABLE.file_name, EPOCH_TABLE.file_name, "events.jsonl")]
    newest = max((mark[1] for mark in marks if mark is not None), default=None)
    return math.inf if newest is None else max(0.0, time.time() - newest / 1e9)


def _mark(path: Path) -> tuple[int, int] | None:
    """By which a file that was replaced is known: its number and its time. None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
