"""`Replica`: the network of a run in this process, and all that trains it; and the way of what it is between two steps
into a checkpoint and back, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem.config.schema import BEFORE, OPERATIONAL, Config, flatten
from lowmem.core.errors import CorruptCheckpoint, ForeignCheckpoint
from lowmem.core.reading import shorten
from lowmem.core.units import counted
from lowmem.data import AnyPictures, Dataset, TrainBatches, eval_batches
from lowmem.distributed.group import Group, Split, even_shares
from lowmem.measure import Meter
from lowmem.models.resnet import ResNet, check_memory_format
from lowmem.models.weights import Placed, place
from lowmem.plan.policy import SAVE_ALL, uniform
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan, stage_names
from lowmem.remat.links import cpu_link
from lowmem.remat.same_forward import check_same_forward
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.checkpoint_state import RunState, read_state
from lowmem.runs.store import RunFolder
from lowmem.step.data_parallel import DataParallelStep, are_alike
from lowmem.step.train_step import (
    EMA,
    SLOTS,
    Execution,
    Score,
    TrainStep,
    evaluate,
    make_optimizer,
    make_scaler,
    mean_weights,
    restart_means,
)
from lowmem.train.observer import Observer
from lowmem.train.schedule import learning_rate

# Of a checkpoint's state, that a fork begins with: other parameters were trained before; another optimizer did it.
REFROZEN, ANOTHER_OPTIMIZER = "refrozen", "another optimizer"


class Replica:
    """Network, optimizer, step, batches, plan and state of a run in this process: all of the group's are alike."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        dataset: Dataset,
        observer: Observer,
        plan: Plan | None = None,
        group: Group | None = None,
        split: Split | None = None,
    ) -> None:
        """`config`: with device, precision and memory format resolved. `plan`: for this process's share of the batch.
        `group`: the processes that train the run; `split`: of the batch among them (None: even)."""
        self.config, self.dataset, self.observer, self.plan = config, dataset, observer, plan
        self.identity = identity_of(config, dataset)  # of its checkpoints
        execution = Execution(config.train.device, config.train.precision, config.train.memory_format)
        self.execution = execution
        check_memory_format(model, execution.device, execution.precision, execution.memory_format)
        self.model = model.to(device=execution.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = make_optimizer(self.model, config.optim, execution.device)
        # Shares every parameter and buffer with the model, which evaluation runs as it is: without gradients there is
        # nothing to keep.
        self.planned = None if plan is None else apply_plan(self.model, plan)
        rate = config.cpu_link_rate
        if self.planned is not None and rate is not None:
            self.planned.lowmem.link = cpu_link(rate)
        micro_batch = config.train.micro_batch if plan is None else plan.micro_batch
        self.group = group or Group()
        self.split = split or Split(even_shares(config.train.batch, self.group.size), self.group.rank)
        joint = None
        if not self.group.alone:  # the executor runs the network then, with a plan or without
            if self.planned is None:
                self.planned = apply_plan(self.model, uniform([SAVE_ALL] * len(stage_names(self.model))))
            sync_bn = config.train.sync_bn
            joint = DataParallelStep(self.planned, self.group, self.split, execution.device, sync_bn=sync_bn)
        if self.planned is not None and not isinstance(model, ResNet):  # the family is held to it by tests
            check_same_forward(self.model, config.data.image_shape)
        run = self.planned or self.model
        scaler, clip_norm, smoothing = make_scaler(execution), config.optim.clip_norm, config.train.label_smoothing
        self.step = TrainStep(
            run, self.optimizer, scaler, execution, micro_batch, joint, clip_norm=clip_norm, label_smoothing=smoothing
        )
        self.batches = TrainBatches(
            dataset.train,
            seed=config.seed,
            batch=config.train.batch,
            augment=config.data.augment,
            mean=dataset.mean,
            std=dataset.std,
            device=execution.device,
            cutout=config.data.cutout,
            random_erasing=config.data.random_erasing,
            mixup=config.data.mixup,
        )
        self.state = RunState(processes=self.group.size)
        self.meter = Meter(execution.device)

    def lr(self, step: int) -> float:
        """The learning rate of the 0-based `step` of the run."""
        scheduled = learning_rate(self.config, self.batches.steps_per_epoch, step, low_start=self.state.low_start)
        return scheduled * self.state.lr_scale

    def next_batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, int, float]:
        """Images and labels of this process for a step, on the device, the size of the whole effective batch, and the
        share of the first of two labels."""
        size = self.batches.size(step)
        part = None if self.step.joint is None else self.step.joint.begin(size)
        layout = self.execution.torch_memory_format
        images, labels = self.batches.batch(epoch, step, memory_format=layout, part=part)
        return images, labels, size, self.batches.share(epoch, step)

    def evaluate(
        self, pictures: AnyPictures, size: int, should_stop: Callable[[int], bool] = lambda done: False
    ) -> Score | None:
        """`size` pictures at a time, with the running means of the weights, where the run has them. None if
        `should_stop` said so in between, which hears how many are done."""
        data, execution = self.dataset, self.execution
        layout = execution.torch_memory_format
        batches = eval_batches(pictures, size, data.mean, data.std, execution.device, layout)
        with mean_weights(self.optimizer):
            return evaluate(self.model, batches, execution, should_stop)

    def keep_alike(self, folder: RunFolder) -> None:
        """Before weights are saved: that all processes have the same. Cards of different kinds may round differently;
        then all go on with rank 0's, and its optimizer's. Raises RuntimeError on the CPU, where that is a fault."""
        if are_alike(self.group, self.model):
            return
        if self.execution.device == "cpu":
            raise RuntimeError(
                "the processes' weights have come apart, which is a fault of lowmem or of a machine; nothing of this "
                f"epoch was saved: go on from before it with `lowmem resume {folder.path}`"
            )
        shared = share_checkpoint(self.group, (self.checkpoint(), folder.path) if self.group.leads else None)
        assert shared is not None
        if not self.group.leads:
            self.restore(shared[0])
        said = "the processes' weights differed by rounding: all go on with those of process 0"
        self.observer.recorded_warning(folder, said, what="weights of the processes differed", step=self.state.step)

    def take(self, plan: Plan) -> None:
        """Goes on under another plan that computes the same (the ladder's: same micro-batch, precision, format)."""
        assert self.planned is not None
        self.planned.lowmem.set_schedule(plan.schedule)
        self.plan = plan

    def record_plans(self, folder: RunFolder) -> None:
        """Every process's plan as it is now, for a resume; what the disk refuses is written by the next `flush`."""
        for rank, plan in enumerate(self.group.gather(None if self.plan is None else self.plan.to_json())):
            if plan is not None:
                folder.update_plan(plan, rank)

    def begin_with(self, tensors: Mapping[str, Tensor], source: str) -> Placed:
        """Before the first step: weights that are not new (`lowmem.models.weights`). Raises PreflightError."""
        placed = place(tensors, self.model, source)
        restart_means(self.step.optimizer)
        return placed

    def checkpoint(self) -> Checkpoint:
        """The run as it is now, on the CPU."""
        return capture(self.state, self.model, self.step, self.identity, exact_settings(self.config))

    def restore(self, checkpoint: Checkpoint) -> RunState:
        """Puts all of a checkpoint back but its state, which it returns. Raises CorruptCheckpoint."""
        return restore(checkpoint, self.model, self.step, self.identity)


