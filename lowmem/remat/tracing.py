"""A module -> its operations, by `torch.fx`: what its own `forward` does counts, never the names of its children.

Modules that cannot be traced, or that must run as a whole, are leaves: those whose forward depends on values, that
change something in place which others see, that own buffers of their own, or that somebody hung hooks on (which then
run as ever). The whole module is one if nothing else helps; a real `nn.Sequential` then is its children.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lowmem.core.errors import first_line
from lowmem.remat.known import RANDOM
from lowmem.remat.starting_point import Generators

TRACING = Lock()  # torch.fx patches every module's calls while it traces: one thread at a time

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    a, b, c, d = _HOOKS
    return bool(own.get(a) or own.get(b) or own.get(c) or own.get(d))


def is_compiled(module: nn.Module) -> bool:
    """By torch.jit or torch.compile: then its forward is no Python that can be traced."""
    wrapped = type(module).__module__.startswith("torch._dynamo")
    return wrapped or isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None


class NotTraceable(ValueError):
    """Why a module cannot be traced, in a sentence. `final`: nor can it be run as a whole."""

    def __init__(self, why: str, final: bool = True) -> None:
        super().__init__(why)
        self.final = final


def check_own_forward(model: nn.Module) -> None:
    """Raises NotTraceable where a call of the module would not run the `forward` of its class, or nobody knows yet what
    it computes."""
    if is_compiled(model):
        raise NotTraceable("it is compiled, by torch.compile or torch.jit: plan the network as it was before")
    if "forward" in model.__dict__:
        raise NotTraceable(
            "its forward was replaced on the object (model.forward = …), which copies and plans do not see: put it "
            "into a subclass"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise NotTraceable(f"{name} has no shape yet (a lazy module): run one batch through the network first")


class _Restart(Exception):
    """A module turned out to be a leaf."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(why)
        self.path, self.why = path, why


class _Proxy(fx.Proxy):
    """With the operators that change in place, for which fx itself records the ones that do not."""


