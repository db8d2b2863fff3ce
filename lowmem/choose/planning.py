"""`make_plan`: a network, a batch and a budget -> the plan with the least predicted step time that fits.

In the design's order of honesty: exact at the full batch in the precision that was asked for; then mixed precision, if
`auto` leaves it open; then accumulation, which under batch norm is another computation and is said to be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from torch import nn

from lowmem.choose.budget import Budget, of_card, tensors_only
from lowmem.choose.execution import precision_order
from lowmem.choose.fit import plan_one
from lowmem.choose.request import REFERENCE_CARD, Choice, Request, card_rates
from lowmem.config.cards import Card, load_card
from lowmem.core.errors import Infeasible
from lowmem.core.units import format_size, parse_size
from lowmem.plan.record import Candidate, Plan
from lowmem.remat.libraries import convolutions_in_tf32

_SMALLEST_MICRO_BATCH = 8

Precision = Literal["auto", "fp32", "amp"]
Layout = Literal["auto", "contiguous", "channels-last"]


def make_plan(
    model: nn.Module,
    *,
    batch: int,
    budget: str | int | Budget | None = None,
    card: Card | None = None,
    precision: Precision = "fp32",
    memory_format: Layout = "contiguous",
    micro_batch: int | None = None,
    allow_accumulation: bool = True,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    momentum: bool = True,
    batch_norm: Literal["library", "native"] | None = None,
) -> Plan:
    """The plan for a training step of `model` (any device, `meta` included; it is not touched).

    `budget`: bytes for all tensors of the step ("4600M"), or, with a `card`, the card's memory (None: the profile's).
    `batch_norm`: its kernels on CUDA, the library's choice, which has plain PyTorch's bits, or native ones, which work
    in place; None: the library's for a `card` or a model on CUDA, else native (on the CPU both have the same bits).
    Raises Infeasible with the least that fits, ValueError if neither budget nor card is given.
    """
    if isinstance(budget, Budget):
        limits = budget
    elif card is not None:
        limits = of_card(card, None if budget is None else parse_size(budget))
    elif budget is not None:
        limits = tensors_only(parse_size(budget))
    else:
        raise ValueError("a plan needs a budget or a card")
    tensor_cores = card is not None and card.tensor_cores
    if batch_norm is None:
        on_cuda = any(parameter.is_cuda for parameter in model.parameters())
        batch_norm = "library" if on_cuda or card is not None else "native"
    choice = choose(
        Request(
            model=model,
            batch=batch,
            budget=limits,
            rates=card_rates(card or load_card(REFERENCE_CARD)),
            precisions=precision_order(precision, tensor_cores),
            memory_format=("channels-last" if tensor_cores else "contiguous")
            if memory_format == "auto"
            else memory_format,
            micro_batch=micro_batch,
            allow_accumulation=allow_accumulation,
            image_shape=image_shape,
            momentum=momentum,
            batch_norm=batch_norm,
            tf32=card is not None and convolutions_in_tf32(card.capability_pair),
        )
    )
    return choice.plan


def choose(request: Request) -> Choice:
    """The first candidate, in the order of `_candidates`, that fits. Raises Infeasible (invariant 10)."""
    refused: list[Candidate] = []
    least: Infeasible | None = None
    for precision, micro_batch in _candidates(request):
        try:
            choice = plan_one(request, precision, micro_batch)
        except Infeasible as error:
            words = _words(precision, request.batch, micro_batch)
            reason = f"the least that fits is {format_size(error.least_bytes)}"
            refused.append(Candidate(what=words, refused_because=reason, peak_bytes=error.least_bytes))
            if least is None or error.least_bytes < least.least_bytes:
                least = error
            continue
        candidates = (*refused, _plain(choice), _chosen(choice.plan))
        return replace(choice, plan=replace(choice.plan, candidates=candidates))
    assert least is not None
    tried = "; ".join(candidate.what for candidate in refused)
    ways = ["give more with --vram"]
    if not request.settled:
        ways.insert(0, "lower --batch")
        if not request.allow_accumulation:
            ways.insert(1, "allow accumulation (--set memory.allow_accumulation=true)")
    way_out = " or ".join(ways)
    raise Infeasible(request.budget.tensor_bytes, least.least_bytes, f"tried: {tried}; {least.what}", way_out)


def _candidates(request: Request) -> Iterator[tuple[str, int]]:
    full = request.micro_batch or request.batch
    for precision in request.precisions:
        yield precision, full
    if request.settled or not request.allow_accumulation or request.micro_batch is not None:
        return
    micro = -(-full // 2)
    while micro >= _SMALLEST_MICRO_BATCH:
        for precision in request.precisions:
            yield precision, micro
        micro = -(-micro // 2)


def _words(precision: str, batch: int, micro_batch: int) -> str:
    cut = "" if micro_batch == batch else f" in micro-batches of {micro_batch}"
    return f"{precision} at batch {batch}{cut}"


def _chosen(plan: Plan) -> Candidate:
    return Candidate(
        what=_words(plan.precision, plan.batch, plan.micro_batch),
        peak_bytes=plan.predicted.peak_allocated_bytes,
        step_seconds=plan.predicted.step_seconds,
    )


def _plain(choice: Choice) -> Candidate:
    peak, budget = choice.plain.estimate.peak_allocated_bytes, choice.budget.tensor_bytes
    seconds = choice.plan.predicted.step_seconds
    if peak > budget:
        why = f"needs {format_size(peak)}, the budget is {format_size(budget)}"
    elif seconds is None or choice.plain_seconds >= seconds:
        why = "takes more memory and no less time"
    else:
        why = "takes more memory, and cannot give any of it up when memory runs short"
    return Candidate(
        what=f"plain autograd, {choice.plan.precision}, {choice.plan.micro_batch} pictures at a time",
        refused_because=why,
        peak_bytes=peak,
        step_seconds=choice.plain_seconds,
    )
