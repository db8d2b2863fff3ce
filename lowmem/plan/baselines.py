"""What others do, and what is certainly right, behind the solver's own signature: (chain, budget in bytes) ->
Solution, or Infeasible.

`every_kth` is torch.utils.checkpoint over equal segments, `sqrt_n` is Chen et al., "Training deep nets with
sublinear memory cost" (2016). Where a stage has not got a policy, it gets SAVE_ALL, or else the first it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import isqrt

from lowmem.plan.cost import ChainCost, StageCost
from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import (
    FUSED,
    SAVE_ALL,
    BlockPolicy,
    Item,
    Keep,
    PolicyKind,
    Schedule,
    Segment,
)
from lowmem.plan.solution import Solution, Strategy, describe, refuse

WAY_OUT = "let the solver choose, lower the batch, or allow mixed precision or accumulation"


def _fitting(name: str, schedules: Iterable[Schedule], chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest of the schedules within the budget."""
    found = [describe(name, schedule, chain) for schedule in schedules]
    fitting = [solution for solution in found if solution.peak_bytes <= budget_bytes]
    if not fitting:
        raise refuse(min(found, key=lambda solution: solution.peak_bytes), budget_bytes, WAY_OUT)
    return min(fitting, key=lambda solution: (solution.seconds, solution.peak_bytes))


def _usual(stage: StageCost) -> list[BlockPolicy]:
    """Policies that can be used anywhere."""
    policies = [option.policy for option in stage.options]
    return [policy for policy in policies if policy.kind is not PolicyKind.FUSED and not policy.drop_output]


def _policy(stage: StageCost, wanted: BlockPolicy) -> BlockPolicy:
    has = _usual(stage)
    for policy in (wanted, SAVE_ALL):
        if policy in has:
            return policy
    return has[0]


def _kept(chain: ChainCost, start: int, end: int, policy: BlockPolicy, fuse_last: bool = False) -> Schedule:
    """start..end (inclusive) without segments."""
    items = [Keep(index, _policy(chain.stages[index], policy)) for index in range(start, end + 1)]
    if fuse_last and any(option.policy == FUSED for option in chain.stages[end].options):
        items[-1] = Keep(end, FUSED)
    return Schedule(tuple(items))


def save_all(chain: ChainCost, budget_bytes: int) -> Solution:
    """Everything autograd would keep: the step without any plan."""
    return _fitting("save all", [_kept(chain, 0, len(chain) - 1, SAVE_ALL)], chain, budget_bytes)


def uniform_policy(policy: BlockPolicy) -> Strategy:
    """One policy for every stage that has it."""

    def strategy(chain: ChainCost, budget_bytes: int) -> Solution:
        schedule = _kept(chain, 0, len(chain) - 1, policy)
        return _fitting(f"{policy} everywhere", [schedule], chain, budget_bytes)

    return strategy


def best_uniform(chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest single policy."""
    policies = {
        option.policy: None
        for stage in chain.stages
        for option in stage.options
        if option.policy.kind is not PolicyKind.FUSED and not option.policy.drop_output
    }
    schedules = [_kept(chain, 0, len(chain) - 1, policy) for policy in policies]
    return _fitting("one policy everywhere", schedules, chain, budget_bytes)


def segments_of(chain: ChainCost, length: int, policy: BlockPolicy = SAVE_ALL, fuse_last: bool = False) -> Schedule:
    """Segments of `length` stages, with `policy` inside; what is left at the end, at least one stage, is not
    checkpointed, as in torch.utils.checkpoint.checkpoint_sequential."""
    items: list[Item] = []
    start, last = 0, len(chain) - 1
    while start + length <= last:
        end = start + length - 1
        items.append(Segment(start, end, _kept(chain, start, end, policy, fuse_last)))
        start = end + 1
    return Schedule((*items, *_kept(chain, start, last, policy).items))


def checkpoint_all(chain: ChainCost, budget_bytes: int) -> Solution:
    """Every stage is its own checkpoint, the last one excepted, as with the library's per-block
    checkpointing."""
    return _fitting("checkpoint every block", [segments_of(chain, 1)], chain, budget_bytes)


def every_kth(length: int, policy: BlockPolicy = SAVE_ALL) -> Strategy:
    """A checkpoint at every `length`-th stage."""

    def strategy(chain: ChainCost, budget_bytes: int) -> Solution:
        name = f"checkpoint every {length} blocks"
        return _fitting(name, [segments_of(chain, length, policy)], chain, budget_bytes)

    return strategy


def best_every_kth(chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest of all lengths of segments."""
    schedules = [segments_of(chain, length) for length in range(1, len(chain) + 1)]
    return _fitting("checkpoint every k-th block", schedules, chain, budget_bytes)


def sqrt_n(chain: ChainCost, budget_bytes: int) -> Solution:
    """Segments of about the square root of the number of stages."""
    length = isqrt(len(chain) - 1) + 1
    return _fitting(f"checkpoint every {length} (sqrt n) blocks", [segments_of(chain, length)], chain, budget_bytes)


def all_schedules(chain: ChainCost) -> Iterator[Schedule]:
    """Every persistent schedule that does not end in a segment (which only runs its last stages twice for
    nothing). Their number explodes: 4 stages with 3 options have thousands."""
    for items in _all_items(chain, 0, len(chain) - 1, inside=False):
        yield Schedule(items)


def _all_items(
    chain: ChainCost, start: int, end: int, inside: bool, dropped: bool = False
) -> Iterator[tuple[Item, ...]]:
    """`inside` a segment the last stage has its own policies, and FUSED, but not after a `dropped` output."""
    stage = chain.stages[start]
    if start == end:
        policies = list(stage.last_policies()) if inside else _usual(stage)
        if inside and not dropped and any(option.policy == FUSED for option in stage.options):
            policies.append(FUSED)
        yield from ((Keep(start, policy),) for policy in policies)
        return
    for option in stage.options:
        policy = option.policy
        if policy.kind is not PolicyKind.FUSED:
            for rest in _all_items(chain, start + 1, end, inside, policy.drop_output):
                yield (Keep(start, policy), *rest)
    for split in range(start, end):
        inner = [Schedule(items) for items in _all_items(chain, start, split, True)]
        rests = list(_all_items(chain, split + 1, end, inside))
        for schedule, rest in product(inner, rests):
            yield (Segment(start, split, schedule), *rest)


def brute_force(chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest of all schedules, one by one: for chains of at most four or five stages."""
    best: tuple[float, int, Schedule] | None = None
    least: tuple[int, Schedule] | None = None
    for schedule in all_schedules(chain):
        result = evaluate(schedule, chain)
        if least is None or result.peak_bytes < least[0]:
            least = (result.peak_bytes, schedule)
        if result.peak_bytes <= budget_bytes and (best is None or (result.seconds, result.peak_bytes) < best[:2]):
            best = (result.seconds, result.peak_bytes, schedule)
    assert least is not None
    if best is None:
        raise refuse(describe("brute force", least[1], chain), budget_bytes, WAY_OUT)
    return describe("brute force", best[2], chain)


BASELINES: dict[str, Strategy] = {
    "save all": save_all,
    "one policy everywhere": best_uniform,
    "checkpoint every block": checkpoint_all,
    "checkpoint every k-th block": best_every_kth,
    "checkpoint every sqrt(n) blocks": sqrt_n,
}
