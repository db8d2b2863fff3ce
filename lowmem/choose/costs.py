"""A model's chain of costs: every distinct stage simulated once under every policy worth having; seconds by a
roofline, or as they were measured on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch

from lowmem.calibrate.calibrator import StageTimes
from lowmem.calibrate.stage_timer import FAST, PLAIN, Seconds, Timed
from lowmem.core.phases import Phase, untold
from lowmem.plan.cost import ChainCost, KernelWork, Rates, StageCost
from lowmem.plan.front import Result, front
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, PolicyKind
from lowmem.remat import traced_chain
from lowmem.remat.host import grad_may_wait
from lowmem.remat.stage import Stage
from lowmem.simulate import Call, OutlineMode, Recorder, StepShape, empty_copy
from lowmem.simulate.stage import Option, StageMeasure, measure_chain
from lowmem.step.train_step import TrainStep, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo

MOST_POLICIES = 64  # of a stage, without those that drop its output
MOST_TOGETHER = 3  # dear results that are kept or not as one
MANY_OPERATIONS = 64  # of a stage that takes long to measure
USUAL_RATES = Rates.roofline(4.38e12, 192e9)  # of the card that this project is aimed at


def policies(stage: Stage, results: Callable[[], Sequence[Result]] | None = None) -> tuple[BlockPolicy, ...]:
    """What is worth measuring: see `keepable`. Of a stage with many choices the front of its `results`; without these
    only what has a name."""
    groups = keepable(stage)
    choices = [[group[:count] for count in range(len(group) + 1)] for group in groups[:-1]]
    choices.append([(), groups[-1]] if groups[-1] else [()])
    together = sum(name in stage.dear for name in groups[-1])
    if prod(map(len, choices)) <= MOST_POLICIES and together <= MOST_TOGETHER:
        kept = [frozenset(name for part in parts for name in part) for parts in product(*choices)]
    else:
        kept = [] if results is None else front(results())
    named = {SAVE_ALL: stage.read, LEAN: stage.dear}
    if len(set(named.values())) < len(named):
        del named[LEAN]
    others = [BlockPolicy(PolicyKind.KEEP, names) for names in kept if names not in named.values()]
    if INPUT_ONLY not in others:
        others.append(INPUT_ONLY)
    drops = [
        BlockPolicy(PolicyKind.KEEP, names, drop_output=True)
        for names in kept
        if names and names <= stage.dear and stage.operations[-1].name not in names
    ]
    return (*named, *others, *drops, FUSED)


def keepable(stage: Stage) -> list[tuple[str, ...]]:
    """What can be kept, in groups: the result of a dear operation, and what is made of it before the next one, which is
    only kept beside it. The dear results that the output is made of without another between are one group, the last:
    other choices are hardly ever better."""
    roots: list[frozenset[int]] = [frozenset()]
    groups: dict[int, list[str]] = {}
    for k, operation in enumerate(stage.operations):
        if operation.dear:
            roots.append(frozenset({k}))
            groups[k] = [operation.name] if operation.name in stage.tensors else []
            continue
        mine: frozenset[int] = frozenset().union(*(roots[value] for value in operation.operands))
        roots.append(mine)
        if operation.name in stage.tensors:
            groups.setdefault(max(mine, default=-1), []).append(operation.name)
    last = sorted(roots[-1])
    first = [tuple(names) for k, names in sorted(groups.items()) if k not in last and names]
    ends = tuple(name for k in last for name in groups.get(k, ()))
    return [*first, ends] if ends else [*first, ()]


@dataclass(frozen=True, kw_only=True)
class ChainMeasure:
    """What the simulator saw of a chain: bytes and operations, for any card. `fixed_bytes`: of parameters, buffers,
    what the optimizer keeps, what undoes a step, and the pictures; `parameter_bytes`: of those that are trained."""

    names: tuple[str, ...]
    run_whole: Mapping[str, str]  # by path ("": all of it) why a module does, though it is no single operation
    stages: tuple[StageMeasure, ...]
    host_grad_bytes: tuple[int, ...]  # by stage: of gradients that nothing but it adds to
    fixed_bytes: int
    parameter_bytes: int
    accumulates: bool


def measure_costs(
    shape: StepShape,
    workspace: Callable[[Call], int] | None = None,
    options: Callable[[Stage], Sequence[Option]] | None = None,
    phase: Phase = untold,
    rates: Rates = USUAL_RATES,
) -> ChainMeasure:
    """Bytes and operations of a step, whose model is not touched. `workspace`: see `lowmem.simulate.Recorder`.
    `options`: per stage, by default all that are worth having; which these are in stages with many choices depends on
    `rates`. `phase` hears how many stages are done."""
    execution = shape.execution
    with OutlineMode():
        recorder = Recorder(workspace)
        model = empty_copy(shape.model, execution.torch_memory_format)
        x = torch.empty(
            (shape.micro_batch, *shape.image_shape), dtype=shape.dtype, memory_format=execution.torch_memory_format
        )
        chain = traced_chain(model, shape.stages)
        stages = chain.stages

        def of(stage: Stage, results: Callable[[Rates], list[Result]]) -> Sequence[Option]:
            return _options(stage, lambda: results(rates)) if options is None else options(stage)

        measured = measure_chain(stages, of, x, recorder, execution.amp_dtype, shape.library_norm)
        what, measures = f"planning: costs of each block at batch {shape.micro_batch}", list[StageMeasure]()
        phase(what, 0, len(stages))
        for measure in measured:
            measures.append(measure)
            phase(what, len(measures), len(stages))
        uses = Counter(id(one) for stage in stages for one in stage.parameters())
        movable = [filter(grad_may_wait, stage.parameters()) for stage in stages]
        optimizer = make_optimizer(model, shape.optim, execution.device)
        step = TrainStep(model, optimizer, make_scaler(execution), execution, shape.micro_batch)
        held = (*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer), *Undo(step, model).copies)
        return ChainMeasure(
            names=tuple(stage.name for stage in stages),
            run_whole=chain.leaves,
            stages=tuple(measures),
            host_grad_bytes=tuple(sum(uses[id(one)] == 1 and one.nbytes for one in stage) for stage in movable),
            fixed_bytes=sum(tensor.nbytes for tensor in held) + x.nbytes * shape.accumulation,
            parameter_bytes=sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
            accumulates=shape.accumulation > 1,
        )


def calls_of(shape: StepShape) -> set[Call]:
    """Every distinct convolution of a step, forward and backward."""
    calls: set[Call] = set()

    def note(call: Call) -> int:
        calls.add(call)
        return 0

    measure_costs(shape, note, lambda stage: [Option(SAVE_ALL)])
    return calls


def price(measured: ChainMeasure, rates: Rates, times: StageTimes | None = None) -> ChainCost:
    """Seconds for what was simulated: as they were measured on the device, or by a roofline. What did not fit the
    device when it was measured gets the roofline's seconds, scaled as those of the others."""
    scale = 1.0

    def seconds(stage: StageMeasure, what: Timed, *works: Iterable[KernelWork]) -> Seconds:
        found = None if times is None else times.seconds(stage, what)
        return found or Seconds(*(scale * rates.seconds(work) for work in works))

    if times is not None:
        known = [(found.backward, stage) for stage in measured.stages if (found := times.seconds(stage, PLAIN))]
        if known:
            scale = sum(took for took, _ in known) / sum(rates.seconds(_plain_work(stage)) for _, stage in known)

    def cost(name: str, stage: StageMeasure, host_grad_bytes: int) -> StageCost:
        options = []
        for one in stage.options:
            took = seconds(stage, one.option, one.forward_work, one.backward_work, one.restore_work)
            priced = replace(
                one.cost, forward_seconds=took.forward, backward_seconds=took.backward, restore_seconds=took.restore
            )
            options.append((one.option.last, priced))
        return StageCost(
            name=name,
            input_bytes=stage.input_bytes,
            input_grad_bytes=stage.input_grad_bytes,
            options=tuple(option for last, option in options if not last),
            last_options=tuple(option for last, option in options if last),
            fast_seconds=seconds(stage, FAST, stage.fast_work, ()).forward,
            fast_temp_bytes=stage.fast_temp_bytes,
            param_grad_bytes=0 if measured.accumulates else stage.param_grad_bytes,
            host_grad_bytes=0 if measured.accumulates else host_grad_bytes,
            reached=stage.reached,
        )

    # The gradients of all parameters exist throughout a step that accumulates. The fused update allocates nothing.
    grads = measured.parameter_bytes if measured.accumulates else 0
    return ChainCost(
        stages=tuple(map(cost, measured.names, measured.stages, measured.host_grad_bytes)),
        output_bytes=measured.stages[-1].output_bytes,
        output_grad_bytes=measured.stages[-1].output_bytes,
        fixed_bytes=measured.fixed_bytes + grads,
        outside_peak_bytes=measured.fixed_bytes + measured.parameter_bytes,
        outside_seconds=0.0 if times is None else times.outside_seconds,
        plain_seconds=sum(seconds(stage, PLAIN, (), _plain_work(stage)).backward for stage in measured.stages),
    )


def _plain_work(stage: StageMeasure) -> tuple[KernelWork, ...]:
    plain = next(option for option in stage.options if option.option.policy == SAVE_ALL)
    return (*plain.forward_work, *plain.backward_work)


def _options(stage: Stage, results: Callable[[], Sequence[Result]]) -> list[Option]:
    usual = policies(stage, results)
    # A segment's last stage is best FUSED, or keeps a little of what is dear: what follows is its own backward.
    few = len(stage.operations) > MANY_OPERATIONS
    lasts = [
        one
        for one in usual
        if one in (SAVE_ALL, LEAN, INPUT_ONLY) or (one.anywhere and not few and one.kept <= stage.dear)
    ]
    return [*map(Option, usual), *(Option(policy, last=True) for policy in lasts)]
