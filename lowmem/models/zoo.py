"""Names -> networks: the table of the family, construction by name, and initialisation by address."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

from lowmem.config.schema import ARCHITECTURES, BLOCK_LAYOUT, resolve_block
from lowmem.core.counter_rng import derive_seed
from lowmem.core.errors import UsageError
from lowmem.models.resnet import BasicBlock, Bottleneck, ResNet

Net = TypeVar("Net", bound=nn.Module)

_BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def names() -> tuple[str, ...]:
    """All architecture names, `res20` ... `cnn110`."""
    return ARCHITECTURES


def default_block(arch: str) -> str:
    """`basic` or `bottleneck`: what the report used for that depth (raises UsageError for an unknown name)."""
    return resolve_block(arch, None)


def layout(arch: str, block: str | None = None) -> tuple[int, int, int, int]:
    """Blocks per stage. Raises UsageError for an unknown name or a block the family does not have at that depth."""
    return BLOCK_LAYOUT[int(arch[3:]), resolve_block(arch, block)]


def build(
    arch: str,
    block: str | None = None,
    *,
    width: int = 64,
    num_classes: int = 10,
    in_channels: int = 3,
    seed: int = 0,
) -> ResNet:
    """A network of the family as a plain `nn.Module` in fp32 on the CPU, initialised as `initialise` says.

    `res*` have shortcuts, `cnn*` are the same nets without any. Takes [N, in_channels, 32, 32].
    Raises UsageError for a name, block or width that the family does not have.
    """
    model = skeleton(arch, block, width=width, num_classes=num_classes, in_channels=in_channels)
    # As `to_empty` does, whose `empty_like` imports sympy for a tensor without storage: half a second.
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    return initialise(model, seed)


def skeleton(
    arch: str, block: str | None = None, *, width: int = 64, num_classes: int = 10, in_channels: int = 3
) -> ResNet:
    """The network on the `meta` device: shapes without storage, for planning. Raises UsageError as `build` does."""
    blocks_per_stage = layout(arch, block)
    if width < 1:
        raise UsageError(f"width {width} is not a positive number of channels: the usual width is 64")
    # Without storage also in `build`: the layers' own initialisation would draw from the global generator, only to
    # be replaced.
    with torch.device("meta"):
        return ResNet(
            _BLOCKS[resolve_block(arch, block)],
            blocks_per_stage,
            width=width,
            residual=arch.startswith("res"),
            num_classes=num_classes,
            in_channels=in_channels,
        )


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


def count_parameters(model: nn.Module) -> int:
    """Number of scalar parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())
