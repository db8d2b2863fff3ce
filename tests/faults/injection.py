"""Out of memory on demand: the real run, with a device that says no to one allocation."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.config.settings import Settings, to_yaml
from lowmem.data import Dataset, TrainBatches
from lowmem.models import build
from lowmem.plan.record import Plan
from lowmem.runs.store import RunFolder
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer

SMALLEST_BYTES = 2048  # less is not worth a failure of its own
UPDATE = "aten._fused_sgd_.default"


class Scarce(TorchDispatchMode):
    """While `armed` it counts what is allocated (`seen`), and raises out-of-memory, as the device would, at the counts
    in `fail_at`. It is disarmed by each failure and by the update."""

    def __init__(self, fail_at: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__()
        self.fail_at = set(fail_at)
        self.armed = False
        self.fail_update = False
        self.seen = 0
        self.failures = 0
        self.made: list[weakref.ref[torch.UntypedStorage]] = []  # up to the latest failure

    def arm(self) -> None:
        self.armed, self.seen = True, 0
        self.made.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func) == UPDATE:
            if self.armed and self.fail_update:
                self._fail(0)
            self.armed = False
        before = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        if self.armed:
            for leaf in tree_leaves(result):
                size = leaf.untyped_storage().nbytes() if isinstance(leaf, Tensor) else 0
                if size >= SMALLEST_BYTES and _storage(leaf) not in before:
                    self.seen += 1
                    if self.seen in self.fail_at:
                        self._fail(size)
                    self.made.append(weakref.ref(leaf.untyped_storage()))
        return result

    def _fail(self, size: int) -> None:
        self.armed = False
        self.failures += 1
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has no more.")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def scarce_step(trainer: Trainer, scarce: Scarce, step: int, failures: int = 1) -> Iterator[Scarce]:
    """The mode over a whole run, armed when the pictures of this step are fetched, as often as it is to fail."""
    fetch = trainer.batches.batch

    def batch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if trainer.state.step == step and scarce.failures < failures:
            scarce.arm()
        return fetch(*args, **kwargs)

    trainer.batches.batch = batch  # type: ignore[method-assign]
    with scarce:
        yield scarce


@contextmanager
def scarce_from(step: int, scarce: Scarce) -> Iterator[Scarce]:
    """For whole commands: from this step on (counted from the first, in this process) there is never enough memory."""
    fetch, steps = TrainBatches.batch, set[tuple[int, int]]()

    def batch(self: TrainBatches, epoch: int, at: int, **formats: Any) -> tuple[Tensor, Tensor]:
        steps.add((epoch, at))
        if len(steps) > step:
            scarce.arm()
        return fetch(self, epoch, at, **formats)

    TrainBatches.batch = batch  # type: ignore[method-assign]
    try:
        with scarce:
            yield scarce
    finally:
        TrainBatches.batch = fetch  # type: ignore[method-assign]


def make_trainer(settings: Settings, dataset: Dataset, plan: Plan | None) -> Trainer:
    """As the command makes it."""
    config = settings.config
    model = build(config.model.arch, width=config.model.width, num_classes=len(dataset.classes), seed=config.seed)
    return Trainer(config, model, dataset, Observer(), plan)


def run(path: Path, settings: Settings, trainer: Trainer, during: Callable[[Trainer], Any] | None = None) -> Path:
    """Trains in a new folder, inside of the context that `during` makes."""
    with RunFolder.create(path, to_yaml(settings), {}) as folder:
        if trainer.plan is not None:
            folder.write_plan(trainer.plan.to_json())
        if during is None:
            trainer.run(folder)
        else:
            with during(trainer):
                trainer.run(folder)
    return path


def events(path: Path, name: str) -> list[dict[str, Any]]:
    lines = (path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def recorded_plan(path: Path) -> Plan:
    return Plan.from_json(json.loads((path / "plan.json").read_text()))
