"""Predicts bytes without a GPU, by running the real code on fake tensors."""

from lowmem.simulate.allocator import Allocator, DeviceFull
from lowmem.simulate.estimate import Estimate, estimate
from lowmem.simulate.step import Loop, empty_copy, trace_steps, warm_up
from lowmem.simulate.trace import Call, Event, Kind, Recorder, Trace, Work

__all__ = [
    "Allocator",
    "Call",
    "DeviceFull",
    "Estimate",
    "Event",
    "Kind",
    "Loop",
    "Recorder",
    "Trace",
    "Work",
    "empty_copy",
    "estimate",
    "trace_steps",
    "warm_up",
]
