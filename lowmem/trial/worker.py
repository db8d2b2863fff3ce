"""What a trial's process does: model, optimizer, pictures on the device, training steps, evaluation; and the measuring
of it. Everything is built by the code that a run uses."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.config.optimization import OptimConfig
from lowmem.config.sources import SOURCE_SIDE
from lowmem.data import Pictures, TrainBatches, eval_batches
from lowmem.isolate import OUT_OF_MEMORY
from lowmem.measure import Meter
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.out_of_memory import Failure, classify
from lowmem.measure.tensors import TensorMeter
from lowmem.measure.timing import busy_seconds
from lowmem.models import build, make_network
from lowmem.models.resnet import check_memory_format
from lowmem.plan.record import Plan
from lowmem.remat import PlannedModule
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.remat.links import cpu_link
from lowmem.step.train_step import FUSED, Execution, TrainStep, evaluate, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo
from lowmem.trial import PLAIN, PLANNED, Trial, executed

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_LR = 0.01


def prepare() -> None:
    """Before trials are forked: this module is imported, and what the library itself imports when its first optimizer
    is made. Nothing is computed."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def work(values: dict[str, Any]) -> dict[str, Any]:
    """A `Trial`'s fields -> those of its result that are known, as JSON values; running out of memory is one."""
    try:
        return _Work(Trial(**values)).run()
    except (RuntimeError, MemoryError) as error:
        if classify(error, "trial") is None:
            raise
        return {"refused": OUT_OF_MEMORY, "out_of_memory": True}