def _in_place(operation: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class Tracer(fx.Tracer):
    """`leaves`: path -> why, of modules that run as a whole; grows while it traces."""

    def __init__(self, model: nn.Module, leaves: dict[str, str]) -> None:
        super().__init__(autowrap_functions=())
        self.model, self.leaves = model, leaves
        self._thread = get_ident()
        self.autocasts = 0  # that were entered
        self._inside = [("", self._modes())]  # modules whose forward is being followed, and the modes that it began in
        self.forwards: list[nn.Module] = []  # modules whose forward was traced

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    @property
    def here(self) -> bool:
        """Whether it is this thread that traces; another's calls may still come by when all else of this is gone."""
        return get_ident() == self.__dict__.get("_thread")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or has_hooks(m) or is_parametrized(m):
            return True
        if super().is_leaf_module(m, module_qualified_name) or is_compiled(m):
            return True
        return any(one is not None for one in m._buffers.values())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.here:  # somebody else's module, which runs meanwhile
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        self._check_modes()
        self.forwards.append(m)
        self._inside.append((path, self._modes()))
        try:
            with _NothingDrawn():
                return super().call_module(m, forward, args, kwargs)
        except (_Restart, NotTraceable):
            raise
        except Exception as error:
            raise _Restart(path, _said(error)) from error
        finally:
            self._inside.pop()

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        self._check_modes()
        return super().create_proxy(kind, target, *args, **kwargs)

    def _check_modes(self) -> None:
        """A graph does not say under which modes a call was made."""
        path, modes = self._inside[-1]
        if modes != self._modes():
            why = "it changes gradients' or autocast's mode inside (torch.no_grad, torch.autocast)"
            raise _Restart(path, why) if path else NotTraceable(why, final=False)

    def _modes(self) -> tuple[bool, int]:
        return torch.is_grad_enabled(), self.autocasts

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.here:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """A tensor that is no attribute of a module: the forward makes it, of nothing that depends on the input."""
        if not isinstance(a, Tensor) or isinstance(a, nn.Parameter) or a in self.tensor_attrs:
            return super().create_arg(a)
        if any(a is one for one in self.model.buffers()):
            return super().create_arg(a)
        return self.create_proxy("call_function", Constant(a), (), {}).node


class Constant:
    """A function of nothing."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__name__ = self.__qualname__ = "constant"

    def __call__(self) -> Tensor:
        return self.tensor


class CustomFunction:
    """Of a user: its own backward counts, which its forward, followed, would not have."""

    def __init__(self, function: type[torch.autograd.Function], apply: Callable[..., Any]) -> None:
        self._apply = apply
        self.__name__ = function.__name__
        self.__qualname__ = f"{function.__module__}.{function.__qualname__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._apply(*args, **kwargs)


@contextmanager
def _told_of_more(tracer: Tracer) -> Iterator[None]:
    """Of what torch.fx does not hear: calls of `torch.autograd.Function`s, and autocast. Other threads may come by, and
    leave when the tracer is gone."""
    thread = get_ident()
    original = torch.autograd.Function.__dict__["apply"]
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(self: Any) -> Any:
        if get_ident() == thread:
            tracer.autocasts += 1
        return enter(self)

    def left(self: Any, *error: Any) -> Any:
        if get_ident() == thread:
            tracer.autocasts -= 1
        return leave(self, *error)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(None, cls)
        if get_ident() == thread and any(isinstance(one, fx.Proxy) for one in tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", CustomFunction(cls, function), args, kwargs)
        return function(*args, **kwargs)

    patched: Any = torch.autocast
    torch.autograd.Function.apply = classmethod(apply)
    patched.__enter__, patched.__exit__ = entered, left
    try:
        yield
    finally:
        torch.autograd.Function.apply = original
        patched.__enter__, patched.__exit__ = enter, leave


class _DrawnError(ValueError):
    pass


def _said(error: Exception) -> str:
    """Why a forward cannot be traced, in a line."""
    if isinstance(error, _DrawnError):
        return str(error)
    return f"torch.fx cannot follow it ({first_line(error)})"


class _NothingDrawn(TorchFunctionMode):
    """Raises ValueError at the end if random numbers were drawn, other than in the shape of what is traced: what was
    drawn once would stay. Generators of Python and numpy are put back."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM:
            self._drawn = self._drawn or not any(isinstance(one, fx.Proxy) for one in tree_leaves((args, kwargs)))
        return func(*args, **kwargs)

    def __enter__(self) -> Any:
        self._before = Generators()
        return super().__enter__()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        super().__exit__(kind, value, trace)
        drawn = self._drawn or self._before.moved_outside_torch()
        if drawn:
            self._before.put_back()
        if drawn and kind is None:
            raise _DrawnError("it draws random numbers whose shape is not its input's")


def trace(model: nn.Module, leaves: dict[str, str] | None = None) -> tuple[fx.Graph, dict[str, str]]:
    """The graph, and the leaves with the reasons. `leaves`: modules that are known to be. Raises NotTraceable if the
    module itself cannot be traced, or keeps state in a plain attribute."""
    leaves = {} if leaves is None else leaves
    check_own_forward(model)
    with TRACING:
        while True:
            before = _attributes(model)
            tracer = Tracer(model, leaves)
            try:
                with _NothingDrawn(), _told_of_more(tracer):
                    graph = tracer.trace(model, _defaults(model))
            except _Restart as restart:
                if restart.path in leaves:
                    raise NotTraceable(restart.why, final=False) from restart
                leaves[restart.path] = restart.why
                continue
            except NotTraceable:
                raise
            except Exception as error:
                raise NotTraceable(_said(error), final=False) from error
            finally:
                changed = _restored(model, before)
                tracer.__dict__.clear()  # it is in a cycle, and would hold the model until the collector comes by
            if changed is not None:
                raise NotTraceable(
                    f"{changed} is set while the network runs: state in a plain attribute cannot be kept right when a "
                    "part runs again; make it a buffer (register_buffer), or leave it to plain PyTorch"
                )
            return graph, leaves


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What `forward` takes beside its first argument has to have a default."""
    first, *others = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if first.kind in kinds:
        raise NotTraceable("its forward takes any number of arguments, not one tensor")
    found = {}
    for parameter in others:
        if parameter.kind in kinds:
            continue
        if parameter.default is inspect.Parameter.empty:
            raise NotTraceable(f"its forward needs {parameter.name} beside its first argument: one tensor is planned")
        found[parameter.name] = parameter.default
    return found


def _attributes(model: nn.Module) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """By module: what it has, and a copy of that."""
    return [(name, module.__dict__, dict(module.__dict__)) for name, module in model.named_modules()]


def _restored(model: nn.Module, before: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> str | None:
    """Puts back what tracing changed; the name of such an attribute."""
    found = None
    for name, now, then in before:
        for key in {*now, *then}:
            if now.get(key, _NOTHING) is not then.get(key, _NOTHING):
                found = f"{name or type(model).__name__}.{key}"
        now.clear()
        now.update(then)
    return found


_NOTHING = object()


def owner_of(node: fx.Node) -> str:
    """The path of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
