"""Seconds of a call on a device: warmed up, several rounds, their median and least.

A round is `inner` calls back to back and one wait at its end, so that the wait and the clock's grain weigh little. On
CUDA a pair of events marks its two ends. Kernels so small that launching them takes longer than running them are timed
with their launches, which is what they cost in a training step too; `busy_seconds` is what the card computes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_MOST_INNER = 1_000_000
_WAKING_SECONDS, _WAKING_SIDE = 0.5, 2048
# Above this share of a call's seconds the host's launching is what takes them: the rest is the round's own wait.
BOUND_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call, over the rounds."""

    median_seconds: float
    least_seconds: float
    launch_seconds: float  # the median of the host's share: all of a call on the CPU, on CUDA until it is issued
    inner: int  # calls a round

    @property
    def bound_by_host(self) -> bool:
        """Whether less work for the host would make the call faster."""
        return self.launch_seconds >= BOUND_SHARE * self.median_seconds


def time_calls(
    call: Callable[[], object],
    device: str,
    *,
    warmup: int = 2,
    rounds: int = 5,
    least_seconds: float = 0.01,
    clock: Callable[[], float] | None = None,
) -> Timing:
    """Times `call` on `cpu` or `cuda` (torch's current device and stream), after `warmup` calls that do not count, in
    rounds of as many calls as take at least `least_seconds` (at most a million).

    `clock`: on the CPU; None is `time.perf_counter`. `time.process_time` does not count what other processes take, but
    counts every thread. Raises ValueError for senseless numbers and other devices, and whatever `call` raises.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"no clock for the device {device!r}: cpu or cuda")
    if warmup < 0 or rounds < 1:
        raise ValueError(f"warmup={warmup}, rounds={rounds}: at least 0 and 1")
    if device == "cuda":
        _wake_card()
    one_round = _cuda_round if device == "cuda" else partial(_cpu_round, clock or time.perf_counter)
    for _ in range(warmup):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    inner = 1
    # Growing numbers: the first call may still be a slow one, and tells little of the others.
    while inner < _MOST_INNER and (took := one_round(call, inner)[0]) < least_seconds:
        growth = 1.2 * least_seconds / took if took > 0 else 10.0
        inner = min(_MOST_INNER, math.ceil(inner * min(10.0, max(1.2, growth))))
    found = [one_round(call, inner) for _ in range(rounds)]
    return Timing(
        median_seconds=statistics.median(took / inner for took, _ in found),
        least_seconds=min(took / inner for took, _ in found),
        launch_seconds=statistics.median(launching / inner for _, launching in found),
        inner=inner,
    )


def _cpu_round(clock: Callable[[], float], call: Callable[[], object], inner: int) -> tuple[float, float]:
    """Seconds of `inner` calls, and those that the host took to issue them."""
    began = clock()
    for _ in range(inner):
        call()
    took = clock() - began
    return took, took


def _cuda_round(call: Callable[[], object], inner: int) -> tuple[float, float]:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    issuing = time.perf_counter()
    for _ in range(inner):
        call()
    launching = time.perf_counter() - issuing
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000, launching  # milliseconds


@cache
def _wake_card() -> None:
    """Half a second of matrix products, once a process: an idle card takes that long to raise its clocks."""
    a = torch.zeros(_WAKING_SIDE, _WAKING_SIDE, device="cuda")
    out = torch.empty_like(a)
    ends = time.perf_counter() + _WAKING_SECONDS
    while time.perf_counter() < ends:
        torch.mm(a, a, out=out)
        torch.cuda.synchronize()


def busy_seconds(call: Callable[[], object], device: str) -> float | None:
    """Seconds of `call` in which the device (`cpu` or `cuda`) runs operations or kernels; overlapping ones count once.

    None where the profiler tells of none: it is built without the card's part, or not permitted to see the card."""
    on_card = device == "cuda"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as seen:
            call()
            if on_card:
                torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # the latter: nothing of what was asked for can be profiled
        return None
    return covered_seconds(seen.events() or (), DeviceType.CUDA if on_card else DeviceType.CPU)


def covered_seconds(events: Iterable[Any], kind: DeviceType) -> float | None:
    """Seconds that the events of a kind of device cover (the profiler's have microseconds); None if there are none.
    Names that the user or an optimizer gives to a stretch of time (annotations) are no work."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == kind and not event.is_user_annotation
    )
    covered = end = 0.0
    for begins, ends in spans:
        covered += max(0.0, ends - max(begins, end))
        end = max(end, ends)
    return covered / 1e6 if spans else None
