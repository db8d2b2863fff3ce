"""The judge itself, against sums done by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lowmem.plan.cost import ChainCost, OptionCost, StageCost
from lowmem.plan.evaluate import evaluate
from lowmem.plan.policy import FUSED, LEAN, SAVE_ALL, BlockPolicy, Keep, Schedule, Segment, keep, uniform

DROP = keep("conv2", drop_output=True)


def option(policy: BlockPolicy, f: float, b: float, kept: int, tf: int, tb: int, **more: Any) -> OptionCost:
    return OptionCost(
        policy=policy,
        forward_seconds=f,
        backward_seconds=b,
        kept_bytes=kept,
        forward_temp_bytes=tf,
        backward_temp_bytes=tb,
        **more,
    )


def stage(index: int) -> StageCost:
    """Input and output 10, gradients 10 (none for the first input), parameter gradients 7; SAVE_ALL keeps 30
    and LEAN 20 beside the output."""
    g = 10 if index else 0
    return StageCost(
        name=f"block{index}",
        input_bytes=10,
        input_grad_bytes=g,
        fast_seconds=1.0,
        fast_temp_bytes=5,
        param_grad_bytes=7,
        options=(
            option(SAVE_ALL, 1, 2, 40, 3, 20 + g),
            option(LEAN, 1, 3, 30, 3, 25 + g),
            option(DROP, 1, 4, 15, 13, 25 + g, restore_temp_bytes=16, restore_seconds=9.0),
            option(FUSED, 0, 4, 0, 0, 50 + g),
        ),
    )


CHAIN = ChainCost(
    stages=tuple(stage(index) for index in range(3)),
    output_bytes=10,
    output_grad_bytes=10,
    fixed_bytes=100,
)


def test_save_all() -> None:
    result = evaluate(uniform([SAVE_ALL] * 3), CHAIN)
    assert result.seconds == 9.0
    # at the last backward: fixed, three times kept, the gradient above, temporaries with the new gradient
    assert result.peak_bytes == 100 + 120 + 10 + 30
    assert result.peak.what == "backward of block2 under SAVE_ALL"
    assert (result.peak.kept_bytes, result.peak.temporary_bytes) == (130, 30)


def test_a_segment() -> None:
    inner = Schedule((Keep(0, SAVE_ALL), Keep(1, FUSED)))
    schedule = Schedule((Segment(0, 1, inner), Keep(2, SAVE_ALL)))
    result = evaluate(schedule, CHAIN)
    assert result.seconds == 2 + 3 + (1 + 4 + 2)
    # fused backward of block1: output of block0 and what it keeps, gradient, block2's parameter gradients,
    # temporaries
    assert result.peak_bytes == 100 + 40 + 10 + 7 + 60
    assert result.peak.param_grad_bytes == 7


def test_the_last_stage_of_a_segment_makes_no_output() -> None:
    first, middle, head = CHAIN.stages
    cheaper = dataclasses.replace(middle.option(LEAN), kept_bytes=20, forward_seconds=0.5)
    stages = (first, dataclasses.replace(middle, last_options=(cheaper,)), head)
    chain = dataclasses.replace(CHAIN, stages=stages)
    inner = Schedule((Keep(0, SAVE_ALL), Keep(1, LEAN)))
    result = evaluate(Schedule((Segment(0, 1, inner), Keep(2, SAVE_ALL))), chain)
    assert result.seconds == 2 + 3 + (1 + 0.5 + 3 + 2)
    assert evaluate(uniform([SAVE_ALL, LEAN, SAVE_ALL]), chain).seconds == 3 + (1 + 3) + 3


def test_a_segment_at_the_end_of_a_segment_runs_its_forward_once() -> None:
    innermost = Schedule((Keep(1, SAVE_ALL),))
    nested = Schedule((Keep(0, SAVE_ALL), Segment(1, 1, innermost)))
    flat = Schedule((Keep(0, SAVE_ALL), *innermost.items))
    first, second = (evaluate(Schedule((Segment(0, 1, inside), Keep(2, LEAN))), CHAIN) for inside in (nested, flat))
    assert first == dataclasses.replace(second, schedule=first.schedule)


def test_a_dropped_output() -> None:
    result = evaluate(uniform([DROP, SAVE_ALL, LEAN]), CHAIN)
    assert result.seconds == 5 + 9 + 3 + 4
    # at the last backward the first two keep 15 and 40, block2 30: the output of block0 is not there
    assert result.peak_bytes == 100 + 85 + 10 + 35
    # at the backward of block1 it is there again
    middle = evaluate(uniform([DROP, SAVE_ALL, SAVE_ALL]), CHAIN)
    assert middle.peak_bytes == max(100 + 95 + 10 + 30, 100 + 15 + 10 + 40 + 10 + 7 + 30)


def test_two_dropped_outputs_in_a_row() -> None:
    result = evaluate(uniform([DROP, DROP, LEAN]), CHAIN)
    assert result.seconds == 3 + (4 + 4 + 3) + 9 + 9
    # at the last backward both inputs are there again: kept 15 + 15 + 30, inputs 10 + 10, gradient above
    assert result.peak_bytes == 100 + 60 + 20 + 10 + 35
    assert result.peak.what == "backward of block2 under LEAN"


def test_a_segment_with_a_transient_input() -> None:
    schedule = Schedule((Keep(0, DROP), Segment(1, 1, Schedule((Keep(1, FUSED),))), Keep(2, LEAN)))
    result = evaluate(schedule, CHAIN)
    # inside the segment: kept by block0, its output again, the gradient, block2's parameter gradients,
    # temporaries
    assert result.peak_bytes == 100 + 15 + 10 + 10 + 7 + 60


def test_what_restoring_leaves_is_held_until_the_stages_own_backward() -> None:
    first = CHAIN.stages[0]
    leaving = dataclasses.replace(first.option(DROP), restored_bytes=500, backward_temp_bytes=501)
    stages = (dataclasses.replace(first, options=(leaving, first.option(LEAN))), *CHAIN.stages[1:])
    chain = dataclasses.replace(CHAIN, stages=stages)
    result = evaluate(uniform([DROP, SAVE_ALL, SAVE_ALL]), chain)
    # at the backward of block1: kept by both, the output again and what is left, gradient, block2's parameter
    # gradients
    assert result.peak_bytes == 100 + 15 + 40 + 10 + 500 + 10 + 7 + 30
    # at its own it is a part of the temporaries: 15 + 10 + 14 + 501 is less
    assert result.peak.what == "backward of block1 under SAVE_ALL"


def test_an_output_that_is_made_again_of_what_is_kept_needs_no_input() -> None:
    """Two neighbours drop their outputs: with inputs read, both are restored before the last backward; without, each
    before its own, while what restoring the later one has left is still there."""

    def result(left: int, reads: bool) -> tuple[float, int, str]:
        changed = {"restored_bytes": left, "restore_temp_bytes": left + 16, "restore_reads_input": reads}
        option = dataclasses.replace(CHAIN.stages[1].option(DROP), **changed)
        stages = [dataclasses.replace(one, options=(*one.options[:2], option)) for one in CHAIN.stages]
        chain = dataclasses.replace(CHAIN, stages=tuple(stages))
        found = evaluate(uniform([DROP, DROP, SAVE_ALL]), chain)
        return found.seconds, found.peak_bytes, found.peak.what

    # fixed, kept, gradient, both restored with what that leaves, temporaries with the new gradient
    assert result(500, True) == (31.0, 100 + 15 + 15 + 40 + 10 + 510 + 510 + 30, "backward of block2 under SAVE_ALL")
    assert result(6, False) == (31.0, 100 + 15 + 15 + 40 + 10 + 16 + 30, "backward of block2 under SAVE_ALL")
    # as the input of the second is restored: kept, gradient, the last one's parameter gradients, what is left
    assert result(500, False)[1] == 100 + 15 + 15 + 10 + 7 + 500 + 516


def test_the_optimizers_step_can_be_the_peak() -> None:
    chain = ChainCost(stages=CHAIN.stages, output_bytes=10, fixed_bytes=100, outside_peak_bytes=5000)
    result = evaluate(uniform([SAVE_ALL] * 3), chain)
    assert result.peak_bytes == 5000
    assert str(result.peak) == "step of the optimizer: fixed 100 B, parameter gradients 21 B, temporary 5 KiB"


def test_what_does_not_fit_the_chain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1"):
        evaluate(uniform([SAVE_ALL] * 2), CHAIN)
    with pytest.raises(KeyError, match="KEEP"):
        evaluate(uniform([keep("conv1")] * 3), CHAIN)