def network(trial: Trial, execution: Execution) -> nn.Module:
    """On the trial's device, to be trained. Raises PreflightError."""
    model = make_network(trial.model, trial.num_classes, channels=trial.channels, seed=trial.seed, freeze=trial.freeze)
    check_memory_format(model, trial.device, execution.precision, execution.memory_format)
    model.to(device=trial.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
    return model.train()


def random_pictures(
    count: int,
    num_classes: int = 10,
    seed: int = 0,
    *,
    size: int = SOURCE_SIDE,
    side: int | None = None,
    channels: int = 3,
) -> Pictures:
    """`count` pictures of noise, `side` (None: `size`) pixels wide and high, which are `size` as a batch."""
    side = side or size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    return Pictures(images, torch.arange(count) % num_classes, enlarged_to=size)


class _Work:
    """One trial in this process."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.cuda = trial.device == "cuda"
        self.wait: Callable[[], object] = torch.cuda.synchronize if self.cuda else lambda: None
        prepare_libraries(Numerics(trial.deterministic, trial.tf32))
        # Before CUDA is first used: what the card is fuller by since then is this process's, the context included.
        self.meter = Meter(trial.device)
        self.capped = self.cuda and trial.cap_bytes is not None and cap_allocator(trial.cap_bytes)
        self.resident_bytes = None if self.cuda else self._resident()
        self.execution = Execution(trial.device, trial.precision, trial.memory_format)
        self.model = network(trial, self.execution)
        form = FUSED if trial.fused else {}
        optim = OptimConfig(**trial.optim)
        self.optimizer = make_optimizer(self.model, optim, trial.device, form)
        # As many as the run holds on the device; on the CPU, where they count for nothing, a batch.
        count = max(trial.batch, trial.pictures if self.cuda else 0)
        self.pictures = random_pictures(
            count, trial.num_classes, trial.seed, size=trial.image_size, side=trial.stored_side, channels=trial.channels
        )
        self.mean, self.std = MEAN[: trial.channels], STD[: trial.channels]
        reserved = torch.cuda.memory_reserved() if self.cuda else 0
        self.batches = TrainBatches(
            self.pictures,
            seed=0,
            batch=trial.batch,
            augment=True,
            mean=self.mean,
            std=self.std,
            device=trial.device,
            mixup=trial.mixup,
        )
        self.beside_reserved_bytes = torch.cuda.memory_reserved() - reserved if self.cuda else 0
        plan = None if trial.plan is None else Plan.from_json(trial.plan)
        run, micro_batch = executed(self.model, trial.way, plan), None if plan is None else plan.micro_batch
        if isinstance(run, PlannedModule) and trial.link_bytes_per_second is not None:
            run.lowmem.link = cpu_link(trial.link_bytes_per_second)
        scaler, execution = make_scaler(self.execution), self.execution
        self.step = TrainStep(run, self.optimizer, scaler, execution, micro_batch, clip_norm=optim.clip_norm)
        self.step.label_smoothing = trial.label_smoothing
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

    def run(self) -> dict[str, Any]:
        for _ in range(self.trial.warmup):
            self._timed_step()
        found = self._train()
        now = self.meter.read()  # with all that training has made the allocator hold
        own = now.process_bytes if self.cuda else now.device_used_bytes
        if own is None and now.context_bytes is not None and now.reserved_bytes is not None:
            own = now.context_bytes + now.reserved_bytes
        found |= {"device_used_bytes": own, "context_bytes": now.context_bytes if self.cuda else None}
        if self.trial.eval_batch is not None:
            found |= self._peaks("eval_", self._evaluation(self.trial.eval_batch))
        if self.trial.detailed:
            found |= self.seen
            if self.cuda:  # in steps of their own: nothing else may slow the timed ones down
                batch = self._batch()
                with TensorMeter() as meter:
                    self._step(*batch)
                found["flops"] = meter.flops
                # What others are held against; a plan at the edge of its budget has no room for a profiler. It slows
                # the host down, not the kernels.
                if self.trial.way == PLAIN:
                    busy = busy_seconds(lambda: self._step(*batch), self.trial.device)
                    found["busy_share"] = None if busy is None else min(1.0, busy / found["step_seconds"])
        if self.cuda:  # last: whatever is computed afterwards makes them again
            allocated = torch.cuda.memory_allocated()
            torch._C._cuda_clearCublasWorkspaces()
            found["blas_workspace_bytes"] = allocated - torch.cuda.memory_allocated()
        finite = all(math.isfinite(loss) for loss in self.losses)
        return {**found, "capped": self.capped, "finite": finite, "losses": self.losses}

    def _train(self) -> dict[str, Any]:
        """Timed steps, and the peaks of training: on the CPU those of one more step, for the meter slows it down."""
        seconds: list[float] = []

        def steps() -> None:
            seconds.extend(self._timed_step() for _ in range(self.trial.steps))

        if self.cuda:
            images, labels = self._batch()
            standing = sum(tensor.nbytes for tensor in (*self._standing(), images, labels))
            self.beside_bytes = max(0, torch.cuda.memory_allocated() - standing)
            del images, labels
            before = torch.cuda.memory_stats().get("num_alloc_retries", 0)
            found = self._peaks("", steps)
            retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) - before
            found |= {"beside_bytes": self.beside_bytes, "alloc_retries": int(retries)}
        else:
            steps()
            peak = self.meter.read().device_used_bytes
            batch = self._batch()
            found = self._peaks("", lambda: self._step(*batch), batch)
            if peak is not None and self.resident_bytes is not None:
                found["resident_growth_bytes"] = peak - self.resident_bytes
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        return {**found, "step_seconds": middle, "least_seconds": least, "most_seconds": most}

    def _peaks(self, kind: str, do: Callable[[], object], given: Iterable[Tensor] = ()) -> dict[str, Any]:
        """Of what is done, with what exists all through a steady step and what is `given`; on the CPU of a detailed
        training step its operations too."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            do()
            return {
                f"{kind}peak_allocated_bytes": torch.cuda.max_memory_allocated() - self.beside_bytes,
                f"{kind}peak_reserved_bytes": torch.cuda.max_memory_reserved() - self.beside_reserved_bytes,
            }
        meter = TensorMeter()
        meter.adopt((*self._standing(), *given))
        with meter:
            do()
        flops = {"flops": meter.flops} if self.trial.detailed and not kind else {}
        return {f"{kind}peak_allocated_bytes": meter.peak_bytes, **flops}

    def _standing(self) -> list[Tensor]:
        copies = self.undo.copies if self.undo is not None else []
        return [*self.model.parameters(), *self.model.buffers(), *optimizer_tensors(self.optimizer), *copies]

    def _evaluation(self, size: int) -> Callable[[], object]:
        """The run's own, of a batch or two."""
        there = len(self.pictures)
        pictures = self.pictures.take(np.arange(min(2 * size, max(size, there))) % there)
        place, layout = self.trial.device, self.execution.torch_memory_format
        return lambda: evaluate(
            self.model, eval_batches(pictures, size, self.mean, self.std, place, layout), self.execution
        )

    def _batch(self) -> tuple[Tensor, Tensor]:
        epoch, step = divmod(len(self.losses), self.batches.steps_per_epoch)
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

    def _timed_step(self) -> float:
        images, labels = self._batch()
        self.wait()
        began = time.perf_counter()
        totals = self._step(images, labels)
        self.wait()
        seconds = time.perf_counter() - began
        self.losses.append(float(totals[0]) / self.trial.batch)
        return seconds


def _digest(tensors: Iterable[Tensor]) -> str:
    """The same for the same values in any memory format."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
