"""What a traced graph calls, a function, method or module: what is known of it, and its operation with kernels of its
own, if there is one (`own`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowmem.remat.autograd_operation import Attribute, Operand, Scalar
from lowmem.remat.batch_norm import BatchNorm
from lowmem.remat.elementwise import Add, InputActivation, Mul, OutputActivation
from lowmem.remat.known import (
    DEAR_FUNCTIONS,
    DEAR_METHODS,
    INPUT_ACTIVATIONS,
    LIGHT,
    OUTPUT_ACTIVATIONS,
    QUIET_MODULES,
    RANDOM,
    SCALAR_FUNCTIONS,
    SCALAR_METHODS,
    VIEWS,
)
from lowmem.remat.layer_norm import GroupNorm, LayerNorm
from lowmem.remat.linear_maps import Convolution, Linear
from lowmem.remat.operation import Operation
from lowmem.remat.pooling import MaxPool
from lowmem.remat.tracing import CustomFunction, has_hooks

Maker = partial[Operation]  # of name and operands' numbers


def _method(name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(x, name)(*args, **kwargs)


def _in_dtype_of_first(function: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(x, *args, **kwargs).to(x.dtype)


def _on_copy(function: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Of what changes its operand: the derivative of some such (ELU) has other last digits than without."""
    return function(x.clone(), *args, **kwargs)


@dataclass(frozen=True, eq=False)
class TracedCall:
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
    def of_module(module: nn.Module) -> TracedCall:
        kind = type(module)
        function: Callable[..., Any] = module
        if getattr(module, "inplace", False) is True:
            function = partial(_on_copy, module)
        quiet = kind in QUIET_MODULES
        return TracedCall(
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
    def of_function(function: Any, as_first: bool = False, in_place: bool = False) -> TracedCall:
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
        known = name.startswith(("torch.", "_operator.", "builtins.", "operator.", "None.")) or "torch" in name
        known = known and not isinstance(function, CustomFunction)
        made = function
        if as_first or in_place:
            made = (
                partial(_in_dtype_of_first, function)
                if as_first
                else partial(_on_copy, partial(function, inplace=True))
            )
        return TracedCall(
            made,
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
    def of_method(name: str, as_first: bool = False) -> TracedCall:
        function: Callable[..., Any] = partial(_method, name)
        return TracedCall(
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

    def own(self, args: Any, kwargs: Any) -> Maker | None:
        """What makes the operation with kernels of its own, if there is one."""
        tensors = sum(isinstance(one, Operand) for one in args)
        module = self.module
        if (
            not args
            or not isinstance(args[0], Operand)
            or (module is not None and (has_hooks(module) or "forward" in module.__dict__))
        ):
            return None
        if module is not None:
            return None if len(args) != 1 or kwargs else self._own_module(module)
        if self.kind in _MUL or self.kind in _ADD:
            if len(args) != 2 or tensors != 2 or kwargs:
                return None
            return partial(_of, Mul if self.kind in _MUL else Add, self.as_first)
        if tensors != 1 or any(isinstance(one, Operand) for one in kwargs.values()):
            return None
        if (maker := _OF_FUNCTION.get(self.kind)) is not None:
            return maker(args[1:], kwargs)
        if len(args) == 1 and not kwargs:
            return _activation(self.kind)
        return None

    def _own_module(self, module: nn.Module) -> Maker | None:
        for cls in (Convolution, BatchNorm, Linear):
            if cls.covers(module):
                return partial(_of, cls, module)
        if self.kind in (nn.LayerNorm, nn.GroupNorm):
            extent = "normalized_shape" if self.kind is nn.LayerNorm else "num_groups"
            given = [Attribute(module, name) for name in (extent, "weight", "bias", "eps")]
            return partial(_of, LayerNorm if self.kind is nn.LayerNorm else GroupNorm, *given)
        if (found := _OF_MODULE.get(self.kind)) is None:
            return _activation(self.kind)
        names, maker = found
        return maker(tuple(getattr(module, name) for name in names), {})


_ADD: set[Any] = {operator.add, torch.add, "add"}
_MUL: set[Any] = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"}


def _of(cls: Any, *rest: Any) -> Operation:
    """`rest`: the operation's own arguments, then its name and operands."""
    *own, name, operands = rest
    made: Operation = cls(name, operands, *own)
    return made


def _activation(kind: Any) -> Maker | None:
    if found := OUTPUT_ACTIVATIONS.get(kind):
        return partial(_of, OutputActivation, found)
    return partial(_of, InputActivation, found) if (found := INPUT_ACTIVATIONS.get(kind)) else None


def _given(defaults: dict[str, Any], args: Any, kwargs: Any) -> list[Any] | None:
    """The arguments in the order of the defaults; None if it takes others, or one is a number of the pass."""
    found = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
    if len(args) > len(defaults) or len(found) > len(defaults):
        return None
    values = [one for value in found.values() for one in (value if type(value) in (tuple, list) else (value,))]
    return None if any(isinstance(one, (Operand, Scalar)) for one in values) else list(found.values())


def _layer_norm(args: Any, kwargs: Any) -> Maker | None:
    defaults = {"normalized_shape": None, "weight": None, "bias": None, "eps": 1e-5, "cudnn_enable": True}
    given = _given(defaults, args, kwargs)
    return None if given is None else partial(_of, LayerNorm, *given[:4])


def _group_norm(args: Any, kwargs: Any) -> Maker | None:
    defaults = {"num_groups": None, "weight": None, "bias": None, "eps": 1e-5, "cudnn_enabled": True}
    given = _given(defaults, args, kwargs)
    return None if given is None else partial(_of, GroupNorm, *given[:4])


def _max_pool(args: Any, kwargs: Any) -> Maker | None:
    defaults = {
        **{"kernel_size": None, "stride": None, "padding": 0, "dilation": 1},
        **{"ceil_mode": False, "return_indices": False},
    }
    given = _given(defaults, args, kwargs)
    if given is None or given.pop():
        return None
    *sizes, ceil_mode = given
    window = [() if size is None else (size,) if isinstance(size, int) else tuple(size) for size in sizes]
    return partial(_of, MaxPool, (*window, ceil_mode))


def _gelu(args: Any, kwargs: Any) -> Maker | None:
    given = _given({"approximate": "none"}, args, kwargs)
    return None if given is None else partial(_of, InputActivation, "gelu", (("approximate", given[0]),))


def _leaky_relu(args: Any, kwargs: Any) -> Maker | None:
    given = _given({"negative_slope": 0.01}, args, kwargs)
    return None if given is None or not given[0] > 0 else partial(_of, OutputActivation, "leaky_relu", tuple(given))


_OF_MODULE: dict[Any, tuple[tuple[str, ...], Callable[[Any, Any], Maker | None]]] = {
    nn.MaxPool2d: (("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"), _max_pool),
    nn.GELU: (("approximate",), _gelu),
    nn.LeakyReLU: (("negative_slope",), _leaky_relu),
}
_OF_FUNCTION: dict[Any, Callable[[Any, Any], Maker | None]] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _group_norm),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.gelu: _gelu,
    F.leaky_relu: _leaky_relu,
}
