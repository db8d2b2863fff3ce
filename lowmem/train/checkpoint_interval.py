"""When a run hands over a save and when it waits for one, so that no kill loses more than the configured interval.

A save that is written in the background exists once it is committed, and training goes on meanwhile: handed over when
the interval is over, it would lose what is done during the write as well. So it is handed over earlier. By the count of
steps that is at every half of the interval, whose places do not depend on how fast a disk is: runs stay comparable. By
the clock it is as long before the end as the longest write so far took. If the write takes longer than that, training
waits for it (`hold`). What the disk refuses is not waited for: then training goes on, and that is said (`Saver`).

An evaluation that would pass the interval is begun with a save; a resume begins with it.

Known limitation: a step cannot be left in its middle; by the clock the one under way comes on top. Nobody knows how
long the first evaluation of a process will take: half an interval is allowed for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lowmem.config.schema import CheckpointConfig
from lowmem.runs.saver import Saver


class SaveInterval:
    """Told of every save of one process; begins with what `saver` finds on disk. `now`: seconds that only rise."""

    def __init__(self, config: CheckpointConfig, saver: Saver, now: Callable[[], float] = time.monotonic) -> None:
        self._config, self._saver, self._now = config, saver, now
        self._seconds = None if config.every_minutes is None else 60 * config.every_minutes
        self._began = self._submitted_at = now()

    def submitted(self) -> None:
        """A save of the run as it is now was handed over."""
        self._submitted_at = self._now()

    def due(self, step: int) -> bool:
        """Whether a save is to be handed over after `step` steps."""
        every = self._config.steps_between_saves
        return (every is not None and step % every == 0) or self._clock(0.0)

    def due_before(self, seconds: float | None) -> bool:
        """Whether a save is to be handed over before what takes so long, by the clock (None: nobody knows how long)."""
        return self._clock(seconds)

    def _clock(self, ahead_seconds: float | None) -> bool:
        if self._seconds is None:
            return False
        ahead_seconds = self._seconds / 2 if ahead_seconds is None else ahead_seconds
        lead = min(self._seconds / 2, self._saver.longest_write_seconds)
        return self._now() - self._submitted_at + ahead_seconds > self._seconds - lead

    def hold(self, step: int) -> None:
        """Before the step after `step`: waits for the save that is being written, if a kill during that step would lose
        more than the interval. Costs nothing otherwise."""
        saved = self._saver.last_saved
        if saved is None:
            return
        most = self._config.every_steps
        if (most is not None and step - saved.step >= most) or self._over(
            self._began if saved.taken_at is None else saved.taken_at
        ):
            self._saver.wait()

    def _over(self, taken_at: float) -> bool:
        return self._seconds is not None and self._now() - taken_at > self._seconds
