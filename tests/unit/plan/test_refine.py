"""Neighbours of a schedule, against all that differ in one policy."""

from __future__ import annotations

import random

import pytest

from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import FUSED, LEAN, SAVE_ALL, Keep, Schedule, Segment, keep, uniform
from lowmem.plan.refine import faster_neighbours, with_policy
from tests.unit.plan.chains import random_chain
from tests.unit.plan.oracle import all_schedules


def test_one_policy_is_another_at_any_depth() -> None:
    inner = Schedule((Keep(1, SAVE_ALL), Keep(2, FUSED)))
    schedule = Schedule((Keep(0, LEAN), Segment(1, 2, inner), Keep(3, SAVE_ALL)))
    changed = Schedule((Keep(0, LEAN), Segment(1, 2, Schedule((Keep(1, LEAN), Keep(2, FUSED)))), Keep(3, SAVE_ALL)))
    assert with_policy(schedule, 1, LEAN) == changed
    assert with_policy(schedule, 3, LEAN).items[:2] == schedule.items[:2]
    with pytest.raises(ValueError, match="nothing would restore"):
        with_policy(schedule, 3, keep("conv1", drop_output=True))
    with pytest.raises(ValueError, match="cannot be FUSED"):
        with_policy(schedule, 1, keep("conv1", drop_output=True))


@pytest.mark.parametrize("seed", range(20))
def test_all_of_them_within_the_bytes_fastest_first(seed: int) -> None:
    rng = random.Random(seed)
    chain = random_chain(rng, 3, 3, dropping=bool(seed % 2))
    every = [schedule for schedule in all_schedules(chain) if not any(isinstance(i, Segment) for i in schedule.items)]
    start = evaluate(rng.choice(every), chain)
    share = 0.1

    def differs_once(schedule: Schedule) -> bool:
        return sum(a != b for a, b in zip(schedule.items, start.schedule.items, strict=True)) == 1

    near = [evaluate(schedule, chain) for schedule in every if differs_once(schedule)]
    for most in {start.peak_bytes - 1, start.peak_bytes, start.peak_bytes + 5, 10**6}:
        expected = [one for one in near if one.peak_bytes <= most and one.seconds <= start.seconds * (1 - share)]
        found = faster_neighbours(start, chain, most, share)
        assert [one.seconds for one in found] == sorted(one.seconds for one in expected)
        assert {one.schedule for one in found} == {one.schedule for one in expected}


def test_nothing_is_faster_than_keeping_what_is_fastest() -> None:
    chain = random_chain(random.Random(3), 3, 1)
    fastest = [min(stage.anywhere, key=lambda option: option.seconds).policy for stage in chain.stages]
    assert faster_neighbours(evaluate(uniform(fastest), chain), chain, 10**6, 0.0) == []
