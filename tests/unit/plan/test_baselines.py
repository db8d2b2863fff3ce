"""Baselines: the schedules they name, the solver's signature, and what they refuse."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest

from lowmem.core.errors import Infeasible
from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import FUSED, LEAN, SAVE_ALL, Keep, Segment, keep
from lowmem.plan.solver import kept, segments_of, strategies
from tests.unit.plan.chains import random_chain, tradeoffs
from tests.unit.plan.oracle import (
    BASELINES,
    all_schedules,
    best_every_kth,
    best_uniform,
    checkpoint_all,
    save_all,
    solve,
    sqrt_n,
)

CHAIN = tradeoffs(9, 4)
PLENTY = 10**12


def test_segments_leave_the_last_stages_alone() -> None:
    schedule = segments_of(CHAIN, 4)
    assert [(item.start, item.end) for item in schedule.items] == [(0, 3), (4, 7), (8, 8)]
    assert [isinstance(item, Segment) for item in schedule.items] == [True, True, False]
    assert [(item.start, item.end) for item in segments_of(CHAIN, 3).items] == [
        (0, 2), (3, 5), (6, 6), (7, 7), (8, 8)
    ]  # fmt: skip


def test_a_missing_policy_is_replaced() -> None:
    """These stages have no SAVE_ALL and no LEAN, so the first of their options is taken."""
    assert {item.policy for item in save_all(CHAIN, PLENTY).schedule.items if isinstance(item, Keep)} == {keep()}
    assert kept(CHAIN, keep("z1")).items[3] == Keep(3, keep("z1"))
    assert LEAN not in {policy for _, policy in kept(CHAIN, LEAN).policies().values()}


def test_names_and_numbers() -> None:
    assert checkpoint_all(CHAIN, PLENTY).schedule == segments_of(CHAIN, 1)
    assert sqrt_n(CHAIN, PLENTY).schedule == segments_of(CHAIN, 3)
    one = best_uniform(CHAIN, PLENTY)
    assert one.seconds == min(evaluate(kept(CHAIN, o.policy), CHAIN).seconds for o in CHAIN.stages[0].options)
    tight = checkpoint_all(CHAIN, PLENTY).peak_bytes
    assert best_every_kth(CHAIN, tight).peak_bytes <= tight


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_keeps_the_budget_or_refuses(name: str) -> None:
    strategy = BASELINES[name]
    peak = strategy(CHAIN, PLENTY).peak_bytes
    assert strategy(CHAIN, peak).peak_bytes <= peak
    assert solve(CHAIN, peak).seconds <= strategy(CHAIN, peak).seconds
    with pytest.raises(Infeasible) as caught:
        strategy(CHAIN, 10)
    assert caught.value.least_bytes > 10


def test_all_schedules_are_different_and_valid() -> None:
    chain = random_chain(random.Random(11), 3, 3, dropping=True)
    schedules = list(all_schedules(chain))
    assert len(set(schedules)) == len(schedules) > 50
    for schedule in schedules:
        schedule.check_covers(3)
    kinds = {policy for schedule in schedules for _, policy in schedule.policies().values()}
    assert FUSED in kinds
    assert SAVE_ALL in kinds or LEAN in kinds


def test_points_fall_and_the_solvers_are_below_all_others() -> None:
    points = strategies(dataclasses.replace(CHAIN, plain_seconds=36.0), 123)
    assert points.pop("plain PyTorch") == [(123, 0.0)]
    for line in points.values():
        assert line == sorted(line, key=lambda point: (point[0], -point[1]))
        assert all(more[1] < less[1] for less, more in pairwise(line))
    for peak, overhead in points["one policy for all blocks"] + points["checkpoint every k-th block"]:
        assert min(time for size, time in points["lowmem"] if size <= peak) <= overhead
