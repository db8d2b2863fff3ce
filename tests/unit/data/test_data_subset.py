from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.data import choose_balanced, class_shares


def test_the_largest_remainders_get_the_rest() -> None:
    # 10 * (53, 24, 23) / 100 = 5.3, 2.4, 2.3: the one left goes to 2.4
    assert class_shares([53, 24, 23], 10) == [5, 3, 2]
    assert class_shares([5, 5, 5], 4) == [2, 1, 1]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.data())
def test_shares_add_up_and_are_within_one_of_the_quota(counts: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, sum(counts)))
    shares = class_shares(counts, count)
    assert sum(shares) == count
    for share, have in zip(shares, counts, strict=True):
        assert 0 <= share <= have
        assert abs(share * sum(counts) - count * have) < max(1, sum(counts))


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 200))
def test_a_choice_is_rising_balanced_and_repeatable(key: int, count: int) -> None:
    labels = np.arange(200) % 4
    chosen = choose_balanced(labels, 4, count, key)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    assert np.ptp(np.bincount(labels[chosen], minlength=4)) <= 1
    assert (chosen == choose_balanced(labels, 4, count, key)).all()


def test_another_key_chooses_others() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    assert len(np.intersect1d(choose_balanced(labels, 1, 100, 1), choose_balanced(labels, 1, 100, 2))) < 40


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="11 of 10"):
        class_shares([4, 6], 11)
