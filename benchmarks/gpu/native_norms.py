"""`lowmem.bench.gradients` with the untouched model's batch norms on torch's native kernels, as a plan with
`batch_norm: native` has them: `python -m benchmarks.gpu.native_norms`, question and answer as there."""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import Tensor, nn

from lowmem.bench.gradients import Question, answer


def use_native_norms() -> None:
    """In this process, from now on: cuDNN is off while a batch norm is called, whose backward pass is decided there."""
    forward = nn.BatchNorm2d.forward

    def native(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            return forward(self, x)
        finally:
            torch.backends.cudnn.enabled = enabled

    nn.BatchNorm2d.forward = native  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before its first call, as in `lowmem.bench.gradients`
    use_native_norms()
    print(json.dumps(answer(Question(**json.loads(sys.stdin.read())))), flush=True)
