"""The figures that the memory engine promises, on the simulated whole step of the real executor (no times here)."""

from __future__ import annotations

import math

import pytest

from lowmem.choose.costs import measure_costs, price
from lowmem.choose.fitting import fit
from lowmem.choose.planning import Request, card_rates, choose
from lowmem.choose.request import Budget, of_card
from lowmem.config.cards import load_card
from lowmem.core.units import GIB, MIB
from lowmem.models import skeleton
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.evaluate import evaluate
from lowmem.plan.hosting import HostSolver, HostTerms
from lowmem.plan.solver import Solver
from lowmem.plan.timeline import LinkRates
from lowmem.simulate import Simulated, StepShape, StepSimulator, simulate_step
from tests.step_shapes import shape_of

pytestmark = pytest.mark.slow

# budget MiB -> the most that the step may take more than plain autograd's
TARGETS = {4600: 0.03, 3600: 0.07, 2708: 0.12, 1806: 0.20, 1500: 0.28}
LEAST_MIB = 1300
# the same with host memory, by the link's GB/s
HOSTED = {
    12: {4600: 0.002, 3600: 0.005, 2708: 0.015, 1806: 0.05, 1500: 0.09, 1080: 0.08, 1030: 0.08, 900: 0.13},
    3: {4600: 0.007, 3600: 0.025, 2708: 0.06, 1806: 0.11, 1500: 0.15},
}


@pytest.fixture(scope="module")
def bottleneck_110() -> tuple[Solver, StepShape, Rates, Simulated]:
    rates = card_rates(load_card("gtx1060-6g"))("fp32")
    shape = shape_of(skeleton("res110", "bottleneck"), 128)
    chain = price(measure_costs(shape), rates)
    return Solver(chain), shape, rates, simulate_step(shape, None, rates)


@pytest.fixture(scope="module")
def counted(bottleneck_110: tuple[Solver, StepShape, Rates, Simulated]) -> ChainCost:
    """Where seconds are operations: one a second, and memory takes no time."""
    return price(measure_costs(bottleneck_110[1]), Rates(1.0, math.inf))


def test_plain_is_what_the_field_measured(bottleneck_110: tuple[Solver, StepShape, Rates, Simulated]) -> None:
    assert round(bottleneck_110[3].estimate.peak_tensor_bytes / MIB) == 5416


@pytest.mark.parametrize("budget_mib", TARGETS)
def test_overhead(
    bottleneck_110: tuple[Solver, StepShape, Rates, Simulated], counted: ChainCost, budget_mib: int
) -> None:
    solver, shape, rates, plain = bottleneck_110
    solution, simulated = fit(solver, StepSimulator(shape), Budget(total_bytes=budget_mib * MIB), rates)
    assert simulated.estimate.peak_allocated_bytes <= budget_mib * MIB
    assert simulated.seconds / plain.seconds - 1 <= TARGETS[budget_mib]
    # The plan's own account of the work is exact.
    assert counted.plain_seconds == plain.flops
    assert evaluate(solution.schedule, counted).seconds == simulated.flops


@pytest.mark.parametrize("link", HOSTED)
def test_overhead_with_host_memory(
    bottleneck_110: tuple[Solver, StepShape, Rates, Simulated], counted: ChainCost, link: int
) -> None:
    alone, shape, rates, plain = bottleneck_110
    solver = HostSolver(alone.chain, HostTerms(LinkRates(link * 1e9, link * 1e9), 8 * GIB, grads=True))
    steps = StepSimulator(shape)
    for budget_mib, most in HOSTED[link].items():
        solution, simulated = fit(solver, steps, Budget(total_bytes=budget_mib * MIB), rates)
        assert simulated.estimate.peak_allocated_bytes <= budget_mib * MIB
        assert (simulated.seconds + solution.waiting_seconds) / plain.seconds - 1 <= most
        assert evaluate(solution.schedule, counted).seconds == simulated.flops
        assert solution.schedule.hosts


def test_least_feasible(bottleneck_110: tuple[Solver, StepShape, Rates, Simulated]) -> None:
    solver, shape, rates, _ = bottleneck_110
    _, simulated = fit(solver, StepSimulator(shape), Budget(total_bytes=LEAST_MIB * MIB), rates)
    assert simulated.estimate.peak_allocated_bytes <= LEAST_MIB * MIB


@pytest.mark.parametrize(("batch", "vram_gib", "most"), [(1024, 6, 0.27), (128, 2, None)])
def test_mixed_precision_on_a_card(batch: int, vram_gib: int, most: float | None) -> None:
    card = load_card("gtx1060-6g")
    budget: Budget = of_card(card, vram_gib * GIB)
    choice = choose(
        Request(
            model=skeleton("res110", "bottleneck"),
            batch=batch,
            budget=budget,
            rates=card_rates(card),
            modes={"amp": "contiguous"},
            allow_accumulation=False,
        )
    )
    predicted = choice.plan.predicted
    assert predicted.device_bytes is not None
    assert predicted.overhead is not None
    assert predicted.device_bytes <= vram_gib * GIB
    assert most is None or predicted.overhead <= most
