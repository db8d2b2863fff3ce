"""When a loss counts as broken: scripted losses, as they are logged."""

from __future__ import annotations

import math

import pytest
import torch

from lowmem.runs.checkpoint_state import RunState
from lowmem.train.loss_watchers import Divergence
from lowmem.train.watchers import Act, Verdict


def first_wrong(every: int, losses: list[float]) -> int | None:
    """After how many logged losses it is to go back."""
    state, divergence = RunState(), Divergence(math.log(10), every)
    for count, loss in enumerate(losses, start=1):
        divergence.logged(state, [loss])
        if divergence.look(state).act is Act.ROLLBACK:
            return count
    return None


@pytest.mark.parametrize(("every", "losses"), [(1, 100), (20, 5), (40, 3), (100, 3), (1000, 3)])
def test_far_above_chance_for_a_hundred_steps_and_three_losses(every: int, losses: int) -> None:
    assert first_wrong(every, [12.0] * 200) == losses


def test_spikes_are_none_of_it() -> None:
    assert first_wrong(20, [1e13, 2.3] * 200) is None
    assert first_wrong(20, [12.0, 12.0, 12.0, 12.0, 3.0] * 40) is None
    assert first_wrong(20, [11.5] * 200) is None  # five times chance is 11.513


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_is_wrong_at_once(value: float) -> None:
    state, divergence = RunState(), Divergence(math.log(10), 20)
    assert divergence.look(state) == Verdict()
    state.loss_sum = value
    assert divergence.look(state) == Verdict(Act.ROLLBACK, f"the training loss is {value}")


def test_an_evaluation_without_a_number_proves_nothing_by_itself() -> None:
    divergence, sound, broken = Divergence(math.log(10), 20), torch.ones(3), torch.tensor([1.0, math.nan])
    assert divergence.look_at_evaluation(2.3, [broken]) == Verdict()
    assert divergence.look_at_evaluation(math.nan, [sound, torch.tensor(5)]) == Verdict()
    assert divergence.look_at_evaluation(math.inf, [sound, broken]).act is Act.ROLLBACK
