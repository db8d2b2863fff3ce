"""Any function or module, as an operation that runs under autograd by itself.

Kept, it keeps the small graph that autograd makes of it; not kept, it runs again in the backward, with the same random
numbers and without moving buffers, and then backward. What a graph saves is autograd's choice; it holds nothing else:
operands enter it through nodes that keep no tensor, and its results are left through their edges.

Known not to be optimal: where it is not kept, the backward runs the whole function again, even if it needs little of
it; operations with kernels of their own do not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from lowmem.measure.outline import is_outline
from lowmem.remat.operation import Gradients, Operation, PassState, of_tensor


class Operand(NamedTuple):
    """In an operation's arguments: the operand at a position."""

    position: int


class Scalar(NamedTuple):
    """In an operation's arguments: a number of this pass (`PassState.scalars`)."""

    name: str


@dataclass(frozen=True)
class Attribute:
    """In an operation's arguments: a parameter, buffer or constant of a module, looked up when it is used."""

    owner: nn.Module
    name: str

    def value(self) -> Any:
        return getattr(self.owner, self.name)


def substitute(arguments: Any, of: Callable[[Any], Any]) -> Any:
    """The nested arguments, with `of` of every Operand, Scalar and Attribute in its place."""
    if isinstance(arguments, (Operand, Scalar, Attribute)):
        return of(arguments)
    if type(arguments) in (tuple, list):
        return type(arguments)(substitute(one, of) for one in arguments)
    if type(arguments) is dict:
        return {key: substitute(one, of) for key, one in arguments.items()}
    if type(arguments) is slice:
        return slice(*(substitute(one, of) for one in (arguments.start, arguments.stop, arguments.step)))
    return arguments


class Graph:
    """What autograd makes of one run: entered by tensors that want a gradient, left through edges."""

    def __init__(self) -> None:
        self.edges: list[GradientEdge | None] = []  # of the result's tensors; None: it needs no gradient
        self.places: list[list[int | None]] = []  # per operand and tensor in it: under which number it entered
        self.parameters: dict[int, Tensor] = {}  # likewise, by number
        self._inbox: dict[int, Tensor] = {}
        self._anchor: Tensor | None = None
        self._entered = 0

    def enter(self, tensor: Tensor) -> Tensor:
        if self._anchor is None:
            self._anchor = torch.empty(0, device=tensor.device, requires_grad=True)
        self._entered += 1
        return _Entry.apply(self._anchor, self._inbox, self._entered - 1, tensor)

    def operand(self, value: Any, needed: bool) -> Any:
        """A tensor, or tensors in a tuple, list or dict, to compute with."""
        tensors, spec = tree_flatten(value)
        wanted = [needed and isinstance(one, Tensor) and one.is_floating_point() for one in tensors]
        entered, places = [], []
        for one, want in zip(tensors, wanted, strict=True):
            places.append(self._entered if want else None)
            entered.append(self.enter(one) if want else one)
        self.places.append(places)
        return tree_unflatten(entered, spec)

    def parameter(self, parameter: Tensor) -> Tensor:
        self.parameters[self._entered] = parameter
        return self.enter(parameter)

    def leave(self, result: Any) -> Any:
        tensors, spec = tree_flatten(result)
        real = [isinstance(one, Tensor) for one in tensors]
        self.edges = [
            get_gradient_edge(one) if is_tensor and one.requires_grad else None
            for one, is_tensor in zip(tensors, real, strict=True)
        ]
        detached = [one.detach() if is_tensor else one for one, is_tensor in zip(tensors, real, strict=True)]
        return tree_unflatten(detached, spec)

    def backward(self, grad: Any, needed: Sequence[bool]) -> Gradients:
        grads = grad if isinstance(grad, list) else [grad]
        pairs = [
            (edge, one) for edge, one in zip(self.edges, grads, strict=True) if edge is not None and one is not None
        ]
        if not pairs:
            return Gradients([None] * len(needed))
        with torch.autograd.set_multithreading_enabled(False):  # as the whole backward pass: see `TrainStep`
            torch.autograd.backward([edge for edge, _ in pairs], [one for _, one in pairs])
        inbox = self._inbox
        operands: list[Any] = []
        for places, wanted in zip(self.places, needed, strict=True):
            found = [None if place is None else inbox.get(place) for place in places]
            operands.append(None if not wanted else found[0] if len(found) == 1 else found)
        return Gradients(operands, [(one, inbox[number]) for number, one in self.parameters.items() if number in inbox])


