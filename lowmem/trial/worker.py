"""What a trial's process does: model, optimizer, pictures on the device, training steps, evaluation; and the measuring
of it. Everything is built by the code that a run uses."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem.config.schema import OptimConfig
from lowmem.data import Pictures, TrainBatches, eval_batches
from lowmem.isolate import OUT_OF_MEMORY
from lowmem.measure import Meter
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.out_of_memory import Failure, classify
from lowmem.measure.tensors import TensorMeter
from lowmem.measure.timing import busy_seconds
from lowmem.models import build
from lowmem.models.resnet import check_memory_format
from lowmem.plan.record import Plan
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.step.train_step import FUSED, Execution, TrainStep, evaluate, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo
from lowmem.trial.trial import Trial
from lowmem.trial.ways import PLAIN, PLANNED, executed

_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_LR = 0.01


def prepare() -> None:
    """Before trials are forked: this module is imported, and what the library itself imports when its first optimizer
    is made. Nothing is computed."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def work_apart(values: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: `work` of a trial's fields."""
    return work(Trial(**values))


def work(trial: Trial) -> dict[str, Any]:
    """The trial's result as JSON values; running out of memory is one."""
    try:
        return _Work(trial).run()
    except (RuntimeError, MemoryError) as error:
        if classify(error, "trial") is None:
            raise
        return {"refused": OUT_OF_MEMORY, "out_of_memory": True}


