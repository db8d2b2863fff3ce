"""One way of doing a training step, in a process of its own: `engine_cpu.py` starts it and reads its lines of JSON.

Peaks are those of real tensors. The tracker of storages is independent of `lowmem.simulate`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lowmem.config.optimization import OptimConfig
from lowmem.config.schema import ModelConfig
from lowmem.measure import Meter
from lowmem.measure.out_of_memory import Failure
from lowmem.measure.tensors import TensorMeter
from lowmem.models import build, make_network
from lowmem.models.resnet import check_memory_format
from lowmem.plan.policy import Schedule
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo
from lowmem.trial import PLANNED, executed

WARMUP = 2
_LR = 0.01


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker does: a way, or the engine with a schedule, on a network."""

    way: str
    network: dict[str, Any]  # fields of a ModelConfig
    image_size: int
    batch: int
    memory_format: str
    schedule: list[Any] | None = None

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**self.network)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.memory_format == "channels-last" else torch.contiguous_format


def way_of(model: nn.Module, task: Task) -> nn.Module:
    """What runs the step."""
    if task.schedule is not None:
        return executed(model, PLANNED, Schedule.from_json(task.schedule))
    return executed(model, task.way)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated_peak(recording: profile) -> int:
    """The most that the allocator gave out at once, above what it had given before."""
    assert recording.profiler is not None
    events = recording.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), index, event.nbytes()) for index, event in enumerate(events) if is_memory(event)
    )
    return max(accumulate(change for _, _, change in changes), default=0)


def is_memory(event: Any) -> bool:
    return event.name() == "[memory]"


def load_library() -> None:
    """A small step, so that code which is loaded at first use does not count as the network's memory."""
    model = build("res20", "basic", width=8)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.zeros(2, dtype=torch.int64)).backward()
    make_optimizer(model, OptimConfig(), "cpu").step()


class Worker:
    """One way in this process."""

    def __init__(self, task: Task) -> None:
        load_library()
        self.meter = Meter("cpu")
        self.meter.reset()
        self.before = self.meter.read().device_used_bytes
        model = make_network(task.model, seed=0).train()
        check_memory_format(model, "cpu", "fp32", task.memory_format)
        self.model = model.to(memory_format=task.torch_memory_format)  # type: ignore[call-overload]
        execution = Execution("cpu", "fp32", task.memory_format)
        self.optimizer = make_optimizer(self.model, OptimConfig(), "cpu")
        run = way_of(self.model, task)
        self.train_step = TrainStep(run, self.optimizer, make_scaler(execution), execution, None)
        # As in a run: what undoes a planned step is in the prediction.
        self.undo = None if task.schedule is None else Undo(self.train_step, self.model)
        images = torch.randn(task.batch, *task.image_shape, generator=torch.Generator().manual_seed(0))
        self.images = images.contiguous(memory_format=task.torch_memory_format)
        self.labels = torch.arange(task.batch) % 10
        self.loss = 0.0
        torch.manual_seed(0)  # of dropout

    def step(self) -> None:
        """One training step."""

        def work() -> Tensor:
            return self.train_step(self.images, self.labels, _LR)

        totals = work() if self.undo is None else self.undo.attempt(work)
        if isinstance(totals, Failure):
            raise MemoryError(totals.message)
        self.loss = totals[0].item() / len(self.labels)

    def standing(self) -> list[Tensor]:
        """What exists all through a steady step."""
        copies = self.undo.copies if self.undo is not None else []
        network = (*self.model.parameters(), *self.model.buffers())
        return [*network, *optimizer_tensors(self.optimizer), *copies, self.images, self.labels]

    def memory(self) -> dict[str, int | None]:
        """Resident growth over the steps so far, then one step under both trackers."""
        after = self.meter.read().device_used_bytes
        standing = bytes_of(self.standing())
        tracker = TensorMeter()
        tracker.adopt(self.standing())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording, tracker:
            self.step()
        return {
            "resident_bytes": None if after is None or self.before is None else after - self.before,
            "peak_tensor_bytes": tracker.peak_bytes,
            "peak_allocator_bytes": standing + allocated_peak(recording),
        }

    def timed(self) -> dict[str, float]:
        """One step: seconds on the clock and of this process's CPU time."""
        began, cpu_began = time.perf_counter(), time.process_time()
        self.step()
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu_began,
            "loss": self.loss,
        }


def work(task: Task) -> None:
    """Reports memory, then does a timed step for every line it is given."""
    worker = Worker(task)
    for _ in range(WARMUP):
        worker.step()
    print(json.dumps(worker.memory()), flush=True)
    for _ in sys.stdin:
        print(json.dumps(worker.timed()), flush=True)


if __name__ == "__main__":
    work(Task(**json.loads(sys.argv[1])))
