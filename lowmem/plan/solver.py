"""The least time under a budget, and what others do beside, over all budgets.

The solver reads schedules from the table of the dynamic programme. Each is evaluated whole on the exact bytes before it
is used, so a budget constrains the true peak of the cost model, whatever the rounding to slots. Which schedules can be
read does not depend on the budget; the fastest of those that fit is taken, so more budget is never slower.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cache, cached_property
from math import ceil, sqrt

import numpy as np

from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost, StageCost
from lowmem.plan.evaluate import Solution, evaluate
from lowmem.plan.policy import SAVE_ALL, BlockPolicy, Schedule, Segment, uniform
from lowmem.plan.table import LONGEST_RUN, Table

MAX_SLOTS = 4096  # with twice as many the plans of benchmarks/plan_targets.py are the same (LOG, 2026-11-28)
# Most often a little is missing (a browser, fragmentation): four small steps down, then the rest of the way in two.
NEAR_RATIO = 0.92
NEAR_RUNGS = 4


def useful_bytes(chain: ChainCost) -> int:
    """Above this, beside `fixed_bytes`, more memory changes nothing."""
    x, g, later = chain.boundary_bytes, chain.boundary_grad_bytes, chain.later_param_grad_bytes
    kept = sum(max(option.kept_bytes for option in stage.options) for stage in chain.stages)
    step = 0
    for here, ahead, stage in zip(x, x[1:], chain.stages, strict=False):
        temporary = stage.fast_temp_bytes
        for o in (*stage.options, *stage.last_options):
            most = max(o.forward_temp_bytes, o.backward_temp_bytes, o.restore_temp_bytes)
            temporary = max(temporary, most + o.restored_bytes)
        step = max(step, here + ahead + temporary)
    return kept + step + max(g) + later[0]


class Solver:
    """All budgets of one chain up to `limit_bytes` (None: all there are), from one table.

    `limit_bytes` is a budget, so it includes the chain's `fixed_bytes`. Smaller limits make a smaller table and the
    same answers. `slot_bytes`: the table's unit; by default the smallest power of two with which what is useful is at
    most `MAX_SLOTS` slots: tensors come in sizes of round binary numbers. `longest_run`: see `Table`.
    """

    def __init__(
        self,
        chain: ChainCost,
        *,
        limit_bytes: int | None = None,
        slot_bytes: int | None = None,
        longest_run: int = LONGEST_RUN,
    ) -> None:
        self.chain = chain
        useful = useful_bytes(chain)
        slot = slot_bytes or 1 << ((useful - 1) // MAX_SLOTS).bit_length()
        self._margin = len(chain) + 2  # slots by which rounding may have made a schedule look too big
        slots = -(-useful // slot) + self._margin
        if limit_bytes is not None:
            slots = min(slots, max(0, limit_bytes - chain.fixed_bytes) // slot + self._margin)
        self.limit_bytes = limit_bytes
        table = self.table = Table(chain, slot, slots, longest_run)
        self._solution = cache(lambda m: evaluate(table.schedule(m), chain))
        # where the time changes: the least m of each distinct time, falling times
        times = table.times
        self._steps = np.flatnonzero(np.isfinite(times) & (times != np.concatenate(([np.inf], times[:-1])))).tolist()

    def solve(self, budget_bytes: int) -> Solution:
        """The fastest schedule whose peak is at most the budget. Raises Infeasible with the least budget that has one;
        ValueError above the table's own limit."""
        if self.limit_bytes is not None and budget_bytes > self.limit_bytes:
            raise ValueError(f"a budget of {budget_bytes} B is above this table's limit of {self.limit_bytes} B")
        found = self._fastest(budget_bytes)
        if found is not None:
            return found
        least, way_out = self.least(), "lower the batch, or allow mixed precision or accumulation"
        raise Infeasible(budget_bytes, least.peak_bytes, f"at its peak, {least.peak}", way_out)

    def _fastest(self, budget_bytes: int) -> Solution | None:
        most = (budget_bytes - self.chain.fixed_bytes) // self.table.slot_bytes + self._margin
        if budget_bytes >= self.chain.outside_peak_bytes:
            for m in reversed(self._steps):
                if m <= most and self._solution(m).peak_bytes <= budget_bytes:
                    return self._solution(m)
        return None

    def least(self) -> Solution:
        """The schedule with the smallest peak that is found, the fastest of them."""
        return self._table_least

    @cached_property
    def _table_least(self) -> Solution:
        if not self._steps:  # the limit cut everything off
            whole = Solver(self.chain, slot_bytes=self.table.slot_bytes, longest_run=self.table.longest_run)
            return whole.least()
        first = self._steps[0]
        near = [self._solution(m) for m in self._steps if m <= first + self._margin]
        return min(near, key=lambda solution: (solution.peak_bytes, solution.seconds))

    def ladder(self, below_bytes: int, ratio: float = NEAR_RATIO, near: int = NEAR_RUNGS) -> list[Solution]:
        """The next smaller solutions, for when memory runs out all the same: `near` of them each at most `ratio` of the
        one before, the first of `below_bytes`; then the rest of the way to the least feasible in two steps."""
        found: list[Solution] = []
        bound = int(below_bytes * ratio)
        with suppress(Infeasible):
            while len(found) < near:
                found.append(self.solve(bound))
                bound = int(found[-1].peak_bytes * ratio)
        least, last = self.least(), found[-1].peak_bytes if found else below_bytes
        if least.peak_bytes >= last:
            return found
        if len(found) == near:
            # The least is rounded to slots like everything in the table: there may be nothing in between.
            with suppress(Infeasible):
                between = self.solve(int(sqrt(least.peak_bytes * last)))
                if between.peak_bytes > least.peak_bytes:
                    found.append(between)
        return [*found, least]

    def curve(self, points: int | None = 200) -> list[Solution]:
        """Time against memory for the whole range of budgets: solutions with rising peak and falling time,
        about `points` of them (None: all), the least feasible and the fastest included."""
        steps = self._steps
        if points is not None and len(steps) > points:
            wanted = np.linspace(steps[0], steps[-1], points)
            steps = [steps[int(i)] for i in np.unique(np.searchsorted(steps, wanted))]
        found: list[Solution] = []
        solutions = (self._table_least, *(self._solution(m) for m in steps))
        for solution in sorted(solutions, key=lambda solution: (solution.peak_bytes, solution.seconds)):
            if not found or solution.seconds < found[-1].seconds:
                found.append(solution)
        return found


