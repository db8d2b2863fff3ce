"""Where a network is cut into stages, and what stages and their operations are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.resnet import Bottleneck
from lowmem.plan.policy import BlockPolicy, keep
from lowmem.remat import decompose, stage_names


def _names(model: nn.Module) -> dict[str, list[str]]:
    return {stage.name: [one.name for one in stage.operations] for stage in decompose(model)}


def _conv(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


def test_a_stage_begins_with_a_dear_operation_and_has_what_follows() -> None:
    # The ReLU comes after the pool.
    model = nn.Sequential(_conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), _conv(), nn.ReLU(), _conv())
    assert _names(model) == {"stem": ["0", "1", "3", "2"], "4": ["4", "5"], "head": ["6"]}


def test_what_is_cheap_at_the_front_belongs_to_the_first() -> None:
    assert _names(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), _conv(), _conv())) == {
        "stem": ["0", "1", "2"],
        "head": ["3"],
    }


def test_a_block_with_a_shortcut_is_one_stage() -> None:
    """Two tensors are alive inside. Blocks of one kind have operations of the same names."""
    found = _names(nn.Sequential(Bottleneck(16, 4), nn.Sequential(Bottleneck(16, 4), Bottleneck(16, 4))))
    assert list(found) == ["0", "1.0", "1.1"]
    assert found["0"] == found["1.0"] == found["1.1"]
    assert found["0"][:3] == ["conv1", "bn1", "relu"]


def test_a_small_block_without_a_shortcut_is_one_stage() -> None:
    """At most four dear operations of one module; not the modules of a module that has such blocks."""

    def block(count: int) -> nn.Sequential:
        return nn.Sequential(*(_conv() for _ in range(count)))

    found = _names(nn.Sequential(block(4), block(2), block(5)))
    assert list(found) == ["0", "1", "2.0", "2.1", "2.2", "2.3", "2.4"]


def test_numbers_and_constants_do_not_count_as_alive() -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale, self.linear = _conv(), nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            count, scale = x.size(0), self.scale.abs() + 1
            y = F.relu(self.conv(x) * scale)
            z: Tensor = self.linear(y.view(count, -1) * scale.sum())
            return z

    assert [[one.name for one in stage.operations if one.dear] for stage in decompose(Flattens())] == [
        ["conv"],
        ["linear"],
    ]


def test_a_value_that_is_used_far_away_leaves_no_cut() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.inner, self.up = _conv(), nn.Sequential(*(_conv() for _ in range(6))), _conv(8)

        def forward(self, x: Tensor) -> Tensor:
            first = self.down(x)
            y: Tensor = self.up(torch.cat([first, self.inner(first)], 1))
            return y

    found = decompose(Skips())
    assert [stage.name for stage in found] == ["stem", "inner", "head"]
    assert [sum(one.dear for one in stage.operations) for stage in found] == [1, 6, 1]


def test_names_are_unique_though_a_module_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.block = nn.Conv2d(3, 16, 1), nn.Sequential(Bottleneck(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(self.block(self.a(x)))
            return y

    names = stage_names(Twice())
    assert len(set(names)) == len(names) == 3
    assert names[0] == "stem"


def test_modules_may_have_any_name() -> None:
    """Also one that a policy's text could not hold."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a-b c,{d}", nn.Sequential(_conv(), nn.BatchNorm2d(4), nn.ReLU(), _conv()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.get_submodule("a-b c,{d}")(x)

    (stage,) = decompose(nn.Sequential(Odd()))
    policy = keep(*stage.tensors)
    assert BlockPolicy.parse(policy.name) == policy
    stage.check(policy)
