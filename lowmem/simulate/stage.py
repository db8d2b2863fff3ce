"""Bytes and operations of one stage of a chain, measured on outlines for each of its policies.

Counted above what the chain holds anyway, as the solver's recurrence has it: the input throughout, in the backward also
the gradient of the output and, as if it still existed, the output of every policy that does not drop it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmem.plan.cost import KernelWork, OptionCost
from lowmem.plan.policy import BlockPolicy
from lowmem.remat.kernels import mask_relu
from lowmem.remat.stage import Saved, Stage, StagePass
from lowmem.simulate.trace import Recorder


@dataclass(frozen=True)
class Option:
    """A policy to be measured. `last`: of a segment's last stage, whose output is not made."""

    policy: BlockPolicy
    last: bool = False


@dataclass(frozen=True, kw_only=True)
class OptionMeasure:
    """Bytes above the chain's, in a cost that has no seconds yet, and the operations that take them."""

    option: Option
    cost: OptionCost
    forward_work: tuple[KernelWork, ...]
    backward_work: tuple[KernelWork, ...]
    restore_work: tuple[KernelWork, ...]


@dataclass(frozen=True, kw_only=True)
class StageMeasure:
    """One stage. `fast_*` is the forward that keeps nothing. `key`: stages with equal keys cost the same."""

    key: Hashable
    input_bytes: int
    input_grad_bytes: int
    output_bytes: int
    param_grad_bytes: int
    fast_temp_bytes: int
    fast_work: tuple[KernelWork, ...]
    options: tuple[OptionMeasure, ...]


def measure_chain(
    stages: Sequence[Stage],
    options: Callable[[Stage], Sequence[Option]],
    x: Tensor,
    recorder: Recorder,
    low: torch.dtype | None,
    library_norm: bool,
) -> Iterator[StageMeasure]:
    """Yields a measure per stage, in order; equal stages on equal inputs are measured once. Runs under `recorder` (and
    an `OutlineMode`, unless real work is wanted), with x the chain's input. `low`, `library_norm`: see `StagePass`."""
    new_memo = partial(StagePass, low, library_norm)
    known: dict[Hashable, StageMeasure] = {}
    need_input = x.requires_grad
    masked = False
    with recorder, torch.no_grad():
        for stage in stages:
            trainable = tuple(parameter.requires_grad for parameter in stage.parameters())
            key = (stage.signature, trainable, x.shape, x.stride(), x.dtype, need_input, masked, library_norm)
            if key not in known:
                bench = _StageBench(stage, x, new_memo, need_input, masked, recorder)
                known[key] = bench.measure(key, options(stage))
            yield known[key]
            y, _ = stage.forward([x], None, new_memo())
            assert y is not None
            x = y
            need_input, masked = need_input or any(trainable), stage.relu_output


@dataclass(frozen=True)
class _StageBench:
    stage: Stage
    x: Tensor
    new_memo: Callable[..., StagePass]
    need_input: bool
    masked: bool
    recorder: Recorder

    def measure(self, key: Hashable, options: Sequence[Option]) -> StageMeasure:
        start = self._mark()
        y = self.stage.forward([self.x], None, self.new_memo())[0]
        assert y is not None
        peak, _, work = self._since(start)
        return StageMeasure(
            key=key,
            input_bytes=self.x.nbytes,
            input_grad_bytes=self.x.nbytes if self.need_input else 0,
            output_bytes=y.nbytes,
            param_grad_bytes=sum(parameter.nbytes for parameter in self.stage.parameters() if parameter.requires_grad),
            fast_temp_bytes=max(0, peak - y.nbytes),
            fast_work=work,
            options=tuple([self._option(option, y.detach()) for option in options]),
        )

    def _option(self, option: Option, like: Tensor) -> OptionMeasure:
        """`like`: a tensor as the stage's output is."""
        memo = self.new_memo(need_input=self.need_input)
        y: Tensor | None = None
        saved: Saved = {}
        if option.policy.fused or option.last:  # statistics come from a run before, which is not its own
            self.stage.forward([self.x], None, memo)
        start = self._mark()
        if not option.policy.fused:
            y, saved = self.stage.forward([self.x], option.policy, memo, not option.last)
        peak, kept, forward_work = self._since(start)
        if option.policy.drop_output:
            kept -= like.nbytes
        del y
        # what the backward starts from; a stage that is kept with its graph holds the output itself
        counted = kept - self._since(start)[1]
        restore_temp = restored = 0
        restore_work: tuple[KernelWork, ...] = ()
        if option.policy.drop_output:
            held = self._mark()
            again = self.stage.restore(saved, self.x, memo)
            restore_temp, left, restore_work = self._since(held)
            restored = left - like.nbytes
            del again
        tb, backward_work = self._backward(like, saved, memo)
        return OptionMeasure(
            option=option,
            cost=OptionCost(
                policy=option.policy,
                kept_bytes=kept,
                forward_temp_bytes=max(0, peak - kept),
                backward_temp_bytes=max(0, tb + restored - counted),
                restore_temp_bytes=restore_temp,
                restored_bytes=restored,
            ),
            forward_work=forward_work,
            backward_work=backward_work,
            restore_work=restore_work,
        )

    def _backward(self, like: Tensor, saved: Saved, memo: StagePass) -> tuple[int, tuple[KernelWork, ...]]:
        """The peak above what is kept and the gradient of the output, and the work."""
        self._forget_grads()
        start = self._mark()
        grad = [torch.empty_like(like)]
        grad_x = self.stage.backward(grad, saved, self.x, memo)
        if grad_x is not None and self.masked:
            mask_relu(grad_x, self.x)
        peak, _, work = self._since(start)
        del grad_x, grad
        self._forget_grads()
        return peak - like.nbytes, work

    def _forget_grads(self) -> None:
        for parameter in self.stage.parameters():
            parameter.grad = None

    def _mark(self) -> tuple[int, int]:
        return len(self.recorder.trace.events), len(self.recorder.trace.work)

    def _since(self, mark: tuple[int, int]) -> tuple[int, int, tuple[KernelWork, ...]]:
        """Peak and live bytes above those at the mark, and the work since."""
        trace = self.recorder.trace
        live = peak = 0
        for event in trace.events[mark[0] :]:
            live += event.change_bytes
            peak = max(peak, live)
        return peak, live, tuple(trace.work[mark[1] :])
