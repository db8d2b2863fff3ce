"""The time left of a job, from what was measured."""

from __future__ import annotations

from lowmem.reproduce.eta import Pace, epoch_seconds_of, seconds_left


def test_nothing_is_known_before_something_was_measured() -> None:
    assert seconds_left([Pace(1.0, 10), Pace(3.0, 10)]) is None
    assert epoch_seconds_of(Pace(1.0, 10), []) is None


def test_a_measured_run_counts_as_measured() -> None:
    assert seconds_left([Pace(1.0, 10, 7.0), Pace(3.0, 2, 20.0)]) == 70 + 40


def test_others_are_scaled_from_the_nearest() -> None:
    small, large = Pace(1.0, 0, 10.0), Pace(6.0, 0, 90.0)
    assert epoch_seconds_of(Pace(1.2, 5), [small, large]) == 12.0
    assert epoch_seconds_of(Pace(5.0, 5), [small, large]) == 75.0
    # What is finished takes no time, and still tells of the others.
    assert seconds_left([small, large, Pace(3.0, 2)]) == 2 * 45.0


def test_nothing_is_left_and_nothing_is_negative() -> None:
    assert seconds_left([Pace(1.0, 0), Pace(2.0, 0, 5.0)]) == 0
    assert seconds_left([Pace(1.0, -1, 5.0)]) == 0
