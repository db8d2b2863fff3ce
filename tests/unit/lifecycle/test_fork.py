"""What becomes of the schedule of a run that is forked."""

from __future__ import annotations

import pytest

from lowmem.config.schema import Config
from lowmem.config.settings import Settings
from lowmem.core.errors import UsageError
from lowmem.lifecycle import fork
from lowmem.train.schedule import milestone_steps


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
