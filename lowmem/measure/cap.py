"""A larger card made to behave like a smaller one."""

from __future__ import annotations

import torch


def cap_allocator(cap_bytes: int) -> bool:
    """Lets the caching allocator of the current CUDA device hold at most `cap_bytes` in segments; the context and what
    libraries allocate on their own are not in it (pytorch/pytorch#107667). Whether there was anything to cap: on the
    CPU, and for a cap that the card does not reach, there is not."""
    if not torch.cuda.is_available():
        return False
    share = cap_bytes / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if not 0 < share < 1:
        return False
    torch.cuda.set_per_process_memory_fraction(share)
    return True
