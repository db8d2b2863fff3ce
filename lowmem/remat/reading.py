"""What the nodes of a traced graph are: which operation each becomes, and what changes in place.

`relu_(v)` and its kin become the operation that makes a new value, and from then on the new one stands for v: the same
bits, and whether the memory is written in place is the program's decision (`program.py`). Where something else may see
the change (a view of v, a buffer, an assignment into a part), the module whose forward does it runs as a whole.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowmem.remat.autograd_operation import Attribute, AutogradOperation, Operand, Scalar, ScalarOperation
from lowmem.remat.batch_norm import BatchNorm
from lowmem.remat.elementwise import Add, InputActivation, OutputActivation
from lowmem.remat.known import (
    DEAR_FUNCTIONS,
    DEAR_METHODS,
    FRESH,
    INPUT_ACTIVATIONS,
    LIGHT,
    OUTPUT_ACTIVATIONS,
    QUIET_MODULES,
    RANDOM,
    SCALAR_ATTRIBUTES,
    SCALAR_FUNCTIONS,
    SCALAR_METHODS,
    VIEWS,
)
from lowmem.remat.linear_maps import Convolution, Linear
from lowmem.remat.operation import Operation
from lowmem.remat.tracing import NotTraceable, owner_of


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


INPUT = Reading("input", "", "input", (), lambda name, operands: Operation())


def read(graph: fx.Graph, model: nn.Module) -> tuple[Reading, list[Reading], Reading]:
    """The input, all operations in forward order, and the output. Raises RunsWhole, NotTraceable."""
    reader = _Reader(graph, model)
    for node in graph.nodes:
        reader.node(node)
    if reader.output is None:
        raise NotTraceable("it returns nothing that is computed from its input")
    return reader.input, reader.found, reader.output


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
        elif node.op == "output":
            found: Any = node.args[0]
            found = self.value[found] if isinstance(found, fx.Node) else found
            if not isinstance(found, Reading) or found.scalar:
                kind = type(found).__name__ if not isinstance(found, Reading) else "number"
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
        same_everywhere = all(one.constant for one in operands) and not scalars
        reading.constant = same_everywhere and not (reading.scalar or call.draws or call.module is not None)
        if reading.view_of is None and operands and call.view:
            reading.view_of = operands[0]
        self.found.append(reading)
        self.value[node] = reading
        if changed is not None:
            self._changed(node, changed, reading, path)

    def _name(self, node: fx.Node, path: str) -> str:
        """Of all values of the network; fx's name of a call is its target's and a number."""
        name = path if node.op == "call_module" else f"{path}.{node.name}"
        count = 1
        while name in self._used:
            count += 1
            name = f"{path}.{node.name}#{count}"
        self._used.add(name)
        return name

    def _reading(self, call: _Call, name: str, path: str, operands: list[Reading], args: Any, kwargs: Any) -> Reading:
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

    def _out_of_place(self, node: fx.Node) -> tuple[_Call, Any, Any, fx.Node | None]:
        """The call without its change, and the node that it changes."""
        args: tuple[Any, ...] = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        target: Any = node.target
        if node.op == "call_module":
            module = self.modules[str(target)]
            first = args[0] if args else None
            return _Call.of_module(module), args, kwargs, first if getattr(module, "inplace", False) is True else None
        first = args[0] if args and isinstance(args[0], fx.Node) else None
        if node.op == "call_method":
            name = str(target)
            if name.endswith("_") and not name.endswith("__"):
                if not hasattr(Tensor, name[:-1]):
                    raise RunsWhole(owner_of(node), f"{name} changes a tensor in place")
                return _Call.of_method(name[:-1], as_first=True), args, kwargs, first
            return _Call.of_method(name), args, kwargs, None
        if target is getattr and args[1] not in SCALAR_ATTRIBUTES:
            return replace(_Call.of_function(getattr), scalar=False, light=True, view=True), args, kwargs, None
        if target in (operator.setitem, setattr):
            raise RunsWhole(owner_of(node), "a part of a tensor is assigned")
        if target in _IN_PLACE_OPERATORS:
            return _Call.of_function(_IN_PLACE_OPERATORS[target], as_first=True), args, kwargs, first
        at = _inplace_position(target)
        if at is not None:
            inplace = kwargs.pop("inplace", args[at] if len(args) > at else False)
            if len(args) > at:
                args = (*args[:at], False, *args[at + 1 :])
            return _Call.of_function(target), args, kwargs, first if inplace else None
        name = getattr(target, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and hasattr(torch, name[:-1]):
            return _Call.of_function(getattr(torch, name[:-1]), as_first=True), args, kwargs, first
        return _Call.of_function(target), args, kwargs, None

    def _changed(self, node: fx.Node, changed: fx.Node, reading: Reading, path: str) -> None:
        """From now on `reading` stands for what the node was."""
        old = self.value[changed]
        where = owner_of(node) if node.op != "call_module" else path.rpartition(".")[0]
        if not isinstance(old, Reading):
            raise RunsWhole(where, "a buffer or a parameter is changed in place")
        if old is self.input:
            raise RunsWhole(where, "the network's input is changed in place")
        now = self.order[node]
        for other, value in list(self.value.items()):
            if value is old:
                self.value[other] = reading
                continue
            shares = isinstance(value, Reading) and value is not reading and _base(value) is _base(old)
            if shares and any(self.order[user] > now for user in other.users):
                raise RunsWhole(where, "something is changed in place of which a view is used later")


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
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
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
    return names.index("inplace") if "inplace" in names else None


def _method(name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(x, name)(*args, **kwargs)


def _in_dtype_of_first(function: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(x, *args, **kwargs).to(x.dtype)


def _not_in_place(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's result as a new tensor."""
    inplace = module.inplace
    module.inplace = False  # type: ignore[assignment]
    try:
        return module(*args, **kwargs)
    finally:
        module.inplace = inplace


