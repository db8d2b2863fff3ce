"""The time left of a job: what was measured, and for networks that have not run yet what it says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """A run of the job. `weight`: what a picture costs in training, in a unit that is the same for all runs;
    `epoch_seconds`: measured, else None. Epochs have as many pictures in each run."""

    weight: float
    epochs_left: float
    epoch_seconds: float | None = None

    @property
    def measured(self) -> bool:
        return self.epoch_seconds is not None


def epoch_seconds_of(pace: Pace, measured: Sequence[Pace]) -> float | None:
    """Its own, else scaled by weight from the measured run nearest to it: how far a machine is from its rates depends
    on the network's size. None if nothing was measured."""
    if pace.epoch_seconds is not None:
        return pace.epoch_seconds
    known = [(other, other.epoch_seconds) for other in measured if other.epoch_seconds is not None]
    if not known:
        return None
    nearest, seconds = min(known, key=lambda one: abs(math.log(one[0].weight / pace.weight)))
    return seconds * pace.weight / nearest.weight


def seconds_left(paces: Sequence[Pace]) -> float | None:
    """Of all of them together; None until something was measured."""
    total = 0.0
    for pace in paces:
        if pace.epochs_left <= 0:
            continue
        seconds = epoch_seconds_of(pace, paces)
        if seconds is None:
            return None
        total += pace.epochs_left * seconds
    return total
