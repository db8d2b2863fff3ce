"""What a run tells while it goes on. The loop knows nothing of terminals: it calls an observer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem.runs.store import RunFolder


@dataclass(frozen=True)
class Progress:
    """Where a run is. Loss and error are means over the epoch so far, `step_loss` is the last step's that was logged;
    unknown is None."""

    epoch: int  # 1-based, the one in progress
    epochs: int
    step_in_epoch: int  # done
    steps_per_epoch: int
    lr: float
    loss: float | None
    error_pct: float | None
    images_per_second: float | None
    memory_bytes: int | None
    seconds_left: float | None
    step_loss: float | None = None
    job: str | None = None  # where in a job of several runs that is, in words


class Observer:
    """Hears what happens; does nothing. Subclasses override what they need."""

    def note(self, text: str) -> None:
        """A sentence worth reading."""

    def warning(self, text: str) -> None:
        """A sentence that must be read."""

    def ended(self, words: str, then: str) -> None:
        """A run's last words, and the commands that come next."""
        self.note(words)
        self.note(then)

    def recorded_warning(self, folder: RunFolder, text: str, **fields: Any) -> None:
        """One that stands in events.jsonl too, in other words if there are `fields`."""
        self.warning(text)
        folder.event("warning", **(fields or {"what": text}))

    def phase(self, what: str, done: int | None = None, total: int | None = None) -> None:
        """What goes on from here on, until anything else is told; `done` of `total` where that is known."""

    def loading(self, library: str) -> AbstractContextManager[None]:
        """Around imports that take seconds."""
        return nullcontext()

    def step(self, progress: Progress) -> None:
        """Before every step, with the figures that were fetched last: nothing waits for the device."""

    def progress(self, progress: Progress) -> None:
        """Every few steps, with figures as they are then."""

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """After each epoch, with its row of metrics.csv."""
