"""What could be taken instead of a choice, should real steps not bear it out: other batches, another precision, less
budget."""

from __future__ import annotations

from dataclasses import replace

from lowmem.choose.planning import Choice, Request, choose
from lowmem.core.errors import Infeasible

# A runner-up that is predicted to be slower by more than this cannot win by an error of the prediction that is usual.
_WORTH_TRYING = 1.5
_MOST_RIVALS = 2


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
    return _again(request, choice, left, request.budget.tensor_bytes)


def smaller(request: Request, choice: Choice, tensor_bytes: int) -> Choice | None:
    """The same computation planned for fewer bytes of tensors; None if it does not fit into them. What the budget has
    more than that is its margin."""
    return _again(request, choice, (choice.plan.precision,), tensor_bytes)


def _again(request: Request, choice: Choice, precisions: tuple[str, ...], tensor_bytes: int) -> Choice | None:
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
