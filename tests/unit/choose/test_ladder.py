"""The next smaller plans: each simulated whole, each computing the same in less."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lowmem.choose.explain import explain_ladder
from lowmem.choose.planning import Choice, Request, card_rates, choose, with_ladder
from lowmem.choose.request import Budget, of_card
from lowmem.config.cards import load_card
from lowmem.core.units import MIB
from lowmem.models import skeleton
from lowmem.plan.record import Plan
from lowmem.simulate import simulate_step

CARD = load_card("gtx1060-6g")


def _choice(budget: Budget, batch: int = 64, micro_batch: int | None = None) -> Choice:
    request = Request(
        model=skeleton("res20", width=8), batch=batch, budget=budget, rates=card_rates(CARD), micro_batch=micro_batch
    )
    return with_ladder(choose(request))


@pytest.fixture(
    scope="module",
    params=["tensors", *(pytest.param(one, marks=pytest.mark.slow) for one in ("card", "micro-batches"))],
)
def choice(request: pytest.FixtureRequest) -> Choice:
    if request.param == "card":
        return _choice(of_card(CARD, 1100 * MIB), batch=512)
    return _choice(Budget(total_bytes=30 * MIB), micro_batch=48 if request.param == "micro-batches" else None)


def test_every_rung_computes_the_same_in_less(choice: Choice) -> None:
    plan = choice.plan
    assert 2 <= len(plan.ladder) <= 7
    above = plan
    for rung in plan.ladder:
        assert rung.budget_bytes is not None
        assert above.budget_bytes is not None
        assert rung.budget_bytes < above.budget_bytes
        assert (rung.batch, rung.micro_batch, rung.precision, rung.memory_format, rung.exact) == (
            (plan.batch, plan.micro_batch, plan.precision, plan.memory_format, plan.exact)
        )
        again = simulate_step(choice.shape, rung.schedule, choice.rates).estimate
        assert rung.predicted.peak_allocated_bytes == again.peak_allocated_bytes
        assert rung.predicted.peak_reserved_bytes == again.peak_reserved_bytes
        on_card = choice.budget.on_card
        assert rung.budget_bytes == (again.peak_reserved_bytes if on_card else again.peak_allocated_bytes)
        above = rung


def test_one_rung_is_one_plan(choice: Choice) -> None:
    said = explain_ladder(replace(choice.plan, ladder=choice.plan.ladder[:1]))
    assert said.startswith("if memory runs out all the same: 1 smaller plan, down to")


def test_it_goes_down_to_the_least(choice: Choice) -> None:
    """What the last rung takes is what a plan for exactly as much takes, and there is none for less."""
    last = choice.plan.ladder[-1]
    assert last.budget_bytes is not None
    if choice.budget.on_card:
        return  # there the least is bounded by gaps between blocks, which are not known beforehand
    least = _choice(Budget(total_bytes=last.budget_bytes), micro_batch=last.micro_batch).plan
    assert least.predicted.peak_allocated_bytes == last.predicted.peak_allocated_bytes
    assert least.ladder == ()


def test_a_ladder_survives_its_file(choice: Choice) -> None:
    assert Plan.from_json(json.loads(json.dumps(choice.plan.to_json()))) == choice.plan


def test_going_down_rung_by_rung(choice: Choice) -> None:
    plan, count = choice.plan, len(choice.plan.ladder)
    for left in reversed(range(count)):
        below = plan.next_rung()
        assert below is not None
        assert len(below.ladder) == left
        plan = below
    assert replace(plan, ladder=()) == choice.plan.ladder[-1]
    assert plan.next_rung() is None
