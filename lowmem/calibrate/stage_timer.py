"""Seconds of the stages of a chain, policy by policy, on the device itself: real tensors, the real executor.

Every call copies the gradient that the chain would hand down; the copy's time is taken off, and where the host is what
a call waits for, that of autograd's engine too: it is called once a stage here, once for the whole network in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowmem.measure.out_of_memory import Failure, attempt, release
from lowmem.measure.timing import BOUND_SHARE, Timing, time_calls
from lowmem.models import from_recipe
from lowmem.remat import decompose
from lowmem.remat.elementwise import OutputActivation
from lowmem.remat.operation import PassState
from lowmem.remat.stage import Saved, Stage, StagePass
from lowmem.simulate.stage import Option
from lowmem.step.train_step import Execution

_T = TypeVar("_T")
_LEAST_SECONDS = 1e-9  # a difference of two measurements may come out below zero
PLAIN = "plain autograd"
FAST = "forward that keeps nothing"
Timed = str | Option  # what is timed of a stage: PLAIN, FAST or a policy


@dataclass(frozen=True)
class Seconds:
    """Of one policy of one stage: forward, backward, and making a dropped output again. FAST has a forward only, PLAIN
    a backward, which is both."""

    forward: float
    backward: float
    restore: float = 0.0


@dataclass(frozen=True)
class Mode:
    """A precision in a memory format: seconds of a plain step's blocks, and whether all results were finite."""

    seconds: float
    finite: bool


def if_it_fits(work: Callable[[], _T]) -> _T | None:
    """The result of `work`; None if it ran out of memory."""
    found = attempt(work, lambda: "measuring")
    if isinstance(found, Failure):
        release()
        return None
    return found


@dataclass(frozen=True, kw_only=True)
class ChainClock:
    """Times stages of a network (`network`: its recipe, see `lowmem.models.network`) on inputs of `input_shape`, [N, C,
    H, W]. `library_norm`: see `lowmem.remat.batch_norm`."""

    network: Mapping[str, Any]
    input_shape: Sequence[int]
    execution: Execution
    library_norm: bool = False

    def measure(self, wanted: Mapping[str, tuple[int, Timed]]) -> dict[str, Seconds]:
        """By name what is wanted of the stage at a place. What does not fit the device's memory is left out."""
        found: dict[str, Seconds] = {}
        for index, stage in enumerate(self._stages()):
            for name, (place, what) in wanted.items():
                if place == index and (seconds := if_it_fits(partial(stage.seconds, what))):
                    found[name] = seconds
        return found

    def mode(self) -> Mode:
        """A plain step's blocks, each distinct one timed once, and whether every result was finite."""
        found = self._of_each(lambda stage: (stage.seconds(PLAIN).backward, stage.finite()))
        return Mode(sum(seconds for seconds, _ in found), all(finite for _, finite in found))

    def bound_by_host(self) -> bool:
        """Whether launching takes most of the seconds of a plain step's blocks."""
        found = self._of_each(lambda stage: stage.plain_timing())
        whole = sum(timing.median_seconds for timing in found)
        return sum(timing.launch_seconds for timing in found) >= BOUND_SHARE * whole

    def _of_each(self, figure: Callable[[_StageClock], _T]) -> list[_T]:
        """A figure for every stage of the chain, taken once of those that are alike."""
        known: dict[Hashable, _T] = {}
        keys = []
        for timer in self._stages():
            trains, mask = timer.stage.trains(), timer.masked and timer.masked.signature
            keys.append((timer.stage.signature, trains, timer.x.shape, timer.need_input, mask))
            if keys[-1] not in known:
                known[keys[-1]] = figure(timer)
        return [known[key] for key in keys]

    def _stages(self) -> Iterator[_StageClock]:
        device, layout = self.execution.device, self.execution.torch_memory_format
        x = torch.randn(self.input_shape, device=device).contiguous(memory_format=layout)
        need_input, masked = False, None
        scalars: dict[str, Any] = {}
        for stage in decompose(from_recipe(self.network, seed=0).to(device).to(memory_format=layout)):
            with torch.no_grad():
                timer = _StageClock(self, stage, x, need_input, masked, scalars)
            yield timer
            x, need_input, masked = timer.output(), timer.next_needs_input, stage.tail

    @cached_property
    def engine_seconds(self) -> float:
        """What a plain pass of a stage pays beside its kernels: autocast is entered and autograd's engine called, here
        for one element that nothing is done to."""
        one = torch.zeros(1, device=self.execution.device)

        def identity() -> None:
            leaf = one.detach().requires_grad_()
            with torch.enable_grad(), self.execution.autocast():
                y = leaf.view_as(leaf)
            call_engine(y, one)

        return self.seconds(self.timing(identity))

    def timing(self, call: Callable[[], object]) -> Timing:
        """A processor is shared with whoever else computes: there, with one thread, this process's own time counts."""
        clock = time.process_time if torch.get_num_threads() == 1 else None
        return time_calls(call, self.execution.device, warmup=1, rounds=3, least_seconds=0.004, clock=clock)

    def seconds(self, timing: Timing) -> float:
        """The median on a card; on a processor the least, since a plan follows from differences of a few percent."""
        return timing.median_seconds if self.execution.device == "cuda" else timing.least_seconds


