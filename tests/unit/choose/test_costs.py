"""What is measured of a stage, and what it is worth: in a chain without shortcuts, in a stage of many operations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lowmem.choose.costs import measure_costs, policies, price
from lowmem.core.units import MIB
from lowmem.plan.cost import Rates
from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import SAVE_ALL, Keep, PolicyKind, Schedule, Segment, keep, uniform
from lowmem.plan.solver import Solver
from lowmem.remat import apply_plan, decompose
from lowmem.simulate import StepShape, simulate_step
from tests.exact.compare import differences, pictures, training
from tests.step_shapes import shape_of

RATES = Rates(3e12, 150e9)
COUNTING = Rates(1.0, math.inf)  # seconds are operations


def _plain_net(depth: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Conv2d(3 if k == 0 else 16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class _Dense(nn.Module):
    """Every layer reads what all before it have made: one stage."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(16 + 8 * k), nn.ReLU(), nn.Conv2d(16 + 8 * k, 8, 3, padding=1, bias=False))
            for k in range(depth)
        )
        self.fc = nn.Linear(16 + 8 * depth, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.fc(torch.cat(features, 1).mean((2, 3)))


def _meta(model: nn.Module) -> StepShape:
    return shape_of(copy.deepcopy(model).to("meta"), 32)


def test_outputs_that_are_made_again_of_what_is_kept() -> None:
    """Of every stage the convolution's result alone is kept: no convolution again, and no output restored before its
    turn."""
    model = _plain_net()
    count = len(decompose(model))
    names = [stage.operations[0].name for stage in decompose(model)]
    schedule = uniform([*[keep(name, drop_output=True) for name in names[: count - 2]], SAVE_ALL, SAVE_ALL])
    shape = _meta(model)
    measured = measure_costs(shape)
    chain = price(measured, RATES)
    dropped = [chain.stages[k].option(schedule.items[k].policy) for k in range(count - 2)]  # type: ignore[union-attr]
    assert not any(option.restore_reads_input for option in dropped)
    expected, simulated = evaluate(schedule, chain), simulate_step(shape, schedule, RATES).estimate
    assert simulated.peak_tensor_bytes == pytest.approx(expected.peak_bytes, rel=1e-3)
    everything = simulate_step(shape, uniform([SAVE_ALL] * count), RATES).estimate
    # One of the dropped outputs is there again at the peak.
    assert everything.peak_tensor_bytes - simulated.peak_tensor_bytes == (count - 3) * 2 * MIB
    assert evaluate(schedule, price(measured, COUNTING)).seconds == simulate_step(shape, None, RATES).flops
    planned = apply_plan(copy.deepcopy(model), schedule)
    assert differences(model, planned, training(*pictures())) == []
    # The solver knows: at that peak nothing takes longer.
    assert Solver(chain).solve(expected.peak_bytes).seconds <= expected.seconds


def test_a_stage_with_many_operations_is_planned_inside() -> None:
    """Sets of its front, each with exact bytes; half the memory of the plain step for less time than running the whole
    stage again."""
    model = _Dense()
    shape = _meta(model)
    chain = price(measure_costs(shape, rates=RATES), RATES)
    stages = decompose(model)
    widest = max(range(len(stages)), key=lambda k: len(stages[k].operations))
    kept = [one.policy.kept for one in chain.stages[widest].anywhere if one.policy.kind is PolicyKind.KEEP]
    assert len(kept) > 8
    assert len(policies(stages[widest])) < len(kept)
    plain = simulate_step(shape, None, RATES)
    solution = Solver(chain).solve(plain.estimate.peak_tensor_bytes // 2)
    again = evaluate(Schedule((Segment(0, widest, _inside(widest)), *_rest(widest, len(stages)))), chain)
    assert solution.seconds < again.seconds
    simulated = simulate_step(shape, solution.schedule, RATES)
    assert simulated.estimate.peak_tensor_bytes == pytest.approx(solution.peak_bytes, rel=1e-3)
    planned = apply_plan(copy.deepcopy(model), solution.schedule)
    assert differences(model, planned, training(*pictures())) == []


def _inside(end: int) -> Schedule:
    return uniform([SAVE_ALL] * (end + 1))


def _rest(end: int, count: int) -> list[Keep]:
    return [Keep(k, SAVE_ALL) for k in range(end + 1, count)]


def test_any_policy_may_end_a_segment() -> None:
    chain = price(measure_costs(_meta(_plain_net()), rates=RATES), RATES)
    for stage in chain.stages:
        assert {one.policy for one in stage.last_options} == {one.policy for one in stage.anywhere}
        for last in stage.last_options:
            assert last.kept_bytes <= stage.option(last.policy).kept_bytes


def test_no_policy_is_tried_twice() -> None:
    """Where nothing can be kept before the output, as in a classifier that ends in a linear layer."""
    classifier = nn.Sequential(nn.Linear(3072, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    model = nn.Sequential(nn.Flatten(), classifier)
    for stage in decompose(model):
        found = policies(stage)
        assert len(set(found)) == len(found)
    chain = price(measure_costs(_meta(model), rates=RATES), RATES)
    assert Solver(chain).least().seconds > 0


class _Halves(nn.Module):
    """As in ShuffleNet: the first half passes, the second is computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).chunk(2, 1)
        return self.fc(torch.cat((first, self.branch(second)), 1).mean((2, 3)))


def test_a_stage_begins_with_one_tensor_not_with_several() -> None:
    torch.manual_seed(0)
    model = _Halves()
    chain = price(measure_costs(_meta(model), rates=RATES), RATES)
    planned = apply_plan(copy.deepcopy(model), Solver(chain).least().schedule)
    assert differences(model, planned, training(*pictures())) == []
