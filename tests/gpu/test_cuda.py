"""What only a CUDA device can tell. Run with `python -m pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lowmem.choose.planning import make_plan
from lowmem.models import build
from lowmem.remat import apply_plan
from lowmem.settings import gather

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _gradients(model: torch.nn.Module, run: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=generator).cuda()
    labels = torch.randint(10, (64,), generator=generator).cuda()
    model.zero_grad(set_to_none=True)
    F.cross_entropy(run(images), labels).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("arch", "block"), [("res20", "basic"), ("cnn56", "bottleneck")])
def test_gradients_are_autograds_up_to_the_librarys_nondeterminism(arch: str, block: str) -> None:
    model = build(arch, block, width=16).cuda()
    plain = _gradients(model, model)
    plan = make_plan(model, batch=64, budget="40M")
    planned = _gradients(model, apply_plan(model, plan))
    assert plain.keys() == planned.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(planned[name], gradient, rtol=1e-3, atol=1e-4)


def test_a_planned_run_stays_within_its_budget(tmp_path: Path) -> None:
    from lowmem.api import run_training

    settings = gather(
        flags={"model.arch": "res56", "model.block": "bottleneck", "data.source": "shapes", "memory.vram": "2G"},
        sets=["train.max_steps=4", "data.train_subset=1000", "data.test_subset=100", "train.precision=fp32"],
    )
    run_training(settings, tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    measured = next(event for event in events if event["event"] == "measured")
    assert measured["measured_peak_bytes"] <= measured["budget_bytes"]
