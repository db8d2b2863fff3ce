"""Costs measured stage by stage, put together by the cost model, are the simulated whole."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.choose.costs import ChainMeasure, measure_costs, policies, price
from lowmem.models.resnet import BasicBlock, Bottleneck
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, Keep, Schedule, Segment
from lowmem.remat import decompose
from lowmem.simulate import Trace, estimate, trace_steps
from tests.step_shapes import shape_of
from tests.unit.simulate.loops import Setup

RATES = Rates(3e12, 150e9)
COUNTING = Rates(1.0, math.inf)  # seconds are operations: one a second, and memory takes no time


@cache
def _measured(setup: Setup) -> ChainMeasure:
    precision = "fp32" if setup.low is None else "amp"
    layout = "channels-last" if setup.memory_format is torch.channels_last else "contiguous"
    return measure_costs(shape_of(setup.model(fake=False), setup.batch, precision, layout))


def _chain(setup: Setup, rates: Rates = RATES) -> ChainCost:
    return price(_measured(setup), rates)


def _seconds(trace: Trace, steps: int) -> float:
    work = [one for one in trace.work if one.phase in ("forward", "backward")]
    return sum(max(one.flops / 3e12, one.moved_bytes / 150e9) for one in work) / steps


@pytest.mark.parametrize("block", [BasicBlock, pytest.param(Bottleneck, marks=pytest.mark.slow)])
def test_plain_cost_is_that_of_plain_autograd(block: type[BasicBlock | Bottleneck]) -> None:
    setup = Setup(block=block)
    chain = _chain(setup)
    trace = trace_steps(setup.build, 2)
    assert chain.plain_seconds == pytest.approx(_seconds(trace, 2), rel=0.005)
    assert _chain(setup, COUNTING).plain_seconds == trace.flops() // 2


@st.composite
def _schedules(draw: st.DrawFn, choices: list[list[BlockPolicy]], start: int, end: int, depth: int = 0) -> Schedule:
    """What the solver emits: segments end in FUSED or in something nested."""
    items: list[Keep | Segment] = []
    at, dropped = start, False
    while at <= end:
        if at < end and depth < 3 and draw(st.integers(0, 2)) == 0:
            last = draw(st.integers(at, end - 1 if depth == 0 else end))
            items.append(Segment(at, last, draw(_schedules(choices, at, last, depth + 1))))
            at, dropped = last + 1, False
        elif at == end and depth > 0 and not dropped:
            items.append(Keep(at, draw(st.sampled_from([FUSED, SAVE_ALL, INPUT_ONLY]))))
            at += 1
        else:
            allowed = [p for p in choices[at] if p != FUSED and not (p.drop_output and at == end)]
            if at == end and depth > 0:
                allowed = [SAVE_ALL, INPUT_ONLY]
            policy = draw(st.sampled_from(allowed))
            items.append(Keep(at, policy))
            at, dropped = at + 1, policy.drop_output
    return Schedule(tuple(items))


@pytest.mark.parametrize("low", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_the_sum_is_the_whole(low: torch.dtype | None, data: st.DataObject) -> None:
    setup = Setup(low=low)
    chain = _chain(setup)
    stages = decompose(setup.model(fake=False))
    schedule = data.draw(_schedules([list(policies(stage)) for stage in stages], 0, len(stages) - 1))
    whole = Setup(low=low, schedule=lambda _: schedule)
    trace = trace_steps(whole.build, 2)
    expected = evaluate(schedule, chain)
    assert evaluate(schedule, _chain(setup, COUNTING)).seconds == trace.flops() // 2
    assert expected.seconds == pytest.approx(_seconds(trace, 2), rel=0.01)
    # never too low; a little too high where an output is counted that is gone already
    assert estimate(trace).peak_tensor_bytes <= expected.peak_bytes * 1.005


def test_equal_stages_cost_the_same() -> None:
    chain = _chain(Setup(layout=(2, 3, 1, 1)))
    assert chain.stages[4].options == chain.stages[5].options != chain.stages[3].options
    assert [stage.name for stage in chain.stages[:3]] == ["stem", "layer1.0", "layer1.1"]


def test_known_bytes() -> None:
    """Bottleneck of 16 planes on 64 channels of 32x32, batch 16, fp32: the results of
    conv1 and conv2 are 1 MiB each, of conv3 and the block 4 MiB."""
    chain = _chain(Setup(layout=(2, 3, 1, 1)))
    stage, mib = chain.stages[2], 2**20
    small = 200 * 4 * 8  # statistics
    for policy, kept in ((SAVE_ALL, 12), (LEAN, 10), (INPUT_ONLY, 4), (BlockPolicy.parse("KEEP{conv1,conv2}"), 6)):
        assert kept * mib <= stage.option(policy).kept_bytes <= kept * mib + small
    dropped = stage.option(BlockPolicy.parse("KEEP{conv1,conv2}-out"))
    assert 2 * mib <= dropped.kept_bytes <= 2 * mib + small
    assert dropped.restored_bytes == 5 * mib  # of conv3 and the ReLU that it came from
