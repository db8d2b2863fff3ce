"""The network family: CIFAR ResNets and the same nets without shortcuts. Knows nothing of memory."""

from lowmem.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    build,
    count_parameters,
    default_block,
    initialise,
    layout,
    names,
    skeleton,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "build",
    "count_parameters",
    "default_block",
    "initialise",
    "layout",
    "names",
    "skeleton",
]
