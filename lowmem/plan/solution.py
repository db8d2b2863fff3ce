"""The one result of the solver and of what others do, so that they swap places; and what others do: one policy for every
stage, or torch.utils.checkpoint over equal segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost, StageCost
from lowmem.plan.evaluate import Evaluation, evaluate
from lowmem.plan.policy import FUSED, SAVE_ALL, BlockPolicy, Item, Keep, PolicyKind, Schedule, Segment


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A schedule that fits, and what it takes under the cost model: `peak_bytes` of the step's tensors,
    `seconds` and `flops` of the whole step. `overhead` and `extra_flops` are over plain autograd, None if
    that was not measured."""

    strategy: str
    schedule: Schedule
    peak_bytes: int
    peak_at: str
    seconds: float
    flops: int
    overhead: float | None
    extra_flops: int | None


# budget in bytes, of all tensors of the step -> a solution within it; raises Infeasible
Strategy: TypeAlias = Callable[[ChainCost, int], Solution]


def describe(strategy: str, schedule: Schedule, chain: ChainCost, result: Evaluation | None = None) -> Solution:
    """The solution that a schedule is, whatever the budget."""
    result = result or evaluate(schedule, chain)
    plain = chain.plain_seconds
    extra = result.seconds - plain if plain is not None else None
    return Solution(
        strategy=strategy,
        schedule=schedule,
        peak_bytes=result.peak_bytes,
        peak_at=str(result.peak),
        seconds=result.seconds + chain.outside_seconds,
        flops=result.flops,
        overhead=extra / (plain + chain.outside_seconds) if plain is not None and extra is not None else None,
        extra_flops=result.flops - chain.plain_flops if chain.plain_flops is not None else None,
    )


def refuse(best: Solution, budget_bytes: int, way_out: str) -> Infeasible:
    """The exception (invariant 10) for a budget under which even `best`, the smallest there is, does not
    fit."""
    what = f"{best.strategy}; at its peak, {best.peak_at}"
    return Infeasible(budget_bytes, best.peak_bytes, what, way_out)


_WAY_OUT = "let the solver choose, lower the batch, or allow mixed precision or accumulation"


def fastest_fitting(name: str, schedules: Iterable[Schedule], chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest of the schedules within the budget."""
    found = [describe(name, schedule, chain) for schedule in schedules]
    fitting = [solution for solution in found if solution.peak_bytes <= budget_bytes]
    if not fitting:
        raise refuse(min(found, key=lambda solution: solution.peak_bytes), budget_bytes, _WAY_OUT)
    return min(fitting, key=lambda solution: (solution.seconds, solution.peak_bytes))


def plain_policies(stage: StageCost) -> list[BlockPolicy]:
    """Policies that can be used anywhere."""
    policies = [option.policy for option in stage.options]
    return [policy for policy in policies if policy.kind is not PolicyKind.FUSED and not policy.drop_output]


def _policy(stage: StageCost, wanted: BlockPolicy) -> BlockPolicy:
    has = plain_policies(stage)
    for policy in (wanted, SAVE_ALL):
        if policy in has:
            return policy
    return has[0]


def without_segments(chain: ChainCost, start: int, end: int, policy: BlockPolicy, fuse_last: bool = False) -> Schedule:
    """start..end (inclusive) without segments."""
    items = [Keep(index, _policy(chain.stages[index], policy)) for index in range(start, end + 1)]
    if fuse_last and any(option.policy == FUSED for option in chain.stages[end].options):
        items[-1] = Keep(end, FUSED)
    return Schedule(tuple(items))


def segments_of(chain: ChainCost, length: int, policy: BlockPolicy = SAVE_ALL, fuse_last: bool = False) -> Schedule:
    """Segments of `length` stages, with `policy` inside; what is left at the end, at least one stage, is not
    checkpointed, as in torch.utils.checkpoint.checkpoint_sequential."""
    items: list[Item] = []
    start, last = 0, len(chain) - 1
    while start + length <= last:
        end = start + length - 1
        items.append(Segment(start, end, without_segments(chain, start, end, policy, fuse_last)))
        start = end + 1
    return Schedule((*items, *without_segments(chain, start, last, policy).items))


def uniform_policy(policy: BlockPolicy) -> Strategy:
    """One policy for every stage that has it."""

    def strategy(chain: ChainCost, budget_bytes: int) -> Solution:
        schedule = without_segments(chain, 0, len(chain) - 1, policy)
        return fastest_fitting(f"{policy} everywhere", [schedule], chain, budget_bytes)

    return strategy


def every_kth(length: int, policy: BlockPolicy = SAVE_ALL) -> Strategy:
    """A checkpoint at every `length`-th stage."""

    def strategy(chain: ChainCost, budget_bytes: int) -> Solution:
        name = f"checkpoint every {length} blocks"
        return fastest_fitting(name, [segments_of(chain, length, policy)], chain, budget_bytes)

    return strategy