def identity_of(config: Config, dataset: Dataset) -> dict[str, str]:
    """What a run is of: its settings, its pictures, the names of its classes; a hash of each."""
    classes = hashlib.sha256(json.dumps(dataset.classes).encode()).hexdigest()
    return {"settings": config_hash(config), "data": dataset.fingerprint, "classes": classes}


def exact_settings(config: Config) -> dict[str, object]:
    """Those that decide what is computed, by dotted name."""
    return {key: value for key, value in flatten(config).items() if key not in OPERATIONAL}


def config_hash(config: Config) -> str:
    """SHA-256 of the settings that define what is computed: a checkpoint of another run is not taken for this one's.

    A setting that came later counts only where it is not what runs had before it: those stay the same runs."""
    exact = {k: value for k, value in exact_settings(config).items() if not (k in BEFORE and BEFORE[k] == value)}
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()


def cpu_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, on the CPU too: training goes on changing the original in place."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()  # the memory format is changed on the host, where there is room


def capture(
    state: RunState, model: nn.Module, step: TrainStep, identity: Mapping[str, str], settings: Mapping[str, object] = {}
) -> Checkpoint:
    """Everything a resume needs, copied: training may go on. `settings`: to tell by name what was changed since."""
    slots = {name: cpu_copy(tensor) for name, tensor in _slots(model, step).items()}
    run = asdict(replace(state, scaler=step.scaler.state_dict()))
    tensors = {name: cpu_copy(tensor) for name, tensor in model.state_dict().items()}
    saved = {"run": run, "identity": dict(identity), "settings": dict(settings)}
    return Checkpoint(step=state.step, model=tensors, optimizer=slots, state=saved)


