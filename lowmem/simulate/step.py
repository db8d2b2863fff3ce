"""One whole training step, simulated: the code of `lowmem.step` on tensors that have no values (invariant 5)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowmem.config.optimization import OptimConfig
from lowmem.distributed.group import Group, Split
from lowmem.measure.out_of_memory import Failure
from lowmem.plan.cost import Rates
from lowmem.plan.policy import Schedule
from lowmem.remat import PlannedModule, apply_plan
from lowmem.remat.tracing import NotTraceable, is_compiled
from lowmem.simulate.allocator import DeviceFull
from lowmem.simulate.effects import OutlineMode
from lowmem.simulate.trace import Call, Estimate, Kind, Recorder, Trace, estimate
from lowmem.step.data_parallel import DataParallelStep
from lowmem.step.train_step import FUSED, Execution, TrainStep, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo

_LR, _SMOOTHING = 0.1, 0.1  # any: they take no memory


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step works on: `batch` in micro-batches of `micro_batch`. `model` may be on any device, `meta` too."""

    model: nn.Module
    image_shape: tuple[int, int, int]
    batch: int
    micro_batch: int
    precision: str
    memory_format: str
    optim: OptimConfig = field(default_factory=OptimConfig)
    library_norm: bool = False  # see lowmem.remat.batch_norm; of a planned step
    joint: bool = False  # one of several processes that sum their gradients
    sync_bn: bool = False
    label_smoothing: bool = False  # how much does not matter
    mixup: bool = False  # pictures with two labels each
    stages: tuple[str, ...] | None = None  # the chain's links, where they are named; None: as it is traced

    @property
    def execution(self) -> Execution:
        """On the CPU, where outlines are: its half precision, bf16, has two bytes like any other."""
        return Execution("cpu", self.precision, self.memory_format)

    @property
    def dtype(self) -> torch.dtype:
        """Of the pictures: the network's own."""
        floating = (one.dtype for one in self.model.parameters() if one.is_floating_point())
        return next(floating, torch.float32)

    @property
    def accumulation(self) -> int:
        """Micro-batches a step, the last, smaller one included."""
        return -(-self.batch // self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A steady step (momentum exists). `estimate` is of an allocator with the capacity that was given, which returns
    what it has cached when that is full; where it does not fit, or none was given, of one on a card without limit."""

    estimate: Estimate
    seconds: float  # by the roofline
    flops: int
    fits: bool = True  # whether the allocator gets by with the capacity


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
    """Runs the training step with the real executor (or, for None, the untouched model under autograd) on outlines.
    `capacity_bytes`: of the allocator; None: no limit. `workspace`: see `lowmem.simulate.Recorder`. `way`: another way
    to execute the model, where there is no schedule. `optimizer`: its form, as its own keywords say it."""
    if schedule is not None:
        return StepSimulator(shape, workspace).simulate(schedule, rates, capacity_bytes)
    trace = trace_steps(lambda: _built(shape, way or _untouched, optimizer), workspace=workspace)
    return _simulated(trace, rates, capacity_bytes)


class StepSimulator:
    """Steps of one shape under one schedule after the other. The network is copied and traced once, and all of them run
    on the same outlines: between two steps there are parameters, buffers and what the optimizer keeps, as at first."""

    def __init__(self, shape: StepShape, workspace: Callable[[Call], int] | None = None) -> None:
        self.shape, self.workspace = shape, workspace
        self._run: StepRun | None = None
        self._recorder = Recorder(workspace)
        self._begun = (0, 0, 0)  # the recorder's mark of where a step begins
        self._live_bytes = 0  # there

    def simulate(self, schedule: Schedule, rates: Rates, capacity_bytes: int | None = None) -> Simulated:
        """See `simulate_step`."""
        if self._run is None or self.shape.joint:  # what is summed over processes keeps notes from step to step
            self._run, self._recorder = None, Recorder(self.workspace)
        with OutlineMode(), self._recorder:
            run, self._run = self._prepared(schedule), None
            _run_recorded(self._recorder, run, 1)
            self._recorder.phase = lambda: "end"
        if self._recorder.live_bytes == self._live_bytes:  # else the next one begins anew, as after an error
            self._run = run
        return _simulated(self._recorder.trace, rates, capacity_bytes)

    def _prepared(self, schedule: Schedule) -> StepRun:
        recorder = self._recorder
        if self._run is not None:
            model = self._run.step.model
            assert isinstance(model, PlannedModule)
            model.lowmem.set_schedule(schedule)
            recorder.rewind(self._begun)
            return self._run
        shape = self.shape

        def planned(model: nn.Module) -> nn.Module:
            return apply_plan(model, schedule, library_norm=shape.library_norm, stages=shape.stages)

        run = _built(shape, planned, FUSED)
        _label(recorder, run)
        self._begun, self._live_bytes = recorder.mark(), recorder.live_bytes
        return run


def _untouched(model: nn.Module) -> nn.Module:
    return model


def _built(shape: StepShape, way: Callable[[nn.Module], nn.Module], optimizer: Mapping[str, bool]) -> StepRun:
    execution, joint = shape.execution, None
    run = way(empty_copy(shape.model, execution.torch_memory_format).train())
    update = make_optimizer(run, shape.optim, execution.device, optimizer)
    # The plain step, which others are compared with, is the library's: nobody sums its gradients or undoes it.
    if isinstance(run, PlannedModule) and shape.joint:
        split = Split((shape.batch,), micro_batches=(shape.micro_batch,))
        joint = DataParallelStep(run, Group(), split, execution.device, sync_bn=shape.sync_bn)
        joint.begin(shape.batch)
    clip_norm, smoothing = shape.optim.clip_norm, _SMOOTHING if shape.label_smoothing else 0.0
    step = TrainStep(
        run,
        update,
        make_scaler(execution),
        execution,
        shape.micro_batch,
        joint,
        clip_norm=clip_norm,
        label_smoothing=smoothing,
    )
    images = torch.empty(
        (shape.batch, *shape.image_shape), dtype=shape.dtype, memory_format=execution.torch_memory_format
    )
    labels = torch.zeros((shape.batch, 2) if shape.mixup else shape.batch, dtype=torch.int64)
    undo = Undo(step, run) if isinstance(run, PlannedModule) else None
    return StepRun(step=step, images=images, labels=labels, undo=undo)


def _simulated(trace: Trace, rates: Rates, capacity_bytes: int | None) -> Simulated:
    seconds = rates.seconds(kernel for kernel in trace.work if kernel.phase != "setup")
    try:
        taken, fits = estimate(trace, capacity_bytes), True
    except DeviceFull:
        taken, fits = estimate(trace), False
    return Simulated(estimate=taken, seconds=seconds, flops=trace.flops(), fits=fits)


@dataclass(frozen=True, kw_only=True)
class StepRun:
    step: TrainStep
    images: Tensor
    labels: Tensor
    undo: Undo | None = None  # None: it is not undone

    def run(self, look: Callable[[], None] | None = None) -> None:
        """Makes the step; `look`: see `TrainStep`. Raises MemoryError where the host has none left."""
        if self.undo is None:
            self.step(self.images, self.labels, _LR, look)
        elif isinstance(failure := self.undo.attempt(lambda: self.step(self.images, self.labels, _LR, look)), Failure):
            raise MemoryError(failure.message)


def trace_steps(
    build: Callable[[], StepRun], steps: int = 1, *, workspace: Callable[[Call], int] | None = None
) -> Trace:
    """Builds a step on outlines and runs it -> everything that was allocated and freed, in the phase `setup` and in
    those of the step (see `TrainStep.phase`). `workspace`: see `Recorder`."""
    with OutlineMode():
        recorder = Recorder(workspace)
        with recorder:
            run = build()
            _label(recorder, run)
            _run_recorded(recorder, run, steps)
            del run
        recorder.phase = lambda: "end"  # and with it the step goes
    return recorder.trace


def _label(recorder: Recorder, run: StepRun) -> None:
    step, network = run.step, run.step.model
    copies = run.undo.copies if run.undo is not None else ()
    recorder.label((*network.parameters(), *network.buffers(), *copies), Kind.PARAMS)
    recorder.label(optimizer_tensors(step.optimizer), Kind.OPTIMIZER)
    recorder.label((run.images, run.labels), Kind.ACTIVATIONS)


def _run_recorded(recorder: Recorder, run: StepRun, steps: int) -> None:
    step, network = run.step, run.step.model
    recorder.phase = lambda: step.phase
    for _ in range(steps):
        run.run(lambda: recorder.label((parameter.grad for parameter in network.parameters()), Kind.GRADS))


def empty_copy(model: nn.Module, memory_format: torch.memory_format = torch.preserve_format) -> nn.Module:
    """The model with parameters and buffers of the same kind but no values, on the CPU: inside an `OutlineMode`, a
    copy that takes no memory. The model may be on the `meta` device. Counters (scalars of whole numbers) are zero.
    Raises NotTraceable for what is compiled, which cannot be copied so."""
    for name, module in model.named_modules():
        if is_compiled(module):
            raise NotTraceable(
                f"{name or 'the network'} is compiled, by torch.compile or torch.jit: plan the network as it was before"
            )
    memo: dict[int, object] = {}
    # Weights that a hook makes of parameters (pruning, the old weight norm) are tensors in plain attributes.
    plain = (one for module in model.modules() for one in module.__dict__.values() if isinstance(one, Tensor))
    for tensor in (*model.parameters(), *model.buffers(), *plain):
        if not tensor.dim() and not tensor.dtype.is_floating_point:
            empty = torch.zeros((), dtype=tensor.dtype)
        elif memory_format is torch.preserve_format or tensor.dim() != 4:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        else:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=memory_format)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return copy.deepcopy(model, memo)
