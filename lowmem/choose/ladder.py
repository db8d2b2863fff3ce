"""What could be taken instead of a choice.

The ladder: the next smaller plans, solved and simulated before the run starts; out of memory is then a step down, and
the training loop needs no solver. And runners-up, should real steps not bear a choice out: other batches, another
precision, less budget."""

from __future__ import annotations

from dataclasses import replace

from lowmem.choose.planning import choose, predict, seconds_of
from lowmem.choose.request import Choice, Request
from lowmem.core.errors import Infeasible
from lowmem.plan.evaluate import Solution
from lowmem.plan.record import Plan
from lowmem.simulate import Simulated, simulate_step

# A runner-up that is predicted to be slower by more than this cannot win by an error of the prediction that is usual.
_WORTH_TRYING = 1.5
_MOST_RIVALS = 2


def with_ladder(choice: Choice) -> Choice:
    """The choice, its plan with its ladder: plans that compute the same (precision, memory format, micro-batch) in less
    and less memory, down to the least there is; none if the chosen one is that.

    Each was simulated whole. Its `budget_bytes` is what that showed to be enough: on a card the allocator's segments,
    else the tensors. Takes a simulated step for each of at most seven candidates.
    """
    above, rungs = choice.simulated, list[Plan]()
    for solution in choice.solver.ladder(choice.simulated.estimate.peak_allocated_bytes):
        simulated = simulate_step(choice.shape, solution.schedule, choice.rates, workspace=choice.workspace)
        if _size(choice, simulated) < _size(choice, above) and _peak(simulated) < _peak(above):
            rungs.append(_rung(choice, solution, simulated))
            above = simulated
    return replace(choice, plan=replace(choice.plan, ladder=tuple(rungs)))


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


# -- runners-up --------------------------------------------------------------------------------------------------------


def rivals(request: Request, choices: list[Choice]) -> list[Choice]:
    """The runners-up that may be faster than the choice, `choices[0]`, though predicted otherwise: the fastest of its
    other batches and of the other precision, by predicted pictures per second.

    Another precision is one only on tensor cores, where `auto` prefers the mixed one for its speed; elsewhere mixed
    precision is for what does not fit in fp32 (see `other_precision`).
    """
    chosen, *others = choices
    if request.precisions[0] == "amp" and chosen.plan.precision == "amp":
        other = other_precision(request, chosen)
        others = others if other is None else [*others, other]
    near = [one for one in others if one.images_per_second * _WORTH_TRYING >= chosen.images_per_second]
    return sorted(near, key=lambda choice: -choice.images_per_second)[:_MOST_RIVALS]


def other_precision(request: Request, choice: Choice) -> Choice | None:
    """The same batch in the next precision that `auto` leaves open; None if there is none or it does not fit."""
    left = request.precisions[request.precisions.index(choice.plan.precision) + 1 :]
    if request.settled or not left:
        return None
    return _planned_as(request, choice, left, request.budget.tensor_bytes)


def smaller(request: Request, choice: Choice, tensor_bytes: int) -> Choice | None:
    """The same computation planned for fewer bytes of tensors; None if it does not fit into them. What the budget has
    more than that is its margin."""
    return _planned_as(request, choice, (choice.plan.precision,), tensor_bytes)


def _planned_as(request: Request, choice: Choice, precisions: tuple[str, ...], tensor_bytes: int) -> Choice | None:
    cut = request.budget.tensor_bytes - tensor_bytes
    try:
        return choose(
            replace(
                request,
                batch=choice.plan.batch,
                micro_batch=choice.plan.micro_batch,
                precisions=precisions,
                allow_accumulation=choice.plan.accumulation > 1,
                budget=replace(request.budget, margin_bytes=request.budget.margin_bytes + cut),
            )
        )
    except Infeasible:
        return None
