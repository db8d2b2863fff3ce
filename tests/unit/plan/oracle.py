"""Other strategies than the solver's, and brute force, which is certainly right: what the solver is held against.
(chain, budget in bytes) -> Solution, or Infeasible.

`sqrt_n` is Chen et al., "Training deep nets with sublinear memory cost" (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import isqrt

from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost
from lowmem.plan.evaluate import Solution, evaluate
from lowmem.plan.policy import FUSED, SAVE_ALL, Item, Keep, Schedule, Segment
from lowmem.plan.solver import Solver, kept, segments_of

Strategy = Callable[[ChainCost, int], Solution]
WAY_OUT = "let the solver choose"


def _fitting(name: str, schedules: Iterable[Schedule], chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest of the schedules within the budget."""
    found = [evaluate(schedule, chain) for schedule in schedules]
    fitting = [solution for solution in found if solution.peak_bytes <= budget_bytes]
    if not fitting:
        raise Infeasible(budget_bytes, min(solution.peak_bytes for solution in found), name, WAY_OUT)
    return min(fitting, key=lambda solution: (solution.seconds, solution.peak_bytes))


def save_all(chain: ChainCost, budget_bytes: int) -> Solution:
    """Everything autograd would keep: the step without any plan."""
    return _fitting("save all", [kept(chain, SAVE_ALL)], chain, budget_bytes)


def best_uniform(chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest single policy."""
    policies = dict.fromkeys(option.policy for stage in chain.stages for option in stage.anywhere)
    return _fitting("one policy everywhere", [kept(chain, policy) for policy in policies], chain, budget_bytes)


def checkpoint_all(chain: ChainCost, budget_bytes: int) -> Solution:
    """Every stage is its own checkpoint, the last one excepted, as with the library's per-block checkpointing."""
    return _fitting("checkpoint every block", [segments_of(chain, 1)], chain, budget_bytes)


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
        policies = [option.policy for option in ((inside and stage.last_options) or stage.anywhere)]
        if inside and not dropped and any(option.policy == FUSED for option in stage.options):
            policies.append(FUSED)
        yield from ((Keep(start, policy),) for policy in policies)
        return
    for option in stage.options:
        policy = option.policy
        if not policy.fused:
            for rest in _all_items(chain, start + 1, end, inside, policy.drop_output):
                yield (Keep(start, policy), *rest)
    for split in range(start, end):
        inner = [Schedule(items) for items in _all_items(chain, start, split, True)]
        rests = list(_all_items(chain, split + 1, end, inside))
        for schedule, rest in product(inner, rests):
            yield (Segment(start, split, schedule), *rest)


def solve(chain: ChainCost, budget_bytes: int) -> Solution:
    """The solver, with a table for this budget alone."""
    return Solver(chain, limit_bytes=budget_bytes).solve(budget_bytes)


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
        raise Infeasible(budget_bytes, least[0], "brute force", WAY_OUT)
    return evaluate(best[2], chain)


BASELINES: dict[str, Strategy] = {
    "save all": save_all,
    "one policy everywhere": best_uniform,
    "checkpoint every block": checkpoint_all,
    "checkpoint every k-th block": best_every_kth,
    "checkpoint every sqrt(n) blocks": sqrt_n,
}
