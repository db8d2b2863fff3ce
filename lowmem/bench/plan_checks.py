"""What is promised of a plan, checked by real steps in processes of their own: the gradients of a planned step are the
untouched model's, and a run under a plan survives out-of-memory in its middle.

The second is two short runs of the real training loop under the same plan: one undisturbed, one in which memory runs
out. Injected: the library's exception in a forward and in a backward pass. Real (CUDA): a tensor takes so much of the
card that the plan no longer fits.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.config.settings import gather
from lowmem.data import Dataset, Pictures
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.out_of_memory import Failure, attempt, classify, release
from lowmem.models import build
from lowmem.models.memory_format import check_memory_format
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.runs.store import RunFolder
from lowmem.step.train_step import Execution
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer, Progress
from lowmem.trial import native_norms

# For `lowmem.isolate`; each takes a question's fields.
GRADIENTS, SURVIVAL = "lowmem.bench.plan_checks:gradients_apart", "lowmem.bench.plan_checks:survival_apart"
Gradients = dict[str, Tensor]
_STEPS = 5
# Memory is taken until this rung of the ladder is left hardly more room than it was predicted to need: for the plan
# itself that is a fifth too little, whatever the allocator gives back.
_DOWN, _ROOM = 3, 1.04


@dataclass(frozen=True, kw_only=True)
class PlanQuestion:
    """A network and a plan for it as JSON; for survival with its ladder.

    `deterministic`, `tf32`: see `lowmem.remat.libraries`; of gradients, whether they are compared on the library's
    deterministic kernels too. Of survival: `cap_bytes`, what the allocator may hold (CUDA), and `real`: take memory
    away instead of raising an error."""

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


def gradients_apart(values: dict[str, Any]) -> dict[str, Any]:
    """`compare_gradients` in a process of its own."""
    # cuBLAS is deterministic only with a workspace of its own, asked for before its first call; no other cell has it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return compare_gradients(PlanQuestion(**values))


def survival_apart(values: dict[str, Any]) -> dict[str, Any]:
    """`survive` in a process of its own."""
    return survive(PlanQuestion(**values))


# -- gradients ---------------------------------------------------------------------------------------------------------


def compare_gradients(question: PlanQuestion) -> dict[str, Any]:
    """`bitwise`: whether loss, gradients and buffers of a planned and an untouched step have the same bits, on the same
    kernels of batch norm (`batch_norm`: the plan's; for native ones the untouched model's norms are made native too).
    `difference`: the largest relative one of any tensor (largest difference over the tensor's largest value); `noise`:
    the same of two runs of the untouched model. `deterministic_*`: with deterministic kernels, or why there are none.
    `batch`: what fitted for the untouched model, at most the question's."""
    prepare_libraries(Numerics(deterministic=False, tf32=question.tf32))
    batch = question.batch
    while isinstance(found := attempt(partial(_compare, question, batch), lambda: "gradients"), Failure):
        if batch == 1:
            raise MemoryError(found.words)
        batch = max(1, batch // 2)
        release()
    return found


def _compare(question: PlanQuestion, batch: int) -> dict[str, Any]:
    plan = Plan.from_json(question.plan)
    execution = Execution(question.device, plan.precision, plan.memory_format)
    model = build(question.arch, question.block, width=question.width)
    check_memory_format(model, question.device, plan.precision, plan.memory_format)
    model.to(device=question.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
    model.train()
    planned, norms = apply_plan(model, plan), nullcontext if plan.library_norm else partial(native_norms, model)
    buffers = [(buffer, buffer.to("cpu", copy=True)) for buffer in model.buffers()]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(question.device)
    images = images.contiguous(memory_format=execution.torch_memory_format)
    labels = (torch.arange(batch) % 10).to(question.device)

    def gradients(run: nn.Module) -> Gradients:
        model.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        with execution.autocast():
            logits = run(images)
        loss = F.cross_entropy(logits.float(), labels)
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found |= {name: buffer.to("cpu", copy=True) for name, buffer in model.named_buffers()}
        found["loss"] = loss.detach().cpu()
        model.zero_grad(set_to_none=True)
        return found

    def three() -> tuple[Gradients, Gradients, Gradients]:
        """Untouched, untouched again, planned."""
        with norms():
            first, again = gradients(model), gradients(model)
        return first, again, gradients(planned)

    first, again, ours = three()
    found: dict[str, Any] = {"batch": batch, "batch_norm": plan.batch_norm}
    found |= {"difference": _largest_difference(ours, first), "noise": _largest_difference(again, first)}
    found["bitwise"] = _same(ours, first)
    found["noise_bitwise"] = _same(again, first)
    if question.deterministic:
        found |= _deterministic(three)
    return found


def _deterministic(three: Callable[[], tuple[Gradients, Gradients, Gradients]]) -> dict[str, Any]:
    before = torch.backends.cudnn.deterministic
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        first, again, ours = three()
    except RuntimeError as error:
        if classify(error, "gradients") is not None:
            raise
        return {"deterministic_refused": str(error).partition("\n")[0][:200]}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = before
    return {
        "deterministic_bitwise": _same(ours, first),
        "deterministic_noise_bitwise": _same(again, first),
        "deterministic_difference": _largest_difference(ours, first),
    }


def _same(left: Gradients, right: Gradients) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _largest_difference(left: Gradients, right: Gradients) -> float:
    """Of any tensor, relative to the tensor's largest value."""
    floating = (name for name, tensor in right.items() if tensor.is_floating_point())
    return max((_difference(left[name], right[name]) for name in floating), default=0.0)


def _difference(left: Tensor, right: Tensor) -> float:
    """The largest, relative to the largest value."""
    scale = right.abs().max().clamp_min(torch.finfo(right.dtype).tiny)
    return float((left - right).abs().max() / scale)


# -- survival ----------------------------------------------------------------------------------------------------------


def survive(question: PlanQuestion) -> dict[str, Any]:
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
        "weights_difference": max(_difference(weights[name], undisturbed[name]) for name in undisturbed),
    }


def _run(
    question: PlanQuestion, plan: Plan, disturbance: _Failing | _Taker | None
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


def _trainer(question: PlanQuestion, plan: Plan, observer: Observer) -> Trainer:
    config = gather(
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

    def __init__(self, question: PlanQuestion, plan: Plan) -> None:
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
