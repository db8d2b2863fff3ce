"""What people do to modules that a planned module does not do: refused in a sentence, where plain PyTorch refuses it
too, or where a plan cannot. What works: `test_what_people_do.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.remat import decompose
from tests.exact.habits import CLASSES, Block, Net, made, pictures, planned

X, LABELS = pictures()


def _loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), LABELS)


# -- as in plain PyTorch -----------------------------------------------------------------------------------------------


def _twice(model: Any) -> None:
    loss = _loss(model)
    loss.backward()
    loss.backward()


def _changed_weight(model: Any) -> None:
    loss = _loss(model)
    with torch.no_grad():
        model.blocks[0].conv1.weight.mul_(2)
    loss.backward()


def _stepped_between(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = _loss(model), _loss(model)
    first.backward()
    optimizer.step()
    second.backward()


def _changed_input(model: Any) -> None:
    x = X.clone()
    loss = F.cross_entropy(model(x), LABELS)
    x.mul_(2)
    loss.backward()


def _nothing_to_train(model: Any) -> None:
    model.requires_grad_(False)
    _loss(model).backward()


def _wrong_shape(model: Any) -> None:
    model(torch.randn(4, 5, 12, 12))


ALIKE = (_twice, _changed_weight, _stepped_between, _changed_input, _nothing_to_train, _wrong_shape)


@pytest.mark.parametrize("use", ALIKE)
def test_what_plain_pytorch_refuses(use: Callable[[nn.Module], None]) -> None:
    for model in (made(Net), planned()):
        with pytest.raises(RuntimeError):
            use(model)


# -- what a plan cannot ------------------------------------------------------------------------------------------------


def _another_structure(model: Any) -> None:
    model.blocks.append(Block(8))
    model(X)


def _removed_block(model: Any) -> None:
    del model.blocks[1]
    model(X)


def _data_parallel(model: Any) -> None:
    model._replicate_for_data_parallel()


def _retained(model: Any) -> None:
    loss = _loss(model)
    loss.backward(retain_graph=True)
    loss.backward()


def _second_derivative(model: Any) -> None:
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.sum().backward()


def _two_tensors(model: Any) -> None:
    model(X, X)


def _compiled_in_place(model: Any) -> None:
    model.compile()


def _model_compiled(model: Any) -> None:
    model.lowmem.model.compile()
    model(X)


def _forward_replaced(model: Any) -> None:
    model.forward = lambda x: x
    model(X)


REFUSED: dict[Callable[[Any], None], str] = {
    _another_structure: "make a plan for it as it is now",
    _removed_block: "make a plan for it as it is now",
    _data_parallel: "DataParallel makes copies",
    _retained: "went backward already",
    _second_derivative: "once_differentiable",
    _two_tensors: "takes one tensor",
    _compiled_in_place: "torch.compile",
    _model_compiled: "torch.compile",
    _forward_replaced: "its forward was replaced",
}


@pytest.mark.parametrize("use", REFUSED, ids=lambda use: use.__name__)
def test_what_a_plan_cannot(use: Callable[[nn.Module], None]) -> None:
    with pytest.raises((RuntimeError, ValueError), match=REFUSED[use]):
        use(planned())


# -- networks ----------------------------------------------------------------------------------------------------------


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return super().forward(x), x


class Named(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.head(self.stem(x).mean((2, 3)))}


class TwoInputs(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask)


class Leaky(nn.Module):
    """State in a plain attribute, as spiking neurons keep it."""

    voltage: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.voltage = 0.5 * self.voltage + x.detach().mean()
        return torch.tanh(x + self.voltage)


class LeakyByValues(Leaky):
    """Whose state the trace does not see."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > -9 else x


def _with(middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), middle(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, CLASSES)
    )


def _replaced() -> nn.Module:
    net: Any = Net()
    net.forward = lambda x: x * 2
    return net


def _compiled_before() -> nn.Module:
    net: Any = Net()
    net.compile()
    return net


NETWORKS: dict[Callable[[], nn.Module], str] = {
    TwoOutputs: "returns a tuple, not one tensor",
    Named: "returns a dict, not one tensor",
    TwoInputs: "needs mask beside its first argument",
    _with(Leaky): "1.voltage is set while the network runs",
    _replaced: "its forward was replaced",
    _compiled_before: "torch.compile",
    lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(3, 8))): "torch.compile",
    lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(5)): "0.weight has no shape yet",
}


@pytest.mark.parametrize("build", NETWORKS)
def test_networks_that_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=re.escape(NETWORKS[build])):
        decompose(build())


def test_state_that_the_trace_does_not_see() -> None:
    model = planned(_with(LeakyByValues))
    with pytest.raises(RuntimeError, match="voltage is set while the network runs"):
        model(X)
