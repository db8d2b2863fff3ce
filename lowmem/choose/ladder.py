"""The next smaller plans, solved and simulated before the run starts: out of memory is then a step down, and the
training loop needs no solver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt

from lowmem.choose.fit import predict, seconds_of
from lowmem.choose.request import Choice
from lowmem.core.errors import Infeasible
from lowmem.plan.record import Plan
from lowmem.plan.solution import Solution
from lowmem.plan.solver import Solver
from lowmem.simulate import Simulated, simulate_step

# Most often a little is missing (a browser, fragmentation): four small steps down, then the rest of the way in two.
NEAR_RATIO = 0.92
NEAR_RUNGS = 4


def ladder(choice: Choice) -> tuple[Plan, ...]:
    """Plans that compute the same as the choice's (precision, memory format, micro-batch) in less and less memory, down
    to the least there is; empty if the chosen one is that.

    Each was simulated whole. Its `budget_bytes` is what that showed to be enough: on a card the allocator's segments,
    else the tensors. Takes a simulated step for each of at most seven candidates.
    """
    solver = Solver(choice.chain, limit_bytes=choice.budget.tensor_bytes)
    above, rungs = choice.simulated, list[Plan]()
    for solution in _solutions(solver, choice.simulated.estimate.peak_allocated_bytes):
        simulated = simulate_step(choice.shape, solution.schedule, choice.rates, workspace=choice.workspace)
        if _size(choice, simulated) < _size(choice, above) and _peak(simulated) < _peak(above):
            rungs.append(_rung(choice, solution, simulated))
            above = simulated
    return tuple(rungs)


def with_ladder(choice: Choice) -> Choice:
    """The choice, its plan with its ladder."""
    return replace(choice, plan=replace(choice.plan, ladder=ladder(choice)))


def _solutions(solver: Solver, below_bytes: int) -> Iterator[Solution]:
    """Falling peaks under the cost model."""
    near = solver.ladder(below_bytes, NEAR_RATIO, NEAR_RUNGS)
    yield from near
    least = solver.least()
    last = near[-1].peak_bytes if near else below_bytes
    if least.peak_bytes >= last:
        return
    try:
        between = solver.solve(int(sqrt(least.peak_bytes * last)))
    except Infeasible:  # the least is rounded to slots like everything in the table
        between = least
    if between.peak_bytes > least.peak_bytes:
        yield between
    yield least


def _peak(simulated: Simulated) -> int:
    return simulated.estimate.peak_allocated_bytes


def _size(choice: Choice, simulated: Simulated) -> int:
    """What a card, or the CPU, must have for it. Reserved as on a card without limit: with less than that the allocator
    might still get by, by emptying its cache."""
    return simulated.estimate.peak_reserved_bytes if choice.budget.on_card else _peak(simulated)


def _rung(choice: Choice, solution: Solution, simulated: Simulated) -> Plan:
    seconds = seconds_of(choice.chain, choice.shape, choice.timed, solution, simulated)
    return replace(
        choice.plan,
        budget_bytes=_size(choice, simulated),
        schedule=solution.schedule,
        predicted=predict(choice.budget, simulated, choice.plain, seconds, choice.plain_seconds),
        candidates=(),
        ladder=(),
    )
