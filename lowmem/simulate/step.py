"""One training loop on fake tensors: build, then forward, loss, backward and optimizer step, a few times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lowmem.simulate.trace import Call, Kind, Recorder, Trace


class Reduction(Protocol):
    """What sums gradients over processes during the last micro-batch's backward (`lowmem.distributed.Reducer`)."""

    def arm(self) -> None: ...

    def finish(self, weight: float) -> None: ...


@dataclass
class Loop:
    """The real loop's step, for whatever executes the model.

    `run` maps a micro-batch to logits, `model` owns parameters and buffers, `micro_batches` are (inputs,
    labels). Gradients are set to None before the forward and the loss of each micro-batch is weighted by
    its share. `beside`: what the real loop holds all the time for its own purposes. `reduction`: of one process
    among several.
    """

    run: Callable[[Tensor], Tensor]
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    micro_batches: list[tuple[Tensor, Tensor]]
    autocast: torch.dtype | None = None
    beside: tuple[Tensor, ...] = ()
    reduction: Reduction | None = None

    def step(self, recorder: Recorder) -> None:
        self.model.zero_grad(set_to_none=True)
        total = sum(len(labels) for _, labels in self.micro_batches)
        for count, (inputs, labels) in enumerate(self.micro_batches, start=1):
            if self.reduction is not None and count == len(self.micro_batches):
                self.reduction.arm()
            share = len(labels) / total
            self._forward_backward(recorder, inputs, labels, share)
        if self.reduction is not None:
            with _phase(recorder, "reduction"):
                self.reduction.finish(1.0)
        recorder.label((parameter.grad for parameter in self.model.parameters()), Kind.GRADS)
        if self.optimizer is not None:
            with _phase(recorder, "optimizer"):
                self.optimizer.step()
            recorder.label(_state(self.optimizer), Kind.OPTIMIZER)

    def _forward_backward(self, recorder: Recorder, inputs: Tensor, labels: Tensor, share: float) -> None:
        enabled = self.autocast is not None
        with _phase(recorder, "forward"), torch.autocast(inputs.device.type, self.autocast, enabled=enabled):
            loss = F.cross_entropy(self.run(inputs), labels)
            if share != 1.0:
                loss = loss * share
        with _phase(recorder, "backward"):
            loss.backward()


@contextmanager
def _phase(recorder: Recorder, name: str) -> Iterator[None]:
    before, recorder.phase = recorder.phase, lambda: name
    yield
    recorder.phase = before


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def trace_steps(
    build: Callable[[], Loop], steps: int = 2, *, fake: bool = True, workspace: Callable[[Call], int] | None = None
) -> Trace:
    """Builds the loop and runs it -> everything that was allocated and freed, in phases `setup`, `forward`,
    `backward` and `optimizer`.

    Two steps are the least that shows the peak, because momentum comes to exist in the first (see
    `warm_up`). With `fake` nothing is allocated for real; without, the same is recorded of real tensors.
    `workspace`: see `Recorder`.
    """
    with _fake_mode(fake):
        recorder = Recorder(workspace)
        with recorder:
            loop = build()
            recorder.label((*loop.model.parameters(), *loop.model.buffers()), Kind.PARAMS)
            if loop.optimizer is not None:
                recorder.label(_state(loop.optimizer), Kind.OPTIMIZER)
            recorder.label((tensor for pair in loop.micro_batches for tensor in pair), Kind.ACTIVATIONS)
            for _ in range(steps):
                loop.step(recorder)
        del loop
    return recorder.trace


def warm_up(optimizer: torch.optim.SGD) -> None:
    """Gives SGD the momentum that its first step would make: then one step is enough to show the peak.

    To be called in `build`, after the optimizer is made; parameters that are frozen get none."""
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@contextmanager
def _fake_mode(fake: bool) -> Iterator[None]:
    if not fake:
        yield
        return
    with FakeTensorMode():
        yield


def empty_copy(model: nn.Module, memory_format: torch.memory_format = torch.preserve_format) -> nn.Module:
    """The model with parameters and buffers of the same kind but no values, on the CPU: inside a fake mode, a
    copy that takes no memory. The model may be on the `meta` device. (`Module.to` does not work on fake
    parameters, so the memory format is given here.)"""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if memory_format is torch.preserve_format or tensor.dim() != 4:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        else:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=memory_format)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return copy.deepcopy(model, memo)
