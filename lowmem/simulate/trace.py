"""A stream of allocations and frees, and of operations, from code that runs on tensors, real or fake; and its peaks.

On fake tensors (`torch._subclasses.FakeTensorMode`) nothing is computed and nothing allocated, but the code, the sizes
and the lifetimes are the real ones: the executor is its own model of memory (invariant 5). Sizes are those of storages,
so views cost nothing. Buffers inside a kernel are not seen, but for a convolution's if the recorder is told its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowmem.measure.tensors import TensorMeter, tensors_among
from lowmem.plan.cost import KernelWork
from lowmem.simulate.allocator import Allocator

_aten = torch.ops.aten


class Kind(StrEnum):
    """What a storage is for. Buffers count as parameters, and what undoes a step too; the batch as an activation."""

    PARAMS = "params"
    GRADS = "grads"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"  # made in one phase, freed in a later one
    TEMPORARY = "temporary"  # made and freed in the same phase
    WORKSPACE = "workspace"  # inside a convolution, from the same allocator


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """A storage comes to exist (`change_bytes` > 0) or is freed (< 0), in a phase, by an operation."""

    storage: int
    change_bytes: int
    phase: str
    operation: str


@dataclass(frozen=True, slots=True)
class Call:
    """A convolution (forward: input, weight, bias; backward: gradient, input, weight), told apart by all that the
    library chooses its algorithm by; hashable, and the same from fake and real tensors."""

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
    kinds = trace.all_kinds()
    allocator = Allocator(capacity_bytes)
    live = dict.fromkeys(Kind, 0)
    peak, at_peak, at = 0, dict(live), MemoryEvent(0, 0, "", "")
    for event in trace.events:
        live[kinds[event.storage]] += event.change_bytes
        if event.change_bytes < 0:
            allocator.free(event.storage)
            continue
        allocator.allocate(event.storage, event.change_bytes)
        if (total := sum(live.values())) > peak:
            peak, at_peak, at = total, dict(live), event
    return Estimate(
        peak_tensor_bytes=peak,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        at_peak_bytes=at_peak,
        peak_at=at,
    )


class Recorder(TensorMeter):
    """Records what runs inside it. Enter it inside the fake mode, if there is one, and before the tensors are made;
    those made earlier are only seen if `adopt`ed or `label`led. `workspace`: bytes that a convolution takes beside its
    operands and results while it runs. `phase`: what the code that runs is doing; may be replaced."""

    def __init__(self, workspace: Callable[[Call], int] | None = None) -> None:
        super().__init__()
        self.trace = Trace()
        self.phase: Callable[[], str] = lambda: "setup"
        self._workspace = workspace

    def label(self, tensors: Iterable[Tensor | None], kind: Kind) -> None:
        """Says what these tensors are for; those not seen before count from now on."""
        for tensor in tensors:
            if tensor is not None:
                self.trace.kinds[self._see(tensor, "adopt")] = kind

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func in _IN_PLACE:
                written = tuple(kwargs[name] for name in _written(func))
                return written if len(written) > 1 else written[0]
            if func is _aten.native_batch_norm.default:
                return _empty_norm(*args)
        return func(*args, **kwargs)

    def _ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], flops: int) -> None:
        if self._workspace is not None and (call := call_of(func, args)) is not None:
            # A buffer inside a kernel: there when all results are, and gone with it.
            number, size = next(self._numbers), self._workspace(call)
            self.trace.kinds[number] = Kind.WORKSPACE
            self._change(number, size, str(func))
            self._change(number, -size, "")
        if (moved := _moved_bytes(func, args, kwargs, outputs)) is not None:
            self.trace.work.append(KernelWork(flops, moved, str(func), self.phase()))

    def _change(self, storage: int, change_bytes: int, operation: str) -> None:
        super()._change(storage, change_bytes, operation)
        if change_bytes:
            self.trace.events.append(MemoryEvent(storage, change_bytes, self.phase(), operation))


def _moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> int | None:
    """None for what launches no kernel: views and allocations."""
    free, makes = _facts(func)
    inputs = tensors_among((args, [value for name, value in kwargs.items() if name not in _written(func)]))
    if func is _aten._fused_sgd_.default:  # returns nothing: it writes parameters and momentum
        outputs = [*args[0], *args[2]]
    if not outputs or free or (makes and not inputs):
        return None
    return sum(tensor.nbytes for tensor in (*inputs, *outputs))


@cache
def _written(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments if argument.is_out)


@cache
def _facts(func: Any) -> tuple[bool, bool]:
    """Of an operation: whether it launches no kernel, and whether it allocates where it is given no tensor."""
    name = func.overloadpacket.__name__
    return func.is_view or name in _FREE, name.startswith("empty")


_CONVOLUTIONS = frozenset({_aten.convolution.default, _aten.convolution_backward.default})

# Fake tensors take milliseconds over these, to find that results given in the right size stay as they are.
_IN_PLACE = frozenset({_aten.native_batch_norm.out, _aten.threshold_backward.grad_input, _aten.batch_norm_elemt.out})


def _empty_norm(z: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The results of a batch norm. Fake tensors' own has statistics in the input's dtype; kernels have the weight's."""
    dtype = z.dtype if weight is None else weight.dtype
    size = z.shape[1] if rest[3] else 0  # in training
    return torch.empty_like(z), z.new_empty(size, dtype=dtype), z.new_empty(size, dtype=dtype)


_FREE = frozenset(
    {"empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view"}
    | {"_reshape_alias", "lift_fresh", "is_same_size", "sym_size", "sym_stride", "sym_numel"}
)
