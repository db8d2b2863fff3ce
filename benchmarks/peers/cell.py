"""One cell of the table in a process of its own. What a way meets is an answer (`died`), never a crash of the table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.peers.budget import Place
from benchmarks.peers.task import Found, Impossible, Stepper, Task, loader, network, out_of_memory, words
from benchmarks.peers.ways import ROWS
from lowmem.choose.request import REFERENCE_CARD, card_rates
from lowmem.config.cards import load_card
from lowmem.config.optimization import OptimConfig
from lowmem.core.units import MIB
from lowmem.measure.out_of_memory import Failure, attempt
from lowmem.models import skeleton
from lowmem.simulate import StepShape, simulate_step
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler

_CHECKED_BATCH = 16


def find(task: Task, place: Place, row: str, **_: Any) -> dict[str, Any]:
    return asdict(ROWS[row].load().find(task, place, **ROWS[row].options))


def train(task: Task, place: Place, row: str, found: dict[str, Any], eval_batch: int, **_: Any) -> dict[str, Any]:
    return asdict(ROWS[row].load().train(task, place, Found(**found), eval_batch))


def speed(task: Task, place: Place, founds: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Of bare training steps, without the peers' trainers; on the CPU without the count of tensors. All ways in one
    process, each one step a round in an order of the round's own, so that what else the machine does hits all alike."""
    place = place if task.device == "cuda" else Place(task.device, None)
    with place:
        steppers = {}
        for row, found in founds.items():
            known = Found(**found)
            net, optimizer = ROWS[row].load().stepped(task, place, known)
            steppers[row] = Stepper(net, optimizer, place, known.batch)
        for number in range(rounds + 1):
            for row in random.Random(number).sample(sorted(steppers), len(steppers)):
                steppers[row].step()
                if task.device == "cuda":
                    torch.cuda.empty_cache()  # what one way's batch has left cached is not another's
    return {"seconds": {row: stepper.seconds[1:] for row, stepper in steppers.items()}}


def check(task: Task, place: Place, **_: Any) -> dict[str, Any]:
    """Whether the budget is one: on the CPU a step of plain autograd whose peak is known passes at its peak and fails
    one byte below it; on CUDA as much as the budget cannot be allocated."""
    if task.device == "cuda":
        with place:
            asked = partial(torch.empty, task.budget_bytes, dtype=torch.uint8, device="cuda")
            if isinstance(attempt(asked, lambda: "the check"), Failure):
                return {"holds": True, "words": "the allocator, capped, refuses as much as the budget"}
        return {"holds": False, "words": "the allocator gave as much as the budget"}
    free = _step_under(task, 1 << 60)
    peak_bytes = int(free["peak_bytes"])
    at, below = _step_under(task, peak_bytes), _step_under(task, peak_bytes - 1)
    simulated_bytes = _simulated(task)
    holds = at["died"] is None and below["died"] is not None
    peaks = f"{peak_bytes / MIB:,.2f} MiB (simulated {simulated_bytes / MIB:,.2f})"
    passes = "passes" if at["died"] is None else "FAILS"
    fails = "PASSES" if below["died"] is None else f"fails one byte below it ({below['died']})"
    step = f"a step of plain autograd at batch {_CHECKED_BATCH} with a counted peak of {peaks}"
    return {
        "holds": holds,
        "peak_bytes": peak_bytes,
        "simulated_bytes": simulated_bytes,
        "words": f"{step} {passes} at that budget and {fails}",
    }


def _step_under(task: Task, budget_bytes: int) -> dict[str, Any]:
    """The training step that the simulation predicts, under plain autograd."""
    execution = Execution("cpu", "fp32", "contiguous")
    with Place("cpu", budget_bytes) as place:
        try:
            net = network(task)
            net.train()
            optimizer = make_optimizer(net, OptimConfig(), "cpu")
            step = TrainStep(net, optimizer, make_scaler(execution), execution, None)
            images, labels = place.put(*next(iter(loader(place, _CHECKED_BATCH, _CHECKED_BATCH))))
            step(images, labels, task.lr)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return {"died": words(error, place)}
        return {"died": None, "peak_bytes": place.peak_bytes}


def _simulated(task: Task) -> int:
    shape = StepShape(
        model=skeleton(task.arch, task.block, width=task.width),
        image_shape=(3, 32, 32),
        batch=_CHECKED_BATCH,
        micro_batch=_CHECKED_BATCH,
        precision="fp32",
        memory_format="contiguous",
    )
    return simulate_step(shape, None, card_rates(load_card(REFERENCE_CARD))("fp32")).estimate.peak_tensor_bytes


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"find": find, "train": train, "speed": speed, "check": check}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """`action` with a `task` and what else it takes."""
    task = Task(**question.pop("task"))
    place = Place(task.device, task.budget_bytes)
    torch.set_num_threads(question.pop("threads"))
    # Loading a library's parts at their first use is not what is compared.
    F.cross_entropy(torch.nn.Conv2d(3, 10, 32)(torch.randn(2, 3, 32, 32)).flatten(1), torch.zeros(2).long()).backward()
    try:
        return ACTIONS[question.pop("action")](task, place, **question)
    except Impossible as error:
        return {"impossible": str(error)}
    except Exception as error:
        return {"died": words(error, place)}
