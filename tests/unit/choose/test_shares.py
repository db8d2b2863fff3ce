"""Shares of the batch by predicted seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.choose.batch_split import ROUNDS, balance


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

    from lowmem.distributed.split import even_shares

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