class _Work:
    """One trial in this process."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.cuda = trial.device == "cuda"
        prepare_libraries(Numerics(trial.deterministic, trial.tf32))
        # Before CUDA is first used: what the card is fuller by since then is this process's, the context included.
        self.meter = Meter(trial.device)
        self.capped = self.cuda and trial.cap_bytes is not None and cap_allocator(trial.cap_bytes)
        self.execution = Execution(trial.device, trial.precision, trial.memory_format)
        self.resident_bytes = None if self.cuda else self._resident()
        model = build(trial.arch, trial.block, width=trial.width, num_classes=trial.num_classes, seed=trial.seed)
        check_memory_format(model, trial.device, trial.precision, trial.memory_format)
        self.model = model.to(device=trial.device, memory_format=self.execution.torch_memory_format)  # type: ignore[call-overload]
        self.model.train()
        optim = OptimConfig(momentum=trial.momentum, weight_decay=trial.weight_decay, nesterov=trial.nesterov)
        self.optimizer = self._optimizer(optim)
        self.pictures = self._pictures()
        reserved = torch.cuda.memory_reserved() if self.cuda else 0
        self.batches = TrainBatches(
            self.pictures, seed=0, batch=trial.batch, augment=True, mean=_MEAN, std=_STD, device=trial.device
        )
        self.beside_reserved_bytes = torch.cuda.memory_reserved() - reserved if self.cuda else 0
        plan = None if trial.plan is None else Plan.from_json(trial.plan)
        micro_batch = trial.micro_batch if plan is None else plan.micro_batch
        run = executed(self.model, trial.way, plan)
        self.step = TrainStep(run, self.optimizer, make_scaler(self.execution), self.execution, micro_batch)
        # What a planned run keeps to undo a step is in the prediction; what it is compared with has none.
        self.undo = Undo(self.step, self.model) if trial.way == PLANNED else None
        self.losses: list[float] = []
        self.seen: dict[str, Any] = {}

    def _resident(self) -> int | None:
        """Of this process now, with the library's code for a step loaded; its peak starts anew."""
        small = build("res20", "basic", width=4)
        F.cross_entropy(small(torch.zeros(2, 3, 32, 32)), torch.zeros(2, dtype=torch.int64)).backward()
        make_optimizer(small, OptimConfig(), "cpu").step()
        del small
        self.meter.reset()
        return self.meter.read().process_bytes

    def _optimizer(self, optim: OptimConfig) -> torch.optim.SGD:
        return make_optimizer(self.model, optim, self.trial.device, FUSED if self.trial.optimizer == "fused" else {})

    def _pictures(self) -> Pictures:
        """Random, as many as the run holds on the device; on the CPU, where they count for nothing, a batch."""
        count = max(self.trial.batch, self.trial.pictures if self.cuda else 0)
        generator = torch.Generator().manual_seed(self.trial.seed)
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Pictures(images, torch.arange(count) % self.trial.num_classes)

    def run(self) -> dict[str, Any]:
        found: dict[str, Any] = {"capped": self.capped}
        for _ in range(self.trial.warmup):
            self._timed_step()
        found |= self._train_on_cuda() if self.cuda else self._train_on_cpu()
        found |= self._on_the_device()
        if self.trial.eval_batch is not None:
            found |= self._evaluate(self.trial.eval_batch)
        if self.trial.detailed:
            found |= self.seen
            if self.cuda:
                found["flops"] = self._count_operations()
                # What others are held against; a plan at the edge of its budget has no room for a profiler.
                if self.trial.way == PLAIN:
                    found["busy_share"] = self._busy_share(found["step_seconds"])
        if self.cuda:  # last: whatever is computed afterwards makes them again
            allocated = torch.cuda.memory_allocated()
            torch._C._cuda_clearCublasWorkspaces()
            found["blas_workspace_bytes"] = allocated - torch.cuda.memory_allocated()
        found["finite"] = all(math.isfinite(loss) for loss in self.losses)
        found["losses"] = self.losses
        return found

    def _on_the_device(self) -> dict[str, int | None]:
        """After training, with all that it has made the allocator hold."""
        now = self.meter.read()
        if not self.cuda:
            return {"device_used_bytes": now.device_used_bytes}
        own = now.process_bytes
        if own is None and now.context_bytes is not None and now.reserved_bytes is not None:
            own = now.context_bytes + now.reserved_bytes
        return {"device_used_bytes": own, "context_bytes": now.context_bytes}

    # -- training ------------------------------------------------------------------------------------------------------

    def _batch(self) -> tuple[Tensor, Tensor]:
        number = len(self.losses)
        epoch, step = divmod(number, self.batches.steps_per_epoch)
        if step == self.batches.steps_per_epoch - 1 and step > 0:
            step = 0  # the epoch's last batch may be a smaller one
        return self.batches.batch(epoch, step, memory_format=self.execution.torch_memory_format)

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        look = self._look if self.trial.detailed and not self.losses else None
        if self.undo is None:
            return self.step(images, labels, _LR, look)
        totals = self.undo.attempt(lambda: self.step(images, labels, _LR, look))
        if isinstance(totals, Failure):
            raise MemoryError(totals.message)
        return totals

    def _look(self) -> None:
        """Between backward and update, where the optimizer's form can make no difference yet."""
        gradients = (parameter.grad for parameter in self.model.parameters())
        counts = [int(one) for name, one in self.model.named_buffers() if name.endswith("num_batches_tracked")]
        self.seen = {
            "gradients": _digest(one for one in gradients if one is not None),
            "buffers": _digest(self.model.buffers()),
            "norm_updates": max(counts, default=None),
        }

    def _count_operations(self) -> int:
        """In a step of its own: on a card nothing else may slow the timed ones down."""
        images, labels = self._batch()
        with TensorMeter() as meter:
            self._step(images, labels)
        return meter.flops

    def _busy_share(self, step_seconds: float) -> float | None:
        """Of a step as it was timed: profiling slows the host down, not the kernels."""
        images, labels = self._batch()
        seconds = busy_seconds(lambda: self._step(images, labels), self.trial.device)
        return None if seconds is None else min(1.0, seconds / step_seconds)

    def _timed_step(self) -> float:
        images, labels = self._batch()
        self._wait()
        began = time.perf_counter()
        totals = self._step(images, labels)
        self._wait()
        seconds = time.perf_counter() - began
        self.losses.append(float(totals[0]) / self.trial.batch)
        return seconds

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _timed_steps(self) -> dict[str, float]:
        seconds = [self._timed_step() for _ in range(self.trial.steps)]
        return {
            "step_seconds": statistics.median(seconds),
            "least_seconds": min(seconds),
            "most_seconds": max(seconds),
        }

    def _train_on_cpu(self) -> dict[str, Any]:
        """Timed steps first: the meter slows them down."""
        timed: dict[str, Any] = self._timed_steps()
        peak = self.meter.read().device_used_bytes
        grown = None if peak is None or self.resident_bytes is None else peak - self.resident_bytes
        images, labels = self._batch()
        meter = TensorMeter()
        meter.adopt((*self._standing(), images, labels))
        with meter:
            self._step(images, labels)
        if self.trial.detailed:
            timed["flops"] = meter.flops
        return {**timed, "peak_allocated_bytes": meter.peak_bytes, "resident_growth_bytes": grown}

    def _train_on_cuda(self) -> dict[str, Any]:
        images, labels = self._batch()
        self.beside_bytes = max(0, torch.cuda.memory_allocated() - _bytes_of((*self._standing(), images, labels)))
        del images, labels
        retries = _retries()
        torch.cuda.reset_peak_memory_stats()
        timed = self._timed_steps()
        return {
            **timed,
            "beside_bytes": self.beside_bytes,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() - self.beside_bytes,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() - self.beside_reserved_bytes,
            "alloc_retries": _retries() - retries,
        }

    def _standing(self) -> list[Tensor]:
        """What exists all through a steady step."""
        copies = self.undo.copies if self.undo is not None else []
        return [*self.model.parameters(), *self.model.buffers(), *optimizer_tensors(self.optimizer), *copies]

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self, size: int) -> dict[str, Any]:
        """Two batches of the run's own evaluation."""
        some = self.pictures.images[: 2 * size]
        while some.shape[0] < size:
            some = torch.cat((some, some))[: 2 * size]
        pictures = Pictures(some.contiguous(), torch.zeros(some.shape[0], dtype=torch.int64))
        place, layout = self.trial.device, self.execution.torch_memory_format
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            evaluate(self.model, eval_batches(pictures, size, _MEAN, _STD, place, layout), self.execution)
            return {
                "eval_peak_allocated_bytes": torch.cuda.max_memory_allocated() - self.beside_bytes,
                "eval_peak_reserved_bytes": torch.cuda.max_memory_reserved() - self.beside_reserved_bytes,
            }
        meter = TensorMeter()
        meter.adopt(self._standing())
        with meter:
            evaluate(self.model, eval_batches(pictures, size, _MEAN, _STD, place, layout), self.execution)
        return {"eval_peak_allocated_bytes": meter.peak_bytes}


def _digest(tensors: Iterable[Tensor]) -> str:
    """The same for the same values in any memory format."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _retries() -> int:
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
