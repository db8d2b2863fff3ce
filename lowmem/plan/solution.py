"""The one result of every solver and baseline, so that they swap places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost
from lowmem.plan.evaluate import Evaluation, evaluate
from lowmem.plan.policy import Schedule


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
