"""Verdicts, and how processes agree on the strongest."""

from __future__ import annotations

import itertools

import pytest

from lowmem.train.signals import NAMES
from lowmem.train.watchers import Act, Verdict, strongest

SAVE, SHORT = Verdict(Act.SAVE), Verdict(Act.REPLAN, "the allocator thrashes")
SIGNALS = [Verdict(Act.LEAVE, name) for name in NAMES]
SENT = [Verdict(), SAVE, SHORT, *SIGNALS]


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


def test_each_in_its_own_words() -> None:
    assert Verdict.of(SHORT.code, SHORT) == SHORT
    assert Verdict.of(SHORT.code, SAVE) == Verdict(Act.REPLAN, "another process is short of it")
