"""Undoing steps: one that met out-of-memory, and one that was made on trial.

A step changes nothing but gradients, batch-norm buffers and the scaler's notes until its update, and the update
allocates nothing (see `make_optimizer`). So a step that ran out of memory is undone with copies of the buffers alone,
in memory that is there from the start. Where the update is made too, everything is copied, to host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowmem.core.errors import PeerLost
from lowmem.measure.out_of_memory import Failure, attempt, release
from lowmem.step.train_step import TrainStep, optimizer_tensors

T = TypeVar("T")
_WATCHED = 1 << 16  # elements: the first layer that is trained may be a large one


class Undo:
    """Runs a step so that out-of-memory leaves everything as it was before it. Takes the memory of its copies at once:
    the buffers', and that of the first elements of one parameter and of what the optimizer keeps of it, by which it is
    seen whether the update had begun all the same (the fused update goes through the parameters in order; their version
    counters do not move)."""

    def __init__(self, step: TrainStep, model: nn.Module) -> None:
        self._step = step
        first: Tensor = step.optimizer.param_groups[0]["params"][0]
        slots = step.optimizer.state.get(first, {})
        watched = (first.detach(), *(slot for slot in slots.values() if isinstance(slot, Tensor)))
        self._watched = [one.as_strided((min(one.numel(), _WATCHED),), (1,), one.storage_offset()) for one in watched]
        self._buffers = list(model.buffers())
        self.copies = [torch.empty_like(tensor) for tensor in (*self._buffers, *self._watched)]

    def attempt(self, work: Callable[[], T]) -> T | Failure:
        """The result of `work`, which runs the step. After a Failure that is not final parameters, optimizer, buffers
        and scaler are as before, there are no gradients, and what the step held is free."""
        _copy(self.copies, (*self._buffers, *self._watched))
        self._step.phase = "data"
        joint = self._step.joint
        try:
            result = attempt(work, lambda: self._step.phase)
        except PeerLost:
            # The network is as before the step, to be saved by whoever is left. On CUDA sums that nobody answers would
            # be waited for.
            if self._watched[0].device.type == "cpu":
                self._undone()
            raise
        if isinstance(result, Failure):
            if not self._undone():
                return replace(result, final=True)
            if joint is not None and not result.peer:
                joint.fail()
        return result

    def _undone(self) -> bool:
        _forget(self._step)
        copies = self.copies[len(self._buffers) :]
        if not all(_same_bits(now, then) for now, then in zip(self._watched, copies, strict=True)):
            return False
        _copy(self._buffers, self.copies[: len(self._buffers)])
        release()
        return True


class Before:
    """Everything a step and its update change, as it was when this was made, in host memory."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._slots = {parameter: dict(slots) for parameter, slots in step.optimizer.state.items()}
        tensors = (*step.model.state_dict().values(), *optimizer_tensors(step.optimizer))
        self._copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
        self._rates = [group["lr"] for group in step.optimizer.param_groups]
        self._scaler = step.scaler.state_dict()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts it all back, in place: same tensors, same memory formats, no gradients."""
        optimizer = self._step.optimizer
        _forget(self._step)
        for tensor, saved in self._copies:
            tensor.copy_(saved)
        optimizer.state.clear()
        optimizer.state.update({parameter: dict(slots) for parameter, slots in self._slots.items()})
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        if self._scaler:
            self._step.scaler.load_state_dict(self._scaler)


def _forget(step: TrainStep) -> None:
    """What a step that is not finished leaves beside buffers: gradients, and the scaler's notes; scale and growth count
    stay. A fresh one: the library's scaler has no way back between two of its own calls, and keeps notes on the
    optimizer too."""
    step.optimizer.zero_grad(set_to_none=True)
    for note in ("grad_scale", "found_inf"):
        if hasattr(step.optimizer, note):
            delattr(step.optimizer, note)
    if step.scaler.is_enabled():
        state = step.scaler.state_dict()
        step.scaler = torch.amp.GradScaler(step.execution.device)
        step.scaler.load_state_dict(state)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Compared on the CPU, for there may be no room for even a result on the device; as bytes, for the weights of a run
    that has diverged are not equal to themselves."""
    one, other = (tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    return torch.equal(one, other)


@torch.no_grad()
def _copy(into: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Allocates nothing; a few launches for each dtype."""
    groups: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for left, right in zip(into, source, strict=True):
        groups.setdefault(left.dtype, []).append((left, right))
    for pairs in groups.values():
        torch._foreach_copy_([left for left, _ in pairs], [right for _, right in pairs])
