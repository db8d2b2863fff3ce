"""What a process of a job does: look at all runs, or train one of them, with the job's time left beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem.cli.terminal import aligned, describe_epoch, observer
from lowmem.core.errors import Interrupted, LowmemError
from lowmem.core.units import format_duration, format_size
from lowmem.lifecycle.api import recorded_settings, resume_training, run_training
from lowmem.reproduce.check import Outlook, look_ahead
from lowmem.reproduce.eta import Pace, epoch_seconds_of, seconds_left
from lowmem.reproduce.job import Job, read_job
from lowmem.reproduce.members import ALL, Member
from lowmem.reproduce.progress import Standing, epoch_seconds, standing_of, standings_of
from lowmem.runs.history import EpochRow
from lowmem.train.observer import Observer, Progress

_HEADER = ("run", "state", "epoch", "time left", "on disk")


def work(request: Mapping[str, Any]) -> int:
    """Does what is requested; returns the exit code. Raises LowmemError."""
    job = read_job(Path(request["out"]))
    members = [member for member in ALL if member.name in request["names"]]
    standings = standings_of(job, members, request["max_steps"])
    measured = measured_before(job, members)
    with observer() as shown:
        if "name" not in request:
            outlook = look_ahead(job, standings, shown)
            for line in describe(outlook, measured):
                shown.note(line)
            outlook.job.write()
            return 0
        number = [member.name for member in members].index(request["name"])
        told = JobObserver(shown, job, standings, number, measured)
        try:
            _train(job, members[number], standings[number], request, told)
        except Interrupted as stopped:
            return stopped.exit_code  # whoever conducts the job says what is next
    if not request["dry_run"]:
        _refuse_unfinished(standing_of(job, members[number], request["max_steps"]))
    return 0


def _train(job: Job, member: Member, standing: Standing, request: Mapping[str, Any], told: Observer) -> None:
    limit = {"train.max_steps": request["max_steps"]}
    if not standing.begun:
        settings = job.settings_of(member)
        if request["max_steps"] is not None:
            settings = settings.replace(limit, "reproduce")
        run_training(settings, standing.path, told, dry_run=bool(request["dry_run"]))
        return
    # Always with the limit, be it None: the run may have been begun as a trial.
    given = {**request["given"], **limit}
    resume_training(standing.path, recorded_settings(standing.path).replace(given, "reproduce"), told)


def _refuse_unfinished(standing: Standing) -> None:
    """Raises LowmemError: a run that left without an error and is not done must not pass for one that is."""
    if standing.left:
        raise LowmemError(
            f"{standing.path} was left at step {standing.step}, epoch {standing.epochs_done} of {standing.epochs}, "
            f"without an error ({standing.state}): look at it with `lowmem verify {standing.path}`"
        )


# -- the table before the first run ------------------------------------------------------------------------------------


def describe(outlook: Outlook, measured: Sequence[Pace] = ()) -> list[str]:
    """A line a run, and what they take together. `measured`: of runs that are not among them."""
    job, names = outlook.job, [looked.standing.member.name for looked in outlook.runs]
    train = job.settings.config.train
    lines = [
        f"job {job.path}: {len(names)} {'run' if len(names) == 1 else 'runs'} of {train.epochs} epochs at width "
        f"{job.settings.config.model.width}, {outlook.pictures}"
    ]
    standings = [looked.standing for looked in outlook.runs]
    paces = [pace_of(job, standing) for standing in standings]
    rows, total = [_HEADER], 0.0
    for looked, pace in zip(outlook.runs, paces, strict=True):
        standing, per_epoch = looked.standing, epoch_seconds_of(pace, [*paces, *measured])
        seconds = 0.0 if not standing.left else looked.seconds_left
        if standing.left and per_epoch is not None:
            seconds = pace.epochs_left * per_epoch
        total += seconds if seconds is not None else float("nan")
        rows.append(
            (
                standing.member.name,
                standing.state,
                f"{standing.epochs_done}/{standing.epochs}",
                "?" if seconds is None else f"about {format_duration(seconds)}" if standing.left else "",
                ("at most " if standing.left else "") + format_size(looked.disk_bytes),
            )
        )
    lines += aligned(rows, right={2, 3, 4})
    time = "known after the first epoch" if total != total else f"about {format_duration(total)}"
    lines.append(
        f"time left in all: {time}; disk: at most {format_size(outlook.needed_bytes)} more, "
        f"{format_size(outlook.free_bytes)} free"
    )
    return lines


# -- the time left -----------------------------------------------------------------------------------------------------


def pace_of(job: Job, standing: Standing) -> Pace:
    left = standing.epochs - standing.epochs_done if standing.left else 0
    return Pace(job.weights.get(standing.member.name, 1.0), left, standing.epoch_seconds)


def measured_before(job: Job, members: Sequence[Member]) -> list[Pace]:
    """Of the job's other runs: not to be trained this time, but they tell how fast the machine is."""
    paces = []
    for member in ALL:
        if member not in members and member.name in job.weights:
            with suppress(LowmemError):
                pace = pace_of(job, standing_of(job, member))
                paces.append(replace(pace, epochs_left=0.0))
    return [pace for pace in paces if pace.measured]


@dataclass
class JobObserver(Observer):
    """Passes everything on, with where in the job the run is: `run 2 of 6, about 3:10:00 left in all`."""

    shown: Observer
    job: Job
    standings: Sequence[Standing]
    number: int  # of the run in progress, from 0
    measured: Sequence[Pace] = ()  # of runs that are not among them

    def __post_init__(self) -> None:
        self._paces = [pace_of(self.job, standing) for standing in self.standings]
        self._rows: list[EpochRow] = []

    def note(self, text: str) -> None:
        self.shown.note(text)

    def warning(self, text: str) -> None:
        self.shown.warning(text)

    def data_progress(self, what: str, done: int, total: int) -> None:
        self.shown.data_progress(what, done, total)

    def progress(self, progress: Progress) -> None:
        done = progress.epoch - 1 + progress.step_in_epoch / progress.steps_per_epoch
        pace = replace(self._paces[self.number], epochs_left=progress.epochs - done)
        if not pace.measured and progress.seconds_left is not None and pace.epochs_left > 0:
            pace = replace(pace, epoch_seconds=progress.seconds_left / pace.epochs_left)
        self.shown.progress(replace(progress, job=self._words(pace, progress.seconds_left)))

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self._rows.append(EpochRow(epoch=row["epoch"], step=row["step"], elapsed_seconds=row["elapsed_seconds"]))
        pace = replace(self._paces[self.number], epochs_left=epochs - row["epoch"])
        # What this process measures itself goes before what an earlier one did, perhaps on another device.
        if (seconds := epoch_seconds(self._rows)) is not None:
            pace = replace(pace, epoch_seconds=seconds)
        self._paces[self.number] = pace
        self.shown.note(f"{describe_epoch(row, epochs)}  {self._words(pace, None)}")

    def _words(self, pace: Pace, own: float | None) -> str:
        """`own`: seconds left of this run, where that is known better than by its pace."""
        where = f"run {self.number + 1} of {len(self.standings)}"
        others = [other for at, other in enumerate(self._paces) if at != self.number]
        rest = seconds_left([*others, *self.measured, replace(pace, epochs_left=0)])
        mine = own if own is not None else seconds_left([pace, *self.measured])
        if rest is None or mine is None:
            return where
        return f"{where}, about {format_duration(mine + rest)} left in all"
