"""What people do to modules, a row a thing: a planned module gives plain PyTorch's results, bit for bit. Hooks:
`test_hooks.py`; what is refused instead: `test_what_is_refused.py`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parametrizations, prune
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from tests.exact.habits import (
    CLASSES,
    Block,
    Net,
    compared,
    made,
    one_step,
    pictures,
    planned,
    state_differs,
    train,
    unequal,
)

X, LABELS = pictures()


def _loss(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), LABELS)


# -- networks ----------------------------------------------------------------------------------------------------------


class Keyword(Net):
    def forward(self, x: Tensor, scale: float = 2.0, *, flip: bool = False) -> Tensor:
        return super().forward(x.flip(3) if flip else x * scale)


class SharedWeights(nn.Module):
    """Two convolutions with one parameter, one activation and one block used twice, a head tied to a table."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.act, self.block = nn.ReLU(), Block(3)
        self.table = nn.Embedding(CLASSES, 3)
        self.head = nn.Linear(3, CLASSES, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.act(self.first(x))))
        x = self.block(self.block(x))
        x = x + self.table(torch.zeros(1, dtype=torch.int64)).view(1, 3, 1, 1)
        return self.head(x.mean((2, 3)))


class MeanNorm(nn.Module):
    """Subtracts the running mean that it has just moved."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3), keepdim=True))
        return torch.tanh(x - self.mean)


class Unfrozen(Net):
    """Keeps its batch norms frozen whatever train() says, as detectors do."""

    def train(self, mode: bool = True) -> Unfrozen:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Checkpointed(Unfrozen):
    """Its own checkpoints give way to the plan: batch norms that train would move twice in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


class Branch(nn.Module):
    """Goes by values, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x * 2


class SumOfParameters(nn.Module):
    """Whose gradients are one tensor under autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.one + self.two)


def _with(*middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), *(one() for one in middle), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, CLASSES)
    )


def _spectral() -> nn.Module:
    return parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv2d(8, 8, 1))


def _pruned() -> nn.Module:
    net: Any = Net()
    prune.l1_unstructured(net.blocks[0].conv1, "weight", 0.5)
    prune.random_unstructured(net.head, "weight", 0.3)
    return net


def _frozen_norms() -> nn.Module:
    net: Any = Net()
    for parameter in net.blocks[0].bn1.parameters():
        parameter.requires_grad_(False)
    return net


def _frozen_stem() -> nn.Module:
    net: Any = Net()
    net.stem.requires_grad_(False)
    return net


def _cumulative() -> nn.Module:
    net: Any = Net()
    net.blocks[0].bn1.momentum = None
    return net


def _scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(10, 10), nn.Tanh()))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "module list, functional dropout, in-place activations": Net,
    "keyword defaults and super().forward": Keyword,
    "tied weights": SharedWeights,
    "buffer that the module moves": _with(MeanNorm),
    "checkpoint in its forward": Checkpointed,
    "forward that goes by values": _with(Branch),
    "sum of parameters": _with(SumOfParameters),
    "frozen batch norm, affine": _frozen_norms,
    "frozen stem": _frozen_stem,
    "train() that keeps batch norms frozen": Unfrozen,
    "cumulative batch norm": _cumulative,
    "float64": lambda: Net().double(),
    "bfloat16": lambda: Net().bfloat16(),
    "spectral norm": _with(_spectral),
    "weight norm": _with(lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1))),
    "old weight norm": _with(_old_weight_norm),
    "pruned": _pruned,
    "instance norm, group norm": _with(
        lambda: nn.InstanceNorm2d(8, track_running_stats=True), lambda: nn.GroupNorm(2, 8)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    assert compared(NETWORKS[name], train) == []


def test_a_scripted_layer_inside() -> None:
    with torch.jit.optimized_execution(False):  # else the bits of its first runs are others, in plain PyTorch too
        assert compared(_with(_scripted), train) == []


# -- around the step ---------------------------------------------------------------------------------------------------


def _adamw(model: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return [one_step(model, optimizer, seed) for seed in range(3)]


def _frozen_then_added(model: Any) -> Any:
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    model.blocks.requires_grad_(False)
    losses = [one_step(model, optimizer)]
    model.blocks.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.blocks.parameters()), "lr": 0.01})
    return [*losses, one_step(model, optimizer)]


