"""Any function or module, as an operation that runs under autograd by itself.

Kept, it keeps the small graph that autograd makes of it; not kept, it runs again in the backward, with the same random
numbers and without moving buffers, and then backward. What a graph saves is autograd's choice; it holds nothing else:
operands enter it through nodes that keep no tensor, and its results are left through their edges.

Known limitation: under autocast, whose cache casts a parameter once for all its uses, autograd adds the gradients of
these up in low precision. Here that of an operation of this kind counts in the parameter's own.

Known not to be optimal: where it is not kept, the backward runs the whole function again, even if it needs little of
it; operations with kernels of their own do not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lowmem.measure.outline import is_outline
from lowmem.remat.operation import Gradients, Operation, PassState, of_tensor
from lowmem.remat.starting_point import StartingPoint
from lowmem.remat.tracing import has_hooks


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

    def __init__(self, device: torch.device | None) -> None:
        self.edges: list[GradientEdge | None] = []  # of the result's tensors; None: it needs no gradient
        self.places: list[list[int | None]] = []  # per operand and tensor in it: under which number it entered
        self.parameters: dict[int, Tensor] = {}  # likewise, by number
        self.entries: list[GradientEdge] = []  # by number
        self.leaves: list[Tensor] = []  # parameters that are in the graph themselves
        self._inbox: dict[int, Tensor] = {}
        self._anchor = torch.empty(0, device=device, requires_grad=True)
        self._entered = 0

    def enter(self, tensor: Tensor) -> Tensor:
        self._entered += 1
        entered: Tensor = _Entry.apply(self._anchor, self._inbox, self._entered - 1, tensor)
        entered = entered.view_as(entered)  # see `_edge`
        self.entries.append(get_gradient_edge(entered))
        return entered

    def operand(self, value: Any, needed: bool) -> Any:
        """A tensor, or tensors in a tuple, list or dict, to compute with."""
        tensors, spec = tree_flatten(value)
        wanted = [needed and isinstance(one, Tensor) and _continuous(one) for one in tensors]
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
            _edge(one) if is_tensor and one.requires_grad else None
            for one, is_tensor in zip(tensors, real, strict=True)
        ]
        detached = [one.detach() if is_tensor else one for one, is_tensor in zip(tensors, real, strict=True)]
        return tree_unflatten(detached, spec)

    def backward(self, grad: Any, needed: Sequence[bool], so_far: Sequence[Any] = ()) -> Gradients:
        """`so_far`: by operand the gradient that it has from later uses, or None: those of the uses in here are added
        to it one by one, as autograd does, and the sum is returned."""
        grads = grad if isinstance(grad, list) else [grad]
        pairs = [
            (edge, one) for edge, one in zip(self.edges, grads, strict=True) if edge is not None and one is not None
        ]
        if not pairs:
            return Gradients([None] * len(needed))
        for one in self.leaves:
            if one._backward_hooks:
                raise RuntimeError(
                    f"a hook was put on a parameter of shape {list(one.shape)} between forward and backward, inside a "
                    "module that runs as a whole: put it there before the forward"
                )
        for places, old in zip(self.places, so_far, strict=False):
            olds = old if isinstance(old, list) else [old]
            pairs += [
                (self.entries[place], one)
                for place, one in zip(places, olds, strict=False)
                if place is not None and one is not None
            ]
        edges, outputs = zip(*pairs, strict=True)
        with torch.autograd.set_multithreading_enabled(False):  # as the whole backward pass: see `TrainStep`
            # `torch.autograd.grad` without its checks of shapes, which import sympy: 0.4 s of every plan.
            inbox, inputs = self._inbox, (self._anchor, *self.leaves)
            _, *found = _engine_run_backward(edges, outputs, False, False, inputs, True, accumulate_grad=False)
        operands: list[Any] = []
        for places, wanted in zip(self.places, needed, strict=True):
            mine = [None if place is None else inbox.get(place) for place in places]
            operands.append(None if not wanted else mine[0] if len(mine) == 1 else mine)
        entered = [(one, inbox[number]) for number, one in self.parameters.items() if number in inbox]
        direct = [(one, value) for one, value in zip(self.leaves, found, strict=True) if value is not None]
        return Gradients(operands, _apart([*outputs, *tree_leaves(operands)], [*entered, *direct]))


def _edge(tensor: Tensor) -> GradientEdge:
    """Where its gradient begins. torch 2.7 ends the process on edges of functions that are written in Python."""
    if isinstance(tensor.grad_fn, BackwardCFunction):
        tensor = tensor.view_as(tensor)
    return get_gradient_edge(tensor)


def _continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Tensors made in inference mode have none."""
    return [-1 if one.is_inference() else one._version for one in tensors]


