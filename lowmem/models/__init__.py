"""The network family: CIFAR ResNets and the same nets without shortcuts. Knows nothing of memory."""

from lowmem.models.resnet import ResNet, build, initialise, layout, skeleton

__all__ = ["ResNet", "build", "initialise", "layout", "skeleton"]
