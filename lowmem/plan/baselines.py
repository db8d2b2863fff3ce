"""What others do beside the solver, over all budgets: the data of a picture of memory against time.

`segments_of` is torch.utils.checkpoint over equal segments. Where a stage has not got a policy, it gets SAVE_ALL, or
else the first it has.
"""

from __future__ import annotations

from collections.abc import Iterable

from lowmem.plan.cost import ChainCost, StageCost
from lowmem.plan.evaluate import Solution, evaluate
from lowmem.plan.policy import SAVE_ALL, BlockPolicy, Item, PolicyKind, Schedule, Segment, uniform
from lowmem.plan.solver import Solver

Points = list[tuple[int, float]]  # (peak bytes, share of time more than plain autograd)


def usual_policies(stage: StageCost) -> list[BlockPolicy]:
    """Those that can be used anywhere: not fused, output kept."""
    policies = [option.policy for option in stage.options]
    return [policy for policy in policies if policy.kind is not PolicyKind.FUSED and not policy.drop_output]


def kept(chain: ChainCost, policy: BlockPolicy, start: int = 0, end: int | None = None) -> Schedule:
    """One policy for every stage of start..end (inclusive) that has it, without segments."""
    stages = chain.stages[start : len(chain) if end is None else end + 1]
    return uniform([_policy(stage, policy) for stage in stages], start)


def _policy(stage: StageCost, wanted: BlockPolicy) -> BlockPolicy:
    has = usual_policies(stage)
    return next((policy for policy in (wanted, SAVE_ALL) if policy in has), has[0])


def segments_of(chain: ChainCost, length: int, policy: BlockPolicy = SAVE_ALL) -> Schedule:
    """Segments of `length` stages, with `policy` inside; what is left at the end, at least one stage, is not
    checkpointed, as in torch.utils.checkpoint.checkpoint_sequential."""
    items: list[Item] = []
    start, last = 0, len(chain) - 1
    while start + length <= last:
        end = start + length - 1
        items.append(Segment(start, end, kept(chain, policy, start, end)))
        start = end + 1
    return Schedule((*items, *kept(chain, policy, start).items))


def strategies(chain: ChainCost, plain_peak_bytes: int) -> dict[str, Points]:
    """Name -> points with rising memory, under the cost model; beside them the plain step as it was simulated."""
    policies = dict.fromkeys(policy for stage in chain.stages for policy in usual_policies(stage))
    lengths = range(1, len(chain) // 2 + 1)
    uniformly = (evaluate(kept(chain, policy), chain) for policy in policies)
    segmented = (evaluate(segments_of(chain, length), chain) for length in lengths)
    return {
        "lowmem": _points(Solver(chain).curve(200)),
        "one policy for all blocks": _points(uniformly),
        "checkpoint every k-th block": _points(segmented),
        "plain PyTorch": [(plain_peak_bytes, 0.0)],
    }


def _points(solutions: Iterable[Solution]) -> Points:
    """What is both smaller and slower than another has no place in the picture."""
    points: Points = []
    for peak, overhead in sorted((one.peak_bytes, one.overhead) for one in solutions if one.overhead is not None):
        if not points or overhead < points[-1][1]:
            points.append((peak, overhead))
    return points
