"""A stream of allocations and frees, and of operations, from code that runs on tensors, real or fake.

On fake tensors (`torch._subclasses.FakeTensorMode`) nothing is computed and nothing allocated, but the code,
the sizes and the lifetimes are the real ones: the executor is its own model of memory (invariant 5). Sizes
are those of storages, so views cost nothing. Buffers inside a kernel are not seen; the convolution library's
workspace is counted if the recorder is told how large it is for a call (it was measured on a card).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Kind(StrEnum):
    """What a storage is for. Buffers count as parameters, the batch as an activation."""

    PARAMS = "params"
    GRADS = "grads"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"  # made in one phase, freed in a later one
    TEMPORARY = "temporary"  # made and freed in the same phase
    WORKSPACE = "workspace"  # inside a convolution, from the same allocator


@dataclass(frozen=True, slots=True)
class Event:
    """A storage comes to exist (`change_bytes` > 0) or is freed (< 0), in a phase, by an operation."""

    storage: int
    change_bytes: int
    phase: str
    operation: str


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel: floating-point operations, and bytes with each operand read once, each result written
    once."""

    operation: str
    flops: int
    moved_bytes: int
    phase: str


@dataclass(frozen=True, slots=True)
class Call:
    """A convolution (forward: input, weight, bias; backward: gradient, input, weight), told apart by all that the
    library chooses its algorithm by.

    `tensors`: (shape, strides, dtype) of these three, None for one that is not given; `rest`: stride and all that
    follows it. Hashable, and the same from fake and real tensors.
    """

    operation: str
    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], str] | None, ...]
    rest: tuple[object, ...]


def call_of(func: Any, args: tuple[Any, ...]) -> Call | None:
    """None for anything but a convolution."""
    if func not in _CONVOLUTIONS:
        return None
    tensors = tuple(None if t is None else (tuple(t.shape), tuple(t.stride()), str(t.dtype)) for t in args[:3])
    # The sizes of the backward's bias: autograd and the executor write "none" differently.
    rest = args[4:] if func is torch.ops.aten.convolution_backward.default else args[3:]
    return Call(str(func), tensors, tuple(tuple(one) if isinstance(one, (list, tuple)) else one for one in rest))


@dataclass
class Trace:
    """What happened, in order. `kinds` has the storages whose kind is known from outside; see `kind`."""

    events: list[Event] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    kinds: dict[int, Kind] = field(default_factory=dict)

    def all_kinds(self) -> dict[int, Kind]:
        """Storage -> kind, for every storage of the trace."""
        kinds = dict(self.kinds)
        born: dict[int, str] = {}
        for event in self.events:
            if event.change_bytes > 0:
                born[event.storage] = event.phase
                kinds.setdefault(event.storage, Kind.ACTIVATIONS)
            elif event.storage not in self.kinds and born.get(event.storage) == event.phase:
                kinds[event.storage] = Kind.TEMPORARY
        return kinds

    def flops(self, *phases: str) -> int:
        """Of the given phases, or of all."""
        return sum(work.flops for work in self.work if not phases or work.phase in phases)

    def peak_bytes(self) -> int:
        """The most that existed at once."""
        live = peak = 0
        for event in self.events:
            live += event.change_bytes
            peak = max(peak, live)
        return peak


class Recorder(TorchDispatchMode):
    """Records what runs inside it. Enter it inside the fake mode, if there is one, and before the tensors are
    made; those made earlier are only seen if `adopt`ed. `workspace`: bytes that a convolution takes beside its
    operands and results while it runs."""

    def __init__(self, workspace: Callable[[Call], int] | None = None) -> None:
        super().__init__()
        self.trace = Trace()
        self._workspace = workspace
        self.phase_name = "setup"
        self._numbers: dict[int, int] = {}  # address of a living storage -> its number in the trace
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE and isinstance(args[0], FakeTensor):
            result = _written(func, kwargs)
        else:
            result = func(*args, **kwargs)
        outputs = _tensors((result,))
        for tensor in outputs:
            self._see(tensor, str(func))
        if self._workspace is not None and (call := call_of(func, args)) is not None:
            self._take(self._workspace(call), str(func))
        work = _work(func, args, kwargs, outputs, result, self.phase_name)
        if work is not None:
            self.trace.work.append(work)
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what happens inside: `forward`, `backward`, `optimizer`, …."""
        before, self.phase_name = self.phase_name, name
        try:
            yield
        finally:
            self.phase_name = before

    def adopt(self, tensors: Iterable[Tensor | None], kind: Kind) -> None:
        """Says what these tensors are for; those not seen before count from now on."""
        for tensor in tensors:
            if tensor is not None:
                self.trace.kinds[self._see(tensor, "adopt")] = kind

    def _take(self, size: int, operation: str) -> None:
        """A buffer inside a kernel: there when all results are, and gone with it."""
        if size:
            self._count += 1
            self.trace.kinds[self._count] = Kind.WORKSPACE
            self.trace.events.append(Event(self._count, size, self.phase_name, operation))
            self.trace.events.append(Event(self._count, -size, self.phase_name, ""))

    def _see(self, tensor: Tensor, operation: str) -> int:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        number = self._numbers.get(address)
        if number is not None:
            return number
        self._count += 1
        number = self._count
        self._numbers[address] = number
        if size:
            self.trace.events.append(Event(number, size, self.phase_name, operation))

        def gone(_: object) -> None:
            del self._numbers[address], self._references[number]
            if size:
                self.trace.events.append(Event(number, -size, self.phase_name, ""))

        self._references[number] = weakref.ref(storage, gone)
        return number


def _work(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], result: Any, phase: str
) -> Work | None:
    """None for what launches no kernel: views and allocations."""
    written, free, makes, count = _facts(func)
    inputs = _tensors((args, [value for name, value in kwargs.items() if name not in written]))
    if func is torch.ops.aten._fused_sgd_.default:  # returns nothing: it writes parameters and momentum
        outputs = [*args[0], *args[2]]
    if not outputs or free or (makes and not inputs):
        return None
    flops = int(count(*args, **kwargs, out_val=result)) if count is not None else 0
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
    return Work(str(func), flops, moved, phase)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among an operation's arguments or results, in lists too. Called some ten thousand times a plan, for which
    torch's own walk through any structure takes too long."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


@cache
def _facts(func: Any) -> tuple[frozenset[str], bool, bool, Any]:
    """Of an operation: the arguments it writes, whether it launches no kernel, whether it allocates where it is given
    no tensor, and what counts its floating-point operations."""
    written = frozenset(argument.name for argument in func._schema.arguments if argument.is_out)
    name = func.overloadpacket.__name__
    count = flop_registry.get(func.overloadpacket)
    return written, func.is_view or name in _FREE, name.startswith("empty"), count


_CONVOLUTIONS = frozenset({torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default})

# Fake tensors take milliseconds over these, to find that results given in the right size stay as they are.
_IN_PLACE = frozenset(
    {torch.ops.aten.native_batch_norm.out, torch.ops.aten.threshold_backward.grad_input}
    | {torch.ops.aten.batch_norm_elemt.out}
)


def _written(func: Any, kwargs: dict[str, Any]) -> Any:
    written = tuple(kwargs[argument.name] for argument in func._schema.arguments if argument.is_out)
    return written if len(written) > 1 else written[0]


_FREE = frozenset(
    {"empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view"}
    | {"_reshape_alias", "lift_fresh", "is_same_size", "sym_size", "sym_stride", "sym_numel"}
)
