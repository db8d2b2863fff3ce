"""Gradient norms on a CUDA device: unscaled under fp16, without waiting, and survived when memory runs out."""

from __future__ import annotations

import pytest
import torch

from lowmem.config.optimization import OptimConfig
from lowmem.models import build
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.train.metrics import GradientNorms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _norms(precision: str) -> dict[str, float]:
    execution = Execution("cuda", precision, "contiguous")
    model = build("res20", width=16).cuda()
    step = TrainStep(model, make_optimizer(model, OptimConfig(), "cuda"), make_scaler(execution), execution, None)
    if step.scaler.is_enabled():
        step.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)  # from 65,536 the first step may overflow
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=generator).cuda()
    labels = torch.randint(10, (64,), generator=generator).cuda()
    norms = GradientNorms(model, step, every=1)

    def without_waiting() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            norms.measure()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step(images, labels, 0.0, without_waiting)
    values = norms.take()
    assert values is not None
    return dict(zip(norms.names, values.tolist(), strict=True))


def test_fp16_has_the_norms_of_fp32() -> None:
    """Up to fp16's own error; the scaler's factor is taken out."""
    exact, half = _norms("fp32"), _norms("amp")
    assert half == pytest.approx(exact, rel=0.2)


def test_what_it_allocates_is_small() -> None:
    """The norms themselves, 512 bytes each, and the library's partial sums."""
    weights = [torch.nn.Parameter(torch.zeros(512, 512, 3, 3, device="cuda")) for _ in range(20)]
    grads = [torch.ones_like(one) for one in weights]
    torch._foreach_norm(grads)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.stack(torch._foreach_norm(grads))
    assert torch.cuda.max_memory_allocated() - before < 2**20
