"""Several processes on paper: what is added to one process's plan, and that nothing else is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.scaling_model import ETHERNET_1G, Link, Scaling, least, messages_of, ready
from lowmem.choose.planning import Request, card_rates, choose
from lowmem.choose.request import Budget, of_card, with_communicators
from lowmem.config.cards import load_card
from lowmem.core.errors import Infeasible, UsageError
from lowmem.core.units import GIB, MIB
from lowmem.models import skeleton

CARD = load_card("gtx1060-6g")
MODEL = skeleton("res20", width=8)
INFINITE = Link(name="infinite", bytes_per_second=math.inf, latency_seconds=0.0)


def _request(budget: Budget, batch: int = 64) -> Request:
    return Request(model=MODEL, batch=batch, budget=budget, rates=card_rates(CARD))


def _link(bytes_per_second: float) -> Link:
    return Link(name="some", bytes_per_second=bytes_per_second, latency_seconds=1e-5)


@pytest.fixture(scope="module")
def tight() -> Scaling:
    """The whole batch fits with recomputation only, a part of it as it is."""
    return Scaling(_request(Budget(total_bytes=22 * MIB)))


def test_what_is_summed() -> None:
    messages = messages_of(MODEL)
    norms = sum(buffer.numel() for buffer in MODEL.buffers() if buffer.is_floating_point())
    assert norms > 0
    assert sum(one.size_bytes for one in messages) == 4 * (
        sum(parameter.numel() for parameter in MODEL.parameters()) + norms
    )
    assert messages[-1].stage == 0


def test_frozen_parameters_are_not_summed() -> None:
    model = skeleton("res20", width=8)
    for parameter in model.layer1.parameters():
        parameter.requires_grad_(False)
    frozen = sum(parameter.numel() for parameter in model.layer1.parameters())
    sizes = [sum(one.size_bytes for one in messages_of(some)) for some in (MODEL, model)]
    assert sizes[0] - sizes[1] == 4 * frozen


def test_one_process_is_the_plan_itself(tight: Scaling) -> None:
    one, plan = tight.predict(1, None), choose(_request(Budget(total_bytes=22 * MIB))).plan
    assert one.plan == plan
    assert one.step_seconds == plan.predicted.step_seconds
    assert one.peak_allocated_bytes == plan.predicted.peak_allocated_bytes
    assert (one.speedup, one.exchange.messages, one.exposed_share) == (1, 0, 0)
    assert tight.predict(1, ETHERNET_1G).exchange.communication_seconds == 0


def test_a_smaller_part_of_the_batch_needs_no_recomputation(tight: Scaling) -> None:
    four = tight.predict(4, INFINITE)
    assert four.local_batch == 16
    assert four.plan.predicted.extra_flops == 0
    assert four.alone_overhead is not None
    assert four.overhead is not None
    assert four.alone_overhead > 0.1 > 0.03 > four.overhead  # packing small gradients, of which a thin net has many
    assert four.exchange.exposed_seconds == 0
    assert four.step_seconds == four.plan.predicted.step_seconds
    assert four.speedup == pytest.approx(tight.predict(1, None).step_seconds / four.step_seconds)
    assert four.images_per_second == 64 / four.step_seconds


@pytest.mark.slow
def test_waiting_is_added_to_the_step(tight: Scaling) -> None:
    fast, slow = tight.predict(4, INFINITE), tight.predict(4, _link(1e6))
    assert slow.plan == fast.plan
    assert slow.step_seconds == fast.step_seconds + slow.exchange.exposed_seconds
    sizes = [one.size_bytes for one in tight.messages]
    choice = choose(replace(tight.request, batch=16))
    ends = ready(choice.plan.schedule, choice.chain).ends
    whole = 2 * 3 / 4 * sum(sizes) / 1e6 + len(sizes) * 6 * 1e-5
    assert slow.exchange.communication_seconds == pytest.approx(whole)
    first = ends[tight.messages[0].stage]
    assert slow.exchange.exposed_seconds == pytest.approx(whole - (ends[0] - first))  # the link is never idle again
    seconds = [tight.predict(4, _link(10.0**power)).step_seconds for power in range(5, 11)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.slow
def test_each_rank_stays_within_its_card() -> None:
    budget = Budget(total_bytes=12 * MIB)
    two = Scaling(_request(budget)).predict(2, ETHERNET_1G)
    assert two.peak_allocated_bytes is not None
    assert two.peak_allocated_bytes <= budget.tensor_bytes
    one = Scaling(_request(budget, batch=32)).predict(1, None)
    assert one.peak_allocated_bytes is not None
    assert two.plan.schedule != one.plan.schedule or two.peak_allocated_bytes > one.peak_allocated_bytes


@pytest.mark.slow
def test_on_a_card_the_budget_is_the_cards() -> None:
    two = Scaling(_request(of_card(CARD, 1 * GIB))).predict(2, ETHERNET_1G)
    assert two.plan.predicted.device_bytes is not None
    assert two.plan.predicted.device_bytes <= 1 * GIB
    assert two.plan.budget_bytes == with_communicators(of_card(CARD, 1 * GIB)).tensor_bytes


@pytest.mark.slow
def test_what_does_not_fit_on_one_card() -> None:
    scaling = Scaling(_request(Budget(total_bytes=16 * MIB), batch=256))
    eight = scaling.predict(8, ETHERNET_1G)
    assert (eight.alone_step_seconds, eight.speedup, eight.alone_overhead) == (None, None, None)
    assert eight.step_seconds > 0
    assert scaling.break_even(8, 0.0) is None
    with pytest.raises(Infeasible):
        scaling.predict(1, None)
    with pytest.raises(Infeasible):
        Scaling(_request(Budget(total_bytes=1 * MIB))).predict(2, ETHERNET_1G)


def test_break_even(tight: Scaling) -> None:
    needed = tight.break_even(2, 1e-5)
    assert needed is not None
    at, below = tight.predict(2, _link(needed)), tight.predict(2, _link(needed / 1.5))
    assert at.speedup == pytest.approx(1, rel=1e-3)
    assert at.speedup is not None
    assert below.speedup is not None
    assert below.speedup < 1 <= at.speedup
    assert tight.break_even(2, 1e-5, speedup=100) is None


def test_least() -> None:
    assert least(lambda value: value >= 5e6) == pytest.approx(5e6, rel=1e-3)
    assert least(lambda value: False) is None
    assert least(lambda value: True) == pytest.approx(1e3, rel=1e-3)


@pytest.mark.slow
def test_an_uneven_part_is_the_largest(tight: Scaling) -> None:
    assert tight.predict(3, INFINITE).local_batch == 22


def test_what_is_refused(tight: Scaling) -> None:
    with pytest.raises(UsageError, match="1 to 64 processes, not to 65"):
        tight.predict(65, ETHERNET_1G)
    with pytest.raises(UsageError, match="not to 0"):
        tight.predict(0, ETHERNET_1G)
    with pytest.raises(UsageError, match="need a link"):
        tight.predict(2, None)
    with pytest.raises(UsageError, match="leave it out"):
        Scaling(replace(_request(Budget(total_bytes=22 * MIB)), micro_batch=16))
