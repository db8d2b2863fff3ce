"""Attention takes other kernels where no gradient is wanted: what runs again, or before it is run again, has to take
those that autograd's step takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, uniform
from lowmem.remat import apply_plan, decompose


def network() -> nn.Sequential:
    """Wide enough for another kernel: with 256 features there is none."""
    torch.manual_seed(0)
    blocks = [EncoderBlock(12, 768, 32, 0.0, 0.0) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(33 * 768, 10))


@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("policy", [SAVE_ALL, LEAN, INPUT_ONLY], ids=str)
def test_attention_has_the_bits_of_a_step_with_gradients(low: torch.dtype | None, policy: BlockPolicy) -> None:
    plain = network()
    planned = apply_plan(copy.deepcopy(plain), uniform([policy] * len(decompose(plain))))
    x = torch.randn(2, 33, 768)
    for model in (plain, planned):
        with torch.autocast("cpu", low, enabled=low is not None):
            model(x).float().pow(2).mean().backward()
    for (name, p), q in zip(plain.named_parameters(), planned.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert torch.equal(p.grad, q.grad), name
