"""What a module becomes: its own forward counts, not the names of its children; what cannot be traced runs whole."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.plan.policy import SAVE_ALL, uniform
from lowmem.remat import apply_plan, decompose
from lowmem.remat.chain import TracedChain, traced
from lowmem.remat.tracing import NotTraceable


def _kinds(model: nn.Module) -> list[list[str]]:
    return [[type(one).__name__ for one in stage.operations] for stage in decompose(model)]


class _Block(nn.Module):
    """Convolution, batch norm and ReLU under any names; `end` is what happens to the sum."""

    def __init__(self, end: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.first, self.then, self.end = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.then(self.first(x)) + x)


def test_the_forward_counts_and_not_the_names() -> None:
    expected = [["Convolution", "BatchNorm", "Add", "OutputActivation"]]
    for end in (F.relu, torch.relu, torch.relu_, nn.ReLU(inplace=True), lambda x: F.relu(x, inplace=True)):
        assert _kinds(_Block(end)) == expected
    assert _kinds(_Block(lambda x: x.mul(2)))[0][-1] == "AutogradOperation"


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 3, padding_mode="circular", padding=1),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ConvTranspose2d(3, 4, 3),
        nn.InstanceNorm2d(3, affine=True),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        type("Convolution", (nn.Conv2d,), {})(3, 4, 3),
    ],
)
def test_what_the_kernels_do_not_cover_runs_under_autograd(module: nn.Module) -> None:
    assert _kinds(nn.Sequential(module)) == [["AutogradOperation"]]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv2d(3, 4, 3, dilation=2, bias=True), "Convolution"),
        (nn.Conv2d(3, 3, 3, groups=3, stride=2), "Convolution"),
        (nn.BatchNorm2d(3, affine=False), "BatchNorm"),
        (nn.BatchNorm2d(3, track_running_stats=False), "BatchNorm"),
        (nn.ReLU6(), "OutputActivation"),
        (nn.SiLU(), "InputActivation"),
        (nn.Linear(3, 4), "Linear"),
    ],
)
def test_what_the_kernels_cover(module: nn.Module, kind: str) -> None:
    assert _kinds(nn.Sequential(module)) == [[kind]]


class _Depends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_depends_on_values_runs_whole_and_the_rest_does_not() -> None:
    found = traced(nn.Sequential(nn.Conv2d(3, 4, 1), _Depends(), nn.Conv2d(4, 4, 1)))
    assert [stage.name for stage in found.stages] == ["stem", "1", "head"]
    assert list(found.leaves) == ["1"]
    assert "control flow" in found.leaves["1"]


def test_what_has_hooks_runs_whole() -> None:
    """And is seen as soon as somebody hangs one on."""
    model = nn.Sequential(_Block(), nn.ReLU())
    chain = TracedChain(model)
    assert len(chain.now().stages[0].operations) == 5
    handle = model[0].register_forward_hook(lambda module, args, output: None)
    assert [one.name for one in chain.now().stages[0].operations] == ["0", "1"]
    handle.remove()
    assert len(chain.now().stages[0].operations) == 5


def test_a_part_that_is_assigned_makes_its_module_whole() -> None:
    class Assigns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = 0
            return y

    found = traced(nn.Sequential(nn.Conv2d(3, 4, 1), Assigns(), nn.Conv2d(4, 4, 1)))
    assert "item assignment" in found.leaves["1"]


def test_a_view_of_what_is_changed_makes_its_module_whole() -> None:
    class Views(nn.Module):
        def __init__(self, later: bool) -> None:
            super().__init__()
            self.conv, self.later = nn.Conv2d(3, 4, 1), later

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            view = y.flatten(1)
            y.relu_()
            return y.flatten(1) + view if self.later else y

    (stage,) = decompose(Views(later=False))
    assert "relu" in [one.name for one in stage.operations]
    (stage,) = decompose(Views(later=True))
    assert [one.name for one in stage.operations] == ["all"]


class _Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _Any(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x


class _Remembers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        return self.last


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (_Two(), "needs y beside its first argument"),
        (_Any(), "any number of arguments"),
        (_Pair(), "returns a tuple, not one tensor"),
        (_Remembers(), "_Remembers.last is set while the network runs"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(model: nn.Module, why: str) -> None:
    with pytest.raises(NotTraceable, match=why):
        decompose(model)
    assert not hasattr(model, "last"), "tracing leaves the model as it was"


def test_other_threads_run_their_modules_meanwhile() -> None:
    """torch.fx patches every module's calls while it traces."""
    theirs, results = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), list[Any]()

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            other = threading.Thread(target=lambda: results.append((theirs(torch.ones(2, 3)), self.linear.weight)))
            other.start()
            other.join()
            y: Tensor = self.linear(x)
            return y

    decompose(Waits())
    output, weight = results[0]
    assert torch.equal(output, theirs(torch.ones(2, 3)))
    assert type(weight) is nn.Parameter


@pytest.mark.parametrize("make", [_Block, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), _Depends())], ids=["whole", "leaf"])
def test_the_model_dies_without_the_garbage_collector(make: Callable[[], nn.Module]) -> None:
    """Its memory is for another one at once."""
    model = make()
    planned = apply_plan(model, uniform([SAVE_ALL] * len(decompose(model))))
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model, planned
        assert reference() is None
    finally:
        gc.enable()