class _Entry(torch.autograd.Function):
    """Anchor, tensor -> the tensor, as one that a gradient is wanted of, without keeping it; its gradient goes to
    `inbox[position]` as it comes. The anchor, empty, wants a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, inbox: dict[int, Tensor], position: int, x: Tensor) -> Tensor:
        ctx.inbox, ctx.position = inbox, position
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.inbox[ctx.position] = grad
        return None, None, None, None


@dataclass(frozen=True, eq=False)
class AutogradOperation(Operation):
    """`function(*args, **kwargs)`; in these stand Operand, Scalar and Attribute for what a pass has.

    `module`: whose parameters and buffers the function uses beside its arguments. `draws`: whether it may draw random
    numbers. `same`: what tells functions apart that cost differently. `shared`: parameters of the module that other
    operations use too: their gradients are handed out, to be summed as autograd does. `fresh`: the backward makes a new
    tensor, which may be written into; of others that is not known.
    """

    name: str
    operands: tuple[int, ...]
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    same: Hashable = None
    dear: bool = False
    light: bool = False
    view: bool = False
    draws: bool = True
    shared: tuple[str, ...] = ()
    fresh: bool = False
    under_autograd = True

    @property
    def reads(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(len(self.operands)))

    @property
    def shares(self) -> tuple[int, ...]:  # type: ignore[override]
        return () if self.fresh else tuple(range(len(self.operands)))

    @property
    def signature(self) -> Hashable:
        rest: list[Any] = []

        def of(argument: Any) -> Any:
            if isinstance(argument, Attribute):
                value = argument.value()
                return of_tensor(value) if isinstance(value, Tensor) else repr(value)
            return argument

        substituted = substitute((self.args, self.kwargs), of)
        if self.module is not None:
            rest += [of_tensor(parameter) for parameter in self.module.parameters()]
            rest += [child.training for child in self.module.modules()]
        return "autograd", self.same, repr(substituted), tuple(rest)

    def parameters(self) -> Iterator[Tensor]:
        for attribute in self._attributes():
            if isinstance(value := attribute.value(), nn.Parameter):
                yield value
        if self.module is not None:
            yield from self.module.parameters()

    def _attributes(self) -> list[Attribute]:
        found: list[Attribute] = []

        def of(argument: Any) -> Any:
            if isinstance(argument, Attribute):
                found.append(argument)

        substitute((self.args, self.kwargs), of)
        return found

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Any:
        return self._run(operands, state, lambda attribute: attribute.value(), {})

    def plain(self, operands: Sequence[Any], state: PassState) -> Any:
        def of(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return operands[argument.position]
            return state.scalars[argument.name] if isinstance(argument, Scalar) else argument.value()

        return self.function(*substitute(self.args, of), **substitute(self.kwargs, of))

    def with_graph(self, operands: Sequence[Any], state: PassState, needed: Sequence[bool]) -> tuple[Any, Graph]:
        """The result, and the graph of its making with respect to the operands that are `needed` and to parameters."""
        graph, entered = Graph(), dict[int, Tensor]()

        def parameter(value: Any) -> Any:
            if not (isinstance(value, nn.Parameter) and value.requires_grad):
                return value
            if id(value) not in entered:
                entered[id(value)] = graph.parameter(value)
            return entered[id(value)]

        with torch.enable_grad():
            inside = [graph.operand(one, wanted) for one, wanted in zip(operands, needed, strict=True)]
            module = self.module
            shared = {name: parameter(module.get_parameter(name)) for name in self.shared} if module is not None else {}
            result = self._run(inside, state, lambda attribute: parameter(attribute.value()), shared)
            return graph.leave(result), graph

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        """`output` is the graph, if one was kept; else operands are there, and it is made first."""
        graph = output if isinstance(output, Graph) else self.with_graph(operands, state, needed)[1]
        return graph.backward(grad, needed)

    def _run(
        self,
        operands: Sequence[Any],
        state: PassState,
        attribute: Callable[[Attribute], Any],
        shared: dict[str, Tensor],
    ) -> Any:
        def of(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return operands[argument.position]
            return state.scalars[argument.name] if isinstance(argument, Scalar) else attribute(argument)

        args, kwargs = substitute(self.args, of), substitute(self.kwargs, of)
        tensors = [one for one in tree_leaves(list(operands)) if isinstance(one, Tensor)]
        versions = [one._version for one in tensors]
        function = self.function
        if shared and self.module is not None:
            module = self.module
            function = lambda *a, **k: torch.func.functional_call(module, shared, a, k)  # noqa: E731
        device = tensors[0].device.type if tensors else "cpu"
        # Without the cache: it would hold the cast parameters for as long as the outer autocast lasts.
        with torch.autocast(device, state.low, enabled=state.low is not None, cache_enabled=False):
            y = self._first_or_again(function, args, kwargs, tensors, state)
        if [one._version for one in tensors] != versions:
            raise ValueError(f"{self.name} changes its input in place: the input is needed again; make it a copy")
        return y

    def _first_or_again(
        self, function: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], state: PassState
    ) -> Any:
        if self not in state.notes:
            if state.total is not None:
                self._check_no_statistics()
            state.notes[self] = None
            if self.draws and not any(map(is_outline, tensors)):
                state.notes[self] = [torch.get_rng_state(), *get_device_states(*tensors)]
            return function(*args, **kwargs)
        cpu, devices, states = state.notes[self] or (None, [], [])
        with (
            torch.random.fork_rng(devices, enabled=cpu is not None),
            nullcontext() if self.module is None else buffers_kept(self.module),
        ):
            if cpu is not None:  # the generators as they were before it first ran
                torch.set_rng_state(cpu)
                set_device_states(devices, states)
            return function(*args, **kwargs)

    def _check_no_statistics(self) -> None:
        for name, module in self.module.named_modules() if self.module is not None else ():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"batch norm {name or self.name} in {self.name} is inside a module that runs as a whole: its "
                    "statistics cannot be those of all processes; put it into evaluation mode or leave out --sync-bn"
                )


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever moves the buffers moves copies. Restoring their values instead would upset autograd, which
    has saved them."""
    originals = [(child._buffers, *item) for child in module.modules() for item in child._buffers.items()]
    for buffers, name, tensor in originals:
        buffers[name] = None if tensor is None else tensor.clone()
    try:
        yield
    finally:
        for buffers, name, tensor in originals:
            buffers[name] = tensor


@dataclass(frozen=True, eq=False)
class ScalarOperation(Operation):
    """A number that follows from shapes (`x.size(0)`): found when the pass first comes by, and known from then on."""

    name: str
    operands: tuple[int, ...]
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> Hashable:
        return "scalar", repr((self.args, self.kwargs))

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Any:
        def of(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return operands[argument.position]
            return state.scalars[argument.name] if isinstance(argument, Scalar) else argument.value()

        args, kwargs = substitute(self.args, of), substitute(self.kwargs, of)
        state.scalars[self.name] = self.function(*args, **kwargs)

    def plain(self, operands: Sequence[Any], state: PassState) -> Any:
        return self.forward(operands, state)
