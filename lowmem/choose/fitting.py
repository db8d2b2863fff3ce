"""The fastest schedule whose whole simulated step is under a budget.

The solver knows tensors; on a card the caching allocator's segments come on top, and how much the gaps between blocks
take is not known beforehand. So the solver is asked again for less until the whole step fits, and then the way back is
tried: targets between the last one that did not fit and the one that did, and single stages under faster policies. What
cannot be won is not tried: every try is a simulated step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from lowmem.choose.request import Budget
from lowmem.core.errors import Infeasible
from lowmem.core.phases import Phase, untold
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.evaluate import Solution
from lowmem.plan.hosting import HostSolver
from lowmem.plan.policy import Schedule
from lowmem.plan.refine import faster_neighbours
from lowmem.plan.solver import Solver
from lowmem.simulate import Simulated, StepSimulator

_TRIES = 12  # of the solver against the whole simulated step
_HALVINGS = 3  # between a target that fits and one that does not
_SWAPS = 4  # of a stage's policy
_WORTH = 0.005  # the least share of a step's time that is worth another try


def fit(
    solver: Solver,
    steps: StepSimulator,
    budget: Budget,
    rates: Rates,
    phase: Phase = untold,
) -> tuple[Solution, Simulated]:
    """Raises Infeasible with a budget of which the whole step is known to fit."""
    if not isinstance(solver, HostSolver):
        return _fit(solver, solver.solve, steps, budget, rates, phase)
    # Between what waits in host memory the allocator may leave other gaps: the way without it may be the better one.
    found = refused = None
    try:
        found = _fit(solver, solver.solve, steps, budget, rates, phase)
        if found[0].seconds <= solver.solve_alone(budget.tensor_bytes).seconds:
            return found  # the others can only be slower
    except Infeasible as error:
        if found is not None:
            return found  # without it nothing fits
        refused = error
    with suppress(Infeasible):
        other = _fit(solver, solver.solve_alone, steps, budget, rates, phase)
        if found is None or other[0].seconds < found[0].seconds:
            return other
    if found is None:
        assert refused is not None
        raise refused
    return found


def _fit(
    solver: Solver,
    solve: Callable[[int], Solution],
    steps: StepSimulator,
    budget: Budget,
    rates: Rates,
    phase: Phase,
) -> tuple[Solution, Simulated]:
    """`solve`: the solver's, or its way without host memory."""
    capacity = budget.tensor_bytes if budget.on_card else None
    search = _Search(solver.chain, solve, budget, lambda schedule: steps.simulate(schedule, rates, capacity), phase)
    target, failed = budget.tensor_bytes, None
    for tried in range(_TRIES):
        phase(f"planning: the fastest way that fits{f', try {tried + 1}' * (tried > 0)}")
        try:
            solution = solve(target)
        except Infeasible:
            break
        simulated = search.simulate(solution.schedule)
        if search.fits(simulated):
            return search.refined(solution, simulated, failed)
        failed = min(target, solution.peak_bytes)
        target = failed - search.less(simulated)
    least = solver.least()
    simulated = search.simulate(least.schedule)
    if search.fits(simulated):
        return search.refined(least, simulated, failed)
    taken = budget.counted_bytes(simulated.estimate)
    raise Infeasible(budget.tensor_bytes, taken, f"at its peak, {least.peak}", "lower --batch")


@dataclass(frozen=True)
class _Search:
    chain: ChainCost
    solve: Callable[[int], Solution]
    budget: Budget
    simulate: Callable[[Schedule], Simulated]
    phase: Phase

    def fits(self, simulated: Simulated) -> bool:
        return simulated.fits and simulated.estimate.peak_allocated_bytes <= self.budget.tensor_bytes

    def less(self, simulated: Simulated) -> int:
        """Bytes by which the solver's next target is lower: what is missing, on a card 2 to 4 %."""
        limit, least = self.budget.tensor_bytes, 1
        if self.budget.on_card:
            gap = simulated.estimate.peak_reserved_bytes - limit
            least = max(limit // 50, min(gap // 3, limit // 25))
        return max(simulated.estimate.peak_allocated_bytes - limit, least)

    def refined(self, solution: Solution, simulated: Simulated, failed: int | None) -> tuple[Solution, Simulated]:
        """What is faster and still fits. `failed`: a target that did not."""
        if failed is not None:
            solution, simulated = self._halved(solution, simulated, failed)
        left = 0 if solution.schedule.hosts else _SWAPS  # another policy is another timeline
        # The cost model's peak is a little too high at times.
        most = self.budget.tensor_bytes + max(0, solution.peak_bytes - simulated.estimate.peak_allocated_bytes)
        while left:
            for other in faster_neighbours(solution, self.chain, most, _WORTH)[:left]:
                left -= 1
                self.phase("planning: faster ways for single blocks")
                found = self.simulate(other.schedule)
                if self.fits(found):
                    solution, simulated = other, found
                    break
            else:
                break
        return solution, simulated

    def _halved(self, solution: Solution, simulated: Simulated, failed: int) -> tuple[Solution, Simulated]:
        """From a target between the one that failed and this solution's peak."""
        low = solution.peak_bytes
        for _ in range(_HALVINGS):
            other = self.solve((low + failed) // 2)
            if other.seconds > solution.seconds * (1 - _WORTH):
                # Nothing to be won there; above it there may be.
                low = (low + failed) // 2
                continue
            self.phase("planning: closer to what the card has")
            found = self.simulate(other.schedule)
            if self.fits(found):
                solution, simulated, low = other, found, max(low, other.peak_bytes)
            else:
                failed = min(failed, other.peak_bytes)
        return solution, simulated
