"""Sums gradients over the processes while the backward pass goes on.

The executor says when it is done with a stage: its gradients are complete then, and their sum is begun while earlier
stages are still at work. A large gradient is summed where it lies. Small ones are packed, so that there are few
messages, into a buffer that takes their place: `.grad` becomes a view of it. So what this takes beside the gradients is
less than one pack, and the simulator sees it, because it runs this code.

The messages are the same in every process, whatever its plan: stages from last to first, parameters in order. Unlike
shares need no weights: every process divides its loss by the size of the effective batch (invariant 4).

Buckets as in Li et al., "PyTorch Distributed: experiences on accelerating data parallel training", VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lowmem.core.units import MIB

ALONE_BYTES = 1 * MIB  # a gradient of this size is summed in place, without a copy
PACK_BYTES = 4 * MIB


@dataclass(frozen=True)
class Message:
    """One sum over all processes: places in the order of completion. Several, and a small one alone, are `packed`."""

    places: tuple[int, ...]
    size_bytes: int
    packed: bool


def arrange(sizes_bytes: Sequence[int]) -> tuple[Message, ...]:
    """The gradients, in the order in which they are complete -> messages, in the order in which they are sent: a pack
    once its last part is there, a large gradient at once, also between the parts of a pack."""
    messages: list[Message] = []
    pack: tuple[int, ...] = ()
    filled = 0
    for place, size in enumerate(sizes_bytes):
        if size >= ALONE_BYTES:
            messages.append(Message((place,), size, packed=False))
            continue
        if pack and filled + size > PACK_BYTES:
            messages.append(Message(pack, filled, packed=True))
            pack, filled = (), 0
        pack, filled = (*pack, place), filled + size
    if pack:
        messages.append(Message(pack, filled, packed=True))
    return tuple(sorted(messages, key=lambda message: message.places[-1]))


Wait: TypeAlias = Callable[[], object]
"""Returns when a sum that was begun is there."""


class Reducer:
    """The gradients of one network. `stages`: the parameters of every stage of the chain, in forward order.

    `buffers`: running statistics, of which every process gets the mean, weighted by its pictures; so that all have the
    same after every step. `start` begins the sum of a contiguous tensor over all processes, in place. Raises
    ValueError for parameters of more than one dtype.
    """

    def __init__(
        self, stages: Sequence[Sequence[Tensor]], buffers: Sequence[Tensor], start: Callable[[Tensor], Wait]
    ) -> None:
        self._stages = [[one for one in stage if one.requires_grad] for stage in stages]
        self._buffers = [one for one in buffers if one.is_floating_point() and one.numel()]
        self._start = start
        ordered = [one for stage in reversed(self._stages) for one in stage]
        if len({one.dtype for one in ordered}) > 1:
            raise ValueError("parameters of different dtypes cannot go in one pack")
        self.messages = arrange([one.numel() * one.element_size() for one in ordered])
        self._packs = [message for message in self.messages if message.packed]
        self._alone = {id(ordered[message.places[0]]) for message in self.messages if not message.packed}
        self._rest()

    def _rest(self) -> None:
        self._armed = False
        self._next_stage = len(self._stages) - 1
        self._packed = self._filled = 0
        self._pack: Tensor | None = None
        self._waits: list[Wait] = []

    def arm(self) -> None:
        """Before the last micro-batch of a step: from now on a stage that is done has its final gradients."""
        self._rest()
        self._armed = True

    def stage_done(self, index: int) -> None:
        """Told by the executor: stages from last to first, each once."""
        if not self._armed:
            return
        while self._next_stage >= index:
            stage = self._stages[self._next_stage]
            self._next_stage -= 1
            for parameter in stage:
                self._take(parameter)

    def finish(self, weight: float) -> None:
        """After the backward pass: what has no gradient (a process without pictures) counts as zeros; waits for all
        sums. `weight`: this process's share of the pictures, for the running statistics."""
        self.stage_done(0)
        joined = None
        if self._buffers:
            joined = torch.cat([buffer.flatten() for buffer in self._buffers]).mul_(weight)
            self._waits.append(self._start(joined))
        for wait in self._waits:
            wait()
        if joined is not None:
            sizes = [buffer.numel() for buffer in self._buffers]
            for buffer, mean in zip(self._buffers, joined.split(sizes), strict=True):
                buffer.copy_(mean.view(buffer.shape))
        self._rest()

    def give_up(self) -> None:
        """After a step that failed here and was undone: sends zeros for the rest, one at a time, and waits."""
        for wait in self._waits:
            wait()
        like = next(one for stage in self._stages for one in stage)
        owed = [(message.size_bytes // like.element_size(), like.dtype) for message in self.messages]
        if self._buffers:
            owed.append((sum(buffer.numel() for buffer in self._buffers), self._buffers[0].dtype))
        for elements, dtype in owed[len(self._waits) :]:
            self._start(torch.zeros(elements, dtype=dtype, device=like.device))()
        self._rest()

    def _take(self, parameter: Tensor) -> None:
        if id(parameter) in self._alone:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            # The same memory as one dimension, whatever the memory format: collectives want contiguous tensors.
            gradient = parameter.grad
            flat = gradient.as_strided((gradient.numel(),), (1,), gradient.storage_offset())
            self._waits.append(self._start(flat))
            return
        if self._pack is None:
            elements = self._packs[self._packed].size_bytes // parameter.element_size()
            self._pack = torch.empty(elements, dtype=parameter.dtype, device=parameter.device)
        # As dense as the parameter, and with its strides: the update wants them alike.
        place = self._pack.as_strided(parameter.shape, parameter.stride(), self._filled)
        self._filled += parameter.numel()
        if parameter.grad is None:
            place.zero_()
        else:
            place.copy_(parameter.grad)
        parameter.grad = place
        if self._filled == self._pack.numel():
            pack, self._pack, self._filled = self._pack, None, 0
            self._packed += 1
            self._waits.append(self._start(pack))
