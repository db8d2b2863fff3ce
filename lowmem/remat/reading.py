"""What the nodes of a traced graph are: which operation each becomes, and what changes in place.

`relu_(v)` and its kin become the operation that makes a new value, and from then on the new one stands for v: the same
bits, and whether the memory is written in place is the program's decision (`program.py`). Where something else may see
the change (a view of v, a buffer, an assignment into a part), the module whose forward does it runs as a whole.

Known limitation: where a view is changed in place (also one that a module returns, as instance norm does), autograd
lays the gradient out as what it is a view of. Here it stays as it comes: in channels-last last digits may differ.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowmem.remat.autograd_operation import Attribute, AutogradOperation, Operand, Scalar, ScalarOperation, substitute
from lowmem.remat.calls import TracedCall
from lowmem.remat.elementwise import OutputActivation
from lowmem.remat.known import FRESH, MOVING, RESHAPING, SCALAR_ATTRIBUTES
from lowmem.remat.linear_maps import Convolution, Linear
from lowmem.remat.operation import Operation
from lowmem.remat.pooling import MaxPool
from lowmem.remat.tracing import Constant, NotTraceable, owner_of

NO_PARAMETERS, RESHAPED, COMPUTED = range(3)


class RunsWhole(Exception):
    """The module at `path` has to be a leaf."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(why)
        self.path, self.why = path, why


@dataclass(eq=False)
class Reading:
    """A node: what it reads (in the order of its arguments, each once), and how its operation is made of the numbers
    that these have in a stage."""

    name: str
    path: str  # of the module that it is, or whose forward it is in
    kind: str  # of a module its path, else the function's name
    operands: tuple[Reading, ...]
    make: Callable[[str, tuple[int, ...]], Operation]
    dear: bool = False
    scalar: bool = False
    constant: bool = False  # made of parameters, buffers and numbers alone: made anew wherever it is used
    view_of: Reading | None = field(default=None, repr=False)
    scalars: tuple[str, ...] = ()  # numbers that its arguments name
    made_of: int = 0  # trained parameters: NO_PARAMETERS, RESHAPED, COMPUTED
    taken_apart: bool = False  # several tensors, of which others take one each: not what a stage may begin with

    @property
    def own(self) -> tuple[Any, ...]:
        """The class of an operation with kernels of its own, and what it is made of."""
        return self.make.args if isinstance(self.make, partial) else ()


INPUT = Reading("input", "", "input", (), lambda name, operands: Operation())


def read(graph: fx.Graph, model: nn.Module) -> tuple[Reading, list[Reading], Reading]:
    """The input, all operations in forward order, and the output. Raises RunsWhole, NotTraceable."""
    reader = _Reader(graph, model)
    for node in graph.nodes:
        reader.node(node)
    if reader.output is None:
        raise NotTraceable("it returns nothing that is computed from its input")
    _pool_first(reader.found, reader.output)
    return reader.input, reader.found, reader.output


def _pool_first(readings: Sequence[Reading], output: Reading) -> None:
    """Where a max pool alone reads a ReLU's result, the ReLU comes after it: it then has a small operand, and its full
    result is never made. Values and gradients are the same: a ReLU keeps the order, and where its ties are, in windows
    without a positive value, no gradient passes. (A zero may have another sign.)"""
    users: dict[Reading, list[Reading]] = {}
    for one in readings:
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    for pool in readings:
        if pool.own[:1] != (MaxPool,):
            continue
        relu = pool.operands[0]
        if relu.own == (OutputActivation, "relu") and relu is not output and users[relu] == [pool]:
            for name in ("name", "path", "kind", "make"):
                mine, theirs = getattr(pool, name), getattr(relu, name)
                setattr(pool, name, theirs)
                setattr(relu, name, mine)


