"""`lowmem plan` works for every shipped card: it fits, or says what would."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from lowmem.choose.execution import request_of
from lowmem.choose.explain import in_full, memory_table
from lowmem.choose.planning import choose
from lowmem.choose.request import Request, card_rates, of_card
from lowmem.config.cards import Card, load_card
from lowmem.config.settings import gather
from lowmem.core.reading import profile_names

NETWORKS = [("res20", "basic"), ("cnn56", "bottleneck"), ("res110", "bottleneck")]


@cache
def _request(arch: str, block: str, tensor_cores: bool) -> Request:
    card = next(name for name in profile_names("cards") if load_card(name).tensor_cores == tensor_cores)
    return request_of(gather(flags={"model.arch": arch, "model.block": block, "memory.card": card}).config)


def _plan(arch: str, block: str, card: Card) -> None:
    budget = of_card(card)
    request = replace(_request(arch, block, card.tensor_cores), budget=budget, rates=card_rates(card))
    choice = choose(request)
    taken = choice.plan.predicted
    assert taken.device_bytes is not None
    assert taken.device_bytes + budget.others_bytes + budget.margin_bytes <= card.memory_bytes
    (source, total), *parts = memory_table(choice)
    assert (source, total) == (card.name, card.memory_bytes)
    assert sum(size for _, size in parts) == total
    assert all(size >= 0 for _, size in parts)
    assert choice.plan.exact
    assert choice.plan.precision == ("amp" if card.tensor_cores else "fp32")
    assert card.name in in_full(choice)


def test_a_plan_for_a_card() -> None:
    _plan("res20", "basic", load_card("gtx1060-6g"))


@pytest.mark.slow
@pytest.mark.parametrize("name", profile_names("cards"))
@pytest.mark.parametrize(("arch", "block"), NETWORKS)
def test_a_plan_for_every_card_and_network(arch: str, block: str, name: str) -> None:
    _plan(arch, block, load_card(name))
