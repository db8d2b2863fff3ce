"""One candidate, precision and micro-batch settled: the fastest schedule whose whole simulated step fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lowmem.calibrate.workspace import Workspaces
from lowmem.choose.budget import Budget
from lowmem.choose.costs import calls_of, measure_costs, price
from lowmem.choose.request import Choice, Request
from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.record import Plan, Predicted
from lowmem.plan.solution import Solution
from lowmem.plan.solver import Solver
from lowmem.remat import stage_names
from lowmem.simulate import Simulated, StepShape, simulate_step

_T = TypeVar("_T")
_TRIES = 12  # of the solver against the whole simulated step


def plan_one(request: Request, precision: str, micro_batch: int) -> Choice:
    shape = request.shape(precision, micro_batch)
    rates, budget = request.rates(precision), request.budget
    workspace = workspaces_of(request, shape)
    chain, timed = _chain(request, shape, rates, workspace)
    solution, simulated = fit(Solver(chain, limit_bytes=budget.tensor_bytes), shape, budget, rates, workspace)
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
        chain=chain,
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
        device_bytes=_device_bytes(budget, simulated),
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


def _device_bytes(budget: Budget, simulated: Simulated) -> int | None:
    if not budget.on_card:
        return None
    return simulated.estimate.peak_reserved_bytes + budget.process_bytes


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
    raise Infeasible(limit, peak, f"at its peak, {least.peak_at}", "lower --batch")
