"""`lowmem train`, with `--batch auto` or with the recipe's batch: what it decides before a run, and its training loop.

The search is the one before every run (`lowmem.choose.decide`): it simulates, and on CUDA it tries its choice by
real steps in processes of their own. The training is the loop of `lowmem train` from its first step on, with
evaluation, the plan's ladder and a checkpoint at the end of the epoch; its planning and preflight come before and are
not metered.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers.budget import Place
from benchmarks.peers.task import CLASSES, Found, Task, Trained, network, words
from lowmem.choose.decide import DataSize, decide
from lowmem.choose.execution import resolve_execution
from lowmem.choose.request import Choice, Request
from lowmem.config.schema import Config
from lowmem.config.settings import Settings, gather, to_yaml
from lowmem.core.units import MIB, format_size
from lowmem.data import Dataset
from lowmem.data.pictures import Pictures
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan
from lowmem.runs.store import RunFolder
from lowmem.step.train_step import make_optimizer
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer
from lowmem.trial.plan_trial import Confirmed, Tried, confirm_run, wants_confirmation


class Notes(Observer):
    """What a run says."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def settings_of(task: Task, batch: int | str, **values: Any) -> Settings:
    """As the command line gathers them."""
    flags = {
        "model.arch": task.arch,
        "model.block": task.block,
        "model.width": task.width,
        "train.batch": batch,
        "train.epochs": 1,
        "train.precision": "fp32",
        "train.memory_format": "contiguous",
        "train.device": task.device,
        "memory.tensors" if task.device == "cpu" else "memory.vram": task.budget_bytes,
    }
    if batch != "auto":
        flags |= values
    return gather(flags=flags)


def random_data(place: Place, train: int, test: int) -> Dataset:
    """On the host; on the CPU it is no part of what a plan bounds."""
    with place.host():
        generator = torch.Generator().manual_seed(0)
        parts = []
        for count in (train, test):
            images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
            parts.append(Pictures(images, torch.arange(count) % CLASSES))
            place.exempt(images, parts[-1].labels)
    names = tuple(str(number) for number in range(CLASSES))
    return Dataset("random", names, parts[0], None, parts[1], (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "")


def find(task: Task, place: Place, batch: int | str = "auto") -> Found:
    """Not under the CPU's tensor budget: nothing in it is computed."""
    settings = resolve_execution(settings_of(task, batch), planned=True)
    dataset = random_data(place, task.pictures, task.eval_pictures)
    began = time.perf_counter()
    data = DataSize(len(dataset.classes), len(dataset.train.labels))
    trials: list[Tried] = []

    def confirm(config: Config, request: Request, choices: list[Choice]) -> Confirmed:
        pictures = len(dataset.train.labels)
        confirmed = confirm_run(
            config, request, choices, num_classes=data.classes, train_pictures=pictures, tell=Observer().note
        )
        trials.extend(confirmed.trials)
        return confirmed

    decided = decide(settings, data, confirm=confirm if wants_confirmation(settings.config) else None)
    settings, plan = decided.settings, decided.plan
    assert plan is not None
    seconds = time.perf_counter() - began
    predicted = plan.predicted
    time_more = f"{predicted.overhead or 0:+.1%} time against plain autograd at the same batch"
    peak = f"predicted peak {format_size(predicted.peak_allocated_bytes)}"
    notes = [f"{peak}, {time_more}, {len(plan.ladder)} smaller plans in reserve"]
    if not plan.exact:
        notes.append(f"in micro-batches of {plan.micro_batch}: under batch norm another computation")
    if batch == "auto":
        others = [f"{one.what}: {one.refused_because}" for one in plan.candidates if one.refused_because]
        notes.append(f"not chosen: {', '.join(others)}")
    tried = [_trial(one) for one in trials]
    return Found(
        batch=plan.batch,
        lr=settings.config.optim.lr,
        seconds=seconds,
        tried=tried,
        notes=notes,
        carry={"plan": plan.to_json(), "predicted_peak_bytes": predicted.peak_allocated_bytes},
    )


def _trial(tried: Tried) -> dict[str, Any]:
    """A choice that was tried by real steps in a process of its own."""
    ran, peak_bytes = tried.refused_because is None, tried.result.most_allocated_bytes
    return {"batch": tried.choice.plan.batch, "ran": ran, "peak_bytes": peak_bytes}


def train(task: Task, place: Place, found: Found, eval_batch: int) -> Trained:
    chosen = {"optim.lr": found.lr, "train.eval_batch": eval_batch}
    settings = resolve_execution(settings_of(task, found.batch, **chosen), planned=True)
    plan, observer = Plan.from_json(found.carry["plan"]), Notes()
    resolved = {"train.precision": plan.precision, "train.memory_format": plan.memory_format}
    settings = settings.replace(resolved, "plan")
    with tempfile.TemporaryDirectory() as folder, place:
        dataset = random_data(place, task.steps * found.batch, task.eval_pictures)
        with RunFolder.create(Path(folder) / "run", to_yaml(settings), {}) as run:
            trainer = Trainer(settings.config, network(task), dataset, observer, plan)
            place.reset_peak()
            place.phase = "lowmem's loop"
            try:
                trainer.run(run)
            except Exception as error:
                return Trained(survived=False, how=words(error, place))
            events = [json.loads(line) for line in run.events_file.read_text(encoding="utf-8").splitlines()]
    measured = [event["measured_peak_bytes"] for event in events if event["event"] == "measured"]
    return Trained(
        survived=True,
        how="; ".join(_helped(events)),
        batch=trainer.config.train.batch,
        train_peak_bytes=max(measured, default=None),
    )


def _helped(events: list[dict[str, Any]]) -> list[str]:
    """What was done about memory on the way."""
    done = []
    for event in events:
        if event["event"] == "replan":
            done.append(f"went on under a plan for {event['budget_bytes'] / MIB:,.0f} MiB")
        elif event["event"] == "out-of-memory" and "evaluation_batch" in event:
            done.append(f"evaluated {event['evaluation_batch']} at a time")
    return done


def stepped(task: Task, place: Place, found: Found) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = network(task).to(place.device)
    settings = settings_of(task, found.batch, **{"optim.lr": found.lr})
    return apply_plan(net, Plan.from_json(found.carry["plan"])), make_optimizer(net, settings.config.optim, task.device)
