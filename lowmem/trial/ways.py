"""The ways of doing a training step that are compared: plain autograd, the library's checkpointing, and a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lowmem.models.resnet import ResNet
from lowmem.plan.policy import Schedule
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan

PLAIN = "plain autograd"
SELECTIVE = "selective checkpointing (convolutions saved)"
PER_BLOCK = "checkpointing per block"
PLANNED = "planned"


def save_convolutions(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Everything but convolutions is computed again. Under autocast on CUDA too: what is called is the same."""
    saved = operation is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(model: ResNet, **options: Any) -> ResNet:
    """The model with `torch.utils.checkpoint` around every block; changes it in place."""
    for stage in model.stages():
        for block in stage.children():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return model


@contextmanager
def native_norms(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's batch norms run on torch's native kernels under autograd, where `F.batch_norm` may
    prefer cuDNN's: what a plan on native kernels is held against."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.forward = partial(_native_norm, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _native_norm(norm: nn.BatchNorm2d, z: Tensor) -> Tensor:
    """`nn.BatchNorm2d.forward` of a norm with running statistics, in training."""
    assert norm.training
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    statistics = (norm.running_mean, norm.running_var)
    out: Tensor = torch.native_batch_norm(z, norm.weight, norm.bias, *statistics, True, momentum, norm.eps)[0]
    return out


def executed(model: ResNet, way: str, plan: Plan | Schedule | None = None) -> nn.Module:
    """What runs the step. The library's ways change the model in place. Raises ValueError for an unknown way."""
    if way == PLANNED and plan is not None:
        return apply_plan(model, plan)
    if way == PER_BLOCK:
        return checkpointed(model)
    if way == SELECTIVE:
        return checkpointed(model, context_fn=partial(create_selective_checkpoint_contexts, save_convolutions))
    if way == PLAIN:
        return model
    raise ValueError(f"{way!r} is no way of doing a step: {PLAIN}, {PER_BLOCK}, {SELECTIVE}, or {PLANNED} with a plan")
