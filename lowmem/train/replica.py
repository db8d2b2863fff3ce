"""`Replica`: the network of a run in this process, and all that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

from lowmem.config.schema import Config
from lowmem.data import Dataset, Pictures, TrainBatches, eval_batches
from lowmem.distributed.group import Group
from lowmem.distributed.split import Split, even_shares
from lowmem.measure import Meter
from lowmem.models.resnet import check_memory_format
from lowmem.plan.policy import SAVE_ALL, uniform
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan, stage_names
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.store import RunFolder
from lowmem.step.data_parallel import DataParallelStep, are_alike
from lowmem.step.train_step import Execution, Sums, TrainStep, evaluate, make_optimizer, make_scaler, optimizer_tensors
from lowmem.train.observer import Observer
from lowmem.train.schedule import learning_rate
from lowmem.train.state import capture, restore, share_checkpoint


class Replica:
    """Network, optimizer, step, batches, plan and state of a run in this process: one of the group's that train it, all
    alike."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        dataset: Dataset,
        execution: Execution,
        identity: dict[str, str],
        observer: Observer,
        plan: Plan | None = None,
        group: Group | None = None,
        split: Split | None = None,
    ) -> None:
        """`plan`: for this process's share of the batch. `group`: the processes that train the run; `split`: of the
        batch among them (None: even)."""
        self.config = config
        self.plan = plan
        self.execution = execution
        self.identity = identity
        self.observer = observer
        self.dataset = dataset
        check_memory_format(model, execution.device, execution.precision, execution.memory_format)
        self.model = model.to(device=execution.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = make_optimizer(self.model, config.optim, execution.device)
        # Shares every parameter and buffer with the model, which evaluation runs as it is: without gradients there is
        # nothing to keep.
        self.planned = None if plan is None else apply_plan(self.model, plan)
        micro_batch = config.train.micro_batch if plan is None else plan.micro_batch
        self.group = group or Group()
        joint = None if self.group.alone else self._join(split)
        run = self.planned or self.model
        self.step = TrainStep(run, self.optimizer, make_scaler(execution), execution, micro_batch, joint)
        self.batches = TrainBatches(
            dataset.train,
            seed=config.seed,
            batch=config.train.batch,
            augment=config.data.augment,
            mean=dataset.mean,
            std=dataset.std,
            device=execution.device,
        )
        self.state = RunState(processes=self.group.size)
        self.meter = Meter(execution.device)

    def _join(self, split: Split | None) -> DataParallelStep:
        """The step's dealings with the other processes; the executor runs the network then, with a plan or without."""
        group, config = self.group, self.config.train
        split = split or Split(even_shares(config.batch, group.size), group.rank)
        if self.planned is None:
            self.planned = apply_plan(self.model, uniform([SAVE_ALL] * len(stage_names(self.model))))
        return DataParallelStep(self.planned, group, split, self.execution.device, sync_bn=config.sync_bn)

    def lr(self, step: int) -> float:
        """The learning rate of the 0-based `step` of the run."""
        scheduled = learning_rate(self.config, self.batches.steps_per_epoch, step, low_start=self.state.low_start)
        return scheduled * self.state.lr_scale

    def next_batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, int]:
        """Images and labels of this process for a step, on the device, and the size of the whole effective batch."""
        size = self.batches.size(step)
        part = None if self.step.joint is None else self.step.joint.begin(size)
        layout = self.execution.torch_memory_format
        images, labels = self.batches.batch(epoch, step, memory_format=layout, part=part)
        return images, labels, size

    def part_of(self, pictures: Pictures) -> Pictures:
        """Those that this process evaluates."""
        if self.step.joint is None:
            return pictures
        first, past = self.step.joint.split.part(len(pictures))
        return Pictures(pictures.images[first:past], pictures.labels[first:past])

    def evaluate(self, pictures: Pictures, size: int, should_stop: Callable[[], bool] = lambda: False) -> Sums | None:
        """`size` pictures at a time. None if `should_stop` said so in between."""
        data, execution = self.dataset, self.execution
        layout = execution.torch_memory_format
        batches = eval_batches(pictures, size, data.mean, data.std, execution.device, layout)
        return evaluate(self.model, batches, execution, should_stop)

    def standing_tensors(self) -> Iterator[Tensor]:
        """Parameters, buffers and momentum: what is there between two steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from optimizer_tensors(self.optimizer)

    def keep_alike(self, folder: RunFolder) -> None:
        """Before weights are saved: that all processes have the same. Cards of different kinds may round differently;
        then all go on with rank 0's. Raises RuntimeError on the CPU, where that is a fault."""
        if are_alike(self.group, self.model):
            return
        if self.execution.device == "cpu":
            raise RuntimeError(
                "the processes' weights have come apart, which is a fault of lowmem or of a machine; nothing of this "
                f"epoch was saved: go on from before it with `lowmem resume {folder.path}`"
            )
        self.take_over_from_rank_0()
        folder.event("warning", what="weights of the processes differed", step=self.state.step)
        self.observer.warning("the processes' weights differed by rounding: all go on with those of process 0")

    def take_over_from_rank_0(self) -> None:
        """Weights, statistics and momentum of all processes become rank 0's."""
        shared = share_checkpoint(self.group, (self.checkpoint(), Path()) if self.group.leads else None)
        assert shared is not None
        if not self.group.leads:
            self.restore(shared[0])

    def take(self, plan: Plan) -> None:
        """Goes on under another plan that computes the same (the ladder's: same micro-batch, precision, format)."""
        assert self.planned is not None
        self.planned.set_schedule(plan.schedule)
        self.plan = plan

    def checkpoint(self) -> Checkpoint:
        """The run as it is now, on the CPU."""
        return capture(self.state, self.model, self.optimizer, self.step.scaler, self.identity)

    def restore(self, checkpoint: Checkpoint) -> RunState:
        """Puts all of a checkpoint back but its state, which it returns. Raises CorruptCheckpoint."""
        return restore(checkpoint, self.model, self.optimizer, self.step.scaler, self.identity)
