"""Bytes and operations of one stage of a chain, measured on outlines for each of its policies.

Counted above what the chain holds anyway, as the solver's recurrence has it: the input throughout, in the backward also
the gradient of the output and, as if it still existed, the output of every policy that does not drop it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowmem.plan.cost import KernelWork, OptionCost, Rates
from lowmem.plan.front import Result
from lowmem.plan.policy import OUTPUT, SAVE_ALL, BlockPolicy
from lowmem.remat.autograd_operation import AutogradOperation
from lowmem.remat.elementwise import OutputActivation
from lowmem.remat.links import fills_its_memory
from lowmem.remat.operation import Operation, PassState
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
    """One stage. `fast_*` is the forward that keeps nothing. `key`: stages with equal keys cost the same. `reached`:
    whether the backward comes to it."""

    key: Hashable
    input_bytes: int
    input_grad_bytes: int
    output_bytes: int
    param_grad_bytes: int
    fast_temp_bytes: int
    fast_work: tuple[KernelWork, ...]
    options: tuple[OptionMeasure, ...]
    reached: bool = True


def measure_chain(
    stages: Sequence[Stage],
    options: Callable[[Stage, Callable[[Rates], list[Result]]], Sequence[Option]],
    x: Tensor,
    recorder: Recorder,
    low: torch.dtype | None,
    library_norm: bool,
) -> Iterator[StageMeasure]:
    """Yields a measure per stage, in order; equal stages on equal inputs are measured once. Runs under `recorder` (and
    an `OutlineMode`, unless real work is wanted), with x the chain's input. `options`: of a stage, whose results it may
    look at. `low`, `library_norm`: see `PassState`."""
    scalars: dict[str, Any] = {}  # of the whole chain
    known: dict[Hashable, StageMeasure] = {}
    need_input = x.requires_grad
    masked: OutputActivation | None = None
    begins = 0 if need_input else next((k for k, stage in enumerate(stages) if any(stage.trains())), len(stages))
    with recorder, torch.no_grad():
        for number, stage in enumerate(stages):
            trains = stage.trains()

            def new_memo(need_input: bool = need_input, trains: tuple[bool, ...] = trains) -> StagePass:
                return StagePass(PassState(low, library_norm, scalars=scalars), need_input, trains)

            mask = masked and masked.signature
            flags = tuple(one.requires_grad for one in stage.parameters())
            trained = trains if all(flags) else (trains, flags)
            key: tuple[Hashable, ...] = (stage.signature, trained, x.shape, x.stride(), x.dtype, need_input, mask)
            key += (library_norm,) if number >= begins else (library_norm, number == 0, number == begins - 1)
            if key not in known:
                bench = _StageBench(stage, x, new_memo, need_input, masked, recorder)
                if number < begins:
                    known[key] = bench.unreached(key, first=number == 0, last=number == begins - 1)
                else:
                    known[key] = bench.measure(key, options(stage, bench.results))
            yield known[key]
            y, _ = stage.forward([x], None, new_memo())
            assert y is not None
            x = y
            need_input, masked = need_input or any(trains), stage.tail


@dataclass(frozen=True)
class _StageBench:
    stage: Stage
    x: Tensor
    new_memo: Callable[[], StagePass]
    need_input: bool
    masked: OutputActivation | None
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

    def unreached(self, key: Hashable, *, first: bool, last: bool) -> StageMeasure:
        """Of a stage before the first that is trained, to which no backward comes: it only runs forward and keeps
        nothing; its input is freed, but for the chain's. `last`: before one that is trained, which has its output."""
        plain = self.measure(key, ())
        kept = plain.output_bytes if last else 0
        held = plain.output_bytes + (0 if first else plain.input_bytes)
        cost = OptionCost(
            policy=SAVE_ALL,
            kept_bytes=kept,
            forward_temp_bytes=held + plain.fast_temp_bytes - kept,
            backward_temp_bytes=0,
        )
        option = OptionMeasure(
            option=Option(SAVE_ALL), cost=cost, forward_work=plain.fast_work, backward_work=(), restore_work=()
        )
        return replace(plain, options=(option,), reached=False)

    @cached_property
    def _noted(self) -> dict[Operation, Any]:
        """What operations remember of a first run."""
        memo = self.new_memo()
        self.stage.forward([self.x], None, memo)
        return memo.state.notes

    def results(self, rates: Rates) -> list[Result]:
        """What its operations make: bytes that keeping each takes, with its graph if it has one, and seconds."""
        memo, found = self.new_memo(), list[Result]()
        values: list[Any] = [self.x]
        graphs: list[Any] = []  # live on, so that what they hold is counted once
        for k, operation in enumerate(self.stage.operations):
            start, operands = self._mark(), [values[at] for at in operation.operands]
            if isinstance(operation, AutogradOperation):
                result, graph = operation.with_graph(operands, memo.state, [True] * len(operands))
                graphs.append(graph)
            else:
                result = operation.forward(operands, memo.state)
            values.append(result)
            _, left, work = self._since(start)
            name = operation.name
            wanted, keepable = self.stage.wanted(k), name in self.stage.tensors
            found.append(Result(name, operation.operands, left, rates.seconds(work), keepable, wanted))
        return found

    def _option(self, option: Option, like: Tensor) -> OptionMeasure:
        """`like`: a tensor as the stage's output is."""
        memo = self.new_memo()
        y: Tensor | None = None
        saved: Saved = []
        if option.policy.fused or option.last:  # statistics come from a run before, which is not its own
            memo.state.notes.update(self._noted)
        start = self._mark()
        if not option.policy.fused:
            y, saved = self.stage.forward([self.x], option.policy, memo, not option.last)
        peak, kept, forward_work = self._since(start)
        if option.policy.drop_output:
            kept -= like.nbytes
        moves = {} if option.policy.fused or option.last else self._movable(option.policy, memo, saved, y)
        del y
        # what the backward starts from; a stage that is kept with its graph holds the output itself
        counted = kept - self._since(start)[1]
        restore_temp = restored = 0
        restore_work: tuple[KernelWork, ...] = ()
        if option.policy.drop_output:
            held = self._mark()
            again = self.stage.restore(saved, self.x, option.policy, memo)
            restore_temp, left, restore_work = self._since(held)
            restored = left - like.nbytes
            del again
        tb, backward_work = self._backward(option.policy, like, saved, memo)
        return OptionMeasure(
            option=option,
            cost=OptionCost(
                policy=option.policy,
                kept_bytes=kept,
                forward_temp_bytes=max(0, peak - kept),
                backward_temp_bytes=max(0, tb + restored - counted),
                restore_temp_bytes=restore_temp,
                restored_bytes=restored,
                restore_reads_input=option.policy.drop_output and self.stage.restore_reads_input(option.policy, memo),
                host_tensors=tuple((name, size) for name, size in moves.items() if name not in ("input", OUTPUT)),
                sends_output=OUTPUT in moves,
                frees_input="input" in moves,
            ),
            forward_work=forward_work,
            backward_work=backward_work,
            restore_work=restore_work,
        )

    def _movable(self, policy: BlockPolicy, memo: StagePass, saved: Saved, y: Tensor | None) -> dict[str, int]:
        """Bytes by name of what may wait on the host: see `Stage.movable`."""
        values: dict[int, Any] = {0: self.x, self.stage.count: y}
        found: dict[str, Any] = {
            name: values.get(at, saved[at]) for name, at in self.stage.movable(policy, memo).items()
        }
        return {name: int(one.nbytes) for name, one in found.items() if name == "input" or fills_its_memory(one)}

    def _backward(
        self, policy: BlockPolicy, like: Tensor, saved: Saved, memo: StagePass
    ) -> tuple[int, tuple[KernelWork, ...]]:
        """The peak above what is kept and the gradient of the output, and the work."""
        self._forget_grads()
        start = self._mark()
        grad = [torch.empty_like(like)]
        grad_x, owned = self.stage.backward(grad, saved, self.x, policy, memo)
        if grad_x is not None and self.masked is not None:
            self.masked.mask(grad_x, self.x, owned)
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
