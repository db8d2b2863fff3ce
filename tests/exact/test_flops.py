"""The promised FLOPs: a counter over the real step gives exactly what was predicted."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lowmem.choose.costs import measure_costs, price
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule, Segment, keep
from lowmem.remat import apply_plan, decompose
from lowmem.simulate import trace_steps
from tests.exact.compare import BLOCKS, pictures, small_net, training
from tests.exact.schedules import alternating, uniform
from tests.step_shapes import shape_of
from tests.unit.simulate.loops import Setup


def _segment(stages: Any) -> Schedule:
    inner = Segment(2, 4, Schedule((Keep(2, keep("conv1")), Keep(3, LEAN), Keep(4, FUSED))))
    outer = Segment(1, 5, Schedule((Keep(1, LEAN), inner, Keep(5, FUSED))))
    return Schedule((Keep(0, INPUT_ONLY), outer, Keep(6, SAVE_ALL)))


SCHEDULES = {
    "save-all": lambda stages: uniform(stages, SAVE_ALL),
    "lean": lambda stages: uniform(stages, LEAN),
    "input-only": lambda stages: uniform(stages, INPUT_ONLY),
    "conv1": lambda stages: uniform(stages, keep("conv1")),
    "dropped": lambda stages: alternating(stages, LEAN, keep("conv1", drop_output=True)),
    "segments": _segment,
}


@cache
def _chain(block: Any) -> ChainCost:
    """Where seconds are operations: one a second, and memory takes no time."""
    return price(measure_costs(shape_of(small_net(block), 2)), Rates(1.0, math.inf))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_promised_flops(schedule: str, block: Any) -> None:
    model = small_net(block)
    chosen = SCHEDULES[schedule](decompose(model))
    chain = _chain(block)
    with FlopCounterMode(display=False) as counter:
        training(*pictures(2))(apply_plan(model, chosen))
    setup = Setup(block=block, width=model.conv1.out_channels, batch=2, schedule=SCHEDULES[schedule])
    trace = trace_steps(setup.build)
    assert counter.get_total_flops() == evaluate(chosen, chain).seconds == trace.flops()


@pytest.mark.parametrize("block", BLOCKS)
def test_save_all_and_lean_repeat_no_convolution(block: Any) -> None:
    model = small_net(block)
    totals = []
    for run in (
        model,
        apply_plan(model, uniform(decompose(model), SAVE_ALL)),
        apply_plan(model, uniform(decompose(model), LEAN)),
    ):
        with FlopCounterMode(display=False) as counter:
            training(*pictures(2))(run)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == totals[2]
