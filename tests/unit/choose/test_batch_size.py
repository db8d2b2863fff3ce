"""Plans and shares for several cards, all of them planned here; shares of the batch by predicted seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.choose.batch_size import ROUNDS, BatchSplit, balance, describe_split
from lowmem.choose.decide import decide
from lowmem.config.processes import cards_of, for_process
from lowmem.config.schema import Config
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import Infeasible, UsageError

FIXED = ("train.precision=fp32", "train.memory_format=contiguous")  # a decision is planned for each pair of these


def plan_cards(card: str, *sets: str) -> tuple[Settings, BatchSplit]:
    net = ("model.arch=res20", "model.width=16", "train.device=cpu", f"memory.card={card}")
    decided = decide(gather(sets=[*net, *sets]), on_paper=True)
    assert decided.planned is not None
    return decided.settings, decided.planned


@pytest.mark.slow
def test_unlike_cards_take_unlike_shares() -> None:
    found, divided = plan_cards("gtx1050ti,gtx1070", *FIXED)
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


@pytest.mark.slow
def test_one_precision_and_format_for_all() -> None:
    """A card with tensor cores and one without want different ones."""
    found, divided = plan_cards("gtx1060-6g,rtx3060-12g")
    plans = [divided.choices[rank].plan for rank in range(2)]
    assert len({(plan.precision, plan.memory_format) for plan in plans}) == 1
    assert found.config.train.precision == plans[0].precision


def test_communicators_have_their_part_of_the_card() -> None:
    _, divided = plan_cards("gtx1060-6g,gtx1060-6g", *FIXED)
    budget = divided.choices[0].budget
    assert ("NCCL communicators (assumed)", budget.communicator_bytes) in budget.terms()
    assert sum(size for _, size in budget.rows()[:-1]) == budget.tensor_bytes
    assert divided.shares == (64, 64)


@pytest.mark.parametrize("sets", [("memory.allow_accumulation=false",), pytest.param((), marks=pytest.mark.slow)])
def test_a_batch_that_fits_nowhere(sets: tuple[str, ...]) -> None:
    with pytest.raises(Infeasible, match="process 0 with 64 pictures"):
        plan_cards("gtx1060-6g,gtx1060-6g", *FIXED, "memory.vram=1200M", "model.width=256", *sets)


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


def seconds(*costs: tuple[float, float, int]) -> Callable[[tuple[int, ...]], Sequence[float | None]]:
    """(of a step, of a picture, most pictures) of each process."""

    def predict(shares: tuple[int, ...]) -> list[float | None]:
        taken: list[float | None] = []
        for share, (step, picture, most) in zip(shares, costs, strict=True):
            taken.append(None if share > most else (step + picture * share if share else 0.0))
        return taken

    return predict


def test_like_processes_keep_even_shares_after_one_look() -> None:
    looks: list[tuple[int, ...]] = []

    def predict(shares: tuple[int, ...]) -> list[float]:
        looks.append(shares)
        return [0.1 + 0.01 * share for share in shares]

    found = balance(128, 2, predict)
    assert found is not None
    assert found.shares == (64, 64)
    assert looks == [(64, 64)]


def test_a_card_twice_as_fast_takes_twice_as_much() -> None:
    found = balance(120, 2, seconds((0, 0.02, 999), (0, 0.01, 999)))
    assert found is not None
    assert found.shares == (40, 80)
    assert found.step_seconds == pytest.approx(0.8)


def test_what_does_not_fit_goes_to_the_others() -> None:
    found = balance(128, 2, seconds((0, 0.01, 40), (0, 0.01, 999)))
    assert found is not None
    assert found.shares[0] <= 40
    assert sum(found.shares) == 128


def test_a_process_may_have_nothing() -> None:
    found = balance(8, 2, seconds((0, 0.01, 0), (0, 0.01, 8)))
    assert found is not None
    assert found.shares == (0, 8)


def test_nothing_fits() -> None:
    assert balance(128, 2, seconds((0, 0.01, 40), (0, 0.01, 40))) is None


@given(
    st.integers(1, 300),
    st.lists(st.tuples(st.floats(0, 0.1), st.floats(1e-3, 1e-1), st.just(9999)), min_size=1, max_size=5),
)
def test_never_worse_than_even_shares_and_soon_found(batch: int, costs: list[tuple[float, float, int]]) -> None:
    looks = 0
    predict = seconds(*costs)

    def counted(shares: tuple[int, ...]) -> Sequence[float | None]:
        nonlocal looks
        looks += 1
        assert sum(shares) == batch
        return predict(shares)

    from lowmem.distributed.group import even_shares

    found = balance(batch, len(costs), counted)
    assert found is not None
    even = [taken for taken in predict(even_shares(batch, len(costs))) if taken is not None]
    assert found.step_seconds <= max(even) + 1e-12
    assert looks <= ROUNDS


def test_as_much_as_fits_and_not_half_of_it() -> None:
    found = balance(128, 2, seconds((0, 0.005, 60), (0, 0.020, 999)))
    assert found is not None
    assert found.shares == (60, 68)
    tight = balance(32, 2, seconds((0, 0.01, 15), (0, 0.01, 20)))
    assert tight is not None
    assert sum(tight.shares) == 32
    assert tight.shares[0] <= 15


@given(st.integers(2, 200), st.lists(st.integers(0, 120), min_size=2, max_size=5))
def test_what_fits_is_found(batch: int, limits: list[int]) -> None:
    """Also where nearly every picture of room is needed."""
    found = balance(batch, len(limits), seconds(*((0.01, 0.01, most) for most in limits)))
    if found is None:
        assert sum(limits) < batch
    else:
        assert sum(found.shares) == batch
        assert all(share <= most for share, most in zip(found.shares, limits, strict=True))