@torch.no_grad()
def restore(checkpoint: Checkpoint, model: nn.Module, step: TrainStep, identity: Mapping[str, str]) -> RunState:
    """Puts a checkpoint back into the model and the step's optimizer and scaler, in their devices and memory formats.
    Raises CorruptCheckpoint if it is of other settings, other data or another network."""
    state, tensors, into = check_belongs(checkpoint, identity), checkpoint.model, model.state_dict()
    if odd := sorted(set(into) ^ set(tensors)):
        raise CorruptCheckpoint(
            f"the model of the checkpoint is another network's: {shorten(odd[0])!r} is on one side only"
        )
    for name, tensor in into.items():
        if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
            raise CorruptCheckpoint(
                f"{name} is {list(tensors[name].shape)} in the checkpoint and {list(tensor.shape)} in the network"
            )
        tensor.copy_(tensors[name])
    _restore_slots(checkpoint, model, step)
    if step.scaler.is_enabled() and state.scaler:
        step.scaler.load_state_dict(state.scaler)
    return state


def _slots(model: nn.Module, step: TrainStep) -> dict[str, Tensor]:
    """What the optimizer keeps, by slot and parameter; the mean of a parameter with several names under each of them,
    as the state dict has it."""
    first = dict(model.named_parameters())
    return {
        f"{slot}/{name}": value
        for name, parameter in model.named_parameters(remove_duplicate=False)
        for slot, value in step.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and (name in first or slot == EMA)
    }


def _restore_slots(checkpoint: Checkpoint, model: nn.Module, step: TrainStep) -> None:
    """In place. What is not kept any more is left out. Where a fork says that it changes the optimizer, a slot that the
    checkpoint has of no parameter begins anew; where it changes what is frozen, those of a parameter that was frozen
    do. Raises CorruptCheckpoint."""
    kept, saved = _slots(model, step), checkpoint.optimizer
    kinds, theirs = ({key.partition("/")[0] for key in slots} for slots in (kept, saved))
    frozen = {name for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad}
    trained, refrozen = {key.partition("/")[2] for key in saved}, bool(checkpoint.state.get(REFROZEN))
    # The first checkpoints of older versions have no momentum yet.
    anew = bool(checkpoint.state.get(ANOTHER_OPTIMIZER)) or not (saved or kinds - {"momentum_buffer"})
    for key in sorted(kept.keys() ^ saved.keys()):
        slot, _, name = key.partition("/")
        changed = refrozen and (name in frozen if key in saved else name not in trained)
        lost = slot not in theirs and not anew
        if (slot in kinds & theirs and not changed) or lost or slot not in SLOTS:
            here = f"the network has {counted(len(dict(model.named_parameters())), 'parameter')}"
            raise CorruptCheckpoint(f"the optimizer state {shorten(key)!r} is on one side only: {here}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in kept.items():
        slot, _, name = key.partition("/")
        found = saved.get(key, parameters[name] if slot == EMA else None)
        if found is None:
            tensor.zero_()
        elif found.shape != tensor.shape:
            raise CorruptCheckpoint(f"the optimizer state {shorten(key)!r} belongs to another network")
        else:
            tensor.copy_(found)


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What of it is evaluated and exported: the running means of the weights, where a run has them, and its buffers."""
    return {name: checkpoint.optimizer.get(f"{EMA}/{name}", tensor) for name, tensor in checkpoint.model.items()}


def check_belongs(checkpoint: Checkpoint, identity: Mapping[str, str]) -> RunState:
    """Its state. Raises CorruptCheckpoint unless that is a run's, and ForeignCheckpoint unless of just these settings
    and data (what `identity` names)."""
    state = read_state(checkpoint.state, checkpoint.step)
    recorded, head = checkpoint.state["identity"], f"the checkpoint of step {checkpoint.step} was made with other"
    ways_out = {
        "settings": "settings than config.yaml has now: put back what was changed there; settings are changed with "
        "`lowmem fork`",
        "data": "data than this run has now",
    }
    for key, value in identity.items():
        if recorded.get(key) != value and key in ways_out:  # the classes' names are said, not refused
            raise ForeignCheckpoint(f"{head} {ways_out[key]}")
    return state


def check_position(state: RunState, steps_per_epoch: int) -> None:
    """Raises CorruptCheckpoint for a place that a run of epochs of `steps_per_epoch` never comes to."""
    if state.step_in_epoch > steps_per_epoch or state.step != state.epoch * steps_per_epoch + state.step_in_epoch:
        raise CorruptCheckpoint(
            f"the checkpoint is at step {state.step}, which is not epoch {state.epoch} and "
            f"{counted(state.step_in_epoch, 'step')} of {steps_per_epoch} an epoch: restore the run's own "
            "files, or start another run"
        )


def share_checkpoint(group: Group, found: tuple[Checkpoint, Path] | None) -> tuple[Checkpoint, Path] | None:
    """What rank 0 has read, in every process: on other machines there may be no such files."""
    head = group.share(None if found is None else [found[0].step, dict(found[0].state), str(found[1])])
    if head is None:
        return None
    step, state, path = head
    mine = (None, None) if found is None else (found[0].model, found[0].optimizer)
    model, optimizer = map(group.share_tensors, mine)
    return Checkpoint(step, model, optimizer, state), Path(path)
