"""How calls are counted and their seconds summed up; nothing here depends on how fast the machine is."""

from __future__ import annotations

import itertools

import pytest

from lowmem.measure import timing
from lowmem.measure.timing import Timing, time_calls


class Clock:
    """A clock that only calls move on, by the next of the given seconds (the last one for ever)."""

    def __init__(self, *seconds: float) -> None:
        self.now = 0.0
        self.calls = 0
        self._seconds = itertools.chain(seconds, itertools.repeat(seconds[-1]))

    def perf_counter(self) -> float:
        return self.now

    def call(self) -> None:
        self.calls += 1
        self.now += next(self._seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Clock:
    made = Clock(*request.param)
    monkeypatch.setattr(timing, "time", made)
    return made


@pytest.mark.parametrize("clock", [(9.0, 9.0, 0.5, 0.5, 0.1, 0.3, 0.2, 0.2)], indirect=True)
def test_the_median_and_the_spread_of_a_call_without_its_warm_up(clock: Clock) -> None:
    result = time_calls(clock.call, "cpu", warmup=2, rounds=3, inner=2)
    assert (result.median_seconds, result.least_seconds, result.most_seconds) == pytest.approx((0.2, 0.2, 0.5))
    assert (result.rounds, result.inner, clock.calls) == (3, 2, 2 + 3 * 2)
    assert result.launch_seconds == result.median_seconds, "a processor computes in the call itself"
    assert result.bound_by_host


@pytest.mark.parametrize("clock", [(0.001,)], indirect=True)
def test_a_round_takes_at_least_the_seconds_asked_for(clock: Clock) -> None:
    result = time_calls(clock.call, "cpu", least_seconds=0.5)
    assert 500 <= result.inner <= 1000
    assert result.median_seconds == pytest.approx(0.001)


@pytest.mark.parametrize("clock", [(5.0, 0.001)], indirect=True)
def test_a_slow_first_call_is_warmed_away(clock: Clock) -> None:
    assert time_calls(clock.call, "cpu", warmup=1, least_seconds=0.1).inner >= 100


@pytest.mark.parametrize("clock", [(0.0,)], indirect=True)
def test_a_call_too_short_for_the_clock_comes_to_an_end(clock: Clock) -> None:
    result = time_calls(clock.call, "cpu", rounds=1)
    assert (result.inner, result.median_seconds) == (1_000_000, 0.0)


@pytest.mark.parametrize("clock", [(20.0,)], indirect=True)
def test_a_long_call_is_made_no_more_often_than_needed(clock: Clock) -> None:
    assert time_calls(clock.call, "cpu", warmup=1, rounds=2).inner == 1
    assert clock.calls == 1 + 1 + 2


def test_on_the_real_clock() -> None:
    result = time_calls(lambda: sum(range(1000)), "cpu", rounds=3, least_seconds=0.001)
    assert 0 < result.least_seconds <= result.median_seconds <= result.most_seconds


@pytest.mark.parametrize(("launching", "bound"), [(0.0, False), (0.7, False), (0.9, True), (1.0, True)])
def test_a_call_waits_for_the_host_or_for_the_card(launching: float, bound: bool) -> None:
    timing = Timing(
        median_seconds=1.0, least_seconds=1.0, most_seconds=1.0, launch_seconds=launching, rounds=1, inner=1
    )
    assert timing.bound_by_host is bound


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warmup": -1}, {"inner": 0}])
def test_senseless_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        time_calls(lambda: None, "cpu", **wrong)  # type: ignore[arg-type]


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="no clock for the device 'tpu'"):
        time_calls(lambda: None, "tpu")


def test_an_error_of_the_call_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        time_calls(lambda: 1 / 0, "cpu")
