"""A memory budget that other people's searches run into unchanged: on the CPU a count of tensors that refuses, on CUDA
the caching allocator, capped."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowmem.choose.request import ASSUMED_CONTEXT_BYTES
from lowmem.measure import Meter
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.outline import is_outline
from lowmem.measure.tensors import TensorMeter


class TensorBudget(TensorMeter):
    """Refuses every tensor with which more than `limit_bytes` would be alive, in the words of the CPU's own allocator.

    Counted is the storage of every tensor that an operation returns, once, until nothing refers to it any more:
    parameters, momentum, gradients, activations, what autograd keeps for the backward pass, and what the backward pass
    makes (on the CPU it runs in the calling thread, and this mode with it). A batch counts from `Place.put` on, as if
    it were copied to a device. Not counted: buffers inside a kernel (the convolution library's workspace), what other
    threads make, rounding and fragmentation, what is `exempt`, and what is made while `paused`.

    An operation is done by the time its result is refused, so the process itself may take more for a moment. A refusal
    leaves everything as it was, `live_bytes` and `peak_bytes` too. It costs a Python call per operation.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.refusals = 0
        self.paused = False

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before. Raises RuntimeError if that is too much."""
        before = self.live_bytes
        super().adopt(tensors)
        if self._over(before):
            self._refuse(self.live_bytes - before)

    def exempt(self, tensors: Iterable[Tensor]) -> None:
        """These and all views of them count for nothing; not for tensors that were counted already."""
        for tensor in tensors:
            self._exempt(tensor.untyped_storage())

    def _exempt(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata

        def gone(_: object) -> None:
            self._known.pop(address, None)

        self._known[address] = 0, weakref.ref(storage, gone)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        live, peak = self.live_bytes, self.peak_bytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._over(live):
            asked = self.live_bytes - live
            del result
            self.peak_bytes = peak
            self._refuse(asked)
        return result

    def _see(self, tensor: Tensor, operation: str) -> int:
        """Without those that have no memory of their own: a simulation may run under this."""
        own = tensor.device.type != "meta" and not is_outline(tensor)
        return super()._see(tensor, operation) if own else 0

    def _over(self, before_bytes: int) -> bool:
        return self.limit_bytes is not None and self.live_bytes > max(self.limit_bytes, before_bytes)

    def _refuse(self, asked_bytes: int) -> NoReturn:
        """What torch raises when the C library has no more (c10/core/impl/alloc_cpu.cpp): the searches know it."""
        self.refusals += 1
        raise RuntimeError(
            f"[tensor budget of {self.limit_bytes} bytes] DefaultCPUAllocator: can't allocate memory: you tried to "
            f"allocate {asked_bytes} bytes. Error code 12 (Cannot allocate memory)"
        )


class Place:
    """Where one cell computes, as a context manager: the CPU under a `TensorBudget`, or a CUDA device whose allocator
    is capped so that its segments and the context stay within the budget (an emulated card: libraries choose their
    algorithms by what is free, which is more here than on a real small one).

    `budget_bytes` None: no limit. On the CPU the tensors are then not even counted.
    """

    def __init__(self, device: str, budget_bytes: int | None) -> None:
        self.device = device
        self.phase = "setting up"  # for whoever has to say where it failed
        self._budget_bytes = budget_bytes
        self._count = TensorBudget(budget_bytes) if device == "cpu" and budget_bytes is not None else None
        self._entered = ExitStack()

    def __enter__(self) -> Place:
        if self._count is not None:
            self._entered.enter_context(self._count)
        elif self.device == "cuda" and self._budget_bytes is not None:
            torch.cuda.init()
            context = Meter("cuda").read().context_bytes or ASSUMED_CONTEXT_BYTES
            if not cap_allocator(self._budget_bytes - context):
                raise ValueError("the budget is not below the card's memory: nothing would be tried under it")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    @contextmanager
    def host(self) -> Iterator[None]:
        """What is made in here lies on the host. (On the CPU nothing else tells it from what lies on the device.)"""
        if self._count is None:
            yield
            return
        before, self._count.paused = self._count.paused, True
        try:
            yield
        finally:
            self._count.paused = before

    def put(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Host tensors -> the same on the device, counted."""
        if self._count is not None:
            self._count.adopt(tensors)
        return tuple(tensor.to(self.device) for tensor in tensors)

    def exempt(self, *tensors: Tensor) -> None:
        """See `TensorBudget.exempt`; nothing to do on CUDA, where the host's tensors are told apart."""
        if self._count is not None:
            self._count.exempt(tensors)

    @property
    def live_bytes(self) -> int | None:
        """Of tensors on the device; None where nobody counts."""
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        return None if self._count is None else self._count.live_bytes

    @property
    def peak_bytes(self) -> int | None:
        """The most since `reset_peak`."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return None if self._count is None else self._count.peak_bytes

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self._count is not None:
            self._count.peak_bytes = self._count.live_bytes

    @property
    def refusals(self) -> int:
        """How often memory ran out so far."""
        if self.device == "cuda":
            return int(torch.cuda.memory_stats().get("num_ooms", 0))
        return 0 if self._count is None else self._count.refusals
