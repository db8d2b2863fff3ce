"""How far each run of a job is, read off its folder, and the time that is left of all. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lowmem.core.errors import LowmemError
from lowmem.core.units import format_duration
from lowmem.reproduce.job import ALL, Job, Member, reading, refuse_foreign
from lowmem.runs.folder import never_began, refuse_existing
from lowmem.runs.rows import EpochRow
from lowmem.runs.view import RunView, summarize
from lowmem.runs.watch import epoch_seconds
from lowmem.train.observer import Observer, Progress


@dataclass(frozen=True)
class Standing:
    """A run of the job as it stands. `stopped`: by train.max_steps, as asked. `epochs_done` counts whole epochs, those
    of a run in progress in part; `epoch_seconds` is what the latest ones took, evaluation and saving included, None
    before the first. `weight`: as in `Job`, for as many pictures an epoch.

    Of a look ahead: `disk_bytes` that it will take at its fullest, `planned_seconds` by the plan of the card that is
    there, None if nothing is planned for one."""

    member: Member
    path: Path
    state: Literal["to begin", "to go on", "finished", "stopped", "damaged"]
    epochs: int
    epochs_done: float = 0
    step: int = 0
    size_bytes: int = 0
    epoch_seconds: float | None = None
    weight: float = 1.0
    disk_bytes: int = 0
    planned_seconds: float | None = None

    @property
    def begun(self) -> bool:
        return self.state != "to begin"

    @property
    def left(self) -> bool:
        """Whether there is anything to do for it."""
        return self.state not in ("finished", "stopped")

    @property
    def epochs_left(self) -> float:
        return max(0.0, self.epochs - self.epochs_done) if self.left else 0.0


def standing_of(job: Job, member: Member, max_steps: int | None = None) -> Standing:
    """`max_steps`: the limit that holds this time. Raises UsageError if something else is in the run's place,
    PreflightError if it cannot be read."""
    path, weight = job.path / member.name, job.weights.get(member.name, 1.0)
    standing = Standing(member, path, "to begin", job.settings.config.train.epochs, weight=weight)
    with reading(path):
        if not path.is_dir() or not (path / "config.yaml").is_file() or never_began(path):
            refuse_existing(path)
            return standing
        refuse_foreign(job, member)
        run = summarize(path)
        seconds = None
        with suppress(LowmemError, OSError):
            seconds = epoch_seconds(RunView(path).epochs)
    step, done = run.step or 0, run.epoch or 0
    standing = replace(standing, epochs_done=done, step=step, size_bytes=run.size_bytes, epoch_seconds=seconds)
    if run.state in ("finished", "damaged"):
        return replace(standing, state=run.state)
    return replace(standing, state="stopped" if max_steps is not None and step >= max_steps else "to go on")


def measured_before(job: Job, members: Sequence[Member]) -> list[Standing]:
    """The job's other runs: not to be trained this time, but they tell how fast the machine is."""
    measured = []
    for member in ALL:
        if member not in members and member.name in job.weights:
            with suppress(LowmemError):
                measured.append(replace(standing_of(job, member), state="finished"))
    return measured


def seconds_left_of(standing: Standing, others: Sequence[Standing]) -> float | None:
    """By its own epochs, else by those of the measured run nearest to it, scaled by weight: how far a machine is from
    its rates depends on the network's size. As planned if nothing was measured; None if nothing is known."""
    each = standing.epoch_seconds
    known = [(other, other.epoch_seconds) for other in others if other.epoch_seconds is not None]
    if each is None and known:
        nearest, seconds = min(known, key=lambda pair: abs(math.log(pair[0].weight / standing.weight)))
        each = seconds * standing.weight / nearest.weight
    return standing.planned_seconds if each is None else standing.epochs_left * each


def seconds_left(standings: Sequence[Standing], others: Sequence[Standing] = ()) -> float | None:
    """Of all `standings` together; None until something was measured of them or of `others`."""
    each = [seconds_left_of(one, [*standings, *others]) for one in standings if one.epochs_left]
    known = [seconds for seconds in each if seconds is not None]
    return sum(known) if len(known) == len(each) else None


class JobObserver(Observer):
    """Passes on what the run `number` (from 0) tells, with where in the job that is: `run 2 of 6, about 3:10:00 left in
    all`. `measured`: runs that are not among the job's `standings`."""

    def __init__(
        self, shown: Observer, standings: Sequence[Standing], number: int, measured: Sequence[Standing] = ()
    ) -> None:
        self._number, self._count = number, len(standings)
        self._run = standings[number]
        self._others = [*standings[:number], *standings[number + 1 :], *measured]
        self._shown = shown
        for name in ("note", "warning", "phase", "loading"):
            setattr(self, name, getattr(shown, name))
        self._rows: list[EpochRow] = []
        self._said = self._where(self._run, None)

    def step(self, progress: Progress) -> None:
        self._shown.step(replace(progress, job=self._said))

    def ended(self, words: str, then: str) -> None:
        self._shown.note(words)  # what comes next is the job's next run

    def progress(self, progress: Progress) -> None:
        done = progress.epoch - 1 + progress.step_in_epoch / progress.steps_per_epoch
        run = replace(self._run, epochs=progress.epochs, epochs_done=done)
        if run.epoch_seconds is None and progress.seconds_left is not None and run.epochs_left > 0:
            run = replace(run, epoch_seconds=progress.seconds_left / run.epochs_left)
        self._said = self._where(run, progress.seconds_left)
        self._shown.progress(replace(progress, job=self._said))

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self._rows.append(EpochRow(epoch=row["epoch"], step=row["step"], elapsed_seconds=row["elapsed_seconds"]))
        # What this process measures itself goes before what an earlier one did, perhaps on another device.
        seconds = epoch_seconds(self._rows) or self._run.epoch_seconds
        self._run = replace(self._run, epochs=epochs, epochs_done=row["epoch"], epoch_seconds=seconds)
        self._shown.epoch({**row, "job": self._where(self._run, None)}, epochs)

    def _where(self, run: Standing, own: float | None) -> str:
        """`own`: seconds left of this run, where that is known better than by its pace."""
        where = f"run {self._number + 1} of {self._count}"
        rest = seconds_left(self._others, [run])
        mine = own if own is not None else seconds_left([run], self._others)
        return where if rest is None or mine is None else f"{where}, about {format_duration(mine + rest)} left in all"
