"""Labels at the ends of curves: near their place, in order, apart, inside."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.report.labels import spread


def test_labels_that_do_not_touch_stay() -> None:
    assert spread([10, 50, 30], gap=10, low=0, high=100) == [10, 50, 30]


def test_two_on_one_place_move_apart_alike() -> None:
    assert spread([50, 50], gap=10, low=0, high=100) == [45, 55]


def test_a_pushed_label_pushes_its_neighbour() -> None:
    assert spread([50, 52, 61], gap=10, low=0, high=100) == pytest.approx([44.333, 54.333, 64.333], abs=0.01)


def test_edges_hold() -> None:
    assert spread([0, 0, 0], gap=10, low=0, high=100) == [0, 10, 20]
    assert spread([100, 99], gap=10, low=0, high=100) == [100, 90]


def test_too_many_share_the_room() -> None:
    assert spread([5, 5, 5], gap=10, low=0, high=10) == [0, 5, 10]


def test_nothing() -> None:
    assert spread([], gap=10, low=0, high=10) == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_always_apart_in_order_and_inside(wanted: list[float]) -> None:
    placed = spread(wanted, gap=8, low=0, high=100)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in placed)
    assert all(after - before >= 8 - 1e-9 for before, after in pairwise(sorted(placed)))
    by_wish = [place for _, place in sorted(zip(wanted, placed, strict=True))]
    assert by_wish == sorted(by_wish)
