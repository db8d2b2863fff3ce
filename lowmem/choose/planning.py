"""`make_plan`: a network, a batch and a budget -> the plan with the least predicted step time that fits.

In the design's order of honesty: exact at the full batch in the precision that was asked for; then mixed precision, if
`auto` leaves it open; then accumulation, which under batch norm is another computation and is said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, TypeVar

from torch import nn

from lowmem.calibrate.calibrator import Workspaces
from lowmem.choose.budget import Budget, of_card, tensors_only
from lowmem.choose.costs import calls_of, measure_costs, price
from lowmem.choose.execution import precision_order
from lowmem.choose.request import REFERENCE_CARD, Choice, Request, card_rates
from lowmem.config.cards import Card, load_card
from lowmem.core.errors import Infeasible
from lowmem.core.units import format_size, parse_size
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.evaluate import Solution
from lowmem.plan.record import Candidate, Plan, Predicted
from lowmem.plan.solver import Solver
from lowmem.remat import stage_names
from lowmem.remat.libraries import convolutions_in_tf32
from lowmem.simulate import Simulated, StepShape, simulate_step

_T = TypeVar("_T")
_SMALLEST_MICRO_BATCH = 8
_TRIES = 12  # of the solver against the whole simulated step

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


# -- one candidate, precision and micro-batch settled ------------------------------------------------------------------


def _plan_one(request: Request, precision: str, micro_batch: int) -> Choice:
    """The fastest schedule whose whole simulated step fits. Raises Infeasible."""
    shape = request.shape(precision, micro_batch)
    rates, budget = request.rates(precision), request.budget
    workspace = workspaces_of(request, shape)
    chain, timed = _chain(request, shape, rates, workspace)
    solver = Solver(chain, limit_bytes=budget.tensor_bytes)
    solution, simulated = fit(solver, shape, budget, rates, workspace)
    plain = _once(request, ("plain", shape, rates), lambda: simulate_step(shape, None, rates, workspace=workspace))
    seconds = seconds_of(chain, shape, timed, solution, simulated)
    plain_seconds = plain.seconds
    if timed:
        assert chain.plain_seconds is not None
        plain_seconds = chain.plain_seconds * shape.accumulation + chain.outside_seconds
    plan = Plan(
        budget_bytes=budget.tensor_bytes,
        batch=request.batch,
        micro_batch=micro_batch,
        accumulation=shape.accumulation,
        precision="amp" if precision == "amp" else "fp32",
        memory_format="channels-last" if shape.memory_format == "channels-last" else "contiguous",
        exact=shape.accumulation == 1,
        stages=stage_names(request.model),
        schedule=solution.schedule,
        predicted=predict(budget, simulated, plain, seconds, plain_seconds),
        batch_norm=request.batch_norm,
        tf32=request.tf32 if precision == "fp32" else False,
        allocator_bytes=budget.allocator_bytes if budget.emulated else None,
    )
    return Choice(
        plan=plan,
        budget=budget,
        solver=solver,
        shape=shape,
        rates=rates,
        workspace=workspace,
        simulated=simulated,
        plain=plain,
        seconds_from="measured on this device" if timed else request.rates_from,
        timed=timed,
        plain_seconds=plain_seconds,
    )


def seconds_of(chain: ChainCost, shape: StepShape, timed: bool, solution: Solution, simulated: Simulated) -> float:
    """Of a step: measured seconds (`timed`) are of stages, so a step takes their sum; the roofline saw every operation
    of the whole one."""
    if not timed:
        return simulated.seconds
    return (solution.seconds - chain.outside_seconds) * shape.accumulation + chain.outside_seconds


def predict(budget: Budget, simulated: Simulated, plain: Simulated, seconds: float, plain_seconds: float) -> Predicted:
    """What a plan is written down to take, from its simulated step and plain autograd's."""
    taken = simulated.estimate
    return Predicted(
        peak_allocated_bytes=taken.peak_allocated_bytes,
        peak_reserved_bytes=taken.peak_reserved_bytes,
        device_bytes=taken.peak_reserved_bytes + budget.process_bytes if budget.on_card else None,
        step_seconds=seconds,
        overhead=seconds / plain_seconds - 1,
        extra_flops=simulated.flops - plain.flops,
    )


def workspaces_of(request: Request, shape: StepShape) -> Workspaces | None:
    """Of the card at hand, measured where the calibration lacks them; None where they cannot be."""
    calibrator = request.calibrator
    table = None if calibrator is None else calibrator.workspaces(shape.precision)
    if calibrator is None or table is None:
        return None
    calls = _once(
        request,
        ("calls", shape),
        lambda: calls_of(
            request.model,
            input_shape=(shape.micro_batch, *request.image_shape),
            memory_format=shape.execution.torch_memory_format,
            low=shape.execution.amp_dtype,
        ),
    )
    calibrator.measure_workspaces(table, calls, shape.precision)
    return table


def _chain(request: Request, shape: StepShape, rates: Rates, workspace: Workspaces | None) -> tuple[ChainCost, bool]:
    """The costs, and whether their seconds were measured."""
    input_shape = (shape.micro_batch, *request.image_shape)
    measured = _once(
        request,
        ("costs", shape),
        lambda: measure_costs(
            request.model,
            input_shape=input_shape,
            memory_format=shape.execution.torch_memory_format,
            low=shape.execution.amp_dtype,
            optimizer_copies=1 if request.momentum else 0,
            accumulation=shape.accumulation,
            workspace=workspace,
            library_norm=shape.library_norm,
        ),
    )
    chain = price(measured, rates)
    if request.calibrator is None:
        return chain, False
    # Bytes need no measuring: what fits nowhere is not worth the minute on the card.
    Solver(chain, limit_bytes=request.budget.tensor_bytes).solve(request.budget.tensor_bytes)
    times = request.calibrator.times(
        request.model,
        measured.stages,
        input_shape=input_shape,
        precision=shape.precision,
        memory_format=shape.memory_format,
        momentum=request.momentum,
        library_norm=shape.library_norm,
    )
    return price(measured, rates, times), True


def _once(request: Request, key: object, make: Callable[[], _T]) -> _T:
    """What does not depend on the budget need not be simulated again for another one."""
    if key not in request.known:
        request.known[key] = make()
    found: _T = request.known[key]
    return found


def fit(
    solver: Solver, shape: StepShape, budget: Budget, rates: Rates, workspace: Workspaces | None = None
) -> tuple[Solution, Simulated]:
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
        simulated = simulate_step(shape, solution.schedule, rates, capacity, workspace)
        over = simulated.estimate.peak_allocated_bytes - limit
        if over <= 0 and simulated.fits:
            return solution, simulated
        less = 1
        if budget.on_card:
            gap = simulated.estimate.peak_reserved_bytes - limit
            less = max(limit // 50, min(gap // 3, limit // 25))
        target = min(target, solution.peak_bytes) - max(over, less)
    least = solver.least()
    simulated = simulate_step(shape, least.schedule, rates, capacity, workspace)
    taken = simulated.estimate
    if taken.peak_allocated_bytes <= limit and simulated.fits:
        return least, simulated
    peak = taken.peak_reserved_bytes if budget.on_card else taken.peak_allocated_bytes
    raise Infeasible(limit, peak, f"at its peak, {least.peak}", "lower --batch")
