"""Tensors and operations of code as it runs, on any device, counted where they are dispatched.

Storages are counted once, from their first appearance to their end, views for nothing. Buffers inside a kernel are not
seen (the convolution library's workspace). Operations are counted by the library's own formulas; its own counter
follows modules with hooks, which keep tensors alive (a step under per-block checkpointing takes nearly twice its
memory). It costs a Python call per operation, so it is for a few steps only.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.measure.flops import flops_of


class TensorMeter(TorchDispatchMode):
    """Context manager; may be entered several times. `live_bytes`: of the storages that exist; `peak_bytes`: the most
    at once; `flops`: of all that ran inside it, recomputation included, a multiplication and its addition being two."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}  # by address: its number
        self._numbers = count(1)

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            self._see(tensor, "adopt")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = tensors_among((result,))
        for tensor in outputs:
            self._see(tensor, str(func))
        flops = flops_of(func, args, kwargs, result)
        self.flops += flops
        self._ran(func, args, kwargs, outputs, flops)
        return result

    def _ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], flops: int) -> None:
        """Called after each operation."""

    def _see(self, tensor: Tensor, operation: str) -> int:
        """The number of the tensor's storage; a new one counts from now on."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            number = next(self._numbers)

            def gone(_: object) -> None:
                self._known.pop(address, None)
                self._change(number, -size, "")

            self._known[address] = number, weakref.ref(storage, gone)
            self._change(number, size, operation)
        return self._known[address][0]

    def _change(self, storage: int, change_bytes: int, operation: str) -> None:
        """A storage came to exist (by that operation) or ceased to."""
        self.live_bytes += change_bytes
        if self.live_bytes > self.peak_bytes:  # some ten thousand times a plan
            self.peak_bytes = self.live_bytes


# Without what the library wraps it in for torch.compile: with the first operation that imports torch._dynamo, over a
# second in the middle of a step.
TensorMeter.__torch_dispatch__ = inspect.unwrap(TensorMeter.__torch_dispatch__)  # type: ignore[method-assign]


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Those among an operation's arguments or results, in lists too. Called some ten thousand times a plan, for which
    torch's own walk through any structure takes too long."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            tensors += tensors_among(value)
    return tensors
