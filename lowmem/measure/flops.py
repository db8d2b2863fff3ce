"""Floating-point operations of real code, counted where they are dispatched, by the library's own formulas.

The library's counter follows modules with hooks, and these keep tensors alive (a step under per-block checkpointing
takes nearly twice its memory under it), which under a capped allocator ends in out-of-memory. This one holds nothing.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopMeter(TorchDispatchMode):
    """Context manager. `flops`: of all that ran inside it, recomputation included; a multiplication and its addition
    are two."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        return result