def _apart(others: Sequence[Any], found: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Parameters with gradients that are nobody else's memory: `.grad` is changed in place later."""
    seen = {one.untyped_storage()._cdata for one in others if isinstance(one, Tensor)}
    apart = []
    for parameter, grad in found:
        memory = grad.untyped_storage()._cdata
        apart.append((parameter, grad.clone() if memory in seen else grad))
        seen.add(memory)
    return apart


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
    numbers. `same`: what tells functions apart that cost differently. `fresh`: the backward makes a new tensor, which
    may be written into; of others that is not known.
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
    fresh: bool = False
    graphed = under_autograd = True

    @property
    def reads(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(len(self.operands)))

    @property
    def shares(self) -> tuple[int, ...]:  # type: ignore[override]
        return () if self.fresh else tuple(range(len(self.operands)))

    @cached_property
    def sums(self) -> bool:  # type: ignore[override]
        found: list[Operand] = []
        substitute((self.args, self.kwargs), lambda one: found.append(one) if isinstance(one, Operand) else None)
        return len(set(found)) < len(found) or (self.module is not None and self.dear)

    @cached_property
    def exposed(self) -> bool:  # type: ignore[override]
        """Functions of torch return no memory but their operands', its modules likewise."""
        if self.module is None:
            return not self.operands or (bool(self._attributes()) and (self.view or (self.dear and self.draws)))
        modules = list(self.module.modules())
        hooked = any(map(has_hooks, modules))
        torchs = all(type(one).__module__.startswith("torch.nn.") for one in modules)
        return hooked or not (torchs or next(chain(self.module.parameters(), self.module.buffers()), None) is None)

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
            value = attribute.value()
            if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad):
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
        tensors = [one for one in tree_leaves(list(operands)) if isinstance(one, Tensor)]
        graph, entered = Graph(tensors[0].device if tensors else None), dict[int, Tensor]()

        def parameter(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.requires_grad):
                return value
            if id(value) not in entered:
                entered[id(value)] = graph.parameter(value)
            return entered[id(value)]

        with torch.enable_grad():
            inside = [graph.operand(one, wanted) for one, wanted in zip(operands, needed, strict=True)]
            hooked = dict[str, Tensor]()
            for name, one in self.module.named_parameters() if self.module is not None else ():
                if one._backward_hooks:  # they are autograd's, which gets the gradient at the end
                    hooked[name] = parameter(one)
                elif one.requires_grad:
                    graph.leaves.append(one)
            result = self._run(inside, state, lambda attribute: parameter(attribute.value()), hooked)
            return graph.leave(result), graph

    def backward(
        self,
        grad: Any,
        operands: Sequence[Any],
        output: Any,
        state: PassState,
        needed: Sequence[bool],
        owned: bool,
        so_far: Sequence[Any] = (),
    ) -> Gradients:
        """`output` is the graph, if one was kept; else operands are there, and it is made first. `so_far`: see
        `Graph.backward`."""
        graph = output if isinstance(output, Graph) else self.with_graph(operands, state, needed)[1]
        return graph.backward(grad, needed, so_far)

    def _run(
        self,
        operands: Sequence[Any],
        state: PassState,
        attribute: Callable[[Attribute], Any],
        instead: dict[str, Tensor],
    ) -> Any:
        def of(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return operands[argument.position]
            return state.scalars[argument.name] if isinstance(argument, Scalar) else attribute(argument)

        args, kwargs = substitute(self.args, of), substitute(self.kwargs, of)
        tensors = [one for one in tree_leaves(list(operands)) if isinstance(one, Tensor)]
        versions = _versions(tensors)
        function = self.function
        if instead and self.module is not None:
            module = self.module
            function = lambda *a, **k: torch.func.functional_call(module, instead, a, k)  # noqa: E731
        device = tensors[0].device.type if tensors else "cpu"
        # Without the cache: it would hold the cast parameters for as long as the outer autocast lasts.
        with torch.autocast(device, state.low, enabled=state.low is not None, cache_enabled=False):
            y = self._first_or_again(function, args, kwargs, tensors, state)
        if _versions(tensors) != versions:
            raise ValueError(f"{self.name} changes its input in place: the input is needed again; make it a copy")
        return y

    def _first_or_again(
        self, function: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], state: PassState
    ) -> Any:
        if self in state.notes:
            with state.notes[self].again(tensors):
                return function(*args, **kwargs)
        if state.total is not None:
            self._check_no_statistics()
        draws = self.draws and not any(map(is_outline, tensors))
        state.notes[self] = before = StartingPoint(self.module, tensors if draws else None)
        y = function(*args, **kwargs)
        before.compare(self.name)
        return y

    def _check_no_statistics(self) -> None:
        for name, module in self.module.named_modules() if self.module is not None else ():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"batch norm {name or self.name} in {self.name} is inside a module that runs as a whole: its "
                    "statistics cannot be those of all processes; put it into evaluation mode or leave out --sync-bn"
                )


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

        if self.name in state.scalars:
            return
        args, kwargs = substitute(self.args, of), substitute(self.kwargs, of)
        state.scalars[self.name] = self.function(*args, **kwargs)

    def plain(self, operands: Sequence[Any], state: PassState) -> Any:
        return self.forward(operands, state)
