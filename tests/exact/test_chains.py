"""Whole networks: loss, every gradient and every buffer have autograd's bits, in fp32 and both memory
formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, Keep, PolicyKind, Schedule, Segment, keep
from lowmem.remat import decompose
from tests.exact.compare import (
    BLOCKS,
    FORMAT_NAMES,
    FORMATS,
    differences,
    pictures,
    small_net,
    training,
    twins,
)
from tests.exact.schedules import alternating, schedules, segments, uniform

DROPPED_LEAN = BlockPolicy(PolicyKind.LEAN, drop_output=True)
CASES = {
    "save-all": lambda stages: uniform(stages, SAVE_ALL),
    "lean": lambda stages: uniform(stages, LEAN),
    "input-only": lambda stages: uniform(stages, INPUT_ONLY),
    "no-last-z": lambda stages: uniform(stages, keep("conv1", "conv2", "relu", "relu_2")),
    "dropped-lean": lambda stages: alternating(stages, DROPPED_LEAN, LEAN),
    "dropped-conv1": lambda stages: alternating(stages, LEAN, keep("conv1", drop_output=True)),
    "segments": lambda stages: segments(stages, 3, LEAN),
    "one-segment": lambda stages: segments(stages, len(stages), keep("conv2")),
}


def _nested(last: int) -> Schedule:
    inner = Segment(
        2,
        last,
        Schedule(
            (
                Keep(2, LEAN),
                Segment(3, 4, Schedule((Keep(3, LEAN), Keep(4, FUSED)))),
                Segment(5, last, Schedule((Keep(5, keep("conv1", drop_output=True)), Keep(6, SAVE_ALL)))),
            )
        ),
    )
    return Schedule(
        (Segment(0, last, Schedule((Keep(0, INPUT_ONLY), Segment(1, last, Schedule((Keep(1, LEAN), inner)))))),)
    )


CASES["nested"] = lambda stages: _nested(len(stages) - 1)


@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", CASES)
def test_schedules(case: str, block: Any, residual: bool, memory_format: Any) -> None:
    model = small_net(block, residual)
    plain, planned = twins(model, CASES[case](decompose(model)), memory_format)
    assert differences(plain, planned, training(*pictures(3, memory_format))) == []


def _random_chain(data: st.DataObject, examples: str) -> None:
    block, residual = data.draw(st.sampled_from(BLOCKS)), data.draw(st.booleans())
    memory_format = data.draw(st.sampled_from(FORMATS))
    model = small_net(block, residual)
    schedule = data.draw(schedules(decompose(model)))
    plain, planned = twins(model, schedule, memory_format)
    assert differences(plain, planned, training(*pictures(2, memory_format)), steps=1) == [], examples


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_random_schedules(data: st.DataObject) -> None:
    _random_chain(data, "fast")


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_many_random_schedules(data: st.DataObject) -> None:
    _random_chain(data, "slow")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2])
def test_with_more_threads(threads: int) -> None:
    """Kernels split their work by threads; forward and recomputation must split alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for memory_format in FORMATS:
            model = small_net(BLOCKS[1])
            plain, planned = twins(model, segments(decompose(model), 3, keep("conv2")), memory_format)
            assert differences(plain, planned, training(*pictures(4, memory_format))) == []
    finally:
        torch.set_num_threads(before)