def _accumulation(model: Any) -> Any:
    for piece, labels in zip(X.split(2), LABELS.split(2), strict=True):
        (F.cross_entropy(model(piece), labels) / 2).backward()
    total = clip_grad_norm_(model.parameters(), 0.5)
    model.zero_grad(set_to_none=False)
    _loss(model).backward()
    return total


def _two_forwards(model: Any) -> Any:
    first, second = _loss(model), _loss(model, X.flip(0))
    (first + 2 * second).backward()
    return first.detach(), second.detach()


def _two_forwards_backward_apart(model: Any) -> Any:
    first, second = _loss(model), _loss(model, X.flip(0))
    second.backward()
    first.backward()


def _scaled(model: Any) -> Any:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(model)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), scaler.get_scale()


def _without_gradients(model: Any) -> Any:
    with torch.no_grad():
        first = model(X)
    with torch.inference_mode():
        second = model(X).clone()
        third = model(X * 2).clone()
    return first, second, third


def _evaluation_and_back(model: Any) -> Any:
    before = model.eval()(X)
    model.train()
    _loss(model).backward()
    with torch.no_grad():
        return before.detach(), model.eval()(X), model(X)


def _saliency(model: Any) -> Any:
    x = X.clone().requires_grad_()
    _loss(model, x).backward()
    assert x.grad is not None
    (asked,) = torch.autograd.grad(_loss(model, x), x)
    model.eval()
    (still,) = torch.autograd.grad(_loss(model, x), x)
    return x.grad, asked, still


def _asked_gradients(model: Any) -> Any:
    weights = [model.head.weight, model.blocks[0].conv1.weight]
    found = torch.autograd.grad(_loss(model), weights)
    assert all(parameter.grad is None for parameter in model.parameters())
    _loss(model).backward(inputs=weights)
    return found


def _averaged(model: Any) -> Any:
    average, optimizer = AveragedModel(model), torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.05)
    for seed in range(2):
        one_step(model, optimizer, seed)
        average.update_parameters(model)
        schedule.step()
    update_bn([X], average)
    return average.eval()(X).detach(), [value.detach() for value in average.state_dict().values()]


def _copied(model: Any) -> Any:
    other = copy.deepcopy(model)
    loss = train(other, 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    return loss, list(other.state_dict().values())


def _loaded(model: Any) -> Any:
    state = copy.deepcopy(model.state_dict())
    train(model)
    model.load_state_dict(state)
    return list(state), train(model, 1)


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    back, again = torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))
    assert type(back) is not Net or type(model) is Net
    return train(back), train(again)


def _changed_attributes(model: Any) -> Any:
    losses = train(model, 1)
    model.blocks[1].dropout = 0.5
    return losses, train(model, 1)


def _in_float64(model: Any) -> Any:
    return train(model, 1), train(model.double())


def _channels_last(model: Any) -> Any:
    model.to(memory_format=torch.channels_last)
    loss = _loss(model, X.contiguous(memory_format=torch.channels_last))
    loss.backward()
    return loss.detach(), [parameter.grad.stride() for parameter in model.parameters()]


def _pruned_later(model: Any) -> Any:
    prune.l1_unstructured(model.blocks[0].conv1, "weight", 0.5)
    losses = train(model)
    prune.remove(model.blocks[0].conv1, "weight")
    return losses, train(model)


def _parametrized_later(model: Any) -> Any:
    parametrizations.spectral_norm(model.blocks[0].conv1)
    return train(model)


def _head_replaced(model: Any) -> Any:
    torch.manual_seed(3)
    model.head = nn.Linear(8, 3)
    return model(X).shape, train(model)


def _frozen_later(model: Any) -> Any:
    model.blocks[0].bn1.eval()
    model.blocks[0].requires_grad_(False)
    return train(model)


USES: dict[str, Callable[[nn.Module], Any]] = {
    name.strip("_"): use
    for name, use in list(globals().items())
    if name.startswith("_") and getattr(use, "__annotations__", {}).get("return") == "Any"
}


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    assert compared(Net, USES[name]) == []


@pytest.mark.slow
def test_torch_compile_leaves_a_planned_module_as_it_is() -> None:
    plain, module = made(Net), planned()
    torch.manual_seed(3)
    wanted = train(plain)
    torch.manual_seed(3)
    assert unequal(wanted, train(torch.compile(module, backend="eager"))) == []
    assert list(state_differs(plain, module)) == []
