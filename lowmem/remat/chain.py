"""A model as a chain of stages: stem, blocks, head.

The family is recognised by its structure (names and types of children), so that this room knows no model
of its own:

- a network has exactly the children `conv1`, `bn1`, `layer1`, `layer2`, … (sequences) and `linear`; its
  head averages over 4x4 and flattens;
- a block has exactly `conv1`, `bn1`, `conv2`, `bn2`, … and `shortcut`, which is None, an empty sequence
  (identity) or a sequence of convolution and batch norm, and ReLUs after every batch norm but the last,
  and after the sum.

A module whose children look like this but whose forward does something else must not be given to `decompose`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.remat.block import ConvBlock, Pair
from lowmem.remat.opaque import OpaqueStage
from lowmem.remat.stage import Stage

_LAYER = re.compile(r"layer\d+")


def decompose(model: nn.Module) -> tuple[Stage, ...]:
    """A network of the family -> stem, blocks, head. An `nn.Sequential` -> its children, blocks of the family
    recognised. Anything else is one stage."""
    family = _family(model)
    if family is not None:
        return family
    if isinstance(model, nn.Sequential) and len(model):
        return tuple(_stage(name, child) for name, child in model.named_children())
    return (OpaqueStage("model", model, model),)


def _family(model: nn.Module) -> tuple[Stage, ...] | None:
    children = dict(model.named_children())
    layers = [name for name in children if _LAYER.fullmatch(name)]
    if set(children) != {"conv1", "bn1", "linear", *layers} or not layers:
        return None
    stem = _pair(children["conv1"], children["bn1"])
    linear = children["linear"]
    if stem is None or not isinstance(linear, nn.Linear) or list(model.parameters(recurse=False)):
        return None
    stages: list[Stage] = [ConvBlock("stem", (stem,))]
    for layer in layers:
        stages += [_stage(f"{layer}.{name}", child) for name, child in children[layer].named_children()]

    def head(x: Tensor) -> Tensor:
        return linear(F.avg_pool2d(x, 4).flatten(1))

    return (*stages, OpaqueStage("head", linear, head))


def _stage(name: str, module: nn.Module) -> Stage:
    block = _block(name, module)
    return OpaqueStage(name, module, module) if block is None else block


def _block(name: str, module: nn.Module) -> ConvBlock | None:
    children = dict(module.named_children())
    shortcut = children.pop("shortcut", getattr(module, "shortcut", "absent"))
    count = len(children) // 2
    if not count or set(children) != {f"{kind}{k}" for k in range(1, count + 1) for kind in ("conv", "bn")}:
        return None
    pairs = [_pair(children[f"conv{k}"], children[f"bn{k}"]) for k in range(1, count + 1)]
    if any(pair is None for pair in pairs) or list(module.parameters(recurse=False)):
        return None
    known = tuple(pair for pair in pairs if pair is not None)
    if shortcut is None:
        return ConvBlock(name, known)
    if not isinstance(shortcut, nn.Sequential):
        return None
    if len(shortcut) == 0:
        return ConvBlock(name, known, identity=True)
    projection = _pair(shortcut[0], shortcut[1]) if len(shortcut) == 2 else None
    return None if projection is None else ConvBlock(name, known, projection=projection)


def _pair(conv: nn.Module | None, bn: nn.Module | None) -> Pair | None:
    """None unless both are exactly what the kernels cover: no bias, zero padding, affine, running
    statistics."""
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
        return None
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if not bn.affine or bn.running_mean is None or bn.weight.dtype not in (torch.float32, torch.float64):
        return None
    return Pair(conv, bn)
