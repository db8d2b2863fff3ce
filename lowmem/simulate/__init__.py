"""Predicts bytes without a GPU, by running the real code on fake tensors."""

from lowmem.simulate.allocator import Allocator, DeviceFull
from lowmem.simulate.step import Simulated, StepRun, StepShape, empty_copy, simulate_step, trace_steps
from lowmem.simulate.trace import Call, Estimate, Kind, MemoryEvent, Recorder, Trace, estimate

__all__ = [
    "Allocator",
    "Call",
    "DeviceFull",
    "Estimate",
    "Kind",
    "MemoryEvent",
    "Recorder",
    "Simulated",
    "StepRun",
    "StepShape",
    "Trace",
    "empty_copy",
    "estimate",
    "simulate_step",
    "trace_steps",
]
