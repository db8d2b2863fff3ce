"""One process of `benchmarks.scaling`: trains some steps and writes what it measured (rank 0, of all)."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lowmem.choose.request import card_rates
from lowmem.config.cards import load_card
from lowmem.config.schema import Config
from lowmem.data import Dataset, Pictures
from lowmem.distributed.group import Group, Split, even_shares, join
from lowmem.distributed.launch import Launch
from lowmem.measure.tensors import TensorMeter
from lowmem.models import build, skeleton
from lowmem.plan.policy import SAVE_ALL, uniform
from lowmem.plan.record import Plan
from lowmem.remat import stage_names
from lowmem.simulate import StepShape, simulate_step
from lowmem.step.train_step import make_optimizer
from lowmem.step.undo import Undo
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer

WARM_UP = 2


def noise(pictures: int) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (pictures, 3, 32, 32), generator=generator, dtype=torch.uint8)
    train = Pictures(images, torch.arange(pictures) % 10)
    classes = tuple(str(one) for one in range(10))
    return Dataset("noise", classes, train, None, train, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), "noise")


class Waiting:
    """Adds up the seconds in some of an object's methods."""

    def __init__(self, owner: Any, *names: str) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def lowmem_steps(group: Group, job: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """As a run makes them, everything kept."""
    batch, sync_bn = job["batch"], job["way"].endswith("--sync-bn")
    model = {"arch": job["arch"], "block": job["block"], "width": job["width"]}
    train = {"batch": batch, "device": "cpu", "sync_bn": sync_bn, "precision": "fp32", "memory_format": "contiguous"}
    config = Config.model_validate({"model": model, "train": train})
    shares = even_shares(batch, group.size)
    share, schedule = shares[group.rank], uniform([SAVE_ALL] * len(stage_names(skeleton(**_named(job)))))
    plan = Plan(
        budget_bytes=None, batch=share, micro_batch=share, accumulation=1, precision="fp32",
        memory_format="contiguous", exact=True, stages=stage_names(skeleton(**_named(job))), schedule=schedule,
        shares=shares,
    )  # fmt: skip
    net = build(**_named(job), num_classes=10, seed=0)
    t = Trainer(config, net, data, Observer(), plan, group, Split(shares, group.rank))
    shape = StepShape(
        model=skeleton(**_named(job), num_classes=10), image_shape=(3, 32, 32), batch=share, micro_batch=share,
        precision="fp32", memory_format="contiguous", joint=group.size > 1, sync_bn=sync_bn,
    )  # fmt: skip
    rates = card_rates(load_card("gtx1060-6g"))("fp32")
    predicted = simulate_step(shape, schedule, rates).estimate.peak_tensor_bytes
    undo = Undo(t.step, t.model)
    waiting = None if t.step.joint is None else Waiting(t.step.joint, "finish", "agree")

    def step(number: int) -> None:
        images, labels, size, _ = t.next_batch(0, number)
        undo.attempt(lambda: t.step(images, labels, 0.1, None, size))

    figures = timed(job["steps"], step, waiting)
    state = [slots["momentum_buffer"] for slots in t.optimizer.state.values()]
    meter, (images, labels, size, _) = TensorMeter(), t.next_batch(0, 0)
    meter.adopt((*t.model.parameters(), *t.model.buffers(), *state, *undo.copies, images, labels))
    with meter:
        t.step(images, labels, 0.1, None, size)
    return {**figures, "peak_bytes": meter.peak_bytes, "predicted_peak_bytes": predicted}


def library_steps(group: Group, job: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """The untouched model in torch's wrapper, with the same optimizer."""
    net = build(**_named(job), num_classes=10, seed=0)
    model = DistributedDataParallel(net)
    optimizer = make_optimizer(net, Config().optim, "cpu")
    split = Split(even_shares(job["batch"], group.size), group.rank)
    first, past = split.part(job["batch"])
    images = data.train.images[first:past].float().sub_(127).div_(80)
    labels = data.train.labels[first:past]

    def step(number: int) -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    figures = timed(job["steps"], step, None)
    state: list[Tensor] = [slots["momentum_buffer"] for slots in optimizer.state.values()]
    meter = TensorMeter()
    meter.adopt((*net.parameters(), *net.buffers(), *state, images, labels))
    with meter:
        step(0)
    return {**figures, "peak_bytes": meter.peak_bytes, "predicted_peak_bytes": None}


def _named(job: dict[str, Any]) -> dict[str, Any]:
    return {key: job[key] for key in ("arch", "block", "width")}


def timed(steps: int, step: Any, waiting: Waiting | None) -> dict[str, Any]:
    """Median seconds of a step, and the share of it that was waited."""
    seconds, waited = [], []
    for number in range(WARM_UP + steps):
        before, began = 0.0 if waiting is None else waiting.seconds, time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
        waited.append(0.0 if waiting is None else (waiting.seconds - before) / seconds[-1])
    return {
        "step_seconds": statistics.median(seconds[WARM_UP:]),
        "waited_share": statistics.median(waited[WARM_UP:]) if waiting is not None else None,
    }


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    data = noise(job["batch"] * (WARM_UP + job["steps"]))
    with join(Launch.of_environment(), "cpu", 120.0) as group:
        library = job["way"] == "DistributedDataParallel"
        figures = (library_steps if library else lowmem_steps)(group, job, data)
        everyone = group.gather(figures)
        if group.leads:
            Path(job["out"]).write_text(json.dumps(everyone))


if __name__ == "__main__":
    main()
