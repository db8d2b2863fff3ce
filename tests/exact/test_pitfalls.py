"""Networks and steps in which a plan could go wrong without a word: what is written in place though others have it,
gradients that belong to somebody else, what torch.fx does not record. Each has plain PyTorch's bits, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lowmem.plan.policy import LEAN, SAVE_ALL, uniform
from lowmem.remat import apply_plan, decompose
from tests.exact.habits import made, schedules, state_differs, unequal

Forward = Callable[[Any, Tensor], Tensor]


class Straight(torch.autograd.Function):
    """Rounds; its gradient is as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Positions(nn.Module):
    """Returns its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[:, : x.size(1)]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.bn, self.drop, self.positions = nn.BatchNorm2d(4), nn.Dropout(0.5), Positions()
        self.scale, self.place = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1, 4, 6, 6))
        self.filter = nn.Parameter(torch.randn(4, 6, 4, 2))
        self.loose = torch.randn(4, 1, 1, requires_grad=True)


def _net(forward: Forward) -> Callable[[], nn.Module]:
    """A class of its own: its forward is what counts."""
    return type("Net", (Parts,), {"forward": forward})


def _without_gradient(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = F.relu(net.a(x))
    return net.b(x)


def _without_autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return net.b(net.a(x).float())


def _spectrum(net: Any, x: Tensor) -> Tensor:
    x = torch.fft.rfft2(net.a(x)) * torch.view_as_complex(net.filter)
    return net.b(torch.fft.irfft2(x, s=(6, 6)))


def _shared_constant(net: Any, x: Tensor) -> Tensor:
    weight = torch.softmax(net.scale, 0).view(1, -1, 1, 1)
    return net.c(net.b(net.a(x) * weight) * weight) * weight


def _positions(net: Any, x: Tensor) -> Tensor:
    y = F.relu(net.bn(net.a(x)))
    return net.b(net.positions(y) + y + x)


def _others_statistics(net: Any, x: Tensor) -> Tensor:
    bn = net.bn
    return net.b(F.relu(F.batch_norm(net.a(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, True)))


NETWORKS: dict[str, Forward] = {
    "a parameter's view under ReLU": lambda net, x: net.b(net.a(x) * net.scale.view(1, -1, 1, 1).relu()),
    "a sum with a parameter's slice": lambda net, x: net.b(net.a(x + net.place[:, :4])),
    "a sum with a module's buffer": _positions,
    "ends in a product": lambda net, x: net.a(x) * net.b(x),
    "ends in a sum": lambda net, x: F.relu(net.a(x)) + net.b(x),
    "no_grad inside": _without_gradient,
    "autocast inside": _without_autocast,
    "a function with its own backward": lambda net, x: net.b(Straight.apply(net.a(x))),
    "complex numbers": _spectrum,
    "a tensor that is no parameter": lambda net, x: net.b(net.a(x) * net.loose),
    "a weight used twice": lambda net, x: net.a(F.relu(net.b(F.relu(net.a(x))))),
    "a constant used thrice": _shared_constant,
    "another module's statistics": _others_statistics,
    "leaky_relu_": lambda net, x: net.b(F.leaky_relu_(net.a(x), 0.1)),
    "elu_": lambda net, x: net.b(F.elu_(net.a(x))),
}


def _pictures(count: int) -> Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def _step(model: Any, count: int, low: bool) -> list[Any]:
    """Output, the gradient that it was given and what became of it, the gradient of the loose tensor, draws."""
    model.loose.grad, given = None, _pictures(count)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = model(_pictures(count))
    given = given.to(y.dtype)
    y.backward(given)
    return [y.detach(), given, model.loose.grad, torch.get_rng_state()]


def _same(build: Callable[[], nn.Module], use: Callable[[Any], Any]) -> Iterator[str]:
    plain = made(build)
    wanted = use(plain)
    for name, schedule in schedules(made(build)):
        model = made(build)
        differs = [*unequal(wanted, use(apply_plan(model, schedule))), *state_differs(plain, model)]
        yield from (f"{name}: {one}" for one in differs)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_bits(name: str, low: bool) -> None:
    """A batch of one has the shape of what it is added to."""
    if low and name == "complex numbers":
        pytest.skip("the FFT knows no bfloat16")
    for count in (1, 3):
        assert list(_same(_net(NETWORKS[name]), lambda model, count=count: _step(model, count, low))) == []


def test_flags_between_forward_and_backward() -> None:
    """What runs again does so as it ran."""

    def use(model: Any) -> Any:
        torch.manual_seed(3)
        y = model(_pictures(3))
        model.eval()
        (y * _pictures(3)).sum().backward()
        return y.detach()

    assert list(_same(_net(lambda net, x: net.c(F.relu(net.bn(net.b(net.drop(net.a(x))))))), use)) == []


def test_what_a_hook_has_seen_stays() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(F.relu(net.bn(net.a(x))) + x)

    def used(plan: bool, schedule: Any = None) -> list[Tensor]:
        model: Any = made(_net(forward))
        seen: list[Tensor] = []
        model.bn.register_forward_hook(lambda module, args, y: seen.extend((args[0].detach(), y.detach())))
        y = (apply_plan(model, schedule) if plan else model)(_pictures(3))
        return [y.detach(), *seen]

    hooked = made(_net(forward))
    hooked.bn.register_forward_hook(lambda module, args, y: None)
    wanted = used(False)
    for name, schedule in schedules(hooked):
        assert unequal(wanted, used(True, schedule)) == [], name


def test_a_changed_output_is_refused() -> None:
    """If the backward begins with it, as plain PyTorch refuses it."""
    model = made(_net(lambda net, x: torch.sigmoid(net.b(F.relu(net.a(x))))))
    y = apply_plan(model, uniform([SAVE_ALL] * len(decompose(model))))(_pictures(3))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        y.sum().backward()


def test_replaced_parameters_are_refused() -> None:
    """The backward would read others than the forward."""
    model = made(_net(NETWORKS["ends in a sum"]))
    planned = apply_plan(model, uniform([LEAN] * len(decompose(model))))
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    y = functional_call(planned, doubled, (_pictures(3),))
    with pytest.raises(RuntimeError, match="replaced by another between forward and backward"):
        y.sum().backward()


def test_parameters_made_of_others() -> None:
    """Their gradients go on to what they are made of."""

    def use(model: Any) -> list[Any]:
        source = torch.linspace(-1, 1, 4 * 4 * 9).view(4, 4, 3, 3).requires_grad_()
        del model.a.weight
        model.a.weight = source * 2
        y = model(_pictures(3))
        (y * _pictures(3)).sum().backward()
        model.a.weight = nn.Parameter(source.detach())
        return [y.detach(), source.grad]

    assert list(_same(_net(NETWORKS["ends in a sum"]), use)) == []


def test_a_pool_that_changes_after_planning() -> None:
    """Its operation has taken the window over."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 1))

    def use(model: Any) -> list[Tensor]:
        found = [model(_pictures(2)).detach()]
        model[2].stride = 1
        return [*found, model(_pictures(2)).detach()]

    assert list(_same(build, use)) == []
