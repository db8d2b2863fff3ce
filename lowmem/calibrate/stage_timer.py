"""Seconds of the stages of a chain, policy by policy, on the device itself: real tensors, the real executor.

The gradient that the chain would hand down is copied for every call, and the copy's own time taken off, and where the
host is what a call waits for, that of autograd's engine too: it is called once a stage here and once for the whole
network in a step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowmem.calibrate.calibration import Mode, Seconds
from lowmem.measure.out_of_memory import Failure, attempt
from lowmem.measure.timing import BOUND_SHARE, Timing, time_calls
from lowmem.remat import decompose
from lowmem.remat.block import ConvBlock
from lowmem.remat.stage import OpaqueStage, Saved, Stage, StagePass
from lowmem.simulate.stage import Option
from lowmem.step.train_step import Execution

_T = TypeVar("_T")
_LEAST_SECONDS = 1e-9  # a difference of two measurements may come out below zero
PLAIN = "plain autograd"
FAST = "forward that keeps nothing"


# Of one stage, names of figures with what each is of: PLAIN, FAST, or a policy.
Wanted = Mapping[str, str | Option]


def real_copy(model: nn.Module, device: str, memory_format: torch.memory_format) -> nn.Module:
    """The model with weights of its own on the device, in training mode; the model may be on `meta`."""
    made = copy.deepcopy(model).to_empty(device=device)
    for module in made.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return made.to(memory_format=memory_format).train()


def plain_forward(stage: Stage, x: Tensor) -> Tensor:
    """What the untouched model computes there, recorded by autograd."""
    if isinstance(stage, OpaqueStage):
        return stage.function(x)
    assert isinstance(stage, ConvBlock)
    return stage.plain(x)


class ChainClock:
    """Times stages of `model` on inputs of `input_shape`, [N, C, H, W]. `library_norm`: see `lowmem.remat.kernels`;
    `time_call`: what times a call, see `lowmem.measure.timing`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        input_shape: Sequence[int],
        execution: Execution,
        library_norm: bool = False,
        rounds: int = 3,
        time_call: Callable[..., Timing] = time_calls,
    ) -> None:
        self.model, self.library_norm = model, library_norm
        self.execution, self.device = execution, execution.device
        self.input_shape = tuple(input_shape)
        self.rounds = rounds
        self._time_call = time_call

    def measure(self, wanted: Mapping[int, Wanted]) -> dict[str, Seconds]:
        """What is wanted of stages, by their place. A policy that does not fit the device's memory is left out."""
        found: dict[str, Seconds] = {}
        for index, timer in enumerate(self._stages() if wanted else ()):
            for name, what in wanted.get(index, {}).items():
                seconds = attempt(partial(timer.of, what), lambda: "timing")
                if isinstance(seconds, Failure):
                    _release(self.device)
                else:
                    found[name] = seconds
        return found

    def mode(self) -> Mode:
        """A plain step's blocks, each distinct one timed once, and whether every result was finite."""
        found = self._of_each(lambda timer: (timer.plain().backward, timer.finite()))
        return Mode(sum(seconds for seconds, _ in found), all(finite for _, finite in found))

    def bound_by_host(self) -> bool:
        """Whether launching takes most of the seconds of a plain step's blocks."""
        found = self._of_each(lambda timer: timer.plain_timing())
        whole = sum(timing.median_seconds for timing in found)
        return sum(timing.launch_seconds for timing in found) >= BOUND_SHARE * whole

    def _of_each(self, figure: Callable[[_StageClock], _T]) -> list[_T]:
        """A figure for every stage of the chain, taken once of those that are alike."""
        known: dict[Hashable, _T] = {}
        found: list[_T] = []
        for timer in self._stages():
            key = (timer.stage.signature, timer.x.shape, timer.need_input, timer.masked)
            if key not in known:
                known[key] = figure(timer)
            found.append(known[key])
        return found

    def _stages(self) -> Iterator[_StageClock]:
        """Every stage of the chain on its own input."""
        stages = decompose(real_copy(self.model, self.device, self.execution.torch_memory_format))
        x = torch.randn(self.input_shape, device=self.device).contiguous(
            memory_format=self.execution.torch_memory_format
        )
        need_input = masked = False
        for stage in stages:
            with torch.no_grad():
                timer = _StageClock(self, stage, x, need_input, masked)
            yield timer
            x, need_input, masked = timer.output(), timer.passes_gradient(), stage.relu_output

    @cached_property
    def engine_seconds(self) -> float:
        """What a plain pass of a stage pays beside its kernels: autocast is entered and autograd's engine called, here
        for one element that nothing is done to."""
        one = torch.zeros(1, device=self.device)

        def identity() -> None:
            leaf = one.detach().requires_grad_()
            with self.recording():
                y = leaf.view_as(leaf)
            call_engine(y, one)

        return self.seconds(self.timing(identity))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """As the forward pass of a plain step."""
        with torch.enable_grad(), self.execution.autocast():
            yield

    def timing(self, call: Callable[[], object]) -> Timing:
        """A processor is shared with whoever else computes: there, with one thread, this process's own time counts."""
        if self.device == "cuda":
            return self._time_call(call, "cuda", warmup=1, rounds=self.rounds, least_seconds=0.004)
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        return self._time_call(call, "cpu", warmup=1, rounds=self.rounds, least_seconds=0.004, clock=clock)

    def seconds(self, timing: Timing) -> float:
        """The median on a card; on a processor the least, since a plan follows from differences of a few percent."""
        return timing.median_seconds if self.device == "cuda" else timing.least_seconds


