"""Seconds of a call on a device: warmed up, several rounds, their median and spread.

A round is `inner` calls back to back and one wait at its end, so that the wait and the clock's grain weigh little. On
CUDA a pair of events marks its two ends. They tell the card's time only as long as the host is ahead of the card: calls
of kernels so small that launching them takes longer than running them are timed with their launches, which is what
they cost in a training step too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

_MOST_INNER = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: median, least and most over `rounds` rounds of `inner` calls each."""

    median_seconds: float
    least_seconds: float
    most_seconds: float
    rounds: int
    inner: int


def time_calls(
    call: Callable[[], object],
    device: str,
    *,
    warmup: int = 2,
    rounds: int = 5,
    inner: int | None = None,
    least_seconds: float = 0.01,
    clock: Callable[[], float] | None = None,
) -> Timing:
    """Times `call` on `cpu` or `cuda` (torch's current device and stream), after `warmup` calls that do not count.

    `clock`: on the CPU; None is `time.perf_counter`. `time.process_time` does not count what other processes take, but
    counts every thread.

    `inner`: calls a round; None finds the number with which a round takes at least `least_seconds` (at most a million
    calls). Raises ValueError for numbers below one (warmup: zero) and other devices, and whatever `call` raises.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"no clock for the device {device!r}: cpu or cuda")
    if warmup < 0 or rounds < 1 or (inner is not None and inner < 1):
        raise ValueError(f"warmup={warmup}, rounds={rounds}, inner={inner}: at least 0, 1 and 1")
    one_round = _cuda_round if device == "cuda" else partial(_cpu_round, clock or time.perf_counter)
    for _ in range(warmup):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    if inner is None:
        inner = _enough(call, one_round, least_seconds)
    seconds = [one_round(call, inner) / inner for _ in range(rounds)]
    return Timing(
        median_seconds=statistics.median(seconds),
        least_seconds=min(seconds),
        most_seconds=max(seconds),
        rounds=rounds,
        inner=inner,
    )


def _enough(
    call: Callable[[], object], one_round: Callable[[Callable[[], object], int], float], least_seconds: float
) -> int:
    """Tries growing numbers: the first call may still be a slow one, and tells little of the others."""
    inner = 1
    while inner < _MOST_INNER:
        took = one_round(call, inner)
        if took >= least_seconds:
            break
        growth = 1.2 * least_seconds / took if took > 0 else 10.0
        inner = min(_MOST_INNER, math.ceil(inner * min(10.0, max(1.2, growth))))
    return inner


def _cpu_round(clock: Callable[[], float], call: Callable[[], object], inner: int) -> float:
    began = clock()
    for _ in range(inner):
        call()
    return clock() - began


def _cuda_round(call: Callable[[], object], inner: int) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(inner):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000  # milliseconds