@dataclass(frozen=True, eq=False)
class _Call:
    """A function, and what is known of it."""

    function: Callable[..., Any]
    same: Hashable
    kind: Any  # the function, the name of the method, or the module's class
    module: nn.Module | None = None
    as_first: bool = False
    dear: bool = False
    light: bool = False
    view: bool = False
    draws: bool = True
    scalar: bool = False

    @staticmethod
    def of_module(module: nn.Module) -> _Call:
        kind = type(module)
        function: Callable[..., Any] = module
        if getattr(module, "inplace", False) is True:
            function = partial(_not_in_place, module)
        quiet = kind in QUIET_MODULES
        return _Call(
            function,
            (f"{kind.__module__}.{kind.__qualname__}", module.extra_repr()),
            kind,
            module,
            dear=not quiet and kind is not nn.Dropout,
            light=kind in LIGHT,
            view=kind in VIEWS,
            draws=not quiet,
        )

    @staticmethod
    def of_function(function: Any, as_first: bool = False) -> _Call:
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
        known = name.startswith(("torch.", "_operator.", "builtins.", "operator.", "None.")) or "torch" in name
        return _Call(
            partial(_in_dtype_of_first, function) if as_first else function,
            name,
            function,
            as_first=as_first,
            dear=function in DEAR_FUNCTIONS or not known,
            light=function in LIGHT,
            view=function in VIEWS,
            draws=not known or getattr(function, "__name__", "") in RANDOM,
            scalar=function in SCALAR_FUNCTIONS,
        )

    @staticmethod
    def of_method(name: str, as_first: bool = False) -> _Call:
        function: Callable[..., Any] = partial(_method, name)
        return _Call(
            partial(_in_dtype_of_first, function) if as_first else function,
            name,
            name,
            as_first=as_first,
            dear=name in DEAR_METHODS,
            light=name in LIGHT,
            view=name in VIEWS,
            draws=name in RANDOM,
            scalar=name in SCALAR_METHODS,
        )

    def own(self, args: Any, kwargs: Any) -> partial[Operation] | None:
        """What makes the operation with kernels of its own, if there is one."""
        tensors = [one for one in args if isinstance(one, Operand)]
        module = self.module
        if module is not None:
            if len(args) != 1 or len(tensors) != 1 or kwargs:
                return None
            for cls in (Convolution, BatchNorm, Linear):
                if cls.covers(module):
                    return partial(_of_module, cls, module)
            if self.kind is nn.GELU:
                return partial(_input_activation, "gelu", (("approximate", module.approximate),))
        if (kind := OUTPUT_ACTIVATIONS.get(self.kind)) and len(tensors) == 1 and _only_inplace(args[1:], kwargs):
            return partial(_output_activation, kind)
        if (kind := INPUT_ACTIVATIONS.get(self.kind)) and len(tensors) == 1 and _only_inplace(args[1:], kwargs):
            return partial(_input_activation, kind, ())
        if self.kind in (operator.add, torch.add, "add") and len(args) == 2 and len(tensors) == 2 and not kwargs:
            return partial(_add, self.as_first)
        return None


def _only_inplace(rest: Any, kwargs: Any) -> bool:
    return not kwargs and all(one is False for one in rest)


def _of_module(cls: Any, module: nn.Module, name: str, operands: tuple[int, ...]) -> Operation:
    made: Operation = cls(name, operands, module)
    return made


def _output_activation(kind: str, name: str, operands: tuple[int, ...]) -> Operation:
    return OutputActivation(name, operands, kind)


def _input_activation(kind: str, arguments: Any, name: str, operands: tuple[int, ...]) -> Operation:
    return InputActivation(name, operands, kind, arguments)


def _add(as_first: bool, name: str, operands: tuple[int, ...]) -> Operation:
    return Add(name, operands, as_first)
