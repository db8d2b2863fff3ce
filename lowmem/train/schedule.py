"""The learning-rate schedule: a pure function of the step, so that a resume cannot be off by one; and its preview for
people, where the rate of the rest of a run changes, two runs beside each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowmem.config.schema import Config

ONE_CYCLE_RISE = 0.3  # share of the run, where warmup_epochs is not given; both as torch's OneCycleLR has them
ONE_CYCLE_BEGIN = 1 / 25  # of optim.lr
_SAME_EPOCHS = 0.01  # two schedules with other steps an epoch round the same milestone differently
_MOST_ROWS = 12  # of a table of two smooth curves


def scaled_milestones(config: Config) -> list[float]:
    """The epochs after which the rate is divided: those of the settings, scaled to the run's length."""
    scale = config.train.epochs / config.schedule.reference_epochs
    return [epoch * scale for epoch in config.schedule.milestones]


def milestone_steps(config: Config, steps_per_epoch: int) -> tuple[int, ...]:
    """The 0-based steps from which the rate is divided."""
    return tuple(round(epoch * steps_per_epoch) for epoch in scaled_milestones(config))


def learning_rate(config: Config, steps_per_epoch: int, step: int, *, low_start: bool) -> float:
    """The rate of the 0-based `step`; `Replica.lr` scales it after going back from a broken loss. `low_start`: whether
    that is still on (see `next_low_start`).

    The last of W steps of a warm-up is the first at optim.lr. Cosine (Loshchilov and Hutter 2017) and one-cycle (Smith
    and Topin 2018) fall from there to final_share of it, which is the rate of the run's last step: the values of
    torch's `CosineAnnealingLR(T_max=steps - W)` (W at least 1) and `OneCycleLR(pct_start=W / steps)`."""
    schedule, top = config.schedule, config.optim.lr
    rise = warmup_steps(config, steps_per_epoch)
    if step < rise - 1 and schedule.kind == "one-cycle":
        return _half_cosine(top * ONE_CYCLE_BEGIN, top, step / (rise - 1))
    if schedule.kind == "steps":
        passed = sum(step >= milestone for milestone in milestone_steps(config, steps_per_epoch))
        if low_start and passed == 0:
            return schedule.low_start_lr
        # 0.1 * 0.1**2 is 0.0010000000000000002: twelve digits are what somebody meant who wrote 0.1.
        top = float(f"{top * schedule.gamma**passed:.12g}")
    if step < rise - 1:
        return top * (step + 1) / rise
    fall, done = config.train.epochs * steps_per_epoch - max(rise, 1), step - max(rise - 1, 0)
    if schedule.kind == "steps" or fall <= 0:
        return top
    return _half_cosine(top, top * schedule.final_share, min(done / fall, 1.0))


def _half_cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * share))


def warmup_epochs(config: Config) -> float:
    """Epochs in which the rate rises to optim.lr."""
    given = config.schedule.warmup_epochs
    if given is None:
        return ONE_CYCLE_RISE * config.train.epochs if config.schedule.kind == "one-cycle" else 0.0
    return given


def warmup_steps(config: Config, steps_per_epoch: int) -> int:
    """Steps of the warm-up; the last of them is made at optim.lr."""
    return round(warmup_epochs(config) * steps_per_epoch)


def starts_low(config: Config) -> bool:
    """Whether the run begins with the low start: asked for, or `auto` and 110 layers or more; never where another
    warm-up or a smooth schedule takes its place.

    Where the low rate is not below the ordinary one there is nothing to start low from.
    """
    schedule = config.schedule
    if schedule.low_start_lr >= config.optim.lr or schedule.kind != "steps" or schedule.warmup_epochs:
        return False
    return schedule.low_start == "always" or (schedule.low_start == "auto" and (config.model.depth or 0) >= 110)


def next_low_start(config: Config, low_start: bool, train_error_pct: float) -> bool:
    """Whether the low start goes on after an epoch with this training error."""
    return low_start and not train_error_pct < config.schedule.low_start_until_error_pct


@dataclass(frozen=True)
class RateCurve:
    """`points`: (epochs done, rate from there on), rising; `line`: the same for a picture, with the rate of the last
    step before each and before the `end`, the epochs of the run. `smooth`: the rate changes with every step, and the
    points are samples."""

    points: tuple[tuple[float, float], ...]
    line: tuple[tuple[float, float], ...]
    end: int
    smooth: bool = False

    def rate(self, epochs_done: float) -> float | None:
        """The rate at that place; None once the run is over."""
        passed = [rate for at, rate in self.points if at <= epochs_done + _SAME_EPOCHS]
        return passed[-1] if passed and epochs_done + _SAME_EPOCHS < self.end else None


def rate_curve(config: Config, steps_per_epoch: int, begin: int, *, low_start: bool, scale: float = 1.0) -> RateCurve:
    """From the 0-based step `begin` on. A low start that is on is drawn to its latest end, the first milestone. Where
    the rate changes with every step there is a point at the beginning of each epoch. `scale`: what going back from a
    broken loss has made of the rate."""
    end, kind = config.train.epochs * steps_per_epoch, config.schedule.kind
    milestones = milestone_steps(config, steps_per_epoch) if kind == "steps" else ()
    rise = warmup_steps(config, steps_per_epoch)
    every = (*range(0, rise if kind == "steps" else end, steps_per_epoch), *([rise - 1] if rise else []))
    smooth = kind != "steps" or begin < rise - 1
    points: list[tuple[float, float]] = []
    line: list[tuple[float, float]] = []
    for step in (begin, *sorted({*milestones, *every}), end):
        if begin < step <= end:
            rate = learning_rate(config, steps_per_epoch, step - 1, low_start=low_start) * scale
            line.append((step / steps_per_epoch, rate))
        rate = learning_rate(config, steps_per_epoch, step, low_start=low_start) * scale
        if begin <= step < end and (not points or points[-1][1] != rate):
            points.append((step / steps_per_epoch, rate))
            line.append(points[-1])
    return RateCurve(tuple(points), tuple(line), config.train.epochs, smooth)


def side_by_side(before: RateCurve, after: RateCurve) -> list[str]:
    """A table of a few lines: where either rate changes, and both; of smooth curves some places of many."""
    places: list[float] = []
    for at in sorted(at for curve in (before, after) for at, _ in curve.points):
        if not places or at - places[-1] > _SAME_EPOCHS:
            places.append(at)
    smooth = before.smooth or after.smooth
    if smooth and len(places) > _MOST_ROWS:
        places = [places[number * (len(places) - 1) // (_MOST_ROWS - 1)] for number in range(_MOST_ROWS)]
    word, digits = ("at", ".3g") if smooth else ("from", "g")
    rows = [("learning rate", "before", "after")]
    for at in places:
        whole = int(at + _SAME_EPOCHS)
        within = f", {at - whole:.0%} in" if at - whole > _SAME_EPOCHS else ""
        rates = ["over" if rate is None else f"{rate:{digits}}" for rate in (before.rate(at), after.rate(at))]
        rows.append((f"{word} epoch {whole + 1}{within}", rates[0], rates[1]))
    rows.append(("last epoch", str(before.end), str(after.end)))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{row[0]:{first}}  {row[1]:{second}}  {row[2]}" for row in rows]
