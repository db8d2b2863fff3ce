"""The cost model's own checks and the roofline."""

from __future__ import annotations

import dataclasses

import pytest

from lowmem.plan.cost import ChainCost, KernelWork, OptionCost, Rates, StageCost
from lowmem.plan.policy import FUSED, LEAN, SAVE_ALL, keep

OPTION = OptionCost(
    policy=SAVE_ALL,
    forward_seconds=1.0,
    backward_seconds=2.0,
    kept_bytes=3,
    forward_temp_bytes=4,
    backward_temp_bytes=5,
)
STAGE = StageCost(
    name="a",
    input_bytes=1,
    input_grad_bytes=1,
    options=(OPTION,),
    fast_seconds=1.0,
    fast_temp_bytes=1,
    param_grad_bytes=7,
)


def test_the_roofline_takes_the_larger_of_computing_and_moving() -> None:
    rates = Rates.roofline(4.38e12, 192e9)
    assert rates.flops_per_second == pytest.approx(0.65 * 4.38e12)
    assert rates.bytes_per_second == pytest.approx(0.80 * 192e9)
    computing, moving = KernelWork(flops=10**12, moved_bytes=1), KernelWork(flops=1, moved_bytes=10**10)
    assert rates.seconds([computing]) == 10**12 / rates.flops_per_second
    assert rates.seconds([moving]) == 10**10 / rates.bytes_per_second
    assert rates.seconds([computing, moving]) == pytest.approx(rates.seconds([computing]) + rates.seconds([moving]))
    with pytest.raises(ValueError, match="positive"):
        Rates(0.0, 1.0)


def test_what_a_boundary_has_behind_it() -> None:
    chain = ChainCost(stages=(STAGE, dataclasses.replace(STAGE, name="b", param_grad_bytes=5)), output_bytes=2)
    assert chain.later_param_grad_bytes == (12, 5, 0)
    assert chain.boundary_bytes == (1, 1, 2)
    assert chain.boundary_grad_bytes == (1, 1, 0)


@pytest.mark.parametrize("name", ["kept_bytes", "forward_temp_bytes", "backward_temp_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_bytes_are_counts(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(OPTION, **{name: value})


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_seconds_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        dataclasses.replace(OPTION, backward_seconds=value)


def test_fused_has_no_forward() -> None:
    with pytest.raises(ValueError, match="FUSED"):
        dataclasses.replace(OPTION, policy=FUSED)


def test_a_stage_has_each_policy_once_and_one_that_can_always_be_used() -> None:
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(STAGE, options=(OPTION, OPTION))
    dropping = dataclasses.replace(OPTION, policy=keep("conv1", drop_output=True))
    with pytest.raises(ValueError, match="anywhere"):
        dataclasses.replace(STAGE, options=(dropping,))
    assert STAGE.option(SAVE_ALL) is OPTION
    with pytest.raises(KeyError, match="LEAN"):
        STAGE.option(LEAN)


def test_last_options_are_some_of_the_options() -> None:
    cheaper = dataclasses.replace(OPTION, kept_bytes=1)
    stage = dataclasses.replace(STAGE, last_options=(cheaper,))
    assert stage.option(SAVE_ALL, last=True) is cheaper
    assert STAGE.option(SAVE_ALL, last=True) is OPTION
    with pytest.raises(ValueError, match="last_options"):
        dataclasses.replace(STAGE, last_options=(dataclasses.replace(OPTION, policy=LEAN),))
    with pytest.raises(ValueError, match="last_options"):
        dataclasses.replace(STAGE, last_options=(cheaper, cheaper))
