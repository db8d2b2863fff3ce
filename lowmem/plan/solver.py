"""The least time under a budget: reads schedules from the table of the dynamic programme and checks each one
whole.

A schedule that is read is evaluated on the exact bytes before it is used, so a budget constrains the true
peak of the cost model, whatever the rounding to slots. Which schedules can be read does not depend on the
budget; the fastest of those that fit is taken, so more budget is never slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from math import sqrt

import numpy as np

from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost
from lowmem.plan.evaluate import Solution, evaluate, refuse
from lowmem.plan.table import LONGEST_RUN, Table

MAX_SLOTS = 8192
NAME = "optimal"
# Most often a little is missing (a browser, fragmentation): four small steps down, then the rest of the way in two.
NEAR_RATIO = 0.92
NEAR_RUNGS = 4


def choose_slot(useful: int, max_slots: int = MAX_SLOTS) -> int:
    """The smallest power of two of bytes with which `useful` bytes are at most `max_slots` slots. Tensors
    come in sizes of round binary numbers: such slots divide most of them."""
    slot = 1
    while slot * max_slots < useful:
        slot *= 2
    return slot


def useful_bytes(chain: ChainCost) -> int:
    """Above this, beside `fixed_bytes`, more memory changes nothing."""
    x, g, later = chain.boundary_bytes, chain.boundary_grad_bytes, chain.later_param_grad_bytes
    kept = sum(max(option.kept_bytes for option in stage.options) for stage in chain.stages)
    step = 0
    for index, stage in enumerate(chain.stages):
        temporary = max(
            max(o.forward_temp_bytes, o.backward_temp_bytes, o.restore_temp_bytes) + o.restored_bytes
            for o in (*stage.options, *stage.last_options)
        )
        around = x[index] + x[index + 1] + max(g) + later[0]
        step = max(step, around + max(temporary, stage.fast_temp_bytes))
    return kept + step


class Solver:
    """All budgets of one chain up to `limit_bytes` (None: all there are), from one table.

    `limit_bytes` is a budget, so it includes the chain's `fixed_bytes`. Smaller limits make a smaller table
    and the same answers. `slot_bytes`: the table's unit; by default 1 MiB or finer wherever that is at most
    8,192 slots. `longest_run`: the most neighbouring stages that may drop their outputs.
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
        slot = slot_bytes or choose_slot(useful)
        self._margin = len(chain) + 2  # slots by which rounding may have made a schedule look too big
        slots = -(-useful // slot) + self._margin
        if limit_bytes is not None:
            slots = min(slots, max(0, limit_bytes - chain.fixed_bytes) // slot + self._margin)
        self.limit_bytes = limit_bytes
        self.table = Table(chain, slot, slots, longest_run)
        # where the time changes: the least m of each distinct time, falling times
        times = self.table.times
        changed = np.concatenate(([True], times[1:] != times[:-1]))
        self._steps = np.flatnonzero(changed & np.isfinite(times)).tolist()
        self._read: dict[int, Solution] = {}

    def _solution(self, m: int) -> Solution:
        if m not in self._read:
            self._read[m] = evaluate(self.table.schedule(m), self.chain, NAME)
        return self._read[m]

    def solve(self, budget_bytes: int) -> Solution:
        """The fastest schedule whose peak is at most the budget.

        Raises Infeasible with the least budget that has one; ValueError above the table's own limit.
        """
        if self.limit_bytes is not None and budget_bytes > self.limit_bytes:
            raise ValueError(f"a budget of {budget_bytes} B is above this table's limit of {self.limit_bytes} B")
        most = (budget_bytes - self.chain.fixed_bytes) // self.table.slot_bytes + self._margin
        if budget_bytes >= self.chain.outside_peak_bytes:
            for m in reversed(self._steps):
                if m <= most and self._solution(m).peak_bytes <= budget_bytes:
                    return self._solution(m)
        raise refuse(self.least(), budget_bytes, "lower the batch, or allow mixed precision or accumulation")

    def least(self) -> Solution:
        """The schedule with the smallest peak that the table knows, the fastest of them."""
        if not self._steps:  # the limit cut everything off
            whole = Solver(self.chain, slot_bytes=self.table.slot_bytes, longest_run=self.table.longest_run)
            return whole.least()
        first = self._steps[0]
        near = [self._solution(m) for m in self._steps if m <= first + self._margin]
        return min(near, key=lambda solution: (solution.peak_bytes, solution.seconds))

    def ladder(self, below_bytes: int, ratio: float = NEAR_RATIO, near: int = NEAR_RUNGS) -> list[Solution]:
        """The next smaller solutions, for stepping down when memory runs out all the same, with falling peaks: `near`
        of them each at most `ratio` of the one before, the first of `below_bytes`; then the rest of the way to the
        least feasible in two steps. Empty if nothing is smaller."""
        found: list[Solution] = []
        bound = int(below_bytes * ratio)
        while len(found) < near:
            try:
                solution = self.solve(bound)
            except Infeasible:
                break
            found.append(solution)
            bound = int(min(bound, solution.peak_bytes) * ratio)
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
        found = [self.least(), *(self._solution(m) for m in steps)]
        return list(_frontier(sorted(found, key=lambda solution: (solution.peak_bytes, solution.seconds))))


def _frontier(rising: list[Solution]) -> Iterator[Solution]:
    """Those that are faster than every smaller one."""
    best = np.inf
    for solution in rising:
        if solution.seconds < best:
            best = solution.seconds
            yield solution


def solve(chain: ChainCost, budget_bytes: int) -> Solution:
    """The fastest persistent schedule whose peak under the cost model is at most `budget_bytes` (for all
    tensors of the step, in bytes). Raises Infeasible. For several budgets of one chain make one `Solver`."""
    return Solver(chain, limit_bytes=budget_bytes).solve(budget_bytes)
