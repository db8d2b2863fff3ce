"""What is left of a card is used, as far as single blocks can use it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem.choose.costs import measure_costs, price
from lowmem.choose.fitting import fit
from lowmem.choose.request import Budget
from lowmem.core.errors import Infeasible
from lowmem.core.units import MIB
from lowmem.models import skeleton
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.hosting import HostSolver, HostTerms
from lowmem.plan.refine import faster_neighbours
from lowmem.plan.solver import Solver
from lowmem.plan.timeline import LinkRates
from lowmem.simulate import StepSimulator, simulate_step
from tests.step_shapes import shape_of

RATES = Rates.roofline(4.38e12, 192e9)
SHAPE = shape_of(skeleton("res20", width=16), 128)


@pytest.fixture(scope="module")
def chain() -> ChainCost:
    return price(measure_costs(SHAPE), RATES)


@pytest.mark.parametrize("mib", [90, 110, 140])
def test_no_block_alone_could_be_faster_on_the_card(chain: ChainCost, mib: int) -> None:
    budget = Budget(total_bytes=(mib + 400) * MIB, context_bytes=400 * MIB)
    solution, simulated = fit(Solver(chain, limit_bytes=budget.tensor_bytes), StepSimulator(SHAPE), budget, RATES)
    assert simulated.fits
    assert simulated.estimate.peak_allocated_bytes <= budget.tensor_bytes
    assert simulated == simulate_step(SHAPE, solution.schedule, RATES, budget.tensor_bytes)
    for other in faster_neighbours(solution, chain, budget.tensor_bytes, 0.005)[:4]:
        found = simulate_step(SHAPE, other.schedule, RATES, budget.tensor_bytes)
        assert not found.fits or found.estimate.peak_allocated_bytes > budget.tensor_bytes


def test_tensors_alone_get_the_solvers_own(chain: ChainCost) -> None:
    for mib in (70, 90, 120):
        budget = Budget(total_bytes=mib * MIB)
        solver = Solver(chain, limit_bytes=budget.tensor_bytes)
        solution, simulated = fit(solver, StepSimulator(SHAPE), budget, RATES)
        assert simulated.estimate.peak_allocated_bytes <= budget.tensor_bytes
        assert solution.seconds <= solver.solve(budget.tensor_bytes * 99 // 100).seconds


def test_what_fits_nowhere_is_refused_with_what_would(chain: ChainCost) -> None:
    budget = Budget(total_bytes=10 * MIB)
    with pytest.raises(Infeasible) as caught:
        fit(Solver(chain, limit_bytes=budget.tensor_bytes), StepSimulator(SHAPE), budget, RATES)
    enough = replace(budget, total_bytes=caught.value.least_bytes)
    assert fit(Solver(chain), StepSimulator(SHAPE), enough, RATES)[1].fits


@pytest.mark.parametrize("gigabytes", [3, 12])
def test_host_memory_makes_no_step_slower_on_a_card(gigabytes: int) -> None:
    """The allocator may leave other gaps between what waits there, so that what is planned with it fits less well."""
    shape = shape_of(skeleton("res20", width=16), 64)
    chain, steps = price(measure_costs(shape), RATES), StepSimulator(shape)
    rates = LinkRates(gigabytes * 1e9, gigabytes * 1e9)
    for mib in (52, 53, 55, 60):
        budget = Budget(total_bytes=(mib + 400) * MIB, context_bytes=400 * MIB)
        alone = fit(Solver(chain), steps, budget, RATES)[0].seconds
        solution, simulated = fit(HostSolver(chain, HostTerms(rates, 1 << 30)), steps, budget, RATES)
        assert simulated.fits
        assert solution.seconds <= alone * (1 + 1e-9), mib
