"""The learning-rate schedule: a pure function of the step, so that a resume cannot be off by one; and its preview for
people, where the rate of the rest of a run changes, two runs beside each other."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.config.schema import Config

_SAME_EPOCHS = 0.01  # two schedules with other steps an epoch round the same milestone differently


def scaled_milestones(config: Config) -> list[float]:
    """The epochs after which the rate is divided: those of the settings, scaled to the run's length."""
    scale = config.train.epochs / config.schedule.reference_epochs
    return [epoch * scale for epoch in config.schedule.milestones]


def milestone_steps(config: Config, steps_per_epoch: int) -> tuple[int, ...]:
    """The 0-based steps from which the rate is divided."""
    return tuple(round(epoch * steps_per_epoch) for epoch in scaled_milestones(config))


def learning_rate(config: Config, steps_per_epoch: int, step: int, *, low_start: bool) -> float:
    """The rate of the 0-based `step`; `Replica.lr` scales it after going back from a broken loss. `low_start`: whether
    that is still on (see `next_low_start`)."""
    passed = sum(step >= milestone for milestone in milestone_steps(config, steps_per_epoch))
    if low_start and passed == 0:
        return config.schedule.low_start_lr
    # 0.1 * 0.1**2 is 0.0010000000000000002: twelve digits are what somebody meant who wrote 0.1.
    return float(f"{config.optim.lr * config.schedule.gamma**passed:.12g}")


def starts_low(config: Config) -> bool:
    """Whether the run begins with the low start: asked for, or `auto` and 110 layers or more.

    Where the low rate is not below the ordinary one there is nothing to start low from.
    """
    wanted = config.schedule.low_start
    if config.schedule.low_start_lr >= config.optim.lr:
        return False
    return wanted == "always" or (wanted == "auto" and (config.model.depth or 0) >= 110)


def next_low_start(config: Config, low_start: bool, train_error_pct: float) -> bool:
    """Whether the low start goes on after an epoch with this training error."""
    return low_start and not train_error_pct < config.schedule.low_start_until_error_pct


@dataclass(frozen=True)
class RateCurve:
    """`points`: (epochs done, rate from there on), rising; `end`: epochs of the run."""

    points: tuple[tuple[float, float], ...]
    end: int

    def rate(self, epochs_done: float) -> float | None:
        """The rate at that place; None once the run is over."""
        passed = [rate for at, rate in self.points if at <= epochs_done + _SAME_EPOCHS]
        return passed[-1] if passed and epochs_done + _SAME_EPOCHS < self.end else None


def rate_curve(config: Config, steps_per_epoch: int, begin: int, *, low_start: bool, scale: float = 1.0) -> RateCurve:
    """From the 0-based step `begin` on. A low start that is on is drawn to its latest end, the first milestone.
    `scale`: what going back from a broken loss has made of the rate."""
    end = config.train.epochs * steps_per_epoch
    points: list[tuple[float, float]] = []
    for step in (begin, *milestone_steps(config, steps_per_epoch)):
        rate = learning_rate(config, steps_per_epoch, step, low_start=low_start) * scale
        if begin <= step < end and (not points or points[-1][1] != rate):
            points.append((step / steps_per_epoch, rate))
    return RateCurve(tuple(points), config.train.epochs)


def side_by_side(before: RateCurve, after: RateCurve) -> list[str]:
    """A table of a few lines: where either rate changes, and both."""
    places: list[float] = []
    for at in sorted(at for curve in (before, after) for at, _ in curve.points):
        if not places or at - places[-1] > _SAME_EPOCHS:
            places.append(at)
    rows = [("learning rate", "before", "after")]
    for at in places:
        whole = int(at + _SAME_EPOCHS)
        within = f", {at - whole:.0%} in" if at - whole > _SAME_EPOCHS else ""
        rates = ["over" if rate is None else f"{rate:g}" for rate in (before.rate(at), after.rate(at))]
        rows.append((f"from epoch {whole + 1}{within}", rates[0], rates[1]))
    rows.append(("last epoch", str(before.end), str(after.end)))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{row[0]:{first}}  {row[1]:{second}}  {row[2]}" for row in rows]
