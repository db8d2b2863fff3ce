"""Plans and shares for several cards, all of them planned here."""

from __future__ import annotations

import pytest

from lowmem.choose.batch_split import BatchSplit, describe_split
from lowmem.choose.decide import decide
from lowmem.config.schema import Config, cards_of, for_process
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import Infeasible, UsageError


def plan_cards(card: str, **flags: object) -> tuple[Settings, BatchSplit]:
    net = {"model.arch": "res20", "model.width": 16, "train.device": "cpu", "memory.card": card}
    decided = decide(gather(flags={**net, **flags}), on_paper=True)
    assert decided.planned is not None
    return decided.settings, decided.planned


def test_unlike_cards_take_unlike_shares() -> None:
    found, divided = plan_cards("gtx1050ti,gtx1070", **{"train.precision": "fp32"})
    small, large = divided.shares
    assert small + large == 128
    assert 2.2 < large / small < 3.6, "a GTX 1070 has 2.3 times the bandwidth and 3 times the rate"
    assert divided.seconds[0] == pytest.approx(divided.seconds[1], rel=0.05)
    for rank, share in enumerate((small, large)):
        plan = divided.choices[rank].plan
        assert (plan.batch, plan.shares, plan.effective_batch) == (share, (small, large), 128)
    lines = describe_split(divided, ["A", "B"])
    assert "batch 128 over 2 processes" in lines[0]
    assert f"{large} pictures" in lines[2]
    assert found.config.train.batch == 128


def test_one_precision_and_format_for_all() -> None:
    """A card with tensor cores and one without want different ones."""
    found, divided = plan_cards("gtx1060-6g,rtx3060-12g")
    plans = [divided.choices[rank].plan for rank in range(2)]
    assert len({(plan.precision, plan.memory_format) for plan in plans}) == 1
    assert found.config.train.precision == plans[0].precision


def test_communicators_have_their_part_of_the_card() -> None:
    _, divided = plan_cards("gtx1060-6g,gtx1060-6g")
    budget = divided.choices[0].budget
    assert ("NCCL communicators (assumed)", budget.communicator_bytes) in budget.terms()
    assert sum(size for _, size in budget.rows()[:-1]) == budget.tensor_bytes
    assert divided.shares == (64, 64)


def test_a_batch_that_fits_nowhere() -> None:
    with pytest.raises(Infeasible, match="process 0 with 64 pictures"):
        plan_cards("gtx1060-6g,gtx1060-6g", **{"memory.vram": "1200M", "model.width": 256})


def test_cards_by_rank() -> None:
    config = Config.model_validate({"memory": {"card": "gtx1060-6g, rtx2060"}})
    assert cards_of(config) == ("gtx1060-6g", "rtx2060")
    assert [for_process(config, rank, 2).memory.card for rank in range(2)] == ["gtx1060-6g", "rtx2060"]
    one = Config.model_validate({"memory": {"card": "rtx2060"}})
    assert [for_process(one, rank, 3).memory.card for rank in range(3)] == ["rtx2060"] * 3
    with pytest.raises(UsageError, match="2 cards, for 1 process"):
        for_process(config, 0, 1)
    with pytest.raises(UsageError, match="2 cards, for 3 processes"):
        for_process(config, 0, 3)
