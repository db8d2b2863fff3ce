"""Every picture of a batch goes to one process, in order, whatever the shares and the size."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.distributed.group import Split, even_shares, weighted_shares


def test_even() -> None:
    assert even_shares(128, 2) == (64, 64)
    assert even_shares(7, 3) == (3, 2, 2)
    assert even_shares(2, 4) == (1, 1, 0, 0)


def test_weighted() -> None:
    assert weighted_shares(128, (1.0, 3.0)) == (32, 96)
    assert weighted_shares(10, (1.0, 1.0, 1.0)) == (4, 3, 3)
    assert weighted_shares(10, (0.0, 2.0)) == (0, 10)


@given(st.integers(1, 5000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_weighted_shares_are_the_whole_batch_and_nearly_in_proportion(batch: int, speeds: list[float]) -> None:
    shares = weighted_shares(batch, tuple(speeds))
    assert sum(shares) == batch
    for share, speed in zip(shares, speeds, strict=True):
        assert abs(share - batch * speed / sum(speeds)) < 1.0001


@given(st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any), st.integers(0, 300))
def test_parts_follow_each_other_and_miss_nothing(shares: list[int], size: int) -> None:
    splits = [Split(tuple(shares), rank) for rank in range(len(shares))]
    ends = [split.part(size) for split in splits]
    assert ends[0][0] == 0
    assert ends[-1][1] == size
    assert all(before[1] == after[0] for before, after in pairwise(ends))
    assert [past - first for first, past in (split.part(sum(shares)) for split in splits)] == shares
    for (first, past), share in zip(ends, shares, strict=True):
        assert abs((past - first) - size * share / sum(shares)) <= 1


def test_pieces_are_those_of_whoever_makes_most() -> None:
    split = Split((10, 4), 0, (3, 4))
    assert split.pieces(14) == 4
    assert split.pieces(1) == 1
    assert Split((5, 0)).pieces(5) == 1


@pytest.mark.parametrize(
    ("shares", "rank", "micro"), [((), 0, ()), ((0, 0), 0, ()), ((1, 1), 2, ()), ((1, 1), 0, (1,))]
)
def test_what_is_no_split(shares: tuple[int, ...], rank: int, micro: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no split"):
        Split(shares, rank, micro)
