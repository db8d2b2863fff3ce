"""Surviving out-of-memory: telling it from other errors, and undoing the step that met it.

A step changes nothing but gradients, batch-norm buffers and the scaler's notes until its update, and the update
allocates nothing (see `make_optimizer`). So a step that ran out of memory is undone with copies of the buffers alone,
made before it in memory that is there from the start, and is run again, the same step, under a smaller plan.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowmem.errors import PeerLost
from lowmem.train.joint import PeerFailed
from lowmem.train.step import TrainStep
from lowmem.units import GIB, KIB, MIB, format_size

T = TypeVar("T")

# What libraries say beside torch.OutOfMemoryError and MemoryError. The first two are certain: the CPU's allocator (on
# Linux, on Windows) and the driver. The others are guesses: the convolution and matrix libraries have no word of their
# own for memory, but these are what they say when the card is full (a handle or a workspace that cannot be made;
# pytorch's own search over convolution kernels swallows out-of-memory of each and reports that none is left).
_WORDS = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"
    r"|CUDA( driver)? error: out of memory"
    r"|CU(DNN|BLAS)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    r"|unable to find an engine to execute this computation|[Uu]nable to find a valid cuDNN algorithm"
)
_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": KIB, "mib": MIB, "gib": GIB}


@dataclass(frozen=True)
class Failure:
    """Out of memory: in which phase of a step or beside it, the library's message, and bytes asked for if it says.

    `final`: the update had begun; then nothing was undone, and there is no way back but the last checkpoint. `peer`: it
    was another process that ran out, and this one undid the step for it.
    """

    phase: str
    message: str
    asked_bytes: int | None = None
    final: bool = False
    peer: bool = False

    @property
    def words(self) -> str:
        asked = "" if self.asked_bytes is None else f", asking for {format_size(self.asked_bytes)}"
        return f"out of memory in {self.phase}{asked}"


def classify(error: BaseException, phase: str) -> Failure | None:
    """The one place that tells out-of-memory from other errors; None: something else."""
    text = str(error)
    if isinstance(error, PeerFailed):
        return Failure(phase, text, peer=True)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not (
        isinstance(error, RuntimeError) and _WORDS.search(text)
    ):
        return None
    asked = _ASKED.search(text)
    # The first sentence: what follows are the allocator's figures and advice on its settings.
    message = re.split(r"\. |\n", text or type(error).__name__, maxsplit=1)[0]
    return Failure(phase, message, int(float(asked[1]) * _UNITS[asked[2].lower()]) if asked else None)


def attempt(work: Callable[[], T], phase: Callable[[], str]) -> T | Failure:
    """The result of `work`, or how it ran out of memory. Other errors go on.

    The error itself is not kept: its traceback holds every tensor of the frames it came through (pytorch issues
    27600, 18853, 82218).
    """
    failure: Failure | None = None
    try:
        return work()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        failure = classify(error, phase())
        if failure is None:
            raise
    return failure


def release() -> None:
    """Gives back what nobody holds any more. To be called outside of an `except`."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Undo:
    """Runs a step so that out-of-memory leaves everything as it was before it.

    Takes the memory of its copies when it is made: the buffers', and one parameter's with its momentum, by which it
    is seen whether the update had begun all the same (the fused update goes through the parameters in order; their
    version counters do not move).
    """

    def __init__(self, step: TrainStep, model: nn.Module) -> None:
        self._step = step
        first: Tensor = step.optimizer.param_groups[0]["params"][0]
        slots = step.optimizer.state.get(first, {})
        self._watched = [first.detach(), *(slot for slot in slots.values() if isinstance(slot, Tensor))]
        self._buffers = list(model.buffers())
        self.copies = [torch.empty_like(tensor) for tensor in (*self._buffers, *self._watched)]

    def attempt(self, work: Callable[[], T]) -> T | Failure:
        """The result of `work`, which runs the step. After a Failure that is not final parameters, momentum, buffers
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
        self._step.optimizer.zero_grad(set_to_none=True)
        self._step.reset_scaler()
        copies = self.copies[len(self._buffers) :]
        if not all(_same_bits(now, then) for now, then in zip(self._watched, copies, strict=True)):
            return False
        _copy(self._buffers, self.copies[: len(self._buffers)])
        release()
        return True


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Compared on the CPU, for there may be no room for even a result on the device; as bytes, for the weights of a run
    that has diverged are not equal to themselves."""
    one, other = (tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    return torch.equal(one, other)


@torch.no_grad()
def _copy(into: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Allocates nothing; a few launches for each dtype."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for left, right in zip(into, source, strict=True):
        pair = groups.setdefault(left.dtype, ([], []))
        pair[0].append(left)
        pair[1].append(right)
    for lefts, rights in groups.values():
        torch._foreach_copy_(lefts, rights)
