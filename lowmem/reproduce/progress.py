"""How far each run of a job is, read off its folder. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

from lowmem.core.errors import LowmemError, PreflightError
from lowmem.reproduce.job import Job, refuse_foreign
from lowmem.reproduce.members import Member
from lowmem.runs.listing import summarize
from lowmem.runs.lock import writer_of
from lowmem.runs.rows import EpochRow
from lowmem.runs.setup import never_began, refuse_existing
from lowmem.runs.view import RunView

State = Literal["to begin", "to go on", "finished", "stopped", "damaged"]
_RECENT_EPOCHS = 5  # a machine's speed changes, over days too
_LEAVING_SECONDS = 120.0


@dataclass(frozen=True)
class Standing:
    """`epochs_done` counts whole epochs; `epoch_seconds` is what the latest ones took, evaluation and saving included,
    None before the first. `stopped`: by train.max_steps, as asked."""

    member: Member
    path: Path
    state: State
    epochs: int
    epochs_done: int = 0
    step: int = 0
    size_bytes: int = 0
    epoch_seconds: float | None = None

    @property
    def begun(self) -> bool:
        return self.state != "to begin"

    @property
    def left(self) -> bool:
        """Whether there is anything to do for it."""
        return self.state not in ("finished", "stopped")


def standing_of(job: Job, member: Member, max_steps: int | None = None) -> Standing:
    """`max_steps`: the limit that holds this time. Raises UsageError if something else is in the run's place,
    PreflightError if it cannot be read."""
    try:
        return _standing_of(job, member, max_steps)
    except OSError as error:
        raise PreflightError(
            f"{job.folder_of(member)} cannot be read ({error.strerror or error}): check its permissions"
        ) from None


def _standing_of(job: Job, member: Member, max_steps: int | None) -> Standing:
    path, epochs = job.folder_of(member), job.settings.config.train.epochs
    if not path.exists() or not path.is_dir() or not (path / "config.yaml").is_file() or never_began(path):
        refuse_existing(path)
        return Standing(member, path, "to begin", epochs)
    refuse_foreign(job, member)
    found = summarize(path)
    step = found.step or 0
    state: State = "to go on"
    if found.state in ("finished", "damaged"):
        state = "finished" if found.state == "finished" else "damaged"
    elif max_steps is not None and step >= max_steps:
        state = "stopped"
    return Standing(member, path, state, epochs, found.epoch or 0, step, found.size_bytes, _epoch_seconds(path))


def standings_of(job: Job, members: Sequence[Member], max_steps: int | None = None) -> list[Standing]:
    """Of each, in the same order. Raises as `standing_of` does."""
    return [standing_of(job, member, max_steps) for member in members]


def epoch_seconds(rows: Sequence[EpochRow]) -> float | None:
    """The median of the latest epochs, by the run's own clock, which stands still while nobody trains it."""
    told = [row.elapsed_seconds for row in rows[-_RECENT_EPOCHS - 1 :] if row.elapsed_seconds is not None]
    if len(told) == 1 and len(rows) == 1:
        return told[0] if rows[0].epoch == 1 and told[0] > 0 else None
    lengths = [after - before for before, after in pairwise(told) if after > before]
    return median(lengths) if lengths else None


def _epoch_seconds(path: Path) -> float | None:
    try:
        return epoch_seconds(RunView(path).epochs)
    except (LowmemError, OSError):
        return None


def wait_for_writers(paths: Sequence[Path], say: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """A job that was killed leaves a process behind that still saves its run: until it has left, or for two minutes, or
    until `stop()`."""
    deadline = time.monotonic() + _LEAVING_SECONDS
    for path in paths:
        if stop() or (who := writer_of(path)) is None:
            continue
        say(f"{path} is still being written by {who}: waiting for it to leave")
        while not stop() and writer_of(path) is not None and time.monotonic() < deadline:
            time.sleep(0.2)
