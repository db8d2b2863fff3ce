"""How long a device computes in a call, by the library's profiler: the rest of the call it waits for the host.

A card waits where kernels are so small that launching them takes longer than running them. What is compared there is
the launching, whatever the kernels cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


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
