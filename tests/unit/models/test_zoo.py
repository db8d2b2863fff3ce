"""The family: names, layers, parameters, shapes, exchange of state dicts, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem.config.networks import ARCHITECTURES, resolve_block
from lowmem.core.errors import UsageError
from lowmem.models import build, layout

TABLE = [
    ("20", "basic", (2, 2, 3, 2), 20),
    ("34", "basic", (3, 4, 6, 3), 34),
    ("50", "bottleneck", (3, 4, 6, 3), 50),
    ("56", "basic", (6, 6, 9, 6), 56),
    ("56", "bottleneck", (3, 4, 9, 3), 59),
    ("101", "bottleneck", (3, 4, 23, 3), 101),
    ("110", "basic", (9, 16, 20, 9), 110),
    ("110", "bottleneck", (3, 4, 26, 3), 110),
]


def _main_path_layers(model: nn.Module) -> int:
    """Convolutions and linear layers, projections not counted: what gives the nets their names."""
    return sum(
        isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name for name, module in model.named_modules()
    )


@pytest.mark.parametrize("kind", ["res", "cnn"])
@pytest.mark.parametrize(("depth", "block", "blocks", "layers"), TABLE)
def test_layers_and_layout(kind: str, depth: str, block: str, blocks: tuple[int, ...], layers: int) -> None:
    model = build(kind + depth, block, width=2)
    assert layout(kind + depth, block) == blocks
    assert _main_path_layers(model) == layers
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arch", "block", "count"),
    [("res110", "bottleneck", 45_864_522), ("res110", "basic", 70_124_362), ("res20", "basic", 12_354_634)],
)
def test_parameter_counts(arch: str, block: str, count: int) -> None:
    with torch.device("meta"):
        from lowmem.models.resnet import BasicBlock, Bottleneck, ResNet

        kinds: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
        model = ResNet(kinds[block], layout(arch, block))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_plain_net_has_no_shortcut_parameter(block: str) -> None:
    plain, residual = build("cnn56", block, width=4), build("res56", block, width=4)
    assert not [name for name in plain.state_dict() if "shortcut" in name]
    extra = set(residual.state_dict()) - set(plain.state_dict())
    assert extra
    assert all("shortcut" in name for name in extra)


def test_plain_and_residual_start_from_the_same_weights() -> None:
    plain, residual = build("cnn20", width=4, seed=3).state_dict(), build("res20", width=4, seed=3).state_dict()
    assert all(torch.equal(tensor, residual[name]) for name, tensor in plain.items())


class UsualBlock(nn.Module):
    """The block as public CIFAR ResNets write it, with its own names: what state dicts are exchanged with."""

    def __init__(self, inp: int, planes: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = planes * (4 if bottleneck else 1)
        sizes = [(inp, planes, 1, 1), (planes, planes, 3, stride), (planes, out, 1, 1)] if bottleneck else [
            (inp, planes, 3, stride), (planes, planes, 3, 1)
        ]  # fmt: skip
        self.count = len(sizes)
        for number, (a, b, k, s) in enumerate(sizes, start=1):
            setattr(self, f"conv{number}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(b))
        self.shortcut = nn.Sequential()
        if stride != 1 or inp != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x
        for number in range(1, self.count + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            if number < self.count:
                out = F.relu(out)
        return F.relu(out + self.shortcut(x))


class UsualResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        inp, layers = width, []
        for stage, count in enumerate(blocks):
            row = []
            for index in range(count):
                row.append(UsualBlock(inp, width * 2**stage, 2 if stage and not index else 1, bottleneck))
                inp = width * 2**stage * (4 if bottleneck else 1)
            layers.append(nn.Sequential(*row))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.linear = nn.Linear(inp, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.avg_pool2d(self.layer4(self.layer3(self.layer2(self.layer1(out)))), 4)
        return self.linear(out.view(out.size(0), -1))


@pytest.mark.parametrize(("arch", "block"), [("res20", "basic"), ("res56", "bottleneck")])
def test_state_dicts_are_exchangeable(arch: str, block: str) -> None:
    torch.manual_seed(0)
    usual = UsualResNet(layout(arch, block), block == "bottleneck", width=4).eval()
    ours = build(arch, block, width=4).eval()
    ours.load_state_dict(usual.state_dict())
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(ours(x), usual(x))
    usual.load_state_dict(build(arch, block, width=4, seed=9).state_dict())


def test_he_initialisation_keeps_its_variance() -> None:
    model = build("res20", width=32)
    weight = model.get_parameter("layer3.1.conv1.weight")
    expected = 2 / (9 * weight.shape[0])
    assert abs(weight.var().item() / expected - 1) < 0.03
    assert torch.equal(model.get_parameter("bn1.weight"), torch.ones(32))


def test_initialisation_is_addressed() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (build("res20", width=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    # Each tensor has an address of its own: another depth leaves the stem's weights as they are.
    assert torch.equal(one.conv1.weight, build("res56", width=4, seed=1).conv1.weight)


def test_names_and_default_blocks() -> None:
    assert set(ARCHITECTURES) == {f"{kind}{depth}" for kind in ("res", "cnn") for depth in (20, 34, 50, 56, 101, 110)}
    assert {name: resolve_block(name, None) for name in ("res20", "res50", "cnn56", "res101", "res110")} == {
        "res20": "basic", "res50": "bottleneck", "cnn56": "basic", "res101": "bottleneck", "res110": "basic"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "block", "width", "message"),
    [("res21", None, 64, "choose one of"), ("res50", "basic", 64, "--block bottleneck"), ("res20", None, 0, "width 0")],
)
def test_what_the_family_does_not_have(arch: str, block: str | None, width: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(arch, block, width=width)
