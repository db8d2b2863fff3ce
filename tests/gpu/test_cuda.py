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


def test_a_run_survives_another_taking_the_cards_memory(tmp_path: Path) -> None:
    """In the middle of a run a tensor fills what is left of the share of the card that this process may have."""
    from lowmem.api import run_training
    from lowmem.data import TrainBatches

    settings = gather(
        flags={"model.arch": "res56", "model.block": "bottleneck", "data.source": "shapes", "memory.vram": "3G"}
        | {"train.precision": "fp32"},
        sets=["train.max_steps=12", "train.log_every_steps=1", "data.train_subset=1600", "data.test_subset=100"],
    )
    run_training(settings, tmp_path / "whole")
    fetch, taken = TrainBatches.batch, []

    def batch(self: TrainBatches, epoch: int, step: int, **formats: object) -> object:
        if step == 6 and not taken:
            torch.cuda.empty_cache()
            # All but what two thirds of a step need.
            reserved = torch.cuda.max_memory_reserved()
            now = torch.cuda.memory_reserved()
            share = (settings.config.memory.vram or 0) - 400 * 2**20
            taken.append(torch.empty(share - now - (reserved - now) * 2 // 3, dtype=torch.uint8, device="cuda"))
        return fetch(self, epoch, step, **formats)  # type: ignore[arg-type]

    TrainBatches.batch = batch  # type: ignore[assignment,method-assign]
    try:
        result = run_training(settings, tmp_path / "run")
    finally:
        TrainBatches.batch = fetch  # type: ignore[method-assign]
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.outcome.state.step == 12
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    failed = [event for event in events if event["event"] == "out-of-memory"]
    assert failed
    assert all(event["new_budget_bytes"] < event["old_budget_bytes"] for event in failed)
    assert failed[0]["memory"]["allocated_bytes"] > 0
    # The same run, up to the library's nondeterminism.
    last = [(tmp_path / name / "steps.csv").read_text().split()[-1].split(",") for name in ("whole", "run")]
    assert last[0][0] == last[1][0] == "12"
    assert float(last[0][-1]) == pytest.approx(float(last[1][-1]), rel=0.2)
