"""A trial: what a run does, for a few steps, in a clean process of its own (`lowmem.isolate`); whether it kept its
budget; and the ways of doing a step that are compared: plain autograd, the library's checkpointing, and a plan. The
process does the work of `lowmem.trial.worker`. Whatever goes wrong in it is a refusal, never an exception here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lowmem.choose.request import Budget
from lowmem.config.schema import ModelConfig
from lowmem.config.sources import SOURCE_SIDE
from lowmem.core.units import format_size
from lowmem.isolate import OUT_OF_MEMORY, Call, run
from lowmem.plan.policy import Schedule
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan
from lowmem.remat.libraries import Numerics, environment_for

# For `lowmem.isolate`; `PREPARE` makes many trials on the CPU, one after the other, take less time each.
WORK, PREPARE = "lowmem.trial.worker:work", "lowmem.trial.worker:prepare"
# Of a step's seconds: a card that computes less of them waits for the host to launch its kernels.
BUSY_SHARE = 0.8
# The ways.
PLAIN = "plain autograd"
SELECTIVE = "selective checkpointing (convolutions saved)"
PER_BLOCK = "checkpointing per block"
PLANNED = "planned"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to do. The network is what a `ModelConfig` says, for pictures of so many `channels`. `way` is one of those
    above; `plan` is a `Plan` as JSON for the planned one. `freeze`: patterns of what is not trained. `optim`: what is
    set of an `OptimConfig`; `fused`: its form, as a run has it; without it the one that the library takes if one says
    nothing.

    `image_size`: side of what the network sees; `stored_side`: of the pictures as they are held, which are enlarged as
    a batch if that is less; None: the same. `pictures`: training pictures that the run holds on the device (only held
    on CUDA). `eval_batch`: pictures at a time in evaluation; None: no evaluation. `cap_bytes`: the most that the
    allocator may hold (CUDA only). `link_bytes_per_second`: what the CPU's link to host memory is held to; None: it
    copies as fast as it can. `detailed`: digest the first step's gradients (needs a warm-up), count the operations of
    another step, and of plain autograd on CUDA profile a third. `deterministic`, `tf32`: see `lowmem.remat.libraries`.
    """

    arch: str = "res20"
    block: str = "basic"
    batch: int
    width: int = 64
    spec: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    num_classes: int = 10
    channels: int = 3
    freeze: list[str] = field(default_factory=list)
    precision: str = "fp32"
    memory_format: str = "contiguous"
    device: str = "cpu"
    deterministic: bool = True
    tf32: Literal["auto", "never"] = "auto"
    way: str = PLAIN
    fused: bool = True
    plan: dict[str, Any] | None = None
    image_size: int = SOURCE_SIDE
    stored_side: int | None = None
    pictures: int = 0
    eval_batch: int | None = None
    cap_bytes: int | None = None
    link_bytes_per_second: float | None = None
    steps: int = 5
    warmup: int = 2
    optim: dict[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.0
    mixup: float = 0.0
    seed: int = 0
    detailed: bool = False

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in ModelConfig.model_fields})


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What came out; bytes and seconds, None where it is not known. `refused` says why there is nothing at all.

    `peak_allocated_bytes` and `peak_reserved_bytes`: of the training steps after the warm-up, without what lies on the
    device beside the step (the training pictures): the tensors that a plan predicts, and on CUDA the convolution
    library's workspace, which comes from the same allocator. On the CPU tensors are counted and nothing is reserved.
    `eval_*`: the same of evaluation. `beside_bytes`: what was taken off, `blas_workspace_bytes` (cuBLAS's and
    cublasLt's) in it. `device_used_bytes`: on CUDA all that this process has on the card, context and pictures
    included; on the CPU its peak resident memory. `step_seconds` (median), `least_seconds`, `most_seconds`: of a step
    without its batch's augmentation, nothing else measured in it. `alloc_retries`: how often the allocator had to give
    back what it had cached. `losses`: the mean loss of every step from the first. `resident_growth_bytes`: on the CPU,
    by how much the process's resident memory grew at its peak, from before the network was made. `gradients`,
    `buffers`: SHA-256 of those of the first step, before its update; `norm_updates`: how often it moved batch norm's
    statistics. `flops`: floating-point operations of a step, counted where they are dispatched. `busy_share`: of
    `step_seconds`, those in which the card computes (plain autograd on CUDA; None where the profiler does not tell).
    `taken_cores`: of the cores that it needs, those that other programs kept busy just before.
    """

    refused: str | None = None
    out_of_memory: bool = False
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    eval_peak_allocated_bytes: int | None = None
    eval_peak_reserved_bytes: int | None = None
    beside_bytes: int | None = None
    blas_workspace_bytes: int | None = None
    device_used_bytes: int | None = None
    context_bytes: int | None = None
    step_seconds: float | None = None
    least_seconds: float | None = None
    most_seconds: float | None = None
    alloc_retries: int | None = None
    finite: bool | None = None
    capped: bool = False
    losses: tuple[float, ...] = ()
    resident_growth_bytes: int | None = None
    gradients: str | None = None
    buffers: str | None = None
    norm_updates: int | None = None
    flops: int | None = None
    busy_share: float | None = None
    taken_cores: float | None = None

    @property
    def most_allocated_bytes(self) -> int | None:
        """The larger peak of training and evaluation."""
        return _most(self.peak_allocated_bytes, self.eval_peak_allocated_bytes)


def _most(*sizes: int | None) -> int | None:
    return max((size for size in sizes if size is not None), default=None)


def run_trial(trial: Trial, timeout_seconds: float = 600.0, call: Call = run) -> TrialResult:
    """The trial in a process of its own: nothing of another is cached, fragmented or still allocated."""
    environment = environment_for(Numerics(trial.deterministic, trial.tf32))
    outcome = call(WORK, asdict(trial), timeout_seconds=timeout_seconds, environment=environment)
    return result_of(outcome.answer_or_refusal)


def result_of(answer: dict[str, Any] | str) -> TrialResult:
    """Of a trial process's answer, or in words why there is none."""
    if isinstance(answer, str):
        return TrialResult(refused=answer, out_of_memory=answer == OUT_OF_MEMORY)
    if unknown := answer.keys() - {one.name for one in fields(TrialResult)}:
        return TrialResult(refused=f"answered with unknown keys: {', '.join(sorted(unknown))}")
    return TrialResult(**{**answer, "losses": tuple(answer.get("losses", ()))})


# -- what is to be said of one ---------------------------------------------------------------------------------------


def verdict(result: TrialResult, budget: Budget, device: str) -> tuple[str | None, bool]:
    """(why the trial is refused, or None if it holds; whether that is a matter of memory)."""
    if result.refused is not None:
        return result.refused, result.out_of_memory
    # On a card the convolution library's workspace comes from the same allocator as the tensors.
    limit = budget.tensor_bytes + (budget.workspace_bytes if device == "cuda" else 0)
    for what, taken in (("training", result.peak_allocated_bytes), ("evaluation", result.eval_peak_allocated_bytes)):
        if taken is not None and taken > limit:
            over = f"{taken / limit - 1:.1%} over the budget of {format_size(limit)}"
            return f"OVER: {what} takes {format_size(taken)}, {over}", True
    cap, reserved = budget.allocator_bytes, _most(result.peak_reserved_bytes, result.eval_peak_reserved_bytes)
    if cap is not None and reserved is not None and reserved > cap - budget.pictures_bytes:
        return f"OVER: the allocator holds {format_size(reserved)}, it may hold {format_size(cap)}", True
    if not result.finite:
        return "the loss is not finite", False
    return None, False


def waits_for_host(busy_share: float | None) -> bool:
    """Whether a card computes so little of a step that what is timed is launching. Unknown is not known to be."""
    return busy_share is not None and busy_share < BUSY_SHARE


def launch_note(busy_share: float | None, batch: int) -> str | None:
    """What is to be said of a plain step in which the card waits for the host; None if it does not."""
    if busy_share is None or not waits_for_host(busy_share):
        return None
    return (
        f"Bound by launches: the card computes {busy_share:.0%} of a plain step at batch {batch}; compare at a larger "
        "--batch."
    )


def excess(measured: float | None, predicted: float | None) -> float | None:
    """The share by which what was measured is above what was predicted; None if either is not known."""
    return None if measured is None or not predicted else measured / predicted - 1


# -- the ways of doing a step -----------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What one would checkpoint by hand: modules of several layers that stand in a row, in a `Sequential` or a
    `ModuleList`; of such rows in a row (ConvNeXt's stages) the blocks of each, of what a block is made of none. Where
    there are no such rows, the model's children with weights."""

    def rows(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            row = isinstance(child, nn.Sequential | nn.ModuleList)
            blocks = [one for one in child.children() if list(one.children())] if row else []
            for block in blocks:
                yield from _row(block) or [block]
            if not blocks:
                yield from rows(child)

    return list(rows(model)) or [child for child in model.children() if list(child.parameters())]


def _row(module: nn.Module) -> list[nn.Module]:
    """The blocks of a row; none: it is a block itself."""
    children = list(module.children())
    whole = isinstance(module, nn.Sequential) and all(list(one.children()) for one in children)
    return [block for one in children for block in _row(one) or [one]] if whole else []


def checkpointed(model: nn.Module, **options: Any) -> nn.Module:
    """The model with `torch.utils.checkpoint` around every block; changes it in place."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return model


@contextmanager
def native_norms() -> Iterator[None]:
    """While it lasts, batch norm under autograd runs on torch's native kernels, where the library may prefer cuDNN's:
    what a plan on native kernels is held against."""

    def native(z: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> Tensor:
        return torch.native_batch_norm(z, weight, bias, mean, var, *others)[0]

    usual, functional.batch_norm = functional.batch_norm, native  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.batch_norm = usual


def executed(model: nn.Module, way: str, plan: Plan | Schedule | None = None) -> nn.Module:
    """What runs the step. The library's ways change the model in place. Raises ValueError for an unknown way."""
    if way == PLANNED and plan is not None:
        return apply_plan(model, plan)
    if way == PER_BLOCK:
        return checkpointed(model)
    if way == SELECTIVE:
        saved = [torch.ops.aten.convolution.default]  # under autocast on CUDA too: what is called is the same
        return checkpointed(model, context_fn=partial(create_selective_checkpoint_contexts, saved))
    if way == PLAIN:
        return model
    raise ValueError(f"{way!r} is no way of doing a step: {PLAIN}, {PER_BLOCK}, {SELECTIVE}, or {PLANNED} with a plan")