def call_engine(y: Tensor, grad: Tensor) -> None:
    """Autograd's backward in this thread, as a training step has it: another one would have handles and workspaces of
    the libraries of its own."""
    with torch.autograd.set_multithreading_enabled(False):
        y.backward(grad)


class _StageClock:
    def __init__(
        self,
        clock: ChainClock,
        stage: Stage,
        x: Tensor,
        need_input: bool,
        masked: OutputActivation | None,
        scalars: dict[str, Any],
    ) -> None:
        self.clock, self.stage, self.x = clock, stage, x
        self.need_input, self.masked, self.scalars = need_input, masked, scalars
        self.like = torch.randn_like(self.output())
        self.next_needs_input = need_input or any(parameter.requires_grad for parameter in stage.parameters())

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the next stage gets."""
        y, _ = self.stage.forward([self.x], None, self._pass())
        assert y is not None
        return y

    def finite(self) -> bool:
        """Of the output and of the gradients that a plain pass left."""
        grads = [parameter.grad for parameter in self.stage.parameters() if parameter.grad is not None]
        return all(bool(torch.isfinite(tensor).all()) for tensor in (self.output(), *grads))

    def seconds(self, what: Timed) -> Seconds:
        if isinstance(what, Option):
            return self._option(what)
        if what == FAST:
            return Seconds(self._time(self.output), 0.0)
        timing = self.plain_timing()
        seconds = self.clock.seconds(timing) - self._copying
        if timing.bound_by_host and self.next_needs_input:
            seconds -= self.clock.engine_seconds
        return Seconds(0.0, max(seconds, _LEAST_SECONDS))

    def plain_timing(self) -> Timing:
        """Of forward and backward under autograd, as the untouched model has them, with a copy of the gradient and a
        call of the engine."""
        state = PassState(scalars=self.scalars)

        def whole() -> None:
            leaf = self.x.detach().requires_grad_(self.need_input)
            self._forget()
            with torch.enable_grad(), self.clock.execution.autocast():
                y = self.stage.plain(leaf, state)
            if y.requires_grad:
                call_engine(y, self.like.to(y.dtype, copy=True))

        return self.clock.timing(whole)

    @torch.no_grad()
    def _option(self, option: Option) -> Seconds:
        """Forward, backward and restoring, as differences of what was timed together."""
        again = self._pass()
        self.stage.forward([self.x], None, again)

        def forward() -> tuple[StagePass, Saved]:
            if option.policy.fused:
                return again, []
            memo = again if option.last else self._pass()
            _, saved = self.stage.forward([self.x], option.policy, memo, not option.last)
            return memo, saved

        def restored() -> tuple[StagePass, Saved]:
            memo, saved = forward()
            if option.policy.drop_output:
                self.stage.restore(saved, self.x, option.policy, memo)
            return memo, saved

        def whole() -> None:
            memo, saved = restored()
            self._forget()
            grad_x, owned = self.stage.backward([self.like.clone()], saved, self.x, option.policy, memo)
            if grad_x is not None and self.masked is not None:
                self.masked.mask(grad_x, self.x, owned)

        first = 0.0 if option.policy.fused else self._time(forward)
        second = self._time(restored) if option.policy.drop_output else first
        third = self._time(whole) - self._copying
        return Seconds(first, max(third - second, _LEAST_SECONDS), max(second - first, 0.0))

    @cached_property
    def _copying(self) -> float:
        return self._time(self.like.clone)

    def _pass(self) -> StagePass:
        state = PassState(self.clock.execution.amp_dtype, self.clock.library_norm, scalars=self.scalars)
        return StagePass(state, self.need_input, self.stage.trains())

    def _time(self, call: Callable[[], object]) -> float:
        return self.clock.seconds(self.clock.timing(call))

    def _forget(self) -> None:
        for parameter in self.stage.parameters():
            parameter.grad = None
