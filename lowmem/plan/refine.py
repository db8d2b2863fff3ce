"""Schedules that differ from a solution in the policy of one stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from lowmem.plan.cost import ChainCost
from lowmem.plan.evaluate import Solution, evaluate
from lowmem.plan.policy import BlockPolicy, Item, Keep, Schedule, Segment


def faster_neighbours(solution: Solution, chain: ChainCost, most_bytes: int, share: float) -> list[Solution]:
    """Those of at most so many bytes that save at least this share of the time, the fastest first. A schedule stays as
    it is cut into segments."""
    found = []
    most_seconds = solution.seconds * (1 - share)
    for schedule in _swapped(solution.schedule, chain, solution.seconds - most_seconds):
        other = evaluate(schedule, chain)
        if other.seconds <= most_seconds and other.peak_bytes <= most_bytes:
            found.append(other)
    return sorted(found, key=lambda one: (one.seconds, one.peak_bytes))


def _swapped(schedule: Schedule, chain: ChainCost, saved: float) -> Iterator[Schedule]:
    """With one stage under a policy that alone saves so many seconds."""
    for stage, (_, policy) in schedule.policies().items():
        options = chain.stages[stage].options
        seconds = next(one.seconds for one in options if one.policy == policy)
        for option in options:
            if option.policy != policy and option.seconds <= seconds - saved:
                with suppress(ValueError):  # it cannot stand there
                    other = with_policy(schedule, stage, option.policy)
                    other.check_covers(len(chain))
                    yield other


def with_policy(schedule: Schedule, stage: int, policy: BlockPolicy) -> Schedule:
    """The same schedule, but for a stage's policy. Raises ValueError where that cannot be used there."""

    def of(item: Item) -> Item:
        if not item.start <= stage <= item.end:
            return item
        if isinstance(item, Segment):
            return replace(item, inner=with_policy(item.inner, stage, policy))
        return Keep(stage, policy)

    return Schedule(tuple(map(of, schedule.items)))
