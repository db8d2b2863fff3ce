"""Random networks, and random schedules of their stages, by a seed."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, Keep, PolicyKind, Schedule, Segment
from lowmem.remat.stage import Stage

Shape = tuple[int, ...]  # of a value without its batch: channels, height, width


class Line(NamedTuple):
    """One line of a network's forward: what is called on which values."""

    call: Callable[..., Tensor]
    operands: tuple[int, ...]
    module: int | None = None  # by its place among the network's; None: `call` itself


class RandomNet(nn.Module):
    """[N, 4, 8, 8] -> [N, 5], by `depth` random lines."""

    def __init__(self, seed: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = nn.ModuleList()
        self.lines: list[Line] = []
        self._random = random.Random(seed)
        self._shapes: list[Shape] = [(4, 8, 8)]
        self._views = {0}  # what is not changed in place: see `lowmem.remat.reading`
        if self._random.random() < 0.7:
            self._convolution(0)
        for _ in range(depth):
            self._random.choices(_KINDS, _WEIGHTS)[0](self, self._recent())
        channels = self._shapes[-1][0]
        self.head = nn.Linear(channels, 5)
        self.rows = self._random.random() < 0.5
        for parameter in self.parameters():
            parameter.requires_grad = self._random.random() > 0.1

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for line in self.lines:
            call = line.call if line.module is None else self.parts[line.module]
            values.append(call(*(values[at] for at in line.operands)))
        x = values[-1].mean([2, 3]) if self.rows else torch.flatten(F.adaptive_avg_pool2d(values[-1], 1), 1)
        result: Tensor = self.head(x)
        return result

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _recent(self) -> int:
        """The last value, mostly."""
        last = len(self._shapes) - 1
        return last if self._random.random() < 0.7 else self._random.randint(max(0, last - 4), last)

    def _line(self, shape: Shape, call: Callable[..., Tensor], *operands: int) -> None:
        self.lines.append(Line(call, operands))
        self._shapes.append(shape)

    def _module(self, shape: Shape, module: nn.Module, at: int) -> None:
        self.parts.append(module)
        self.lines.append(Line(module, (at,), len(self.parts) - 1))
        self._shapes.append(shape)

    def _convolution(self, at: int) -> None:
        channels, height, width = self._shapes[at]
        out, size, stride = self._random.choice([4, 8]), self._random.choice([1, 3]), self._random.choice([1, 1, 1, 2])
        groups = self._random.choice([1, 1, 2, 4]) if channels % 4 == 0 else 1
        mode = self._random.choice(["zeros"] * 5 + ["circular"])
        stride = stride if height >= 4 and size == 3 else 1
        options: dict[str, Any] = {"groups": groups, "padding_mode": mode, "bias": self._random.random() < 0.5}
        conv = nn.Conv2d(channels, out, size, stride, size // 2, **options)
        alike = [
            one
            for one in self.parts
            if isinstance(one, nn.Conv2d)
            and one.weight.shape == conv.weight.shape
            and one.stride == conv.stride
            and one.padding_mode == conv.padding_mode == "zeros"
        ]
        shape = out, -(-height // stride), -(-width // stride)
        if alike and self._random.random() < 0.4:
            if self._random.random() < 0.5:
                conv.weight = alike[0].weight
            elif alike[0].groups == groups:  # a module that is used again
                place = next(place for place, one in enumerate(self.parts) if one is alike[0])
                self.lines.append(Line(alike[0], (at,), place))
                self._shapes.append(shape)
                return
        self._module(shape, conv, at)

    def _norm(self, at: int) -> None:
        shape = self._shapes[at]
        channels = shape[0]
        norm = self._random.choice(
            [
                lambda: nn.BatchNorm2d(channels),
                lambda: nn.BatchNorm2d(channels),
                lambda: nn.BatchNorm2d(channels, momentum=None),
                lambda: nn.BatchNorm2d(channels, affine=False),
                lambda: nn.BatchNorm2d(channels, track_running_stats=False),
                lambda: nn.GroupNorm(2 if channels % 2 == 0 else 1, channels),
                lambda: nn.InstanceNorm2d(channels, affine=True) if shape[1] > 1 else nn.Identity(),
                lambda: nn.LayerNorm(shape),
                lambda: nn.LayerNorm(shape[1:], elementwise_affine=False),
            ]
        )()
        self._module(shape, norm, at)
        if isinstance(norm, (nn.InstanceNorm2d, nn.Identity)):
            self._views.add(len(self._shapes) - 1)
        if self._random.random() < 0.15:
            norm.eval()

    def _activation(self, at: int) -> None:
        inplace = self._random.random() < 0.5 and at not in self._views
        kinds: list[Any] = [
            nn.ReLU,
            nn.ReLU,
            nn.ReLU,
            nn.ReLU6,
            nn.SiLU,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.LeakyReLU,
            nn.ELU,
        ]
        plain: list[Any] = [nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, lambda: nn.GELU(approximate="tanh")]
        functions = [
            *(F.relu, torch.relu, torch.sigmoid, F.gelu, F.silu, lambda x: F.leaky_relu(x, 0.2, inplace)),
            *(
                lambda x: F.elu(x, 1.0, inplace),
                lambda x: F.relu(x, inplace),
                lambda x: x.relu_() if inplace else x.relu(),
            ),
            *(lambda x: x.tanh(), lambda x: F.hardtanh(x, -1.0, 1.0, inplace), lambda x: x.clamp(min=-0.5)),
        ]
        choice = self._random.random()
        if choice < 0.5:
            self._module(self._shapes[at], self._random.choice(kinds)(inplace=inplace), at)
        elif choice < 0.7:
            self._module(self._shapes[at], self._random.choice(plain)(), at)
        else:
            self._line(self._shapes[at], self._random.choice(functions), at)

    def _of_two(self, at: int) -> None:
        shape = self._shapes[at]
        others = [one for one in range(len(self._shapes)) if self._shapes[one] == shape]
        other = self._random.choice(others)
        kinds: list[Any] = [operator.add, operator.add, torch.add, operator.mul, torch.mul, operator.sub, torch.maximum]
        if at not in self._views:
            kinds += [operator.iadd, operator.imul]
        call = self._random.choice(kinds)
        swapped = call not in (operator.iadd, operator.imul) and self._random.random() < 0.3
        self._line(shape, call, *((other, at) if swapped else (at, other)))

    def _excitation(self, at: int) -> None:
        """A value times a number for each channel, whichever comes first."""
        channels, *size = self._shapes[at]
        if self._random.random() < 0.5:
            self._module((channels, 1, 1), nn.AdaptiveAvgPool2d(1), at)
        else:
            self._line((channels, 1, 1), lambda x: x.mean((2, 3), keepdim=True), at)
        self._module((channels, 1, 1), nn.Conv2d(channels, channels, 1), len(self._shapes) - 1)
        self._module((channels, 1, 1), self._random.choice([nn.Sigmoid, nn.Hardsigmoid])(), len(self._shapes) - 1)
        scale = len(self._shapes) - 1
        kind = self._random.choice([operator.mul, operator.mul, operator.add])
        self._line((channels, *size), kind, *((at, scale) if self._random.random() < 0.5 else (scale, at)))

    def _cat(self, at: int) -> None:
        size = self._shapes[at][1:]
        others = [one for one in range(len(self._shapes)) if self._shapes[one][1:] == size]
        picked = [at, *self._random.choices(others, k=self._random.choice([1, 2]))]
        total = sum(self._shapes[one][0] for one in picked)
        if total <= 32:
            self._line((total, *size), lambda *x: torch.cat(x, 1), *picked)

    def _pool(self, at: int) -> None:
        channels, height, width = self._shapes[at]
        if height < 4 or width < 4:
            return
        half, up = (channels, height // 2, width // 2), (channels, -(-height // 2), -(-width // 2))
        choices: list[tuple[Shape, Any]] = [
            (half, nn.MaxPool2d(2)),
            (up, nn.MaxPool2d(3, 2, 1)),
            (up, nn.MaxPool2d(2, 2, ceil_mode=True)),
            ((channels, height, width), nn.MaxPool2d(3, 1, 1)),
            (half, nn.AvgPool2d(2)),
            (half, lambda x: F.max_pool2d(x, 2)),
            (half, lambda x: F.avg_pool2d(x, (2, 2))),
            ((channels, height * 2, width * 2), lambda x: F.interpolate(x, scale_factor=2)),
        ]
        shape, kind = self._random.choice(choices[:-1] if height > 8 else choices)
        if isinstance(kind, nn.Module):
            if self._random.random() < 0.6:
                self._module(
                    self._shapes[at], nn.ReLU(inplace=self._random.random() < 0.5 and at not in self._views), at
                )
                at = len(self._shapes) - 1
            self._module(shape, kind, at)
        else:
            self._line(shape, kind, at)

    def _view(self, at: int) -> None:
        shape = self._shapes[at]
        channels, height, width = shape
        part = max(1, channels // 2)
        choices: list[tuple[Shape, Any]] = [
            (shape, lambda x: x.flatten(1).unflatten(1, shape)),
            (shape, lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
            (shape, lambda x: x.reshape(x.size(0), -1).view(x.shape)),
            (shape, lambda x: x / x.size(1)),
            (shape, lambda x: x * 0.5 + 1),
            ((part, height, width), lambda x: x[:, :part]),
            ((part, height, width), lambda x: x.chunk(2, 1)[0] if channels % 2 == 0 else x[:, part - 1 : 2 * part - 1]),
            ((channels, width, height), lambda x: x.transpose(2, 3)),
            (shape, lambda x: torch.cat(torch.split(x, part, 1)[::-1], 1)),
            (shape, lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (channels,)).permute(0, 3, 1, 2)),
        ]
        self._line(*self._random.choice(choices), at)
        self._views.add(len(self._shapes) - 1)

    def _rows(self, at: int) -> None:
        """A linear layer over channels, or a row."""
        channels, height, width = self._shapes[at]
        bias = self._random.random() < 0.6
        if self._random.random() < 0.5:
            self._module((channels, height, 8), nn.Linear(width, 8, bias=bias), at)
            return
        self._line((height, width, channels), lambda x: x.permute(0, 2, 3, 1), at)
        self._views.add(len(self._shapes) - 1)
        self._module((height, width, channels), nn.Linear(channels, channels, bias=bias), len(self._shapes) - 1)
        self._line((channels, height, width), lambda x: x.permute(0, 3, 1, 2), len(self._shapes) - 1)
        self._views.add(len(self._shapes) - 1)

    def _random_numbers(self, at: int) -> None:
        inplace = self._random.random() < 0.4 and at not in self._views
        kind = self._random.choice([nn.Dropout, nn.Dropout, nn.Dropout2d])
        if self._random.random() < 0.5:
            self._module(self._shapes[at], kind(0.3, inplace=inplace), at)
        else:
            self._line(self._shapes[at], lambda x: F.dropout(x, 0.3, True, inplace), at)


_WEIGHTED: dict[Any, int] = {
    RandomNet._convolution: 8,
    RandomNet._norm: 6,
    RandomNet._activation: 8,
    RandomNet._of_two: 5,
    RandomNet._excitation: 2,
    RandomNet._cat: 2,
    RandomNet._pool: 2,
    RandomNet._view: 3,
    RandomNet._rows: 1,
    RandomNet._random_numbers: 2,
}
_KINDS, _WEIGHTS = list(_WEIGHTED), list(_WEIGHTED.values())


def random_schedule(
    stages: Sequence[Stage], numbers: random.Random, start: int = 0, end: int | None = None, depth: int = 0
) -> Schedule:
    """Any valid schedule of start..end: any set of kept tensors, dropped outputs, nested segments, FUSED ends."""
    end = len(stages) - 1 if end is None else end
    items: list[Keep | Segment] = []
    at, dropped = start, False
    while at <= end:
        if depth < 3 and numbers.random() < 0.3:
            last = numbers.randint(at, end)
            items.append(Segment(at, last, random_schedule(stages, numbers, at, last, depth + 1)))
            at, dropped = last + 1, False
            continue
        if depth and at == end and not dropped and numbers.random() < 0.5:
            policy = FUSED
        else:
            policy = _random_policy(stages[at], numbers, may_drop=at < end)
        items.append(Keep(at, policy))
        at, dropped = at + 1, policy.drop_output
    return Schedule(tuple(items))


def _random_policy(stage: Stage, numbers: random.Random, may_drop: bool) -> BlockPolicy:
    drop = may_drop and numbers.random() < 0.3
    if numbers.random() < 0.4:
        policy = numbers.choice([SAVE_ALL, INPUT_ONLY, LEAN])
        return policy if policy is SAVE_ALL else BlockPolicy(policy.kind, drop_output=drop)
    kept = frozenset(name for name in sorted(stage.tensors) if numbers.random() < 0.5)
    return BlockPolicy(PolicyKind.KEEP, kept, drop)
