"""The time left, from what this process measured itself: after a resume nothing of an earlier process is divided in."""

from __future__ import annotations


class TimeLeft:
    """Steps and evaluations are timed apart. Seconds are monotonic-clock seconds."""

    def __init__(self, epochs: int, steps_per_epoch: int) -> None:
        self._epochs = epochs
        self._per_epoch = steps_per_epoch
        self._mark: tuple[int, float] | None = None
        self._step_seconds: float | None = None
        self._evaluation_seconds: float | None = None

    def trained(self, step: int, now: float) -> None:
        """Called after steps, with the count of steps done."""
        if self._mark is not None and step > self._mark[0]:
            latest = (now - self._mark[1]) / (step - self._mark[0])
            # A slow average follows a machine whose speed drifts and forgets the warm-up.
            self._step_seconds = latest if self._step_seconds is None else 0.8 * self._step_seconds + 0.2 * latest
        self._mark = (step, now)

    def evaluated(self, seconds: float) -> None:
        """Called after an epoch's evaluation, which is then not counted as the time of steps."""
        self._evaluation_seconds = seconds
        self._mark = None

    @property
    def evaluation_seconds(self) -> float | None:
        """Of the last evaluation; None before there was one."""
        return self._evaluation_seconds

    def seconds(self, epochs_done: int, steps_done: int) -> float | None:
        """Seconds until the end of the run; None until something was measured."""
        if self._step_seconds is None:
            return None
        steps = max(0, self._epochs * self._per_epoch - steps_done)
        evaluations = max(0, self._epochs - epochs_done)
        return steps * self._step_seconds + evaluations * (self._evaluation_seconds or 0.0)
