"""Gradients of a planned step against the untouched model's, in a process of its own:
`python -m lowmem.bench.gradients`, the question as JSON on standard input, one JSON line out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.measure.out_of_memory import Failure, attempt, classify, release
from lowmem.models import build
from lowmem.models.memory_format import check_memory_format
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.step.train_step import Execution
from lowmem.trial.ways import native_norms

Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A network, and a plan for it as JSON. `deterministic`: ask for the library's deterministic kernels too. `tf32`:
    see `lowmem.remat.libraries`."""

    arch: str
    block: str
    width: int
    batch: int
    plan: dict[str, Any]
    precision: str = "fp32"
    memory_format: str = "contiguous"
    device: str = "cpu"
    deterministic: bool = True
    tf32: Literal["auto", "never"] = "auto"


def answer(question: Question) -> dict[str, Any]:
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


def _compare(question: Question, batch: int) -> dict[str, Any]:
    execution = Execution(question.device, question.precision, question.memory_format)
    model = build(question.arch, question.block, width=question.width)
    check_memory_format(model, question.device, question.precision, question.memory_format)
    model.to(device=question.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
    model.train()
    plan = Plan.from_json(question.plan)
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
    found |= {"difference": _difference(ours, first), "noise": _difference(again, first)}
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
        "deterministic_difference": _difference(ours, first),
    }


def _same(left: Gradients, right: Gradients) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _difference(left: Gradients, right: Gradients) -> float:
    """The largest of any tensor, relative to the tensor's largest value."""
    worst = 0.0
    for name, gradient in right.items():
        if not gradient.is_floating_point():
            continue
        scale = gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)
        worst = max(worst, float((left[name] - gradient).abs().max() / scale))
    return worst


if __name__ == "__main__":
    # cuBLAS is deterministic only with a workspace of its own, asked for before its first call; no other cell has it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    print(json.dumps(answer(Question(**json.loads(sys.stdin.read())))), flush=True)
