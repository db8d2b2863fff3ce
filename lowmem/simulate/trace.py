"""A stream of allocations and frees, and of operations, from code that runs on tensors, real ones or outlines; and its
peaks.

On outlines (`effects.OutlineMode`) nothing is computed and nothing allocated, but the code, the sizes and the lifetimes
are the real ones: the executor is its own model of memory (invariant 5). Sizes are those of storages,
so views cost nothing. Buffers inside a kernel are not seen, but for a convolution's if the recorder is told its size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.measure.flops import flops_of
from lowmem.measure.outline import Outline, OutlineStorage
from lowmem.measure.tensors import TensorMeter, tensors_among
from lowmem.plan.cost import KernelWork
from lowmem.simulate.allocator import Allocator
from lowmem.simulate.effects import effect_of

_aten = torch.ops.aten


class Kind(StrEnum):
    """What a storage is for. Buffers count as parameters, and what undoes a step too; the batch as an activation."""

    PARAMS = "params"
    GRADS = "grads"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"  # made in one phase, freed in a later one
    TEMPORARY = "temporary"  # made and freed in the same phase
    WORKSPACE = "workspace"  # inside a convolution, from the same allocator


class MemoryEvent(NamedTuple):
    """A storage comes to exist (`change_bytes` > 0) or is freed (< 0), in a phase, by an operation."""

    storage: int
    change_bytes: int
    phase: str
    operation: str


@dataclass(frozen=True, slots=True)
class Call:
    """A convolution (forward: input, weight, bias; backward: gradient, input, weight), told apart by all that the
    library chooses its algorithm by; hashable, and the same from outlines and real tensors."""

    operation: str
    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], str] | None, ...]  # shape, strides, dtype of these three
    rest: tuple[object, ...]  # stride and all that follows it


def call_of(func: Any, args: tuple[Any, ...]) -> Call | None:
    """None for anything but a convolution."""
    if func not in _CONVOLUTIONS:
        return None
    tensors = tuple(None if t is None else (tuple(t.shape), tuple(t.stride()), str(t.dtype)) for t in args[:3])
    # The sizes of the backward's bias: autograd and the executor write "none" differently.
    rest = args[4:] if func is _aten.convolution_backward.default else args[3:]
    return Call(str(func), tensors, tuple(tuple(part) if isinstance(part, (list, tuple)) else part for part in rest))


@dataclass
class Trace:
    """What happened, in order. `kinds` has the storages whose kind is known from outside."""

    events: list[MemoryEvent] = field(default_factory=list)
    work: list[KernelWork] = field(default_factory=list)
    kinds: dict[int, Kind] = field(default_factory=dict)

    def all_kinds(self) -> dict[int, Kind]:
        kinds = dict(self.kinds)
        born: dict[int, str] = {}
        for event in self.events:
            if event.change_bytes > 0:
                born[event.storage] = event.phase
                kinds.setdefault(event.storage, Kind.ACTIVATIONS)
            elif event.storage not in self.kinds and born.get(event.storage) == event.phase:
                kinds[event.storage] = Kind.TEMPORARY
        return kinds

    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.work)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Peaks of a trace; `torch.cuda` would say the same."""

    peak_tensor_bytes: int  # the most that storages took at once
    peak_allocated_bytes: int  # `max_memory_allocated`
    peak_reserved_bytes: int  # `max_memory_reserved`
    at_peak_bytes: dict[Kind, int]  # of the storages, when they first took the most
    peak_at: MemoryEvent  # by which they did


def estimate(trace: Trace, capacity_bytes: int | None = None) -> Estimate:
    """Plays the trace through the allocator's model. Raises `allocator.DeviceFull` if it does not fit a capacity."""
    allocator = Allocator(capacity_bytes)
    live = peak = until = 0
    for number, event in enumerate(trace.events):
        change = event.change_bytes
        live += change
        if change < 0:
            allocator.free(event.storage)
            continue
        allocator.allocate(event.storage, change)
        if live > peak:
            peak, until = live, number + 1
    kinds, at_peak = trace.all_kinds(), dict.fromkeys(Kind, 0)
    for event in trace.events[:until]:
        at_peak[kinds[event.storage]] += event.change_bytes
    return Estimate(
        peak_tensor_bytes=peak,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        at_peak_bytes=at_peak,
        peak_at=trace.events[until - 1] if until else MemoryEvent(0, 0, "", ""),
    )


