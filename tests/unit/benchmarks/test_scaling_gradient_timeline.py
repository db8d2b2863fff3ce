"""When gradients are there: by hand, and against the executor's order written down once more."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from benchmarks.scaling_model import ready
from lowmem.plan.cost import ChainCost, OptionCost
from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, Item, Keep, Schedule, Segment, keep, uniform
from lowmem.plan.solver import Solver
from tests.unit.plan.chains import random_chain
from tests.unit.plan.test_evaluate import CHAIN


def test_without_segments() -> None:
    found = ready(uniform([SAVE_ALL, LEAN, SAVE_ALL]), CHAIN)
    assert found.forward_seconds == 3
    assert found.ends == (7, 5, 2)  # backwards of 2, 3 and 2 seconds, the last stage first
    assert (found.backward_seconds, found.seconds) == (7, 10)


def test_a_segment_runs_forward_again_before_its_backward() -> None:
    inner = Schedule((Keep(0, SAVE_ALL), Keep(1, FUSED)))
    found = ready(Schedule((Segment(0, 1, inner), Keep(2, SAVE_ALL))), CHAIN)
    assert found.forward_seconds == 2 + 1  # two fast forwards
    assert found.ends == (9, 7, 2)  # stage 0 again, then the fused backward, then its own


def test_another_chains_schedule() -> None:
    with pytest.raises(ValueError, match=r"the chain has 0\.\.2"):
        ready(uniform([SAVE_ALL] * 2), CHAIN)
    with pytest.raises(KeyError, match="has no option"):
        ready(uniform([SAVE_ALL, INPUT_ONLY, SAVE_ALL]), CHAIN)


@dataclass
class Entry:
    """As `lowmem.remat.executor.Held`."""

    item: Item
    there: bool
    option: OptionCost | None


class Executor:
    """`lowmem.remat.executor.Run` with a clock in the place of tensors."""

    def __init__(self, chain: ChainCost) -> None:
        self.chain = chain
        self.clock = 0.0
        self.ended: dict[int, float] = {}

    def forward(self, schedule: Schedule, want_output: bool = True) -> list[Entry]:
        entries: list[Entry] = []
        dropped = False
        for item in schedule.items:
            last = item.end == schedule.end and not want_output
            option = None
            if isinstance(item, Keep):
                stage = self.chain.stages[item.stage]
                option = stage.option(item.policy, last)
                self.clock += option.forward_seconds
            elif not last:
                self.clock += sum(self.chain.stages[index].fast_seconds for index in range(item.start, item.end + 1))
            entries.append(Entry(item, not dropped, option))
            dropped = isinstance(item, Keep) and item.policy.drop_output
        return entries

    def backward(self, entries: list[Entry]) -> None:
        while entries:
            self.restore(entries)
            entry = entries.pop()
            if isinstance(entry.item, Segment):
                self.backward(self.forward(entry.item.inner, want_output=False))
            else:
                assert entry.option is not None
                self.clock += entry.option.backward_seconds
                self.ended[entry.item.stage] = self.clock

    def restore(self, entries: list[Entry]) -> None:
        if entries[-1].there:
            return
        before = entries[-2].option
        assert before is not None
        if before.restore_reads_input:
            self.restore(entries[:-1])
        self.clock += before.restore_seconds
        entries[-1].there = True


def random_schedule(rng: random.Random, chain: ChainCost, start: int, end: int, inside: bool = False) -> Schedule:
    items: list[Item] = []
    at = start
    while at <= end:
        to = rng.randint(at, end)
        if rng.random() < 0.4 and (to > at or not inside):
            inner = random_schedule(rng, chain, at, to, True) if to - at < end - start else None
            if inner is not None:
                items.append(Segment(at, to, inner))
                at = to + 1
                continue
        stage = chain.stages[at]
        policies = [option.policy for option in stage.options]
        before = items[-1] if items else None
        drops = isinstance(before, Keep) and before.policy.drop_output
        usable = [
            policy
            for policy in policies
            if (not policy.drop_output or at < end) and (policy != FUSED or (inside and at == end and not drops))
        ]
        items.append(Keep(at, rng.choice(usable)))
        at += 1
    return Schedule(tuple(items))


def test_against_the_executors_order_and_evaluate() -> None:
    rng = random.Random(4)
    segments = drops = 0
    for _ in range(300):
        count = rng.randint(1, 8)
        chain = random_chain(rng, count, 3, dropping=True)
        schedule = random_schedule(rng, chain, 0, count - 1)
        run = Executor(chain)
        entries = run.forward(schedule)
        start = run.clock
        run.backward(entries)
        found = ready(schedule, chain)
        assert found.forward_seconds == start
        assert found.ends == tuple(run.ended[stage] - start for stage in range(count))
        assert found.seconds == evaluate(schedule, chain).seconds == run.clock
        assert list(found.ends) == sorted(found.ends, reverse=True)
        segments += any(isinstance(item, Segment) for item in schedule.items)
        drops += any(isinstance(item, Keep) and item.policy.drop_output for _, item in schedule.walk())
    assert segments > 50
    assert drops > 50


def test_what_the_solver_finds() -> None:
    rng = random.Random(5)
    chain = random_chain(rng, 12, 4, dropping=True)
    solutions = Solver(chain, slot_bytes=1).curve(None)
    assert len(solutions) > 3
    for solution in solutions:
        found = ready(solution.schedule, chain)
        assert found.seconds == solution.seconds
        assert found.ends[0] == found.backward_seconds == max(found.ends)


def test_a_dropped_output_is_restored_before_the_next_stages_backward() -> None:
    drop = keep("conv2", drop_output=True)
    first, *others = CHAIN.stages
    slow = replace(first.option(drop), restore_seconds=0.5)
    first = replace(first, options=tuple(slow if option.policy == drop else option for option in first.options))
    chain = replace(CHAIN, stages=(first, *others))
    assert ready(uniform([drop, SAVE_ALL, LEAN]), chain).ends == (3 + 0.5 + 2 + 4, 3 + 0.5 + 2, 3)
