"""`make_plan` on networks that people have: planned, or refused in a sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import lowmem
from lowmem.choose.explain import explain
from lowmem.choose.planning import choose
from lowmem.choose.request import Budget, Request, card_rates
from lowmem.config.cards import load_card
from lowmem.core.errors import Infeasible, PreflightError
from lowmem.remat.tracing import NotTraceable
from tests.exact.habits import CLASSES, made, state_differs, unequal

SHAPE = (3, 12, 12)


def _plan(model: nn.Module, budget: Any = "1G", batch: int = 4) -> Any:
    return lowmem.make_plan(model, batch=batch, budget=budget, image_shape=SHAPE, allow_accumulation=False)


def _small(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *middle, nn.Flatten(), nn.Linear(400, CLASSES))


class AssignsPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0] = 0
        return y


class Scores(nn.Module):
    """One number a picture, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3))).squeeze(1)


def _pruned() -> nn.Module:
    net: Any = _small()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


PLANNED: dict[str, Callable[[], nn.Module]] = {
    "bfloat16": lambda: _small(nn.BatchNorm2d(4)).bfloat16(),
    "float64": lambda: _small(nn.BatchNorm2d(4)).double(),
    "dense output": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "one number a picture": Scores,
    "pruned": _pruned,
    "a part assigned": lambda: _small(AssignsPart()),
}


@pytest.mark.parametrize("name", PLANNED)
def test_planned_into_the_least_budget(name: str) -> None:
    plain, model = made(PLANNED[name]), made(PLANNED[name])
    with pytest.raises(Infeasible) as refused:
        _plan(model, 1)  # a number is bytes
    plan = _plan(model, refused.value.least_bytes)
    assert plan.predicted.peak_allocated_bytes <= refused.value.least_bytes
    x = torch.randn(4, *SHAPE, dtype=next(model.parameters()).dtype)
    outputs = []
    for module in (plain, lowmem.apply_plan(model, plan)):
        outputs.append(module(x))
        outputs[-1].float().square().mean().backward()
    assert unequal(*outputs) == []
    assert list(state_differs(plain, model)) == []


def test_a_planned_module_is_planned_again() -> None:
    model = made(_small)
    plan = _plan(model)
    planned = lowmem.apply_plan(model, plan)
    again = lowmem.apply_plan(planned, _plan(planned))
    assert type(again).__mro__[1:] == type(planned).__mro__[1:]
    assert isinstance(again, type(model))
    assert list(again.named_parameters()) == list(model.named_parameters())
    assert [name for name, _ in again.named_modules()] == [name for name, _ in model.named_modules()]


def test_what_runs_as_a_whole_is_said() -> None:
    request = Request(
        model=made(PLANNED["a part assigned"]),
        batch=4,
        budget=Budget(total_bytes=1 << 30),
        rates=card_rates(load_card("gtx1060-6g")),
        image_shape=SHAPE,
    )
    choice = choose(request)
    (line,) = (one for one in explain(choice) if "inside" in one)
    assert line.startswith("not planned inside 2: it runs as a whole: torch.fx cannot follow it (TypeError")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x).mean((2, 3))
        return self.head(h), h


class ByType(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if isinstance(x, Tensor) else x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two outputs": (Two, "returns a tuple"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), "0.weight has no shape yet"),
    "other pictures": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3)),
        r"the network itself fails on pictures of \[3, 12, 12\]",
    ),
    "untraceable": (lambda: _small(ByType()), "computes something else than by itself, from stage head on"),
    "scripted inside": (lambda: _small(torch.jit.script(nn.Tanh())), "2 is compiled, by torch.compile or torch.jit"),
    "nothing to train": (nn.Tanh, "no parameter that is trained"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name: str) -> None:
    build, said = REFUSED[name]
    model = build()
    before = copy.deepcopy(model.__dict__) if name == "two outputs" else None
    with pytest.raises((ValueError, PreflightError), match=said) as refused:
        _plan(model)
    assert "\n" not in str(refused.value)
    assert type(refused.value) in (ValueError, NotTraceable, PreflightError)
    assert before is None or before.keys() == model.__dict__.keys()
