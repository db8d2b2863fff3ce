"""`make_plan`: a network, a batch and a budget -> the plan with the least predicted step time that fits.

In the design's order of honesty: exact at the full batch in the precision that was asked for; then mixed precision, if
`auto` leaves it open; then accumulation, which under batch norm is another computation and is said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from lowmem.cards import Card
from lowmem.choose.budget import Budget, of_card, tensors_only
from lowmem.choose.costs import chain_cost
from lowmem.choose.simulated import Simulated, StepShape, simulate_step
from lowmem.errors import Infeasible
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.record import Candidate, Plan, Predicted
from lowmem.plan.solution import Solution
from lowmem.plan.solver import Solver
from lowmem.remat import stage_names
from lowmem.units import format_size, parse_size

# The rates that time is predicted with where no card is named: the card this project is aimed at.
REFERENCE_CARD = "gtx1060-6g"
_TRIES = 12  # of the solver against the whole simulated step
_SMALLEST_MICRO_BATCH = 8

Precision = Literal["auto", "fp32", "amp"]
Layout = Literal["auto", "contiguous", "channels-last"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned. `precision` and `memory_format` are candidates in order of preference."""

    model: nn.Module
    batch: int
    budget: Budget
    rates: Callable[[str], Rates]
    precisions: tuple[str, ...] = ("fp32",)
    memory_format: str = "contiguous"
    micro_batch: int | None = None
    allow_accumulation: bool = True
    settled: bool = False  # a run that has begun: batch, precision and accumulation cannot change
    image_shape: tuple[int, int, int] = (3, 32, 32)
    momentum: bool = True

    def shape(self, precision: str, micro_batch: int) -> StepShape:
        return StepShape(
            model=self.model,
            image_shape=self.image_shape,
            batch=self.batch,
            micro_batch=micro_batch,
            precision=precision,
            memory_format=self.memory_format,
            momentum=self.momentum,
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan with what it was chosen from: for explaining, drawing, and its ladder."""

    plan: Plan
    budget: Budget
    chain: ChainCost
    shape: StepShape
    rates: Rates
    simulated: Simulated
    plain: Simulated

    @property
    def images_per_second(self) -> float:
        """Predicted."""
        return self.plan.batch / self.simulated.seconds


def card_rates(card: Card) -> Callable[[str], Rates]:
    """Precision -> attainable rates by the card's datasheet (see `Rates.roofline` for the shares)."""

    def rates(precision: str) -> Rates:
        flops = card.amp_flops_per_second if precision == "amp" else card.fp32_flops_per_second
        return Rates.roofline(flops, card.bandwidth_bytes_per_second)

    return rates


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
) -> Plan:
    """The plan for a training step of `model` (any device, `meta` included; it is not touched).

    `budget`: bytes for all tensors of the step ("4600M"), or, with a `card`, the card's memory (None: the profile's).
    Raises Infeasible with the least that fits, ValueError if neither budget nor card is given.
    """
    from lowmem.cards import load_card

    if isinstance(budget, Budget):
        limits = budget
    elif card is not None:
        limits = of_card(card, None if budget is None else parse_size(budget))
    elif budget is not None:
        limits = tensors_only(parse_size(budget))
    else:
        raise ValueError("a plan needs a budget or a card")
    tensor_cores = card is not None and card.tensor_cores
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
        )
    )
    return choice.plan


def precision_order(precision: str, tensor_cores: bool) -> tuple[str, ...]:
    """`auto`: mixed precision first on tensor cores; elsewhere fp32, and mixed only where nothing else fits."""
    if precision != "auto":
        return (precision,)
    return ("amp", "fp32") if tensor_cores else ("fp32", "amp")


