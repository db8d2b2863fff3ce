"""A model's chain of costs: every distinct stage simulated once under every policy worth having; seconds by a
roofline, or as they were measured on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.calibrate.calibration import Seconds
from lowmem.calibrate.calibrator import StageTimes
from lowmem.calibrate.stage_timer import FAST, PLAIN
from lowmem.plan.cost import ChainCost, KernelWork, OptionCost, Rates, StageCost
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, PolicyKind
from lowmem.remat import decompose
from lowmem.remat.block import ConvBlock
from lowmem.remat.stage import Stage, StagePass
from lowmem.simulate.stage import Option, OptionMeasure, StageMeasure, measure_chain
from lowmem.simulate.step import empty_copy
from lowmem.simulate.trace import Call, Recorder


def policies(stage: Stage) -> tuple[BlockPolicy, ...]:
    """What is worth measuring. An activation is only kept beside the convolution output it comes from and
    where the block's output is kept, and the projection's output is kept or not with the last
    convolution's: the other choices are hardly ever better."""
    if not isinstance(stage, ConvBlock):
        return (SAVE_ALL, INPUT_ONLY, FUSED)
    n = len(stage.pairs)
    choices: list[tuple[tuple[str, ...], ...]] = [((), (f"z{k}",), (f"z{k}", f"a{k}")) for k in range(1, n)]
    choices.append(((), (f"z{n}", *(("zs",) if stage.projection else ()))))
    kept = [frozenset(name for part in parts for name in part) for parts in product(*choices)]
    named = {SAVE_ALL: stage.tensors, LEAN: stage.kept(LEAN)}
    others = [BlockPolicy(PolicyKind.KEEP, names) for names in kept if names not in named.values()]
    drops = [
        BlockPolicy(PolicyKind.KEEP, names, drop_output=True)
        for names in kept
        if n > 1 and names and not any(name.startswith("a") for name in names)
    ]
    return (*named, *others, *drops, FUSED)


@dataclass(frozen=True, kw_only=True)
class ChainMeasure:
    """What the simulator saw of a chain: bytes and operations, for any card."""

    names: tuple[str, ...]
    stages: tuple[StageMeasure, ...]
    parameter_bytes: tuple[int, ...]
    buffer_bytes: int
    input_bytes: int
    optimizer_copies: int
    accumulation: int


def measure_costs(
    model: nn.Module,
    *,
    input_shape: Sequence[int],
    memory_format: torch.memory_format = torch.contiguous_format,
    low: torch.dtype | None = None,
    optimizer_copies: int = 1,
    accumulation: int = 1,
    workspace: Callable[[Call], int] | None = None,
    options: Callable[[Any], Sequence[Option]] | None = None,
    library_norm: bool = False,
) -> ChainMeasure:
    """Bytes and operations of a step of `model`, which may be on any device, `meta` included, and is not touched.

    `input_shape`: of one micro-batch, [N, C, H, W], float32. `low`: the dtype of autocast, or None.
    `optimizer_copies`: tensors of the parameters' size that the optimizer holds (1: momentum). With
    `accumulation` above 1 the parameters' gradients exist throughout. `workspace`: see `lowmem.simulate.Recorder`.
    `options`: per stage, by default all that are worth having. `library_norm`: see `lowmem.remat.kernels`.
    """
    with FakeTensorMode():
        recorder = Recorder(workspace)
        copied = empty_copy(model, memory_format)
        x = torch.empty(tuple(input_shape)).contiguous(memory_format=memory_format)
        stages = decompose(copied)
        measures = tuple(
            measure_chain(stages, options or _options, x, partial(StagePass, low, library_norm), recorder, library_norm)
        )
        return ChainMeasure(
            names=tuple(stage.name for stage in stages),
            stages=measures,
            parameter_bytes=tuple(p.numel() * p.element_size() for p in copied.parameters()),
            buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in copied.buffers()),
            input_bytes=x.numel() * x.element_size(),
            optimizer_copies=optimizer_copies,
            accumulation=accumulation,
        )


def calls_of(
    model: nn.Module, *, input_shape: Sequence[int], memory_format: torch.memory_format, low: torch.dtype | None
) -> set[Call]:
    """Every distinct convolution of a step, forward and backward."""
    calls: set[Call] = set()

    def note(call: Call) -> int:
        calls.add(call)
        return 0

    one: list[Option] = [Option(SAVE_ALL)]
    measure_costs(
        model,
        input_shape=input_shape,
        memory_format=memory_format,
        low=low,
        workspace=note,
        options=lambda stage: one,
    )
    return calls


