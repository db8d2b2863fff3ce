"""What a module starts from when it first runs in a pass: random generators, buffers, flags of training. A repetition
starts from the same, and leaves everything as it found it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

# What `nn.Module` itself keeps in an object's `__dict__`.
OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


class Generators:
    """The states of torch's generators (of the CPU and of the tensors' devices), Python's and numpy's."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy: Any = None if numpy is None else numpy.random.get_state()

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def moved_outside_torch(self) -> bool:
        """Whether anybody has drawn from Python's or numpy's since."""
        if random.getstate() != self.python:
            return True
        if self.numpy is None:
            return False
        _, keys, position, *_ = sys.modules["numpy"].random.get_state()
        return bool(position != self.numpy[2] or (keys != self.numpy[1]).any())


def changed_attribute(module: nn.Module, before: dict[str, Any]) -> str | None:
    """The name of a plain attribute that is another object than it was. Weights that a hook makes of parameters before
    every forward (weight norm, pruning) are no state."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    made = {name.removesuffix(end) for end in ("_orig", "_g") for name in own if name.endswith(end)}
    for name in {**before, **module.__dict__}:
        if name in OF_EVERY_MODULE or name in made:
            continue
        if before.get(name, before) is not module.__dict__.get(name, before):
            return name
    return None


class _Buffer(NamedTuple):
    owner: dict[str, Tensor | None]  # a module's buffers
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None  # of what it was; None: what it is now will do


class StartingPoint:
    """Taken before the first run of `module` (None: a function). `tensors`: on whose devices random numbers may be
    drawn; None: there are none."""

    def __init__(self, module: nn.Module | None, tensors: Sequence[Tensor] | None) -> None:
        self._generators = None if tensors is None else Generators(tensors)
        self._modules = [] if module is None else list(module.named_modules())
        self._buffers = [
            _Buffer(child._buffers, name, tensor, tensor._version, tensor.clone())
            for _, child in self._modules
            for name, tensor in child._buffers.items()
            if tensor is not None
        ]
        self._attributes = [dict(child.__dict__) for _, child in self._modules]
        self._training = [child.training for _, child in self._modules]

    def compare(self, name: str) -> None:
        """After the first run: buffers that did not move need no copy. Raises RuntimeError for state in a plain
        attribute, which a repetition would find moved."""
        for (path, child), before in zip(self._modules, self._attributes, strict=True):
            if changed := changed_attribute(child, before):
                where = ".".join(filter(None, (name, path, changed)))
                raise RuntimeError(
                    f"{where} is set while the network runs: state in a plain attribute cannot be kept right when a "
                    "part runs again; make it a buffer (register_buffer), or leave it to plain PyTorch"
                )
        self._attributes.clear()
        # Batch norm's kernels move statistics without a new version, but do not read them in training.
        self._buffers = [
            one._replace(copy=None) if one.owner[one.name] is one.tensor and one.tensor._version == one.version else one
            for one in self._buffers
        ]

    @contextmanager
    def again(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Buffers are copies of what they were, whatever moves them now; putting their values back instead would upset
        autograd, which has saved them."""
        now = [one.owner[one.name] for one in self._buffers]
        flags = [child.training for _, child in self._modules]
        generators = None
        if self._generators is not None:
            generators = Generators(tensors)
            self._generators.put_back()
        for one in self._buffers:
            one.owner[one.name] = (one.tensor if one.copy is None else one.copy).clone()
        self._train(self._training)
        try:
            yield
        finally:
            if generators is not None:
                generators.put_back()
            for one, tensor in zip(self._buffers, now, strict=True):
                one.owner[one.name] = tensor
            self._train(flags)

    def _train(self, flags: Sequence[bool]) -> None:
        for (_, child), training in zip(self._modules, flags, strict=True):
            child.training = training