def choose(request: Request) -> Choice:
    """The first candidate, in the order of `_candidates`, that fits. Raises Infeasible (invariant 10)."""
    refused: list[Candidate] = []
    least: Infeasible | None = None
    for precision, micro_batch in _candidates(request):
        try:
            choice = _plan_one(request, precision, micro_batch)
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
    fits = peak <= budget
    return Candidate(
        what=f"plain autograd, {choice.plan.precision}, {choice.plan.micro_batch} pictures at a time",
        refused_because="takes more memory and no less time"
        if fits
        else f"needs {format_size(peak)}, the budget is {format_size(budget)}",
        peak_bytes=peak,
        step_seconds=choice.plain.seconds,
    )


def _plan_one(request: Request, precision: str, micro_batch: int) -> Choice:
    shape = request.shape(precision, micro_batch)
    rates = request.rates(precision)
    chain = chain_cost(
        request.model,
        input_shape=(micro_batch, *request.image_shape),
        rates=rates,
        memory_format=shape.torch_memory_format,
        low=shape.low_dtype,
        optimizer_copies=1 if request.momentum else 0,
        accumulation=shape.accumulation,
    )
    budget = request.budget
    solution, simulated = fit(Solver(chain, limit_bytes=budget.tensor_bytes), shape, budget, rates)
    plain = simulate_step(shape, None, rates)
    plan = Plan(
        budget_bytes=budget.tensor_bytes,
        batch=request.batch,
        micro_batch=micro_batch,
        accumulation=shape.accumulation,
        precision="amp" if precision == "amp" else "fp32",
        memory_format="channels-last" if request.memory_format == "channels-last" else "contiguous",
        exact=shape.accumulation == 1,
        stages=stage_names(request.model),
        schedule=solution.schedule,
        predicted=predict(budget, simulated, plain),
    )
    return Choice(plan=plan, budget=budget, chain=chain, shape=shape, rates=rates, simulated=simulated, plain=plain)


def predict(budget: Budget, simulated: Simulated, plain: Simulated) -> Predicted:
    """What a plan is written down to take, from its simulated step and plain autograd's."""
    return Predicted(
        peak_allocated_bytes=simulated.estimate.peak_allocated_bytes,
        peak_reserved_bytes=simulated.estimate.peak_reserved_bytes,
        device_bytes=_device_bytes(budget, simulated),
        step_seconds=simulated.seconds,
        overhead=simulated.seconds / plain.seconds - 1,
        extra_flops=simulated.flops - plain.flops,
    )


def _device_bytes(budget: Budget, simulated: Simulated) -> int | None:
    if not budget.on_card:
        return None
    return simulated.estimate.peak_reserved_bytes + budget.context_bytes + budget.workspace_bytes


def fit(solver: Solver, shape: StepShape, budget: Budget, rates: Rates) -> tuple[Solution, Simulated]:
    """The fastest schedule whose whole simulated step is under the budget.

    The solver knows tensors; rounding, and on a card the caching allocator's segments, come on top. Where the whole
    step does not fit, the solver is asked again for as much less, on a card for 2 to 4 % less (how much the gaps
    between blocks take is not known beforehand). Raises Infeasible with a budget of which the whole step is known
    to fit.
    """
    limit = budget.tensor_bytes
    capacity = limit if budget.on_card else None
    target = limit
    for _ in range(_TRIES):
        try:
            solution = solver.solve(target)
        except Infeasible:
            break
        simulated = simulate_step(shape, solution.schedule, rates, capacity)
        over = simulated.estimate.peak_allocated_bytes - limit
        if over <= 0 and simulated.fits:
            return solution, simulated
        less = 1
        if budget.on_card:
            gap = simulated.estimate.peak_reserved_bytes - limit
            less = max(limit // 50, min(gap // 3, limit // 25))
        target = min(target, solution.peak_bytes) - max(over, less)
    least = solver.least()
    simulated = simulate_step(shape, least.schedule, rates, capacity)
    taken = simulated.estimate
    if taken.peak_allocated_bytes <= limit and simulated.fits:
        return least, simulated
    peak = taken.peak_reserved_bytes if budget.on_card else taken.peak_allocated_bytes
    raise Infeasible(limit, peak, f"at its peak, {least.peak_at}", "lower --batch")
