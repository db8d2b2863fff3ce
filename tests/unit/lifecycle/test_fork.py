"""What becomes of the schedule of a run that is forked."""

from __future__ import annotations

import pytest

from lowmem.config.schema import Config
from lowmem.config.settings import Settings
from lowmem.core.errors import UsageError
from lowmem.lifecycle import fork
from lowmem.train.schedule import learning_rate, milestone_steps, warmup_steps


def test_not_a_step_of_the_schedule_moves() -> None:
    for epochs, reference, milestones in ((3, 164, (81, 122)), (164, 164, (81, 122)), (100, 7, (1.1, 2.3, 6.9))):
        flat = {"train.epochs": epochs, "schedule.milestones": list(milestones), "schedule.reference_epochs": reference}
        recorded = Settings(Config(), {}).replace(flat, "run")
        for more in (epochs + 1, 3 * epochs, 1000):
            longer = fork.changed(recorded, {"train.epochs": more}, "fork")
            again = fork.changed(longer, {"train.epochs": more + 7, "optim.lr": 0.2}, "fork")
            for steps in (1, 5, 390, 391):
                expected = milestone_steps(recorded.config, steps)
                assert milestone_steps(longer.config, steps) == expected == milestone_steps(again.config, steps)


def test_a_schedule_that_is_asked_to_change_does() -> None:
    recorded = Settings(Config(), {})
    scaled = fork.changed(recorded, {"train.epochs": 328, "schedule.reference_epochs": 164}, "fork").config
    assert milestone_steps(scaled, 10) == (1620, 2440)
    given = fork.changed(recorded, {"train.epochs": 328, "schedule.milestones": [100]}, "fork").config
    assert milestone_steps(given, 10) == (2000,)
    with pytest.raises(UsageError, match=r"train\.epochs = 0"):
        fork.changed(recorded, {"train.epochs": 0}, "fork")


def test_a_cycles_rise_stays_and_its_fall_goes_to_the_new_end() -> None:
    flat = {"train.epochs": 60, "schedule.kind": "one-cycle"}
    recorded = Settings(Config(), {}).replace(flat, "run")
    longer = fork.changed(recorded, {"train.epochs": 100}, "fork").config
    assert warmup_steps(longer, 10) == warmup_steps(recorded.config, 10) == 180
    for step in range(180):
        rates = [learning_rate(config, 10, step, low_start=False) for config in (recorded.config, longer)]
        assert rates[0] == rates[1]
    assert learning_rate(longer, 10, 599, low_start=False) > 0.03
    assert learning_rate(longer, 10, 999, low_start=False) == 0
    given = fork.changed(recorded, {"train.epochs": 100, "schedule.warmup_epochs": 5}, "fork").config
    assert warmup_steps(given, 10) == 50
    # Too short for the rise that there was: the share of the new length.
    assert warmup_steps(fork.changed(recorded, {"train.epochs": 10}, "fork").config, 10) == 30
