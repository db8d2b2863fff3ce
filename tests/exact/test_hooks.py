"""Hooks on a planned module, on what is inside it and on its parameters fire as in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.plan.policy import LEAN, SAVE_ALL, uniform
from lowmem.remat import apply_plan, decompose
from tests.exact.habits import Net, made, pictures, planned, state_differs, train, unequal

X, _ = pictures()


def _watch(model: Any, where: nn.Module, seen: list[Any]) -> None:
    name = type(where).__name__
    where.register_forward_pre_hook(lambda module, args: seen.append((f"{name} before", args[0].detach().clone())))
    where.register_forward_hook(lambda module, args, y: seen.append((f"{name} after", y.detach().clone())))
    where.register_full_backward_hook(lambda module, into, out: seen.append((f"{name} back", out[0].clone())))


def _changing(model: Any) -> None:
    model.blocks[1].register_forward_hook(lambda module, args, y: y * 1.5)
    model.head.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))


def _on_parameters(model: Any, seen: list[Any]) -> None:
    for parameter in (model.head.weight, model.blocks[0].bn1.weight):
        parameter.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        parameter.register_hook(lambda grad: seen.append(grad.clone()))
        parameter.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.clone()))


HOOKED: dict[str, Callable[[Any, list[Any]], Any]] = {
    "the module": lambda model, seen: _watch(model, model, seen),
    "a block": lambda model, seen: _watch(model, model.blocks[0], seen),
    "a convolution": lambda model, seen: _watch(model, model.blocks[0].conv1, seen),
    "a batch norm": lambda model, seen: _watch(model, model.blocks[0].bn1, seen),
    "an activation": lambda model, seen: _watch(model, model.stem[2], seen),
    "the head": lambda model, seen: _watch(model, model.head, seen),
    "a hook that changes": lambda model, seen: _changing(model),
    "parameters": _on_parameters,
}


def _no_in_place() -> nn.Module:
    """What a backward hook has seen may not be changed in place."""
    return Net(inplace=False)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", HOOKED)
def test_hooks(name: str, when: str) -> None:
    """Put there before planning or after it; what a hook on a module hears twice, it hears because that runs again."""

    def hooked(build: nn.Module, seen: list[Any]) -> nn.Module:
        HOOKED[name](build, seen)
        return build

    for policy in (SAVE_ALL, LEAN):
        heard: list[list[Any]] = [[], []]
        plain, model = made(_no_in_place), made(_no_in_place)
        hooked(plain, heard[0])
        if when == "before":
            hooked(model, heard[1])
        module = apply_plan(model, uniform([policy] * len(decompose(model))))
        if when == "after":
            hooked(model, heard[1])
        outcomes = []
        for one in (plain, module):
            torch.manual_seed(3)
            outcomes.append(train(one))
        assert unequal(*outcomes) == []
        assert list(state_differs(plain, model)) == []
        if policy == SAVE_ALL:
            assert unequal(*heard) == []
        assert [one for one in heard[0] if not any(unequal(one, other) == [] for other in heard[1])] == []


def test_hooks_on_all_modules_are_said_not_to_fire_inside() -> None:
    module = planned()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="fire only for the planned module"):
            module(X)
    finally:
        handle.remove()


def test_a_hook_on_a_complete_gradient_runs_once() -> None:
    """And may do what it likes with it, as an optimizer that steps in the backward does: autograd of newer versions
    runs it for a gradient that it was not given, too."""
    plain, planned = made(_no_in_place), made(_no_in_place)
    updated: list[list[str]] = [[], []]
    for model, names in zip((plain, planned), updated, strict=True):
        for name, parameter in model.named_parameters():

            def update(one: torch.Tensor, name: str = name, names: list[str] = names) -> None:
                assert one.grad is not None
                names.append(name)
                one.data.add_(one.grad, alpha=-0.1)
                one.grad = None

            parameter.register_post_accumulate_grad_hook(update)
    module = apply_plan(planned, uniform([LEAN] * len(decompose(planned))))
    for model in (plain, module):
        torch.manual_seed(3)
        model(X).square().sum().backward()
    assert sorted(updated[1]) == sorted(updated[0]) == sorted(name for name, _ in plain.named_parameters())
    assert all(map(torch.equal, planned.state_dict().values(), plain.state_dict().values()))