class _Reader:
    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.modules = dict(model.named_modules())
        self.value: dict[fx.Node, Reading | Attribute | Any] = {}  # what stands for a node by now
        self.found: list[Reading] = []
        self.input = Reading("input", "", "input", (), INPUT.make)
        self.output: Reading | None = None
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self._used = {"input"}
        self._inputs: list[fx.Node] = []

    def node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.value[node] = node.args[0] if self._inputs and node.args else self.input
            self._inputs.append(node)
        elif node.op == "get_attr":
            *owner, name = str(node.target).split(".")
            self.value[node] = Attribute(self.model.get_submodule(".".join(owner)), name)
        elif isinstance(node.target, Constant):
            self.value[node] = node.target.tensor
        elif node.op == "output":
            found: Any = node.args[0]
            found = self.value[found] if isinstance(found, fx.Node) else found
            if not isinstance(found, Reading) or found.scalar:
                kind = type(found).__name__.removeprefix("immutable_") if not isinstance(found, Reading) else "number"
                raise NotTraceable(f"its forward returns a {kind}, not one tensor: plan the part that returns one")
            self.output = found
        else:
            self._call(node)

    # -- one call ------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        call, args, kwargs, changed = self._out_of_place(node)
        operands: list[Reading] = []
        scalars: list[str] = []

        def of(argument: Any) -> Any:
            value = self.value[argument]
            if not isinstance(value, Reading):
                return value
            if value.scalar:
                scalars.append(value.name)
                return Scalar(value.name)
            if value not in operands:
                operands.append(value)
            return Operand(operands.index(value))

        args, kwargs = fx.node.map_arg(args, of), fx.node.map_arg(kwargs, of)
        args, kwargs = _plain(args), _plain(kwargs)
        path = str(node.target) if node.op == "call_module" else owner_of(node)
        name = self._name(node, path)
        reading = self._reading(call, name, path, operands, args, kwargs)
        reading.scalars = tuple(scalars)
        if call.kind is operator.getitem and operands and isinstance(args[1], int):
            operands[0].taken_apart = True
        same_everywhere = all(one.constant for one in operands) and not scalars
        reading.made_of = self._made_of(call, args, kwargs, operands)
        # Else the gradients of its uses would go through its making one by one, not their sum.
        same_everywhere = same_everywhere and not (reading.made_of == COMPUTED and len(node.users) > 1)
        reading.constant = same_everywhere and not (reading.scalar or call.draws or call.module is not None)
        if reading.view_of is None and operands and call.view:
            reading.view_of = operands[0]
        self.found.append(reading)
        self.value[node] = reading
        if changed is not None:
            self._changed(node, changed, reading, path)

    @staticmethod
    def _made_of(call: TracedCall, args: Any, kwargs: Any, operands: list[Reading]) -> int:
        given: list[Any] = []
        substitute((args, kwargs), lambda one: given.append(one.value()) if isinstance(one, Attribute) else None)
        of_parameters = any(isinstance(one, Tensor) and one.requires_grad for one in given)
        found = max((one.made_of for one in operands), default=NO_PARAMETERS)
        found = max(found, RESHAPED if of_parameters else NO_PARAMETERS)
        reshapes = getattr(call.kind, "__name__", call.kind) in RESHAPING
        return found if reshapes or found == NO_PARAMETERS else COMPUTED

    def _name(self, node: fx.Node, path: str) -> str:
        """Of all values of the network; fx's name of a call is its target's and a number."""
        name = path if node.op == "call_module" else f"{path}.{node.name}"
        count = 1
        while name in self._used:
            count += 1
            name = f"{path}.{node.name}#{count}"
        self._used.add(name)
        return name

    def _reading(
        self, call: TracedCall, name: str, path: str, operands: list[Reading], args: Any, kwargs: Any
    ) -> Reading:
        kind = path if call.module is not None else getattr(call.kind, "__name__", str(call.kind))
        if call.scalar or (operands == [] and self._only_scalars(args, kwargs)):
            return Reading(
                name,
                path,
                kind,
                tuple(operands),
                lambda _, o: ScalarOperation(name, o, call.function, args, kwargs),
                scalar=True,
            )
        own = call.own(args, kwargs)
        if own is not None:
            dear = own.args[0] in (Convolution, Linear)
            many = tuple(operands[one.position] for one in args if isinstance(one, Operand))
            return Reading(name, path, kind, many, own, dear=dear)

        def make(n: str, o: tuple[int, ...]) -> Operation:
            return AutogradOperation(
                n,
                o,
                call.function,
                args,
                kwargs,
                module=call.module,
                same=call.same,
                dear=call.dear,
                light=call.light,
                view=call.view,
                draws=call.draws,
                fresh=call.kind in FRESH,
            )

        return Reading(name, path, kind, tuple(operands), make, dear=call.dear)

    def _only_scalars(self, args: Any, kwargs: Any) -> bool:
        found: list[Any] = []

        def walk(value: Any) -> None:
            if isinstance(value, (Operand, Scalar, Attribute)):
                found.append(value)
            elif isinstance(value, (tuple, list)):
                for one in value:
                    walk(one)
            elif isinstance(value, dict):
                for one in value.values():
                    walk(one)

        walk((args, kwargs))
        return bool(found) and all(isinstance(one, Scalar) for one in found)

    # -- what changes in place -----------------------------------------------------------------------------------------

    def _out_of_place(self, node: fx.Node) -> tuple[TracedCall, Any, Any, fx.Node | None]:
        """The call without its change, and the node that it changes."""
        args: tuple[Any, ...] = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        target: Any = node.target
        if node.op == "call_module":
            module = self.modules[str(target)]
            first = args[0] if args else None
            return (
                TracedCall.of_module(module),
                args,
                kwargs,
                first if getattr(module, "inplace", False) is True else None,
            )
        first = args[0] if args and isinstance(args[0], fx.Node) else None
        if node.op == "call_method":
            name = str(target)
            if name.endswith("_") and not name.endswith("__"):
                if not hasattr(Tensor, name[:-1]):
                    raise RunsWhole(owner_of(node), f"{name} changes a tensor in place")
                return TracedCall.of_method(name[:-1], as_first=True), args, kwargs, first
            return TracedCall.of_method(name), args, kwargs, None
        if target is getattr and args[1] not in SCALAR_ATTRIBUTES:
            return replace(TracedCall.of_function(getattr), scalar=False, light=True, view=True), args, kwargs, None
        if target in (operator.setitem, setattr):
            raise RunsWhole(owner_of(node), "a part of a tensor is assigned")
        if target in _IN_PLACE_OPERATORS:
            return TracedCall.of_function(_IN_PLACE_OPERATORS[target], as_first=True), args, kwargs, first
        if target in MOVING and any(isinstance(self.value[one], Attribute) for one in node.all_input_nodes):
            raise RunsWhole(owner_of(node), f"{target.__name__} moves statistics that it is given")
        at = _inplace_position(target)
        if at is not None:
            inplace = kwargs.pop("inplace", args[at] if len(args) > at else False)
            args = args[:at]  # it is the last one
            return TracedCall.of_function(target, in_place=bool(inplace)), args, kwargs, first if inplace else None
        name = getattr(target, "__name__", "")
        if name.endswith("_") and _inplace_position(getattr(F, name[:-1], None)) is not None:
            return TracedCall.of_function(getattr(F, name[:-1]), in_place=True), args, kwargs, first
        if name.endswith("_") and not name.endswith("__") and hasattr(torch, name[:-1]):
            return TracedCall.of_function(getattr(torch, name[:-1]), as_first=True), args, kwargs, first
        return TracedCall.of_function(target), args, kwargs, None

    def _changed(self, node: fx.Node, changed: fx.Node, reading: Reading, path: str) -> None:
        """From now on `reading` stands for what the node was."""
        old = self.value[changed]
        where = owner_of(node) if node.op != "call_module" else path.rpartition(".")[0]
        if isinstance(old, Reading) and old.scalar:
            later = any(self.order[user] > self.order[node] for user in changed.users)
            if later or node.target not in _IN_PLACE_OPERATORS:  # a number has no others, and is not changed itself
                raise RunsWhole(where, "what is made of shapes alone is changed in place")
            return
        if not isinstance(old, Reading):
            raise RunsWhole(where, "a buffer or a parameter is changed in place")
        if _base(old) is self.input:
            raise RunsWhole(where, "the network's input is changed in place")
        now = self.order[node]
        if old.view_of is not None and self._used_beside(old, now):
            # Autograd then sums the gradients of all uses at what it is a view of, in another order.
            raise RunsWhole(where, "a view is changed in place of which there are other uses")
        for other, value in list(self.value.items()):
            if value is old:
                self.value[other] = reading
                continue
            shares = isinstance(value, Reading) and value is not reading and _base(value) is _base(old)
            if shares and any(self.order[user] > now for user in other.users):
                raise RunsWhole(where, "something is changed in place of which a view is used later")

    def _used_beside(self, view: Reading, now: int) -> bool:
        """Whether there is another use, before, of the view or of what it is a view of, than to make the view."""
        chain = {view}
        while view.view_of is not None:
            view = view.view_of
            chain.add(view)
        for node, value in self.value.items():
            if isinstance(value, Reading) and _base(value) is view:
                users = [self.value.get(user) for user in node.users if self.order[user] < now]
                if any(not (user in chain or (isinstance(user, Reading) and user.scalar)) for user in users):
                    return True
        return False


def _base(reading: Reading) -> Reading:
    while reading.view_of is not None:
        reading = reading.view_of
    return reading


def _plain(arguments: Any) -> Any:
    """fx's immutable containers as the usual ones; named tuples among them stay what they are."""
    if isinstance(arguments, (Operand, Scalar, Attribute)):
        return arguments
    if isinstance(arguments, tuple):
        return tuple(map(_plain, arguments))
    if isinstance(arguments, list):
        return list(map(_plain, arguments))
    if isinstance(arguments, dict):
        return {key: _plain(value) for key, value in arguments.items()}
    return arguments


_IN_PLACE_OPERATORS = {
    **{getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv")},
    **{getattr(operator, f"i{name}"): getattr(operator, name) for name in ("mod", "pow", "matmul", "xor")},
    **{operator.iand: operator.and_, operator.ior: operator.or_},
}


@cache
def _inplace_position(function: Any) -> int | None:
    """Where a function of `torch.nn.functional` takes `inplace`."""
    if getattr(function, "__module__", "") not in ("torch.nn.functional", "torch"):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return None
    return names.index("inplace") if names[-1:] == ["inplace"] else None
