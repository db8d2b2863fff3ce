"""A model as a chain of stages, as it is now: traced anew when its modules, flags or hooks have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowmem.remat.autograd_operation import AutogradOperation, Operand
from lowmem.remat.cutting import cut
from lowmem.remat.reading import RunsWhole, read
from lowmem.remat.stage import Stage
from lowmem.remat.starting_point import OF_EVERY_MODULE
from lowmem.remat.tracing import NotTraceable, has_hooks, trace


@dataclass(frozen=True)
class Traced:
    """Stages in forward order, and what runs as a whole though it is no single operation: path -> why."""

    stages: tuple[Stage, ...]
    leaves: dict[str, str] = field(default_factory=dict)


def traced(model: nn.Module) -> Traced:
    """By torch.fx; else the children of a real `nn.Sequential`; else one stage. Raises NotTraceable for what is not one
    tensor in, one tensor out."""
    leaves: dict[str, str] = {}
    while True:
        try:
            graph, _ = trace(model, leaves)
            return Traced(cut(*read(graph, model)), leaves)
        except RunsWhole as whole:
            if not whole.path or whole.path in leaves:
                why = str(whole)
                break
            leaves[whole.path] = str(whole)
        except NotTraceable as error:
            if error.final:
                raise
            why = str(error)
            break
    if type(model).forward is nn.Sequential.forward and len(list(model.children())):
        parts = list(model.named_children())
    else:
        parts = [("model", model)]
    return Traced(chain_of(parts), {**leaves, "": why})


def chain_of(parts: Sequence[tuple[str, Callable[..., Any]]]) -> tuple[Stage, ...]:
    """One stage of one operation for each of the named modules or functions."""
    return tuple(Stage(name, (_whole(name, part),)) for name, part in parts)


def _whole(name: str, part: Callable[..., Any]) -> AutogradOperation:
    module = part if isinstance(part, nn.Module) else None
    kind = type(part) if module is not None else part
    same = (name, f"{kind.__module__}.{getattr(kind, '__qualname__', kind)}")
    return AutogradOperation("all", (0,), part, (Operand(0),), module=module, same=same, dear=True)


class TracedChain:
    """The chain of a model that may change: `stages()` are those of its present state."""

    def __init__(self, model: nn.Module, parts: Sequence[tuple[str, Callable[..., Any]]] | None = None) -> None:
        self._model, self._parts = model, parts
        self._known: dict[tuple[Any, ...], tuple[list[Any], Traced]] = {}

    def now(self) -> Traced:
        modules = _modules(self._model)
        alive: list[Any] = [modules]
        key = tuple((id(module), module.training, has_hooks(module), _attributes(module, alive)) for module in modules)
        if key not in self._known:
            if self._parts is not None:
                found = Traced(chain_of(self._parts))
            else:
                found = traced(self._model)
            if len(self._known) >= 4:
                self._known.clear()
            self._known[key] = alive, found  # they live on, so that nobody else has their identities
        return self._known[key][1]


def _modules(model: nn.Module) -> list[nn.Module]:
    """Each once. As `modules()`, which makes a generator for every one: this runs in every step."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found)


def _attributes(module: nn.Module, alive: list[Any]) -> tuple[Any, ...]:
    """What its forward may read of it as plain Python values, which the trace has taken over: numbers and names by
    value, all else by identity. torch's own modules run as they are, but those without parameters may have become
    operations that took them over (a pool's window)."""
    if type(module).__module__.startswith("torch.nn.") and (module._modules or module._parameters):
        return ()
    found = [value for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE]
    alive += found
    return tuple((type(one), one) if type(one) in _PLAIN else id(one) for one in found)


_PLAIN = (int, float, bool, str)
