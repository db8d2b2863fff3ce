"""Predicts bytes without a GPU, by running the real code on tensors that have no data."""

from lowmem.simulate.effects import OutlineMode
from lowmem.simulate.step import Simulated, StepRun, StepShape, StepSimulator, empty_copy, simulate_step, trace_steps
from lowmem.simulate.trace import Call, Kind, MemoryEvent, Recorder, Trace, estimate

__all__ = ["Call", "Kind", "MemoryEvent", "OutlineMode", "Recorder", "Simulated", "StepRun", "StepShape"]
__all__ += ["StepSimulator", "Trace", "empty_copy", "estimate", "simulate_step", "trace_steps"]
