"""ResNet for 3x32x32 pictures, residual or plain, with Basic or Bottleneck blocks; by name, and initialised by address.
And which networks may not run in channels-last on a CPU: the convolution library corrupts memory in some.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", CVPR 2016, in the four-stage CIFAR form that is
usual in PyTorch code; parameter names are the usual ones, so that state dicts can be exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.config.networks import BLOCK_LAYOUT, resolve_block
from lowmem.core.counter_rng import derive_seed
from lowmem.core.errors import PreflightError, UsageError

Net = TypeVar("Net", bound=nn.Module)


def _conv(in_planes: int, planes: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel, stride=stride, padding=kernel // 2, bias=False)


class _ResNetBlock(nn.Module):
    """Convolutions with batch norms and ReLUs. The shortcut is a 1x1 convolution and a batch norm where the shape
    changes, else an empty sequence; None in a plain net, which then has none of its parameters."""

    kernels: tuple[int, ...]
    strided: int  # the convolution that has the stride, from 1
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1, residual: bool = True) -> None:
        super().__init__()
        sizes = [in_planes, *(planes for _ in self.kernels[1:]), planes * self.expansion]
        for k, kernel in enumerate(self.kernels, start=1):
            self.add_module(f"conv{k}", _conv(sizes[k - 1], sizes[k], kernel, stride if k == self.strided else 1))
            self.add_module(f"bn{k}", nn.BatchNorm2d(sizes[k]))
        layers: list[nn.Module] = []
        if residual and (stride, in_planes) != (1, sizes[-1]):
            layers = [_conv(in_planes, sizes[-1], 1, stride), nn.BatchNorm2d(sizes[-1])]
        self.shortcut = nn.Sequential(*layers) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for k in range(1, len(self.kernels) + 1):
            out = self.get_submodule(f"bn{k}")(self.get_submodule(f"conv{k}")(out))
            if k < len(self.kernels):
                out = F.relu(out)
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return F.relu(out)


class BasicBlock(_ResNetBlock):
    """Two 3x3 convolutions."""

    kernels, strided = (3, 3), 1


class Bottleneck(_ResNetBlock):
    """1x1, 3x3 (with the stride), 1x1 to four times the planes."""

    kernels, strided, expansion = (1, 3, 1), 2, 4


class ResNet(nn.Module):
    """Stem of `width` channels, four stages of width*(1, 2, 4, 8) planes, 4x4 average pool, linear. Takes float
    [N, in_channels, 32, 32]; returns logits, float [N, num_classes]."""

    lowmem_recipe: dict[str, Any] | None = None  # the arguments of `skeleton` that make it again; None: made by hand

    def __init__(
        self,
        block: type[_ResNetBlock],
        blocks_per_stage: Sequence[int],
        *,
        width: int = 64,
        residual: bool = True,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        in_planes = width
        for number, (count, stride) in enumerate(zip(blocks_per_stage, (1, 2, 2, 2), strict=True), start=1):
            planes = width * 2 ** (number - 1)
            stage: list[nn.Module] = []
            for index in range(count):
                stage.append(block(in_planes, planes, stride if index == 0 else 1, residual))
                in_planes = planes * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.linear = nn.Linear(in_planes, num_classes)

    def stages(self) -> list[nn.Module]:
        """`layer1` ... `layer4`."""
        return [self.get_submodule(f"layer{number}") for number in range(1, 5)]

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages():
            out = stage(out)
        out = F.avg_pool2d(out, 4)
        return self.linear(out.flatten(1))


def layout(arch: str, block: str | None = None) -> tuple[int, int, int, int]:
    """Blocks per stage. Raises UsageError for an unknown name or a block the family does not have at that depth."""
    return BLOCK_LAYOUT[int(arch[3:]), resolve_block(arch, block)]


def build(arch: str, block: str | None = None, *, seed: int = 0, **sizes: int) -> ResNet:
    """A network of the family in fp32 on the CPU, initialised by `initialise`; `sizes` are `skeleton`'s. `res*` have
    shortcuts, `cnn*` are the same nets without any. Raises UsageError for what the family does not have."""
    model = skeleton(arch, block, **sizes)
    # As `to_empty` does, whose `empty_like` imports sympy for a tensor without storage: a third of a second.
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    return initialise(model, seed)


def skeleton(
    arch: str, block: str | None = None, *, width: int = 64, num_classes: int = 10, in_channels: int = 3
) -> ResNet:
    """The network on the `meta` device: shapes without storage, for planning. Raises UsageError as `build` does."""
    blocks_per_stage = layout(arch, block)
    if width < 1:
        raise UsageError(f"width {width} is not a positive number of channels: the usual width is 64")
    # Also in `build`: the layers' own initialisation would draw from the global generator, only to be replaced.
    kind = BasicBlock if resolve_block(arch, block) == "basic" else Bottleneck
    sizes = {"width": width, "num_classes": num_classes, "in_channels": in_channels}
    with torch.device("meta"):
        model = ResNet(kind, blocks_per_stage, residual=arch.startswith("res"), **sizes)
    model.lowmem_recipe = {"arch": arch, "block": block, **sizes}
    return model


@torch.no_grad()
def initialise(model: Net, seed: int) -> Net:
    """He initialisation, each tensor drawn from its own address (seed, "init", name); returns the model.

    Convolutions: normal, variance 2 / (kernel area * output channels), the form that keeps the gradient's variance
    (He et al., "Delving Deep into Rectifiers", ICCV 2015, eq. 14). Batch norm: weight 1, bias 0. Linear: uniform in
    +-1/sqrt(fan in), bias 0.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)
    return model


# Channels-last on a CPU: oneDNN's backward pass of a 1x1 convolution with a stride writes past its buffers in fp32 if
# there are few input channels: under 8 on processors with AVX2, with one thread too; under 16 with AVX-512, with
# several threads and a batch that they do not divide (torch 2.14 and 2.15; the process crashes or worse). Contiguous,
# bf16, larger kernels and stride 1 are not affected. The scans are in benchmarks/LOG.md. The rule is the same for every
# processor and number of threads: what a run computes shall not depend on the machine it was begun on.

SAFE_CHANNELS = 16


def unsafe_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Name -> convolution, of those that must not run in channels-last and fp32 on a CPU."""

    def unsafe(conv: nn.Conv2d) -> bool:
        few = conv.in_channels // conv.groups < SAFE_CHANNELS
        return few and tuple(conv.kernel_size) == (1, 1) and max(conv.stride) > 1

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and unsafe(module)}


def is_safe(model: nn.Module, device: str, precision: str, memory_format: str) -> bool:
    """Whether the library computes the network so without corrupting memory. A precision that is still open counts as
    fp32; on the CPU `amp` is bf16 too."""
    exposed = device == "cpu" and memory_format == "channels-last" and precision not in ("amp", "bf16")
    return not (exposed and unsafe_convolutions(model))


def check_memory_format(model: nn.Module, device: str, precision: str, memory_format: str) -> None:
    """Raises PreflightError unless `is_safe`."""
    if is_safe(model, device, precision, memory_format):
        return
    name, conv = next(iter(unsafe_convolutions(model).items()))
    raise PreflightError(
        f"channels-last in fp32 corrupts memory on the CPU: {name} is a 1x1 convolution of stride {max(conv.stride)} "
        f"with {conv.in_channels // conv.groups} input channels, and the library has a fault there under "
        f"{SAFE_CHANNELS}, with one thread too: use --memory-format contiguous or --precision amp (for a run that has "
        "begun: lowmem fork RUN --at last --set train.memory_format=contiguous)"
    )
