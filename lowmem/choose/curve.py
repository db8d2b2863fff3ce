"""Memory against time over all budgets, of the solver and of what others do: the data of a picture."""

from __future__ import annotations

from lowmem.choose.planning import Choice
from lowmem.plan.cost import ChainCost
from lowmem.plan.policy import BlockPolicy, PolicyKind
from lowmem.plan.solution import Solution, every_kth, uniform_policy
from lowmem.plan.solver import Solver

Points = list[tuple[int, float]]  # (peak bytes, share of time more than plain autograd)
_NO_LIMIT = 1 << 62


def strategies(choice: Choice) -> dict[str, Points]:
    """Name -> points with rising memory, under the cost model of the choice's chain."""
    chain = choice.chain
    lengths = range(1, len(chain) // 2 + 1)
    found = {
        "lowmem": Solver(chain).curve(200),
        "one policy for all blocks": [uniform_policy(policy)(chain, _NO_LIMIT) for policy in _plain_policies(chain)],
        "checkpoint every k-th block": [every_kth(length)(chain, _NO_LIMIT) for length in lengths],
    }
    points = {name: _points(solutions) for name, solutions in found.items()}
    points["plain PyTorch"] = [(choice.plain.estimate.peak_allocated_bytes, 0.0)]
    return points


def _plain_policies(chain: ChainCost) -> list[BlockPolicy]:
    """Those that one could use everywhere: not fused, output kept."""
    every = {option.policy: None for stage in chain.stages for option in stage.options}
    return [policy for policy in every if policy.kind is not PolicyKind.FUSED and not policy.drop_output]


def _points(solutions: list[Solution]) -> Points:
    """What is both smaller and slower than another has no place in the picture."""
    points: Points = []
    for peak, overhead in sorted((one.peak_bytes, one.overhead) for one in solutions if one.overhead is not None):
        if not points or overhead < points[-1][1]:
            points.append((peak, overhead))
    return points