class Recorder(TensorMeter):
    """Records what runs inside it. Enter it inside the `OutlineMode`, if there is one, and before the tensors are made;
    those made earlier are only seen if `adopt`ed or `label`led. `workspace`: bytes that a convolution takes beside its
    operands and results while it runs. `phase`: what the code that runs is doing; may be replaced."""

    def __init__(self, workspace: Callable[[Call], int] | None = None) -> None:
        super().__init__()
        self.trace = Trace()
        self.phase: Callable[[], str] = lambda: "setup"
        self._workspace = workspace

    def mark(self) -> tuple[int, int, int]:
        """For `rewind`: how much is recorded so far, and the next storage's number."""
        number = next(self._numbers)
        self._numbers = count(number)
        return len(self.trace.events), len(self.trace.work), number

    def rewind(self, mark: tuple[int, int, int]) -> None:
        """Forgets all since the mark. What came to exist since then has to be gone."""
        events, work, number = mark
        del self.trace.events[events:], self.trace.work[work:]
        self.trace.kinds = {storage: kind for storage, kind in self.trace.kinds.items() if storage < number}
        self._numbers = count(number)

    def label(self, tensors: Iterable[Tensor | None], kind: Kind) -> None:
        """Says what these tensors are for; those not seen before count from now on."""
        for tensor in tensors:
            if tensor is not None:
                self.trace.kinds[self._see(tensor, "adopt")] = kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        effect, tensors = effect_of(func, args, kwargs)
        if effect is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        result, outputs = effect.apply(tensors)
        facts: _Facts | None = effect.facts
        if facts is None:
            facts = effect.facts = _Facts(func, args, kwargs, outputs, flops_of(func, args, kwargs, result))
        for tensor in outputs:
            if type(tensor) is not Outline or tensor._outline_storage.counter is not self:
                self._see(tensor, facts.operation)
        self.flops += facts.flops
        self._note(facts)
        return result

    def _see(self, tensor: Tensor, operation: str) -> int:
        if type(tensor) is not Outline:
            return super()._see(tensor, operation)
        storage = tensor._outline_storage
        if storage.counter is None:
            storage.counter, storage.number = self, next(self._numbers)
            self._change(storage.number, storage.nbytes, operation)
        assert storage.counter is self, "an outline that another recorder counts"
        return storage.number

    def outline_gone(self, storage: OutlineStorage) -> None:
        self._change(storage.number, -storage.nbytes, "")

    def _ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], flops: int) -> None:
        self._note(_Facts(func, args, kwargs, outputs, flops))

    def _note(self, facts: _Facts) -> None:
        if self._workspace is not None and facts.call is not None:
            # A buffer inside a kernel: there when all results are, and gone with it.
            number, size = next(self._numbers), self._workspace(facts.call)
            self.trace.kinds[number] = Kind.WORKSPACE
            self._change(number, size, facts.operation)
            self._change(number, -size, "")
        if facts.moved_bytes is not None:
            self.trace.work.append(facts.work(self.phase()))

    def _change(self, storage: int, change_bytes: int, operation: str) -> None:
        super()._change(storage, change_bytes, operation)
        if change_bytes:
            self.trace.events.append(MemoryEvent(storage, change_bytes, self.phase(), operation))


# Without what the library wraps it in for torch.compile: see `lowmem.measure.tensors`.
Recorder.__torch_dispatch__ = inspect.unwrap(Recorder.__torch_dispatch__)  # type: ignore[method-assign]


class _Facts:
    """Of one call, and of all that are like it."""

    __slots__ = ("_works", "call", "flops", "moved_bytes", "operation")

    def __init__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], flops: int
    ) -> None:
        self.operation = str(func)
        self.flops = flops
        self.moved_bytes = _moved_bytes(func, args, kwargs, outputs)
        self.call = call_of(func, args)
        self._works: dict[str, KernelWork] = {}  # by phase

    def work(self, phase: str) -> KernelWork:
        found = self._works.get(phase)
        if found is None:
            assert self.moved_bytes is not None
            found = self._works[phase] = KernelWork(self.flops, self.moved_bytes, self.operation, phase)
        return found


def _moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> int | None:
    """None for what launches no kernel: views and allocations."""
    free, makes = _launches(func)
    inputs = tensors_among((args, [value for name, value in kwargs.items() if name not in _written(func)]))
    if func in _UPDATES:
        outputs = [tensor for number in _UPDATES[func] for tensor in args[number]]
    if not outputs or free or (makes and not inputs):
        return None
    return sum(tensor.nbytes for tensor in (*inputs, *outputs))


@cache
def _written(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments if argument.is_out)


@cache
def _launches(func: Any) -> tuple[bool, bool]:
    """Of an operation: whether it launches no kernel, and whether it allocates where it is given no tensor."""
    name = func.overloadpacket.__name__
    return func.is_view or name in _FREE, name.startswith("empty")


# Return nothing: the arguments that they write.
_UPDATES: dict[Any, tuple[int, ...]] = {
    _aten._fused_sgd_.default: (0, 2),  # parameters, momentum
    _aten._fused_adamw_.default: (0, 2, 3),  # parameters, both running means
    _aten._foreach_lerp_.Scalar: (0,),  # means of the weights
}
_CONVOLUTIONS = frozenset({_aten.convolution.default, _aten.convolution_backward.default})

_FREE = frozenset(
    {"empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view"}
    | {"_reshape_alias", "lift_fresh", "is_same_size", "sym_size", "sym_stride", "sym_numel"}
)
