"""The learning rate as a pure function of the step, so that a resume cannot be off by one."""

from __future__ import annotations

from lowmem.config.schema import Config


def milestone_steps(config: Config, steps_per_epoch: int) -> tuple[int, ...]:
    """The 0-based steps from which the rate is divided; milestones are scaled to the run's length."""
    scale = config.train.epochs / config.schedule.reference_epochs
    return tuple(round(epoch * scale * steps_per_epoch) for epoch in config.schedule.milestones)


def learning_rate(config: Config, steps_per_epoch: int, step: int, *, low_start: bool) -> float:
    """The rate of the 0-based `step`. `low_start`: whether the low start is still on (see `next_low_start`)."""
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
    return wanted == "always" or (wanted == "auto" and int(config.model.arch[3:]) >= 110)


def next_low_start(config: Config, low_start: bool, train_error_pct: float) -> bool:
    """Whether the low start goes on after an epoch with this training error."""
    return low_start and not train_error_pct < config.schedule.low_start_until_error_pct
