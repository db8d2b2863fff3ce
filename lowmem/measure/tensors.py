"""The peak of real tensors on any device, counted where they are made: what the CPU's allocator does not tell.

Storages are counted once, from their first appearance to their end, views for nothing. Buffers inside a kernel are not
seen (the convolution library's workspace). It costs a Python call per operation, so it is for a few steps only.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMeter(TorchDispatchMode):
    """Context manager; may be entered several times. `peak_bytes`: the most that existed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

        def gone(_: object) -> None:
            self._known.pop(address, None)
            self.live_bytes -= size

        self._known[address] = weakref.ref(storage, gone)
