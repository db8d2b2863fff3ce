"""A model's chain of costs: every distinct stage simulated once under every policy worth having, seconds by a
roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.plan.cost import ChainCost, Operation, OptionCost, Rates, StageCost
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, PolicyKind
from lowmem.remat import decompose
from lowmem.remat.block import ConvBlock
from lowmem.remat.stage import Stage, StagePass
from lowmem.simulate.stage import Option, OptionMeasure, StageMeasure, measure_chain
from lowmem.simulate.step import empty_copy
from lowmem.simulate.trace import Recorder, Work


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


def chain_cost(
    model: nn.Module,
    *,
    input_shape: Sequence[int],
    rates: Rates,
    memory_format: torch.memory_format = torch.contiguous_format,
    low: torch.dtype | None = None,
    optimizer_copies: int = 1,
    accumulation: int = 1,
) -> ChainCost:
    """Costs of a step of `model`, which may be on any device, `meta` included, and is not touched.

    `input_shape`: of one micro-batch, [N, C, H, W], float32. `low`: the dtype of autocast, or None.
    `optimizer_copies`: tensors of the parameters' size that the optimizer holds (1: momentum). With
    `accumulation` above 1 the parameters' gradients exist throughout.
    """
    with FakeTensorMode():
        recorder = Recorder()
        copied = empty_copy(model, memory_format)
        x = torch.empty(tuple(input_shape)).contiguous(memory_format=memory_format)
        stages = decompose(copied)
        measures = list(measure_chain(stages, _options, x, lambda: StagePass(low), recorder))
        sizes = [parameter.numel() * parameter.element_size() for parameter in copied.parameters()]
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in copied.buffers())
        input_bytes = x.numel() * x.element_size()
    parameters = sum(sizes)
    grads = parameters if accumulation > 1 else 0
    # Copies that undo a step which ran out of memory: of the buffers, and of one parameter and its momentum.
    undo = buffers + sizes[0] * (1 + optimizer_copies)
    fixed = parameters * (1 + optimizer_copies) + buffers + undo + input_bytes * accumulation + grads
    plain = [next(o for o in measure.options if o.option.policy == SAVE_ALL) for measure in measures]
    work = [work for option in plain for work in (*option.forward_work, *option.backward_work)]
    return ChainCost(
        stages=tuple(
            _stage_cost(stage.name, measure, rates, accumulation)
            for stage, measure in zip(stages, measures, strict=True)
        ),
        output_bytes=measures[-1].output_bytes,
        output_grad_bytes=measures[-1].output_bytes,
        fixed_bytes=fixed,
        outside_peak_bytes=fixed - grads + parameters,  # the fused update allocates nothing
        plain_seconds=_seconds(rates, work),
        plain_flops=sum(one.flops for one in work),
    )


def _options(stage: Any) -> list[Option]:
    usual = [Option(policy, policy.drop_output, policy.kind is PolicyKind.FUSED) for policy in policies(stage)]
    # A segment's last stage is best FUSED; the other ways are for the baselines.
    lasts = [Option(policy, last=True) for policy in (SAVE_ALL, LEAN, INPUT_ONLY) if policy in policies(stage)]
    return [*usual, *lasts]


def _stage_cost(name: str, measure: StageMeasure, rates: Rates, accumulation: int) -> StageCost:
    return StageCost(
        name=name,
        input_bytes=measure.input_bytes,
        input_grad_bytes=measure.input_grad_bytes,
        options=tuple(_option_cost(one, rates) for one in measure.options if not one.option.last),
        last_options=tuple(_option_cost(one, rates) for one in measure.options if one.option.last),
        fast_seconds=_seconds(rates, measure.fast_work),
        fast_temp_bytes=measure.fast_temp_bytes,
        fast_flops=sum(work.flops for work in measure.fast_work),
        param_grad_bytes=measure.param_grad_bytes if accumulation == 1 else 0,
    )


def _option_cost(measure: OptionMeasure, rates: Rates) -> OptionCost:
    return OptionCost(
        policy=measure.option.policy,
        forward_seconds=_seconds(rates, measure.forward_work),
        backward_seconds=_seconds(rates, measure.backward_work),
        kept_bytes=measure.kept_bytes,
        forward_temp_bytes=measure.forward_temp_bytes,
        backward_temp_bytes=measure.backward_temp_bytes,
        forward_flops=sum(work.flops for work in measure.forward_work),
        backward_flops=sum(work.flops for work in measure.backward_work),
        restore_seconds=_seconds(rates, measure.restore_work),
        restore_temp_bytes=measure.restore_temp_bytes,
        restore_flops=sum(work.flops for work in measure.restore_work),
        restored_bytes=measure.restored_bytes,
    )


def _seconds(rates: Rates, work: Iterable[Work]) -> float:
    return rates.seconds(Operation(one.flops, one.moved_bytes) for one in work)
