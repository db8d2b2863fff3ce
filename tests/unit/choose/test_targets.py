"""Bottleneck-110, width 64, on a GTX 1060 (4.38 TFLOP/s, 192 GB/s by the roofline): memory against time.

Overhead is predicted time over plain autograd's. The figures are those the engine was asked for; what it
reaches is better (see benchmarks).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lowmem.choose.costs import measure_costs, price
from lowmem.core.units import MIB
from lowmem.models.resnet import Bottleneck, ResNet
from lowmem.plan.cost import Rates
from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, Keep, Schedule, keep
from lowmem.plan.solver import Solver
from lowmem.remat import decompose
from lowmem.simulate import StepShape, simulate_step
from tests.step_shapes import shape_of

GTX_1060 = Rates.roofline(4.38e12, 192e9)
TARGETS = {4600: 0.03, 3600: 0.07, 2708: 0.12, 1806: 0.20, 1500: 0.28}  # MiB: overhead
MORE_BLOCKS = (3, 4, 26, 3)


@cache
def _model() -> ResNet:
    with torch.device("meta"):
        return ResNet(Bottleneck, MORE_BLOCKS)


def _shape(batch: int, low: torch.dtype | None) -> StepShape:
    return shape_of(_model(), batch, "fp32" if low is None else "amp")


@cache
def _solver(batch: int = 128, low: torch.dtype | None = None) -> Solver:
    return Solver(price(measure_costs(_shape(batch, low)), GTX_1060))


def _overhead(solver: Solver, budget_bytes: int) -> float:
    assert solver.chain.plain_seconds is not None
    solution = solver.solve(budget_bytes)
    assert solution.peak_bytes <= budget_bytes
    return solution.seconds / solver.chain.plain_seconds - 1


def _simulated_peak(schedule: Schedule | None, batch: int = 128, low: torch.dtype | None = None) -> int:
    return simulate_step(_shape(batch, low), schedule, GTX_1060).estimate.peak_tensor_bytes


@pytest.mark.slow
def test_overheads() -> None:
    solver = _solver()
    assert {budget for budget, most in TARGETS.items() if _overhead(solver, budget * MIB) > most} == set()
    assert solver.least().peak_bytes <= 1300 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("budget", TARGETS)
def test_the_plan_simulated_whole_is_under_the_budget(budget: int) -> None:
    solution = _solver().solve(budget * MIB)
    assert _simulated_peak(solution.schedule) <= budget * MIB
    assert _simulated_peak(solution.schedule) == pytest.approx(solution.peak_bytes, rel=0.01)


@pytest.mark.slow
def test_mixed_precision() -> None:
    """Batch 1,024 on a card of 6 GiB, batch 128 on one of 2 GiB, with 1 GiB and 512 MiB for all that is
    no tensor."""
    assert _overhead(_solver(1024, torch.float16), 5 * 1024 * MIB) <= 0.27
    assert _overhead(_solver(128, torch.float16), 1536 * MIB) <= 0.27


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "most"),
    [
        (None, 5416),
        (SAVE_ALL, 5416),
        (LEAN, 4576),
        (keep("conv1", "conv2"), 3081),
        (keep("conv2"), 2425),
        (INPUT_ONLY, 2065),
    ],
    ids=str,
)
def test_uniform_policies(policy: BlockPolicy | None, most: int) -> None:
    """At most what a first prototype took; None is plain autograd."""
    if policy is None:
        assert _simulated_peak(None) // MIB == most
        return
    count = len(decompose(_model()))
    blocks = (Keep(index, policy) for index in range(1, count - 1))
    schedule = Schedule((Keep(0, LEAN), *blocks, Keep(count - 1, SAVE_ALL)))
    assert _simulated_peak(schedule) <= most * MIB
