"""The matrix library's workspace: bytes that the allocator holds after the first product, forward and backward, and
what clearing it gives back. CUBLAS_WORKSPACE_CONFIG comes with the question."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.probes.measuring import same


def look(device: str, batch: int, features: int, classes: int) -> dict[str, Any]:
    """Of the network's own linear layer: [batch, features] to [batch, classes], and its backward pass, which autograd
    runs in a thread of its own with a handle of its own."""
    head = torch.nn.Linear(features, classes).to(device)
    x = torch.randn(batch, features, device=device, requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def held() -> int:
        if device != "cuda":
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def step() -> list[torch.Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(head(x), labels), [x, head.weight]))

    before = held()
    head(x.detach()).sum()
    after_forward = held()
    first = step()
    again = step()
    alike = same(first, again)
    del first, again
    after_backward = held()
    found: dict[str, Any] = {
        "config": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "gradients_repeated_bitwise": alike,
        "forward_bytes": after_forward - before,
        "forward_backward_bytes": after_backward - before,
    }
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        found["after_clearing_bytes"] = held() - before
    return found
