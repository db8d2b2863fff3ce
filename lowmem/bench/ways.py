"""The ways of doing a training step that are compared: plain autograd, the library's checkpointing, and a plan."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
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
