"""What of a network is not trained: parameters by patterns of names.

A frozen parameter needs no gradient, and so has no momentum and no weight decay: it keeps its bits. A batch norm all of
whose parameters are frozen stays in evaluation mode: it normalises by its running statistics, which do not move, as is
usual for a frozen part of a network (torchvision's detection models have `FrozenBatchNorm2d` for it). Left in training
mode it would go on with the statistics of each batch, and the part that is called frozen would change. Any other way
(`model.train()` of plain PyTorch) is a matter of that one flag, by which the engine goes too.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowmem.core.errors import UsageError
from lowmem.core.reading import shorten


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes parameters whose name, or that of a module that they are in, is like one of the patterns (`layer1*`,
    `features.*`, `*.bn1`; `*` stands for dots too). Raises UsageError for a pattern that is like no name, with near
    ones, and where nothing is left to train."""
    if not patterns:
        return
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [one for name, one in named if any(fnmatchcase(each, pattern) for each in _names(name))]
        if not found:
            raise _unknown(model, pattern)
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"--freeze {' '.join(patterns)} freezes every parameter, and nothing is left to train: freeze less, as all "
            "but the last layer"
        )
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(one.requires_grad for one in own):
            module.eval()
            module.train = _stay  # type: ignore[method-assign, assignment]


def thawed(model: nn.Module) -> nn.Module:
    """A copy with nothing frozen."""
    model = copy.deepcopy(model).requires_grad_(True)
    for module in model.modules():
        if module.__dict__.get("train") is _stay:
            del module.train
    return model.train()


def _stay(mode: bool = True) -> None:
    """In place of `train` of a module that stays in evaluation mode; the network's own `train` comes by. No method:
    one that knew its module would be a cycle, and copies of the module would set another's flag."""


def _names(name: str) -> list[str]:
    """The parameter's, and those of the modules that it is in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _unknown(model: nn.Module, pattern: str) -> UsageError:
    known = list(
        dict.fromkeys(one for name, _ in model.named_parameters(remove_duplicate=False) for one in _names(name))
    )
    near = difflib.get_close_matches(pattern.rstrip("*."), known, n=3, cutoff=0.5)
    top = list(dict.fromkeys(name.partition(".")[0] for name in known))
    has = f"did you mean {' or '.join(near)}?" if near else f"it has {shorten(', '.join(top), 200)}"
    return UsageError(f"--freeze {shorten(pattern)!r} is like no name of a part of the network with parameters: {has}")
