"""Predicts bytes without a GPU, by running the real code on fake tensors."""

from lowmem.simulate.allocator import Allocator, DeviceFull
from lowmem.simulate.step import Loop, empty_copy, trace_steps, warm_up
from lowmem.simulate.trace import Call, Estimate, KernelWork, Kind, MemoryEvent, Recorder, Trace, estimate

__all__ = [
    "Allocator",
    "Call",
    "DeviceFull",
    "Estimate",
    "KernelWork",
    "Kind",
    "Loop",
    "MemoryEvent",
    "Recorder",
    "Trace",
    "empty_copy",
    "estimate",
    "trace_steps",
    "warm_up",
]
