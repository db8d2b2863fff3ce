"""Memory of the current CUDA device, from the caching allocator and the driver."""

from __future__ import annotations

import torch


def reset() -> None:
    """Starts new peaks."""
    torch.cuda.reset_peak_memory_stats()


def read() -> tuple[int, int, int]:
    """(peak allocated, peak reserved, in use on the card now) in bytes."""
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free
