"""Memory trouble without an error, on scripted readings."""

from __future__ import annotations

from dataclasses import replace

from lowmem.measure import Snapshot
from lowmem.train.watchers import FIRST, Act, MemoryPressure, Verdict

FREE, FULL = 2_000, 100  # of 6,000


class Device:
    """What the watcher is shown, interval by interval."""

    def __init__(self, free_bytes: int | None = FREE, *, spills: bool = False, retries: int = 0) -> None:
        self.now = Snapshot(alloc_retries=retries, device_free_bytes=free_bytes, device_total_bytes=6_000)
        self.pressure = MemoryPressure(self.now, spills=spills)

    def interval(self, seconds: float, retries: int = 0, steps: int = 10) -> Verdict:
        """`retries` more of them in so many steps."""
        self.now = replace(self.now, alloc_retries=(self.now.alloc_retries or 0) + retries)
        return self.pressure.look(steps, seconds, self.now)


def _learned(free_bytes: int = FREE, *, spills: bool = False, retries: int = 0) -> Device:
    device = Device(free_bytes, spills=spills)
    for _ in range(FIRST + 5):
        assert device.interval(10.0, retries) == Verdict()
    return device


def test_thrashing_takes_retries_and_slow_steps_together() -> None:
    device = _learned()
    assert [device.interval(100.0) for _ in range(5)] == [Verdict()] * 5  # slow alone
    device = _learned()
    assert [device.interval(11.0, 30) for _ in range(5)] == [Verdict()] * 5  # retries alone
    device = _learned()
    assert device.interval(20.0, 30) == Verdict()  # once is an accident
    verdict = device.interval(20.0, 30)
    assert verdict.act is Act.REPLAN
    assert "3.00 times a step (0.00 at first)" in verdict.why


def test_a_run_that_always_retried_is_left_alone() -> None:
    device = _learned(retries=30)
    assert [device.interval(20.0, 30) for _ in range(5)] == [Verdict()] * 5


def test_accidents_that_are_not_in_a_row() -> None:
    device = _learned()
    for _ in range(10):
        assert device.interval(20.0, 30) == Verdict()
        assert device.interval(10.0) == Verdict()


def test_spilling_takes_a_full_card_whose_driver_spills() -> None:
    for free, spills, expected in ((FULL, True, True), (FREE, True, False), (FULL, False, False)):
        device = _learned(free, spills=spills)
        assert device.interval(35.0) == Verdict()
        assert (device.interval(35.0).act is Act.REPLAN) is expected


def test_after_a_change_of_plan_everything_is_learned_anew() -> None:
    device = _learned()
    assert [device.interval(20.0, 30).act for _ in range(2)] == [Act.CONTINUE, Act.REPLAN]
    device.pressure.plan_changed()
    # As slow as before, and still retrying: nothing tells that a smaller plan would help.
    assert [device.interval(20.0, 30) for _ in range(FIRST + 5)] == [Verdict()] * (FIRST + 5)


def test_the_first_intervals_are_no_evidence() -> None:
    device = Device(FULL, spills=True)
    assert [device.interval(seconds, 100) for seconds in (1.0, 50.0, 500.0)[:FIRST]] == [Verdict()] * FIRST


def test_a_device_that_tells_nothing_is_never_under_pressure() -> None:
    device = Device(None, spills=True)
    assert [device.interval(seconds) for seconds in (1.0,) * 10 + (1000.0,) * 10] == [Verdict()] * 20


def test_retries_are_told_when_their_number_has_doubled() -> None:
    device = Device(retries=7)  # of whoever used the process before
    told = []
    for count in range(100):
        told.append(device.pressure.retries(Snapshot(alloc_retries=7 + count)))
    assert [count for count in told if count is not None] == [1, 2, 4, 8, 16, 32, 64]
    assert told[1] == 1  # the first is told at once
    assert device.pressure.retries(Snapshot()) is None


def test_an_interval_of_no_steps() -> None:
    assert _learned().interval(100.0, steps=0) == Verdict()
