"""Events -> peaks: allocated, reserved, and what the peak is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.simulate.allocator import Allocator
from lowmem.simulate.trace import Kind, Trace


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All figures are bytes.

    `peak_tensor_bytes`: the most that storages took at once. `peak_allocated_bytes`,
    `peak_reserved_bytes`: what `torch.cuda.max_memory_allocated` and `max_memory_reserved` would say.
    `at_peak_bytes`: the first by kind, at the moment of the first peak; `peak_phase` and `peak_operation`
    say when that is.
    """

    peak_tensor_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    at_peak_bytes: dict[Kind, int]
    peak_phase: str
    peak_operation: str


def estimate(trace: Trace, capacity_bytes: int | None = None) -> Estimate:
    """Plays the trace through the allocator's model. Raises `allocator.DeviceFull` if it does not fit a
    capacity."""
    kinds = trace.all_kinds()
    allocator = Allocator(capacity_bytes)
    live = dict.fromkeys(Kind, 0)
    peak, at_peak, phase, operation = 0, dict(live), "", ""
    for event in trace.events:
        live[kinds[event.storage]] += event.change_bytes
        if event.change_bytes < 0:
            allocator.free(event.storage)
            continue
        allocator.allocate(event.storage, event.change_bytes)
        if (total := sum(live.values())) > peak:
            peak, at_peak, phase, operation = total, dict(live), event.phase, event.operation
    return Estimate(
        peak_tensor_bytes=peak,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        at_peak_bytes=at_peak,
        peak_phase=phase,
        peak_operation=operation,
    )
