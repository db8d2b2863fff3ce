"""A trained network run as evaluation in training runs it: in its precision and memory format, and in its batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lowmem.choose.execution import numerics_of
from lowmem.config.schema import Config
from lowmem.core.errors import OutOfMemory
from lowmem.distributed.group import Split, even_shares
from lowmem.inference.loading import LoadedRun
from lowmem.measure.out_of_memory import Failure, halving
from lowmem.plan.record import Plan
from lowmem.remat.libraries import prepare_libraries
from lowmem.runs.store import plan_file
from lowmem.runs.view import RunView
from lowmem.step.train_step import Execution
from lowmem.train.observer import Observer
from lowmem.train.oom_fallback import evaluates_fewer, evaluation_batch

T = TypeVar("T")
_ALONE_BATCH = 64  # of weights by themselves, which tell of no plan


def prepare_execution(run: LoadedRun) -> Execution:
    """How the run was evaluated in training, with network and libraries made ready for it; on another type of device,
    and of weights by themselves, plain fp32."""
    train, device = None if run.config is None else run.config.train, run.device.type
    if train is None or train.device != device:
        return Execution(device, "fp32", "contiguous")
    prepare_libraries(numerics_of(train))
    execution = Execution(device, train.precision, train.memory_format)
    run.model.to(memory_format=execution.torch_memory_format)
    return execution


def evaluation_parts(run: RunView, config: Config, count: int) -> list[tuple[int, int, int]]:
    """Of `count` pictures the [first, past) that each process of the run evaluated, and how many at a time, within the
    memory that it was planned for: the last digits of a sum depend on both. Raises CorruptCheckpoint."""
    plan = Plan.read(run.path / plan_file(0))
    told = [event.detail.get("processes") for event in run.events if event.kind in ("start", "resume")]
    size = told[-1] if told and isinstance(told[-1], int) and told[-1] > 0 else 1
    split = Split(plan.shares if plan else even_shares(config.train.batch, size))
    plans = [plan, *(Plan.read(run.path / plan_file(rank)) or plan for rank in range(1, len(split.shares)))]
    return [(*split.part(count, rank), evaluation_batch(config.train, one)) for rank, one in enumerate(plans)]


def batch_of(path: Path, config: Config | None) -> int:
    """Pictures at a time, of the network of a run or of a file of weights. Raises CorruptCheckpoint."""
    return _ALONE_BATCH if config is None else evaluation_batch(config.train, Plan.read(path / plan_file(0)))


def within_memory(work: Callable[[int], T], size: int, tell: Observer) -> tuple[T, int]:
    """`work(size)`, with fewer at a time where memory runs out; and with how many. Raises OutOfMemory."""

    def halved(failure: Failure, half: int) -> None:
        tell.warning(evaluates_fewer(failure, half))

    result = halving(lambda size: (work(size), size), size, "evaluation", halved)
    if isinstance(result, Failure):
        way_out = "free what others use, or give --device cpu"
        raise OutOfMemory(f"{result.words} ({result.message}), of one picture at a time: {way_out}")
    return result
