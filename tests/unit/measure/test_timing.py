"""How calls are counted, their seconds summed up, and what a profiler's events cover: however fast the machine is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from lowmem.measure import timing
from lowmem.measure.timing import Timing, busy_seconds, covered_seconds, time_calls


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


@pytest.mark.parametrize("clock", [(9.0, 9.0, 0.6, 0.6, 0.6, 0.5, 0.5, 0.1, 0.25, 0.2, 0.2)], indirect=True)
def test_the_median_and_the_least_of_a_call_without_its_warm_up(clock: Clock) -> None:
    result = time_calls(clock.call, "cpu", warmup=2, rounds=3, least_seconds=1.0)
    assert (result.median_seconds, result.least_seconds) == pytest.approx((0.2, 0.175))
    assert (result.inner, clock.calls) == (2, 2 + 3 + 3 * 2)
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
    assert 0 < result.least_seconds <= result.median_seconds


@pytest.mark.parametrize(("launching", "bound"), [(0.0, False), (0.7, False), (0.9, True), (1.0, True)])
def test_a_call_waits_for_the_host_or_for_the_card(launching: float, bound: bool) -> None:
    timing = Timing(median_seconds=1.0, least_seconds=1.0, launch_seconds=launching, inner=1)
    assert timing.bound_by_host is bound


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warmup": -1}])
def test_senseless_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        time_calls(lambda: None, "cpu", **wrong)  # type: ignore[arg-type]


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="no clock for the device 'tpu'"):
        time_calls(lambda: None, "tpu")


def test_an_error_of_the_call_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        time_calls(lambda: 1 / 0, "cpu")


def _event(start: float, end: float, kind: DeviceType = DeviceType.CUDA, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        device_type=kind, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=annotation
    )


@pytest.mark.parametrize(
    ("events", "microseconds"),
    [
        ([_event(10, 20), _event(30, 35)], 15),
        ([_event(30, 35), _event(10, 20)], 15),
        ([_event(10, 20), _event(15, 25), _event(12, 14)], 15),  # two streams
        ([_event(10, 20), _event(0, 100, DeviceType.CPU)], 10),  # what the host does is not the card's work
        ([_event(10, 20), _event(0, 100, annotation=True)], 10),
    ],
)
def test_the_card_is_busy_wherever_a_kernel_runs(events: list[SimpleNamespace], microseconds: float) -> None:
    assert covered_seconds(events, DeviceType.CUDA) == pytest.approx(microseconds / 1e6)


def test_a_profiler_that_tells_nothing_is_not_taken_for_an_idle_card() -> None:
    assert covered_seconds([_event(0, 5, DeviceType.CPU)], DeviceType.CUDA) is None
    assert covered_seconds([], DeviceType.CUDA) is None


def test_the_profiler_sees_what_a_processor_computes() -> None:
    a = torch.randn(100, 100)
    found = busy_seconds(lambda: a @ a, "cpu")
    assert found is not None
    assert found > 0
    assert busy_seconds(lambda: None, "cpu") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_without_a_card_nothing_is_known_of_it() -> None:
    assert busy_seconds(lambda: None, "cuda") is None
