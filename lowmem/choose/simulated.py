"""One whole step, simulated: what a plan, or plain autograd, takes in bytes, seconds and operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem.distributed.reducer import Reducer
from lowmem.plan.cost import Operation, Rates
from lowmem.plan.policy import Schedule
from lowmem.remat import PlannedModule, apply_plan
from lowmem.simulate import Call, DeviceFull, Estimate, Loop, empty_copy, estimate, trace_steps, warm_up

FUSED: Mapping[str, bool] = {"fused": True}


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step works on: `batch` in micro-batches of `micro_batch`. `model` may be on any device, `meta` too."""

    model: nn.Module
    image_shape: tuple[int, int, int]
    batch: int
    micro_batch: int
    precision: str
    memory_format: str
    momentum: bool = True
    library_norm: bool = False  # see lowmem.remat.kernels; of a planned step
    joint: bool = False  # one of several processes that sum their gradients
    sync_bn: bool = False

    @property
    def low_dtype(self) -> torch.dtype | None:
        """The dtype of autocast. Both halves have two bytes; the CPU, on which fake tensors live, knows bf16."""
        return torch.bfloat16 if self.precision == "amp" else None

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.memory_format == "channels-last" else torch.contiguous_format

    @property
    def accumulation(self) -> int:
        """Micro-batches a step, the last, smaller one included."""
        return -(-self.batch // self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A steady step (momentum exists): bytes, seconds by the roofline, floating-point operations.

    `fits`: whether the caching allocator gets by with the capacity that was given. Its estimate is then of that
    allocator, which returns what it has cached when the card is full (at the price of waiting for the card); where it
    does not fit, or no capacity was given, of one on a card without limit.
    """

    estimate: Estimate
    seconds: float
    flops: int
    fits: bool = True


def simulate_step(
    shape: StepShape,
    schedule: Schedule | None,
    rates: Rates,
    capacity_bytes: int | None = None,
    workspace: Callable[[Call], int] | None = None,
    *,
    way: Callable[[nn.Module], nn.Module] | None = None,
    optimizer: Mapping[str, bool] = FUSED,
) -> Simulated:
    """Runs the real executor (or, for None, the untouched model under autograd) and optimizer on fake tensors.

    `capacity_bytes`: of the allocator; None: no limit. `workspace`: see `lowmem.simulate.Recorder`. `way`: another way
    to execute the model, where there is no schedule. `optimizer`: the form of SGD, as its own keywords say it.
    """
    trace = trace_steps(_loop_builder(shape, schedule, way, optimizer), steps=1, workspace=workspace)
    work = (Operation(one.flops, one.moved_bytes) for one in trace.work if one.phase != "setup")
    try:
        taken, fits = estimate(trace, capacity_bytes), True
    except DeviceFull:
        taken, fits = estimate(trace), False
    return Simulated(estimate=taken, seconds=rates.seconds(work), flops=trace.flops(), fits=fits)


def _loop_builder(
    shape: StepShape,
    schedule: Schedule | None,
    way: Callable[[nn.Module], nn.Module] | None,
    form: Mapping[str, bool],
) -> Callable[[], Loop]:
    def build() -> Loop:
        model = empty_copy(shape.model, shape.torch_memory_format)
        model.train()
        if schedule is not None:
            run: nn.Module = apply_plan(model, schedule, library_norm=shape.library_norm)
        else:
            run = model if way is None else way(model)
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=0.1,
            momentum=0.9 if shape.momentum else 0.0,
            weight_decay=1e-4,
            **form,
        )
        warm_up(optimizer)
        images = torch.empty(shape.batch, *shape.image_shape).contiguous(memory_format=shape.torch_memory_format)
        labels = torch.zeros(shape.batch, dtype=torch.int64)
        micro: list[tuple[Tensor, Tensor]] = list(
            zip(images.split(shape.micro_batch), labels.split(shape.micro_batch), strict=True)
        )
        # The plain step, which others are compared with, is the library's and cannot be undone.
        reduction = None
        if shape.joint and isinstance(run, PlannedModule):
            buffers = [] if shape.sync_bn else list(model.buffers())
            stages = [list(stage.parameters()) for stage in run.stages]
            reduction = Reducer(stages, buffers, lambda tensor: _Done())
            run.stage_done = reduction.stage_done
            run.total = (lambda tensor: None) if shape.sync_bn else None
        copies = () if schedule is None else tuple(torch.empty_like(tensor) for tensor in _undo(model, optimizer))
        return Loop(run, model, optimizer, micro, shape.low_dtype, copies, reduction)

    return build


class _Done:
    """Nobody is there to wait for; sizes and lifetimes are the real ones."""

    def wait(self) -> None: ...


def _undo(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What the training loop copies before each step, to undo it when it runs out of memory."""
    yield from model.buffers()
    first = optimizer.param_groups[0]["params"][0]
    yield first
    yield from optimizer.state.get(first, {}).values()
