"""What is promised of a plan, checked by real steps in processes of their own: the gradients of a planned step are the
untouched model's, and a run under a plan survives out-of-memory in its middle.

The second is two short runs of the real training loop under the same plan: one undisturbed, one in which memory runs
out. Injected: the library's exception in a forward and in a backward pass. Real (CUDA): a tensor takes so much of the
card that the plan no longer fits.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.config.settings import gather
from lowmem.data import Dataset
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.out_of_memory import Failure, attempt, classify, release
from lowmem.models import make_network
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.runs.rows import Event
from lowmem.runs.store import RunFolder
from lowmem.runs.tables import read_events
from lowmem.step.train_step import Execution
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer, Progress
from lowmem.trial import Trial, native_norms
from lowmem.trial.worker import MEAN, STD, network, random_pictures

# For `lowmem.isolate`; each takes a question's fields.
GRADIENTS, SURVIVAL = "lowmem.bench.plan_checks:compare_gradients", "lowmem.bench.plan_checks:survive"
Tensors = dict[str, Tensor]
_STEPS = 5
# Memory is taken until this rung of the ladder is left hardly more room than it was predicted to need: for the plan
# itself that is a fifth too little, whatever the allocator gives back.
_DOWN, _ROOM = 3, 1.04


@dataclass(frozen=True, kw_only=True)
class PlanQuestion(Trial):
    """A network and a plan for it, which says how it is executed; for survival with its ladder. `deterministic`: of
    gradients, whether they are compared on the library's deterministic kernels too. `real`: take memory away, up to
    `cap_bytes`, instead of raising an error."""

    real: bool = False

    @property
    def planned(self) -> Plan:
        return Plan.from_json(self.plan)


# -- gradients ---------------------------------------------------------------------------------------------------------


def compare_gradients(values: dict[str, Any]) -> dict[str, Any]:
    """`bitwise`: whether loss, gradients and buffers of a planned and an untouched step have the same bits, on the same
    kernels of batch norm (`batch_norm`: the plan's; for native ones the untouched model's norms are made native too).
    `difference`: the largest relative one of any tensor (largest difference over the tensor's largest value); `noise`,
    `noise_bitwise`: the same of two runs of the untouched model. `deterministic_*`: with deterministic kernels, or why
    there are none. `batch`: what fitted for the untouched model, at most the question's."""
    question = PlanQuestion(**values)
    if question.device == "cuda":
        # cuBLAS is deterministic only with a workspace of its own, asked for before its first call; no other cell has
        # this one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    prepare_libraries(Numerics(deterministic=False, tf32=question.tf32))
    batch = question.batch
    while isinstance(found := attempt(partial(_compare, question, batch), lambda: "gradients"), Failure):
        if batch == 1:
            raise MemoryError(found.words)
        batch = max(1, batch // 2)
        release()
    return found


def _compare(question: PlanQuestion, batch: int) -> dict[str, Any]:
    plan = question.planned
    execution = Execution(question.device, plan.precision, plan.memory_format)
    model = network(question, execution)
    planned, norms = apply_plan(model, plan), nullcontext if plan.library_norm else native_norms
    buffers = [(buffer, buffer.to("cpu", copy=True)) for buffer in model.buffers()]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, question.image_size, question.image_size, generator=generator).to(question.device)
    images = images.contiguous(memory_format=execution.torch_memory_format)
    labels = (torch.arange(batch) % 10).to(question.device)

    def gradients(run: nn.Module) -> Tensors:
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
        model.zero_grad(set_to_none=True)
        return found | {"loss": loss.detach().cpu()}

    def compared(kernels: str = "") -> dict[str, Any]:
        with norms():
            untouched, again = gradients(model), gradients(model)
        ours = gradients(planned)
        return {
            f"{kernels}difference": _largest_difference(ours, untouched),
            f"{kernels}noise": _largest_difference(again, untouched),
            f"{kernels}bitwise": _same(ours, untouched),
            f"{kernels}noise_bitwise": _same(again, untouched),
        }

    found = {"batch": batch, "batch_norm": plan.batch_norm, **compared()}
    if not question.deterministic:
        return found
    before = torch.backends.cudnn.deterministic
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        return found | compared("deterministic_")
    except RuntimeError as error:
        if classify(error, "gradients") is not None:
            raise
        return found | {"deterministic_refused": str(error).partition("\n")[0][:200]}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = before


def _same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _largest_difference(left: Tensors, right: Tensors) -> float:
    """Of any tensor, relative to the tensor's largest value."""
    floating = [(left[name], tensor) for name, tensor in right.items() if tensor.is_floating_point()]
    scales = [tensor.abs().max().clamp_min(torch.finfo(tensor.dtype).tiny) for _, tensor in floating]
    shares = (float((one - other).abs().max() / scale) for (one, other), scale in zip(floating, scales, strict=True))
    return max(shares, default=0.0)


# -- survival ----------------------------------------------------------------------------------------------------------


def survive(values: dict[str, Any]) -> dict[str, Any]:
    """`survived`, and how: events, budgets in bytes before and after, and the final weights against those of the
    undisturbed run: the same bits, or the largest relative difference. Raises OutOfMemory if it was not survived."""
    question = PlanQuestion(**values)
    prepare_libraries(Numerics(question.deterministic, question.tf32))
    if question.cap_bytes is not None and question.device == "cuda":
        cap_allocator(question.cap_bytes)
    undisturbed, _ = _run(question)
    release()
    weights, events = _run(question, _Taker(question)) if question.real else _run(question, hook=_failing())
    said = [event.kind for event in events]
    budgets = [event.detail["budget_bytes"] for event in events if event.kind == "replan"]
    budget_bytes = question.planned.budget_bytes
    return {
        "survived": "out-of-memory" in said or "pressure" in said,
        "times_out_of_memory": said.count("out-of-memory"),
        "in": ", ".join(str(event.detail["phase"]) for event in events if event.kind == "out-of-memory"),
        "smaller_plans_taken": len(budgets),
        "budget_bytes": budget_bytes,
        "last_budget_bytes": budgets[-1] if budgets else budget_bytes,
        "weights_bitwise": _same(weights, undisturbed),
        "weights_difference": _largest_difference(weights, undisturbed),
    }


def _run(
    question: PlanQuestion, observer: Observer | None = None, hook: Callable[..., None] | None = None
) -> tuple[Tensors, Sequence[Event]]:
    """The weights after a few steps, and the run's events. `hook`: hears of every planned forward pass."""
    plan = question.planned
    flags = {f"model.{name}": value for name, value in question.model.given.items()}
    flags |= {"train.batch": question.batch, "train.device": question.device, "data.image_size": question.image_size}
    flags |= {"train.precision": plan.precision, "train.memory_format": plan.memory_format}
    config = gather(flags=flags, sets=[f"train.max_steps={_STEPS}", "train.log_every_steps=1"]).config
    pictures = random_pictures((_STEPS + 1) * question.batch, size=question.image_size, side=question.stored_side)
    dataset = Dataset("random", tuple("0123456789"), pictures, None, pictures, MEAN, STD, "")
    model = make_network(question.model, seed=0)
    trainer = Trainer(config, model, dataset, observer or Observer(), plan)
    if hook is not None:
        trainer.step.model.register_forward_hook(hook)
    with tempfile.TemporaryDirectory() as place, RunFolder.create(Path(place) / "run", "", {}) as folder:
        trainer.run(folder)
        events = read_events(folder.events_file, [])
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}, events


def _failing() -> Callable[..., None]:
    """Runs out of memory twice: in the second forward pass, once everything in it is allocated, and in the backward
    pass of the fifth."""
    calls = itertools.count(1)

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory, as injected. Tried to allocate 1.00 GiB.")

    def after_forward(module: nn.Module, given: tuple[Tensor], logits: Tensor) -> None:
        call = next(calls)
        if call == 2:
            fail(logits)
        if call == 5:
            logits.register_hook(fail)

    return after_forward


class _Taker(Observer):
    """Takes memory of the card after the second step, and keeps it."""

    def __init__(self, question: PlanQuestion) -> None:
        rungs = question.planned.ladder[:_DOWN]
        if question.cap_bytes is None or not rungs:
            raise ValueError("taking memory away needs a cap of the allocator, and a plan with a ladder")
        needed = rungs[-1].predicted.peak_reserved_bytes or 0
        pictures_bytes = (_STEPS + 1) * question.batch * 3 * (question.stored_side or question.image_size) ** 2
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