def call_engine(y: Tensor, grad: Tensor) -> None:
    """Autograd's backward in this thread, as a training step has it: another one would have handles and workspaces of
    the libraries of its own."""
    with torch.autograd.set_multithreading_enabled(False):
        y.backward(grad)


class _StageClock:
    """One stage on its input."""

    def __init__(self, clock: ChainClock, stage: Stage, x: Tensor, need_input: bool, masked: bool) -> None:
        self.clock, self.stage, self.x = clock, stage, x
        self.need_input, self.masked = need_input, masked
        self.like = torch.randn_like(self.output())

    @cached_property
    def copying(self) -> float:
        """Seconds of making a gradient of the output's size."""
        return self._seconds(self.like.clone)

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the next stage gets."""
        y, _ = self.stage.forward([self.x], None, self._pass())
        assert y is not None
        return y

    def _pass(self) -> StagePass:
        return StagePass(self.clock.execution.amp_dtype, self.clock.library_norm, need_input=self.need_input)

    def passes_gradient(self) -> bool:
        """Whether the next stage's input needs a gradient."""
        return self.need_input or any(parameter.requires_grad for parameter in self.stage.parameters())

    def of(self, what: str | Option) -> Seconds:
        if isinstance(what, Option):
            return self.option(what)
        return self.fast() if what == FAST else self.plain()

    def fast(self) -> Seconds:
        """The forward that keeps nothing."""
        return Seconds(self._seconds(self.output), 0.0)

    @torch.no_grad()
    def option(self, option: Option) -> Seconds:
        """Forward, backward and restoring, as differences of what was timed together."""
        again = self._pass()
        self.stage.forward([self.x], None, again)

        def forward() -> tuple[StagePass, Saved]:
            if option.policy.fused:
                return again, {}
            memo = again if option.last else self._pass()
            _, saved = self.stage.forward([self.x], option.policy, memo, not option.last)
            return memo, saved

        def restored() -> tuple[StagePass, Saved]:
            memo, saved = forward()
            if option.policy.drop_output:
                self.stage.restore(saved, self.x, memo)
            return memo, saved

        def whole() -> None:
            self._backward(*restored())

        first = 0.0 if option.policy.fused else self._seconds(forward)
        second = self._seconds(restored) if option.policy.drop_output else first
        third = self._seconds(whole) - self.copying
        return Seconds(first, max(third - second, _LEAST_SECONDS), max(second - first, 0.0))

    def plain(self) -> Seconds:
        """Forward and backward under autograd; only their sum is meant to be used."""
        timing = self.plain_timing()
        seconds = self.clock.seconds(timing) - self.copying
        if timing.bound_by_host and self.passes_gradient():
            seconds -= self.clock.engine_seconds
        return Seconds(0.0, max(seconds, _LEAST_SECONDS))

    def plain_timing(self) -> Timing:
        """Of forward and backward under autograd, with a copy of the gradient and a call of the engine."""

        def whole() -> None:
            leaf = self.x.detach().requires_grad_(self.need_input)
            self._forget()
            with self.clock.recording():
                y = plain_forward(self.stage, leaf)
            if y.requires_grad:
                call_engine(y, self.like.to(y.dtype, copy=True))

        return self.clock.timing(whole)

    def finite(self) -> bool:
        """Of the output and of the gradients that a plain pass left."""
        grads = [parameter.grad for parameter in self.stage.parameters() if parameter.grad is not None]
        return all(bool(torch.isfinite(tensor).all()) for tensor in (self.output(), *grads))

    def _backward(self, memo: StagePass, saved: Saved) -> None:
        self._forget()
        grad_x = self.stage.backward([self.like.clone()], saved, self.x, memo)
        if grad_x is not None and self.masked:
            torch.ops.aten.threshold_backward.grad_input(grad_x, self.x, 0, grad_input=grad_x)

    def _seconds(self, call: Callable[[], object]) -> float:
        return self.clock.seconds(self.clock.timing(call))

    def _forget(self) -> None:
        for parameter in self.stage.parameters():
            parameter.grad = None


def _release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