def price(measured: ChainMeasure, rates: Rates, times: StageTimes | None = None) -> ChainCost:
    """Seconds for what was simulated: as they were measured on the device, or by a roofline. What did not fit the
    device when it was measured gets the roofline's seconds, scaled as those of the others."""
    parameters = sum(measured.parameter_bytes)
    grads = parameters if measured.accumulation > 1 else 0
    # Copies that undo a step which ran out of memory: of the buffers, and of one parameter and its momentum.
    undo = measured.buffer_bytes + measured.parameter_bytes[0] * (1 + measured.optimizer_copies)
    fixed = parameters * (1 + measured.optimizer_copies) + measured.buffer_bytes + undo
    fixed += measured.input_bytes * measured.accumulation + grads
    seconds = _StageSeconds(rates, times, measured.stages)
    return ChainCost(
        stages=tuple(
            _stage_cost(name, stage, seconds, measured.accumulation)
            for name, stage in zip(measured.names, measured.stages, strict=True)
        ),
        output_bytes=measured.stages[-1].output_bytes,
        output_grad_bytes=measured.stages[-1].output_bytes,
        fixed_bytes=fixed,
        outside_peak_bytes=fixed - grads + parameters,  # the fused update allocates nothing
        outside_seconds=0.0 if times is None else times.outside_seconds,
        plain_seconds=sum(seconds.plain(stage) for stage in measured.stages),
        plain_flops=sum(one.flops for stage in measured.stages for one in _plain_work(stage)),
    )


class _StageSeconds:
    """Seconds of everything a stage can do: measured ones, else the roofline's."""

    def __init__(self, rates: Rates, times: StageTimes | None, stages: Sequence[StageMeasure]) -> None:
        self.rates, self.times = rates, times
        self.scale = 1.0
        measured = [(one, self._roofline(_plain_work(stage))) for stage in stages if (one := self._timed(stage, PLAIN))]
        if measured:
            self.scale = sum(seconds.backward for seconds, _ in measured) / sum(guess for _, guess in measured)

    def option(self, stage: StageMeasure, option: OptionMeasure) -> Seconds:
        works = (option.forward_work, option.backward_work, option.restore_work)
        return self._timed(stage, option.option) or Seconds(*map(self._roofline, works))

    def fast(self, stage: StageMeasure) -> float:
        found = self._timed(stage, FAST)
        return self._roofline(stage.fast_work) if found is None else found.forward

    def plain(self, stage: StageMeasure) -> float:
        """Under autograd."""
        found = self._timed(stage, PLAIN)
        return self._roofline(_plain_work(stage)) if found is None else found.backward

    def _timed(self, stage: StageMeasure, what: str | Option) -> Seconds | None:
        return None if self.times is None else self.times.seconds(stage, what)

    def _roofline(self, work: Iterable[KernelWork]) -> float:
        return self.scale * self.rates.seconds(work)


def _plain_work(stage: StageMeasure) -> tuple[KernelWork, ...]:
    plain = next(option for option in stage.options if option.option.policy == SAVE_ALL)
    return (*plain.forward_work, *plain.backward_work)


def _options(stage: Stage) -> list[Option]:
    usual = [Option(policy) for policy in policies(stage)]
    # A segment's last stage is best FUSED; the other ways are for the baselines.
    lasts = [Option(policy, last=True) for policy in (SAVE_ALL, LEAN, INPUT_ONLY) if policy in policies(stage)]
    return [*usual, *lasts]


def _stage_cost(name: str, measure: StageMeasure, seconds: _StageSeconds, accumulation: int) -> StageCost:
    options = [(one.option.last, _option_cost(one, seconds.option(measure, one))) for one in measure.options]
    return StageCost(
        name=name,
        input_bytes=measure.input_bytes,
        input_grad_bytes=measure.input_grad_bytes,
        options=tuple(cost for last, cost in options if not last),
        last_options=tuple(cost for last, cost in options if last),
        fast_seconds=seconds.fast(measure),
        fast_temp_bytes=measure.fast_temp_bytes,
        fast_flops=sum(work.flops for work in measure.fast_work),
        param_grad_bytes=measure.param_grad_bytes if accumulation == 1 else 0,
    )


def _option_cost(measure: OptionMeasure, seconds: Seconds) -> OptionCost:
    return OptionCost(
        policy=measure.option.policy,
        forward_seconds=seconds.forward,
        backward_seconds=seconds.backward,
        kept_bytes=measure.kept_bytes,
        forward_temp_bytes=measure.forward_temp_bytes,
        backward_temp_bytes=measure.backward_temp_bytes,
        forward_flops=sum(work.flops for work in measure.forward_work),
        backward_flops=sum(work.flops for work in measure.backward_work),
        restore_seconds=seconds.restore,
        restore_temp_bytes=measure.restore_temp_bytes,
        restore_flops=sum(work.flops for work in measure.restore_work),
        restored_bytes=measure.restored_bytes,
    )
