"""Out of memory in the middle of a run, survived: `python -m lowmem.bench.survival`, the question as JSON on standard
input, one JSON line out.

Two short runs of the real training loop under the same plan: one undisturbed, one in which memory runs out. Injected:
the library's exception in a forward and in a backward pass. Real (CUDA): a tensor takes so much of the card that the
plan no longer fits.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowmem.config.schema import Config
from lowmem.config.settings import gather
from lowmem.data import Dataset, Pictures
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.out_of_memory import release
from lowmem.models import build
from lowmem.plan.record import Plan
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.runs.store import RunFolder
from lowmem.step.train_step import Execution
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer, Progress

_STEPS = 5
# Memory is taken until this rung of the ladder is left hardly more room than it was predicted to need: for the plan
# itself that is a fifth too little, whatever the allocator gives back.
_DOWN, _ROOM = 3, 1.04


@dataclass(frozen=True, kw_only=True)
class Question:
    """A network and its plan as JSON, ladder included. `cap_bytes`: what the allocator may hold (CUDA); `real`: take
    memory away instead of raising an error."""

    arch: str
    block: str
    width: int
    batch: int
    plan: dict[str, Any]
    device: str = "cpu"
    deterministic: bool = True
    tf32: Literal["auto", "never"] = "auto"
    cap_bytes: int | None = None
    real: bool = False


def answer(question: Question) -> dict[str, Any]:
    """`survived`, and how: events, budgets in bytes before and after, and the final weights against those of the
    undisturbed run: the same bits, or the largest relative difference. Raises OutOfMemory if it was not survived."""
    prepare_libraries(Numerics(question.deterministic, question.tf32))
    if question.cap_bytes is not None and question.device == "cuda":
        cap_allocator(question.cap_bytes)
    plan = Plan.from_json(question.plan)
    undisturbed, _ = _run(question, plan, None)
    release()
    disturbance = _Taker(question, plan) if question.real else _Failing()
    weights, events = _run(question, plan, disturbance)
    said = [event["event"] for event in events]
    budgets = [event["budget_bytes"] for event in events if event["event"] == "replan"]
    return {
        "survived": "out-of-memory" in said or "pressure" in said,
        "times_out_of_memory": said.count("out-of-memory"),
        "in": ", ".join(str(event["phase"]) for event in events if event["event"] == "out-of-memory"),
        "smaller_plans_taken": len(budgets),
        "budget_bytes": plan.budget_bytes,
        "last_budget_bytes": budgets[-1] if budgets else plan.budget_bytes,
        "weights_bitwise": all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed),
        "weights_difference": max(_off(weights[name], undisturbed[name]) for name in undisturbed),
    }


def _run(
    question: Question, plan: Plan, disturbance: _Failing | _Taker | None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The weights after a few steps, and the run's events."""
    observer = disturbance if isinstance(disturbance, _Taker) else Observer()
    trainer = _trainer(question, plan, observer)
    if isinstance(disturbance, _Failing):
        disturbance.model, trainer.step.model = trainer.step.model, disturbance
    with tempfile.TemporaryDirectory() as place, RunFolder.create(Path(place) / "run", "", {}) as folder:
        trainer.run(folder)
        lines = folder.events_file.read_text(encoding="utf-8").splitlines()
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}, [*map(json.loads, lines)]


def _trainer(question: Question, plan: Plan, observer: Observer) -> Trainer:
    config: Config = gather(
        flags={
            "model.arch": question.arch,
            "model.block": question.block,
            "model.width": question.width,
            "train.batch": question.batch,
            "train.precision": plan.precision,
            "train.memory_format": plan.memory_format,
            "train.device": question.device,
        },
        sets=[f"train.max_steps={_STEPS}", "train.log_every_steps=1"],
    ).config
    model = build(question.arch, question.block, width=question.width)
    execution = Execution(question.device, plan.precision, plan.memory_format)
    identity = {"settings": "", "data": ""}
    return Trainer(config, model, _pictures((_STEPS + 1) * question.batch), execution, identity, observer, plan)


def _pictures(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    pictures = Pictures(images, torch.arange(count) % 10)
    classes = tuple(str(number) for number in range(10))
    middle, spread = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return Dataset("random", classes, pictures, None, pictures, middle, spread, "")


class _Failing(nn.Module):
    """Stands before the planned module and runs out of memory twice: in its second forward pass, once everything in
    it is allocated, and in the backward pass of the fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.model: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.model is not None
        self.calls += 1
        logits: Tensor = self.model(x)
        if self.calls == 2:
            _fail(logits)
        if self.calls == 5:
            logits.register_hook(_fail)
        return logits


def _fail(_: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory, as injected. Tried to allocate 1.00 GiB.")


class _Taker(Observer):
    """Takes memory of the card after the second step, and keeps it."""

    def __init__(self, question: Question, plan: Plan) -> None:
        rungs = plan.ladder[:_DOWN]
        if question.cap_bytes is None or not rungs:
            raise ValueError("taking memory away needs a cap of the allocator, and a plan with a ladder")
        needed = rungs[-1].predicted.peak_reserved_bytes or 0
        pictures_bytes = (_STEPS + 1) * question.batch * 3 * 32 * 32
        self.bytes = int(question.cap_bytes - _ROOM * needed - pictures_bytes)
        self.steps = 0
        self.held: Tensor | None = None
        if self.bytes <= 0:
            raise ValueError("the smaller plans take all of the card: there is nothing to take away from them")

    def progress(self, progress: Progress) -> None:
        self.steps += 1
        if self.steps == 2:
            torch.cuda.empty_cache()
            self.held = torch.empty(self.bytes, dtype=torch.uint8, device="cuda")


def _off(left: Tensor, right: Tensor) -> float:
    scale = right.abs().max().clamp_min(torch.finfo(right.dtype).tiny)
    return float((left - right).abs().max() / scale)


if __name__ == "__main__":
    print(json.dumps(answer(Question(**json.loads(sys.stdin.read())))), flush=True)
