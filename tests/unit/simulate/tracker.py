"""An independent measure of a step on real tensors: the CPU allocator's own records, as the profiler
keeps them.

What a convolution or batch norm allocates and frees inside itself is left out: the library's workspace
and reordered copies depend on the processor, and a CPU's batch norm backward allocates its result twice
and drops the first at once, untouched. They are no tensors of the step, and the plan has a separate
allowance for workspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KERNELS = ("aten::convolution", "aten::conv2d", "aten::native_batch_norm")


def measured_peak_bytes(work: Callable[[], object]) -> int:
    """The most that existed at once of what `work` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = list(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    events.sort(key=lambda event: event[0])
    skipped = _inside_kernels(events)
    live = peak = 0
    for index, (_, _, size, _) in enumerate(events):
        if index not in skipped:
            live += size
            peak = max(peak, live)
    return peak


def _allocations(roots: list[Any]) -> Iterator[tuple[int, int, int, int | None]]:
    """(time, address, bytes, number of the kernel it is inside of, if any)."""
    stack: list[tuple[Any, int | None]] = [(root, None) for root in roots]
    while stack:
        event, inside = stack.pop()
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size, inside
        if inside is None and event.name.startswith(KERNELS):
            inside = event.id
        stack += [(child, inside) for child in event.children]


def _inside_kernels(events: list[tuple[int, int, int, int | None]]) -> set[int]:
    """Indices of allocations and frees that belong to each other and to one kernel."""
    born: dict[int, int] = {}
    skipped: set[int] = set()
    for index, (_, address, size, inside) in enumerate(events):
        if size > 0:
            born[address] = index
        elif (start := born.pop(address, None)) is not None and inside is not None and events[start][3] == inside:
            skipped |= {start, index}
    return skipped
