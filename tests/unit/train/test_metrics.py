"""The time eta."""

from __future__ import annotations

from lowmem.train.metrics import Eta


def test_nothing_measured_is_unknown() -> None:
    assert Eta(3, 10).seconds(0, 0) is None


def test_a_resume_late_in_a_run_has_the_right_time_left_at_once() -> None:
    eta = Eta(epochs=100, steps_per_epoch=10)
    # 95 epochs were done by another process, whose hours must not be divided in here.
    eta.trained(950, now=5.0)
    eta.trained(955, now=10.0)
    assert eta.seconds(95, 955) == 45.0
    eta.evaluated(2.0)
    assert eta.seconds(96, 960) == 40.0 + 4 * 2.0


def test_an_evaluation_is_not_taken_for_a_slow_step() -> None:
    eta = Eta(epochs=2, steps_per_epoch=10)
    eta.trained(0, now=0.0)
    eta.trained(10, now=10.0)
    eta.evaluated(100.0)
    eta.trained(10, now=110.0)
    eta.trained(15, now=115.0)
    assert eta.seconds(1, 15) == 5.0 + 100.0


def test_it_is_never_negative() -> None:
    eta = Eta(epochs=1, steps_per_epoch=1)
    eta.trained(0, now=0.0)
    eta.trained(5, now=5.0)
    assert eta.seconds(3, 5) == 0.0
