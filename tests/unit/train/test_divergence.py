"""When a loss counts as broken: scripted losses, as they are logged."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lowmem.config.schema import Config, TrainConfig
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.store import RunFolder
from lowmem.train.divergence import Recovery


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def recovery(log_every_steps: int) -> Recovery:
        config = Config(train=TrainConfig(log_every_steps=log_every_steps))
        trainer = SimpleNamespace(state=RunState(), config=config)
        return Recovery(cast(Any, trainer), cast(RunFolder, None), math.log(10))

    return recovery


def first_wrong(recovery: Recovery, losses: list[float]) -> int | None:
    """After how many logged losses something was said."""
    for count, loss in enumerate(losses, start=1):
        recovery.logged([loss])
        if recovery.wrong() is not None:
            return count
    return None


@pytest.mark.parametrize(("every", "losses"), [(1, 100), (20, 5), (40, 3), (100, 3), (1000, 3)])
def test_far_above_chance_for_a_hundred_steps_and_three_losses(every: int, losses: int, make: Any) -> None:
    assert first_wrong(make(every), [12.0] * 200) == losses


def test_spikes_are_none_of_it(make: Any) -> None:
    assert first_wrong(make(20), [1e13, 2.3] * 200) is None
    assert first_wrong(make(20), [12.0, 12.0, 12.0, 12.0, 3.0] * 40) is None
    assert first_wrong(make(20), [11.5] * 200) is None  # five times chance is 11.513


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_is_wrong_at_once(value: float, make: Any) -> None:
    recovery = make(20)
    assert recovery.wrong() is None
    recovery._t.state.loss_sum = value
    assert recovery.wrong() == f"the training loss is {value}"
