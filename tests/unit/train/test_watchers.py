"""Verdicts, how processes agree on the strongest, and what is said of a prediction once first steps were measured."""

from __future__ import annotations

import itertools

import pytest

from lowmem.core.units import MIB
from lowmem.train.signals import NAMES
from lowmem.train.watchers import HOURS, Act, MeasuredPeak, Verdict, strongest

SAVE, SHORT = Verdict(Act.SAVE), Verdict(Act.REPLAN, "the allocator thrashes")
SIGNALS = [Verdict(Act.LEAVE, name) for name in NAMES]
SENT = [Verdict(), SAVE, SHORT, Verdict(Act.LEAVE, HOURS), *SIGNALS]


def test_a_broken_loss_is_undone_before_anything_is_saved_or_left() -> None:
    assert sorted(Act) == [Act.CONTINUE, Act.SAVE, Act.REPLAN, Act.LEAVE, Act.ROLLBACK]


def test_the_first_of_the_strongest() -> None:
    assert strongest(SAVE, *SIGNALS, SHORT) == SIGNALS[0]
    assert strongest(Verdict(), SAVE) == SAVE


@pytest.mark.parametrize(("mine", "other"), list(itertools.product(SENT, SENT)))
def test_two_processes_agree(mine: Verdict, other: Verdict) -> None:
    code = max(mine.code, other.code)
    agreed = [Verdict.of(code, one) for one in (mine, other)]
    assert agreed[0].act == agreed[1].act == strongest(mine, other).act
    assert agreed[0].code == agreed[1].code
    if agreed[0].act is Act.LEAVE:
        assert agreed[0] == agreed[1], "both name the same signal"


def test_a_signal_is_what_they_leave_for_when_the_time_is_over_too() -> None:
    over, signal = Verdict(Act.LEAVE, HOURS), SIGNALS[0]
    assert Verdict.of(max(over.code, signal.code), over) == signal


def test_each_in_its_own_words() -> None:
    assert Verdict.of(SHORT.code, SHORT) == SHORT
    assert Verdict.of(SHORT.code, SAVE) == Verdict(Act.REPLAN, "another process is short of it")


def test_on_the_cpu_only_tensors_are_known() -> None:
    found = MeasuredPeak(1000 * MIB, 1010 * MIB, 1100 * MIB)
    assert found.within
    assert found.line() == (
        "measured: 1,010 MiB of tensors at the peak of a step (predicted 1,000 MiB, +1.0%); within the budget of "
        "1,100 MiB"
    )


def test_on_a_card_each_figure_has_its_own_error() -> None:
    found = MeasuredPeak(
        predicted_peak_bytes=5000 * MIB,
        measured_peak_bytes=5100 * MIB,
        budget_bytes=5050 * MIB,
        predicted_reserved_bytes=5500 * MIB,
        measured_reserved_bytes=5445 * MIB,
        predicted_device_bytes=None,
        measured_device_bytes=5800 * MIB,
    )
    assert not found.within
    assert found.line() == (
        "measured: 5,100 MiB of tensors at the peak of a step (predicted 5,000 MiB, +2.0%), 5,445 MiB held by the "
        "allocator (predicted 5,500 MiB, -1.0%), 5,800 MiB in use on the card by this process; OVER the budget of "
        "5,050 MiB"
    )
    assert found.measured_device_bytes == 5800 * MIB
    assert found.predicted_device_bytes is None
