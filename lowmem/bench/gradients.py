"""Gradients of a planned step against the untouched model's, in a process of its own:
`python -m lowmem.bench.gradients`, the question as JSON on standard input, one JSON line out."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.choose.workspace import cap_workspace
from lowmem.models import build
from lowmem.models.memory_format import check_memory_format
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan
from lowmem.train.step import Execution
from lowmem.train.survive import release

Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A network, and a plan for it as JSON. `deterministic`: ask for the library's deterministic kernels too."""

    arch: str
    block: str
    width: int
    batch: int
    plan: dict[str, Any]
    precision: str = "fp32"
    memory_format: str = "contiguous"
    device: str = "cpu"
    deterministic: bool = True


def answer(question: Question) -> dict[str, Any]:
    """`bitwise`: whether planned and untouched gradients have the same bits. `difference`: the largest relative one of
    any tensor (largest difference over the tensor's largest value); `noise`: the same of two runs of the untouched
    model. `deterministic_*`: with deterministic kernels, or why there are none. `batch`: what fitted for the untouched
    model, at most the question's."""
    if question.device == "cuda":
        cap_workspace()
    batch = question.batch
    while True:
        try:
            return _compare(question, batch)
        except (torch.OutOfMemoryError, MemoryError):
            if batch == 1:
                raise
        # Outside of the handler, which would hold on to what was allocated.
        batch = max(1, batch // 2)
        release()


def _compare(question: Question, batch: int) -> dict[str, Any]:
    execution = Execution(question.device, question.precision, question.memory_format)
    model = build(question.arch, question.block, width=question.width)
    check_memory_format(model, question.device, question.precision, question.memory_format)
    model.to(device=question.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
    model.train()
    planned = apply_plan(model, Plan.from_json(question.plan))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(question.device)
    images = images.contiguous(memory_format=execution.torch_memory_format)
    labels = (torch.arange(batch) % 10).to(question.device)

    def gradients(run: nn.Module) -> Gradients:
        model.zero_grad(set_to_none=True)
        with execution.autocast():
            logits = run(images)
        F.cross_entropy(logits.float(), labels).backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    first, again, ours = gradients(model), gradients(model), gradients(planned)
    found = {"batch": batch, "difference": _difference(ours, first), "noise": _difference(again, first)}
    found["bitwise"] = _same(ours, first)
    found["noise_bitwise"] = _same(again, first)
    if question.deterministic:
        found |= _deterministic(gradients, model, planned)
    return found


def _deterministic(gradients: Any, model: nn.Module, planned: nn.Module) -> dict[str, Any]:
    before = torch.backends.cudnn.deterministic
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        first, again, ours = gradients(model), gradients(model), gradients(planned)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
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
        scale = gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)
        worst = max(worst, float((left[name] - gradient).abs().max() / scale))
    return worst


if __name__ == "__main__":
    # cuBLAS is deterministic only with a workspace of its own, asked for before its first call; no other cell has it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    print(json.dumps(answer(Question(**json.loads(sys.stdin.read())))), flush=True)
