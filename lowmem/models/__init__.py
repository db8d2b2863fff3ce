"""Networks: the family (CIFAR ResNets and the same nets without shortcuts), and whatever else settings name. Knows
nothing of memory."""

from lowmem.models.network import check_network, from_recipe, hashes_of, make_network, network_of, recipe_of
from lowmem.models.resnet import ResNet, build, initialise, layout, skeleton

__all__ = [
    "ResNet",
    "build",
    "check_network",
    "from_recipe",
    "hashes_of",
    "initialise",
    "layout",
    "make_network",
    "network_of",
    "recipe_of",
    "skeleton",
]
