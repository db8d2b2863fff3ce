"""`make_plan`: a network, a batch and a budget -> the plan with the least predicted step time that fits.

In the design's order of honesty: exact at the full batch in the precision that was asked for; then mixed precision, if
`auto` leaves it open; then accumulation, which under batch norm is another computation and is said to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal, cast

from torch import nn

from lowmem.calibrate.calibrator import Workspaces
from lowmem.choose.costs import ChainMeasure, calls_of, measure_costs, price
from lowmem.choose.execution import by_kind
from lowmem.choose.fitting import fit
from lowmem.choose.request import INSIDE, REFERENCE_CARD, Budget, Choice, Request, card_rates, of_card
from lowmem.config.cards import Card, load_card, refuse_bf16
from lowmem.config.optimization import OptimConfig
from lowmem.core.errors import Infeasible
from lowmem.core.phases import Phase, untold
from lowmem.core.units import LEAST_CARD_BYTES, LEAST_TENSORS_BYTES, counted, format_size, parse_memory
from lowmem.plan.cost import ChainCost
from lowmem.plan.hosting import HostSolver, HostTerms
from lowmem.plan.record import Candidate, Plan, Precision
from lowmem.plan.solver import Solver
from lowmem.remat.libraries import convolutions_in_tf32
from lowmem.remat.module import Named, parts_of
from lowmem.remat.same_forward import check_same_forward
from lowmem.simulate import Simulated, StepShape, StepSimulator, simulate_step

_SMALLEST_MICRO_BATCH = 8
# A runner-up that is predicted to be slower by more than this cannot win by an error of the prediction that is usual.
_WORTH_TRYING = 1.5
_MOST_RIVALS = 2


def make_plan(
    model: nn.Module,
    *,
    batch: int,
    budget: str | int | Budget | None = None,
    card: Card | None = None,
    precision: Literal["auto", "fp32", "amp", "bf16"] = "fp32",
    memory_format: Literal["auto", "contiguous", "channels-last"] = "contiguous",
    micro_batch: int | None = None,
    allow_accumulation: bool = True,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    momentum: bool = True,
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
    ema: bool = False,
    batch_norm: Literal["library", "native"] | None = None,
    stages: Named | None = None,
    host: HostTerms | None = None,
) -> Plan:
    """The plan for a training step of `model` (any device, `meta` included; it is not touched).

    `budget`: bytes for all tensors of the step ("4600M"), or, with a `card`, the card's memory (None: the profile's).
    `batch_norm`: its kernels on CUDA, the library's choice, which has plain PyTorch's bits, or native ones, which work
    in place; None: the library's for a `card` or a model on CUDA, else native (on the CPU both have the same bits).
    `optimizer`: what it keeps from step to step is in the plan: of SGD with `momentum` a tensor of each parameter's
    size, of Adam and AdamW two; `ema` (running means of the weights, on the same device): one more. It is simulated in
    the library's fused form, whose update takes no memory.
    `stages`: for a network that cannot be traced, modules of it, themselves or by name, which its input goes through
    one after the other; each runs as a whole (`apply_plan` is told the same). None: as it is traced. `host`: memory
    in which tensors may wait between forward and backward, and how fast they get there (`lowmem.plan.hosting`); None:
    they do not. Raises Infeasible with the least that fits, ValueError if neither budget nor card is given, for a
    budget without its unit, for another optimizer, for stages that are no modules of the network, or for a network that
    cannot be planned (NotTraceable), PreflightError if, planned, it computes something else
    (`lowmem.remat.same_forward`; of a model on `meta` nobody can tell) or for bf16 on a `card` without. What cannot be
    planned inside is named among the plan's candidates.
    """
    if isinstance(budget, Budget):
        limits = budget
    elif card is not None:
        limits = of_card(card, None if budget is None else parse_memory(budget, LEAST_CARD_BYTES))
    elif budget is not None:
        # Any chain of modules may be planned, however small: bytes, or a size with its unit, are what was meant.
        unitless = isinstance(budget, str) and budget.isdigit()
        limits = Budget(total_bytes=parse_memory(budget, LEAST_TENSORS_BYTES if unitless else 1))
    else:
        raise ValueError("a plan needs a budget or a card")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the network has no parameter that is trained: there is no step to plan")
    check_same_forward(model, image_shape, stages)
    if batch_norm is None:
        on_cuda = any(parameter.is_cuda for parameter in model.parameters())
        batch_norm = "library" if on_cuda or card is not None else "native"
    if card is not None:
        refuse_bf16(precision, card.name, card.capability_pair)
    request = Request(
        model=model,
        batch=batch,
        budget=limits,
        rates=card_rates(card or load_card(REFERENCE_CARD)),
        modes=by_kind(precision, memory_format, card is not None and card.tensor_cores),
        micro_batch=micro_batch,
        allow_accumulation=allow_accumulation,
        image_shape=image_shape,
        optim=_optim(optimizer, momentum=momentum, ema=ema),
        batch_norm=batch_norm,
        stages=None if stages is None else tuple(name for name, _ in parts_of(model, stages)),
        host=host,
        tf32=card is not None and convolutions_in_tf32(card.capability_pair),
    )
    return choose(request).plan


def _optim(optimizer: str, *, momentum: bool, ema: bool) -> OptimConfig:
    """What decides bytes; what the other settings are changes none. Raises ValueError."""
    adam: dict[str, Any] = {"kind": "adamw"}
    kinds = {"sgd": {"momentum": 0.9 if momentum else 0.0}, "adam": adam, "adamw": adam}
    if optimizer not in kinds:
        raise ValueError(f"what {optimizer!r} keeps is not known here: give what keeps as much, {', '.join(kinds)}")
    return OptimConfig(**kinds[optimizer], ema=0.999 if ema else None)


def choose(request: Request) -> Choice:
    """The first candidate, in the order of `_candidates`, that fits; for equal requests made from one, found once.
    Raises Infeasible (invariant 10)."""
    key = (*request.modes.items(), replace(request, known={}))  # equal mappings may differ in their order
    found = request.once(key, lambda: _first_that_fits(request))
    if isinstance(found, Infeasible):
        raise found
    return found


def _first_that_fits(request: Request) -> Choice | Infeasible:
    refused: list[Candidate] = []
    errors: list[Infeasible] = []
    candidates, hopeless = list(_candidates(request)), _whatever_the_batch(request) > request.budget.tensor_bytes
    for precision, micro_batch in candidates[-len(request.modes) :] if hopeless else candidates:
        cut = "" if micro_batch == request.batch else f" in micro-batches of {micro_batch}"
        what = f"{precision} at batch {request.batch}{cut}"
        try:
            choice = _plan_one(request, precision, micro_batch)
        except Infeasible as error:
            reason = f"the least that fits is {format_size(error.least_bytes)}"
            refused.append(Candidate(what=what, refused_because=reason, peak_bytes=error.least_bytes))
            errors.append(error)
            continue
        taken = choice.plan.predicted
        chosen = Candidate(what=what, peak_bytes=taken.peak_allocated_bytes, step_seconds=taken.step_seconds)
        looked_at = (*choice.plan.candidates, *refused, _plain(choice), chosen)
        return replace(choice, plan=replace(choice.plan, candidates=looked_at))
    least = min(errors, key=lambda error: error.least_bytes)
    tried = "; ".join(candidate.what for candidate in refused)
    ways = [] if request.settled or hopeless else ["lower --batch"]
    if ways and not request.allow_accumulation:
        ways.append("allow accumulation (--set memory.allow_accumulation=true)")
    way_out = ", or ".join([*ways, request.budget.more(least.least_bytes)])
    return Infeasible(request.budget.tensor_bytes, least.least_bytes, f"tried: {tried}; {least.what}", way_out)


def _whatever_the_batch(request: Request) -> int:
    """Bytes that a step takes at its end of any batch: parameters, gradients of those that are trained and what the
    optimizer keeps of them, buffers."""
    parameters = list(request.model.parameters())
    everything, trained = (
        sum(one.numel() * one.element_size() for one in of)
        for of in ((*parameters, *request.model.buffers()), (one for one in parameters if one.requires_grad))
    )
    return everything + trained * (1 + request.optim.copies)


def _candidates(request: Request) -> Iterator[tuple[str, int]]:
    micro = request.micro_batch or request.batch
    yield from product(request.modes, (micro,))
    accumulates = request.allow_accumulation and request.micro_batch is None
    while accumulates and (micro := -(-micro // 2)) >= _SMALLEST_MICRO_BATCH:
        yield from product(request.modes, (micro,))


def _not_planned_inside(measured: ChainMeasure) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(what=f"{INSIDE} {path or 'the network'}", refused_because=f"it runs as a whole: {why}")
        for path, why in measured.run_whole.items()
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
        what=f"plain autograd, {choice.plan.precision}, {counted(choice.plan.micro_batch, 'picture')} at a time",
        refused_because=why,
        peak_bytes=peak,
        step_seconds=choice.plain_seconds,
    )


# -- one candidate, precision and micro-batch settled ------------------------------------------------------------------


def _plan_one(request: Request, precision: str, micro_batch: int) -> Choice:
    """The fastest schedule whose whole simulated step fits. Raises Infeasible."""
    shape, budget, calibrator = request.shape(precision, micro_batch), request.budget, request.calibrator
    rates, workspace = request.rates(precision), workspaces_of(request, shape)
    measured = request.once(
        ("costs", shape, rates), lambda: measure_costs(shape, workspace, phase=request.phase, rates=rates)
    )
    chain = price(measured, rates)
    if calibrator is not None:
        # Bytes need no measuring: what fits nowhere is not worth the minute on the card.
        _solver(request, chain).solve(budget.tensor_bytes)
        chain = price(measured, rates, calibrator.times(shape, measured.stages))
    solver = _solver(request, chain)
    steps = request.once(("steps", shape), lambda: StepSimulator(shape, workspace))
    solution, simulated = fit(solver, steps, budget, rates, request.phase)

    def plain() -> Simulated:
        request.phase("planning: the plain step to compare with")
        return simulate_step(shape, None, rates, workspace=workspace)

    plan = Plan(
        budget_bytes=budget.tensor_bytes,
        batch=request.batch,
        micro_batch=micro_batch,
        accumulation=shape.accumulation,
        precision=cast(Precision, precision),
        memory_format="channels-last" if shape.memory_format == "channels-last" else "contiguous",
        exact=shape.accumulation == 1,
        stages=measured.names,
        schedule=solution.schedule,
        batch_norm=request.batch_norm,
        tf32=request.tf32 if precision == "fp32" else False,
        allocator_bytes=budget.allocator_bytes if budget.emulated else None,
        candidates=_not_planned_inside(measured),
    )
    choice = Choice(
        plan=plan,
        budget=budget,
        solver=solver,
        shape=shape,
        rates=rates,
        steps=steps,
        simulated=simulated,
        plain=request.once(("plain", shape, rates), plain),
        seconds_from=request.rates_from if calibrator is None else "measured on this device",
        timed=calibrator is not None,
    )
    return replace(choice, plan=replace(plan, predicted=choice.predicted(solution, simulated)))


def _solver(request: Request, chain: ChainCost) -> Solver:
    if request.host is None:
        return Solver(chain, limit_bytes=request.budget.tensor_bytes)
    return HostSolver(chain, request.host)


def workspaces_of(request: Request, shape: StepShape) -> Workspaces | None:
    """Of the card at hand, measured where the calibration lacks them; None where they cannot be."""
    if request.calibrator is None:
        return None
    return request.calibrator.workspaces(
        shape.precision, lambda: request.once(("calls", shape), lambda: calls_of(shape))
    )


# -- what could be taken instead ---------------------------------------------------------------------------------------


def with_ladder(choice: Choice, phase: Phase = untold) -> Choice:
    """The choice, its plan with its ladder: plans that compute the same (precision, memory format, micro-batch) in less
    and less memory, down to the least there is; none if the chosen one is that. Out of memory is then a step down, and
    the training loop needs no solver. `budget_bytes` of each is what its whole simulated step showed to be enough: on a
    card the allocator's segments, without a limit (with less it might still get by, by emptying its cache), else the
    tensors. Takes a simulated step for each of at most seven candidates."""
    size, above, rungs = choice.budget.counted_bytes, choice.simulated.estimate, list[Plan]()
    solutions = choice.solver.ladder(above.peak_allocated_bytes)
    for tried, solution in enumerate(solutions):
        phase("planning: smaller plans in reserve", tried, len(solutions))
        simulated = choice.steps.simulate(solution.schedule, choice.rates)
        below = simulated.estimate
        if below.peak_allocated_bytes < above.peak_allocated_bytes and size(below) < size(above):
            predicted = choice.predicted(solution, simulated)
            rung = replace(choice.plan, budget_bytes=size(below), schedule=solution.schedule, predicted=predicted)
            rungs.append(replace(rung, candidates=(), ladder=()))
            above = below
    return replace(choice, plan=replace(choice.plan, ladder=tuple(rungs)))


def rivals(request: Request, choices: list[Choice]) -> list[Choice]:
    """The runners-up that may be faster than the choice, `choices[0]`, though predicted otherwise: the fastest of its
    other batches and of the other precision, by predicted pictures per second. Another precision is one only on tensor
    cores, where `auto` prefers the mixed one for its speed; elsewhere that is for what does not fit in fp32."""
    chosen, *others = choices
    if next(iter(request.modes)) == "amp" and chosen.plan.precision == "amp":
        other = other_precision(request, chosen)
        others = others if other is None else [*others, other]
    near = [one for one in others if one.images_per_second * _WORTH_TRYING >= chosen.images_per_second]
    return sorted(near, key=lambda choice: -choice.images_per_second)[:_MOST_RIVALS]


def other_precision(request: Request, choice: Choice) -> Choice | None:
    """The same batch in the next precision that `auto` leaves open; None if there is none or it does not fit."""
    order = list(request.modes)
    left = order[order.index(choice.plan.precision) + 1 :]
    return _planned_as(request, choice, left, request.budget.tensor_bytes) if left else None


def smaller(request: Request, choice: Choice, tensor_bytes: int) -> Choice | None:
    """The same computation planned for fewer bytes of tensors; None if it does not fit into them. What the budget has
    more than that is its margin."""
    return _planned_as(request, choice, [choice.plan.precision], tensor_bytes)


def _planned_as(request: Request, choice: Choice, precisions: Sequence[str], tensor_bytes: int) -> Choice | None:
    cut = request.budget.tensor_bytes - tensor_bytes
    try:
        return choose(
            replace(
                request,
                batch=choice.plan.batch,
                micro_batch=choice.plan.micro_batch,
                modes={precision: request.modes[precision] for precision in precisions},
                allow_accumulation=choice.plan.accumulation > 1,
                budget=replace(request.budget, margin_bytes=request.budget.margin_bytes + cut),
            )
        )
    except Infeasible:
        return None
