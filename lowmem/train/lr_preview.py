"""The learning rate over the rest of a run, for people: where it changes, and two runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.config.schema import Config
from lowmem.train.schedule import learning_rate, milestone_steps

_SAME_EPOCHS = 0.01  # two schedules with other steps an epoch round the same milestone differently


@dataclass(frozen=True)
class RateCurve:
    """`points`: (epochs done, rate from there on), rising; `end`: epochs of the run."""

    points: tuple[tuple[float, float], ...]
    end: int

    def rate(self, epochs_done: float) -> float | None:
        """The rate at that place; None once the run is over."""
        if epochs_done + _SAME_EPOCHS >= self.end:
            return None
        passed = [rate for at, rate in self.points if at <= epochs_done + _SAME_EPOCHS]
        return passed[-1] if passed else None


def rate_curve(config: Config, steps_per_epoch: int, begin: int, *, low_start: bool, scale: float = 1.0) -> RateCurve:
    """From the 0-based step `begin` on. A low start that is on is drawn to its latest end, the first milestone.
    `scale`: what going back from a broken loss has made of the rate."""
    end = config.train.epochs * steps_per_epoch
    steps = [begin, *(step for step in milestone_steps(config, steps_per_epoch) if begin < step < end)]
    points: list[tuple[float, float]] = []
    for step in steps if begin < end else []:
        rate = learning_rate(config, steps_per_epoch, step, low_start=low_start) * scale
        if not points or points[-1][1] != rate:
            points.append((step / steps_per_epoch, rate))
    return RateCurve(tuple(points), config.train.epochs)


def side_by_side(before: RateCurve, after: RateCurve) -> list[str]:
    """A table of a few lines: where either rate changes, and both."""
    places: list[float] = []
    for at in sorted(at for curve in (before, after) for at, _ in curve.points):
        if not places or at - places[-1] > _SAME_EPOCHS:
            places.append(at)
    rows = [("learning rate", "before", "after")]
    rows += [(_place(at), _rate(before.rate(at)), _rate(after.rate(at))) for at in places]
    rows.append(("last epoch", str(before.end), str(after.end)))
    return _aligned(rows)


def _place(epochs_done: float) -> str:
    whole = int(epochs_done + _SAME_EPOCHS)
    within = epochs_done - whole
    return f"from epoch {whole + 1}" + (f", {within:.0%} in" if within > _SAME_EPOCHS else "")


def _rate(rate: float | None) -> str:
    return "over" if rate is None else f"{rate:g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