# what others do

Points = list[tuple[int, float]]  # (peak bytes, share of time more than plain autograd)


def kept(chain: ChainCost, policy: BlockPolicy, start: int = 0, end: int | None = None) -> Schedule:
    """One policy for every stage of start..end (inclusive), without segments; where a stage has not got it, SAVE_ALL,
    or else the first it has."""

    def of(stage: StageCost) -> BlockPolicy:
        has = [option.policy for option in stage.anywhere]
        return next((one for one in (policy, SAVE_ALL) if one in has), has[0])

    return uniform([of(stage) for stage in chain.stages[start : None if end is None else end + 1]], start)


def segments_of(chain: ChainCost, length: int) -> Schedule:
    """torch.utils.checkpoint over segments of `length` stages; what is left at the end, at least one stage, is not
    checkpointed, as in torch.utils.checkpoint.checkpoint_sequential."""
    starts = range(0, len(chain) - length, length)
    items = [Segment(start, start + length - 1, kept(chain, SAVE_ALL, start, start + length - 1)) for start in starts]
    return Schedule((*items, *kept(chain, SAVE_ALL, len(starts) * length).items))


def strategies(chain: ChainCost, plain_peak_bytes: int) -> dict[str, Points]:
    """Name -> points with rising memory, under the cost model; beside them the plain step as it was simulated."""
    policies = dict.fromkeys(option.policy for stage in chain.stages for option in stage.anywhere)
    lengths = range(1, len(chain) // 2 + 1)
    return {
        "lowmem": _points(Solver(chain).curve(200)),
        "one policy for all blocks": _points(evaluate(kept(chain, policy), chain) for policy in policies),
        "checkpoint every k-th block": _points(evaluate(segments_of(chain, length), chain) for length in lengths),
        "plain PyTorch": [(plain_peak_bytes, 0.0)],
    }


def solved(solver: Solver, count: int = 25) -> Points:
    """What a solver finds for so many budgets, from the least to the largest that changes anything."""
    least, most = solver.least().peak_bytes, solver.curve(2)[-1].peak_bytes
    # Closer together where memory is short.
    return _points(solver.solve(ceil(least * (most / least) ** (n / (count - 1)))) for n in range(count))


def _points(solutions: Iterable[Solution]) -> Points:
    """What is both smaller and slower than another has no place in the picture."""
    points: Points = []
    for peak, overhead in sorted((one.peak_bytes, one.overhead) for one in solutions if one.overhead is not None):
        if not points or overhead < points[-1][1]:
            points.append((peak, overhead))
    return points
