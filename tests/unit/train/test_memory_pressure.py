"""Memory trouble without an error, on scripted readings."""

from __future__ import annotations

from lowmem.train.memory_pressure import FIRST, Pressure, Reading

FREE, FULL = 2_000, 100  # of 6,000


class Device:
    """What `Pressure` reads; retries and free memory are set by the test."""

    def __init__(self, free_bytes: int = FREE) -> None:
        self.reading: Reading | None = Reading(0, free_bytes, 6_000)

    def __call__(self) -> Reading | None:
        return self.reading

    def retries(self, more: int) -> None:
        assert self.reading is not None
        self.reading = Reading(self.reading.alloc_retries + more, self.reading.free_bytes, self.reading.total_bytes)


def _learned(device: Device, *, spills: bool = False, retries: int = 0) -> Pressure:
    pressure = Pressure(device, spills=spills)
    for _ in range(FIRST + 5):
        device.retries(retries)
        assert pressure.interval(10, 10.0) is None
    return pressure


def test_thrashing_takes_retries_and_slow_steps_together() -> None:
    device = Device()
    pressure = _learned(device)
    for _ in range(5):
        assert pressure.interval(10, 100.0) is None  # slow alone
    device = Device()
    pressure = _learned(device)
    for _ in range(5):
        device.retries(30)
        assert pressure.interval(10, 11.0) is None  # retries alone
    device = Device()
    pressure = _learned(device)
    device.retries(30)
    assert pressure.interval(10, 20.0) is None  # once is an accident
    device.retries(30)
    found = pressure.interval(10, 20.0)
    assert found is not None
    assert "3.00 times a step (0.00 at first)" in found


def test_a_run_that_always_retried_is_left_alone() -> None:
    device = Device()
    pressure = _learned(device, retries=30)
    for _ in range(5):
        device.retries(30)
        assert pressure.interval(10, 20.0) is None


def test_accidents_that_are_not_in_a_row() -> None:
    device = Device()
    pressure = _learned(device)
    for _ in range(10):
        device.retries(30)
        assert pressure.interval(10, 20.0) is None
        assert pressure.interval(10, 10.0) is None


def test_spilling_takes_a_full_card_whose_driver_spills() -> None:
    for free, spills, expected in ((FULL, True, True), (FREE, True, False), (FULL, False, False)):
        pressure = _learned(Device(free), spills=spills)
        assert pressure.interval(10, 35.0) is None
        assert (pressure.interval(10, 35.0) is not None) is expected


def test_after_a_change_of_plan_everything_is_learned_anew() -> None:
    device = Device()
    pressure = _learned(device)
    for _ in range(2):
        device.retries(30)
        found = pressure.interval(10, 20.0)
    assert found is not None
    pressure.plan_changed()
    for _ in range(FIRST + 5):  # as slow as before, and still retrying: nothing tells that a smaller plan would help
        device.retries(30)
        assert pressure.interval(10, 20.0) is None


def test_the_first_intervals_are_no_evidence() -> None:
    device = Device(FULL)
    pressure = Pressure(device, spills=True)
    for seconds in (1.0, 50.0, 500.0)[:FIRST]:
        device.retries(100)
        assert pressure.interval(10, seconds) is None


def test_a_device_that_tells_nothing_is_never_under_pressure() -> None:
    device = Device()
    device.reading = None
    pressure = Pressure(device, spills=True)
    assert [pressure.interval(10, seconds) for seconds in (1.0,) * 10 + (1000.0,) * 10] == [None] * 20


def test_retries_are_told_when_their_number_has_doubled() -> None:
    device = Device()
    device.retries(7)  # of whoever used the process before
    pressure, told = Pressure(device), []
    for _ in range(100):
        told.append(pressure.retries())
        device.retries(1)
    assert [count for count in told if count is not None] == [1, 2, 4, 8, 16, 32, 64]
    assert told[1] == 1  # the first is told at once
    device.reading = None
    assert pressure.retries() is None


def test_an_interval_of_no_steps() -> None:
    pressure = _learned(Device())
    assert pressure.interval(0, 100.0) is None
