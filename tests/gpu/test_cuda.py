"""What only a CUDA device can tell: the bits of planned steps, budgets kept, memory taken away. Run with
`python -m pytest -m gpu`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lowmem.bench.plan_checks import GRADIENTS, PlanQuestion
from lowmem.choose.planning import make_plan
from lowmem.config.settings import gather
from lowmem.isolate import run
from lowmem.models import skeleton
from tests.conftest import assert_same_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("batch_norm", ["library", "native"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16"])
@pytest.mark.parametrize(("arch", "block", "budget"), [("res20", "basic", "40M"), ("cnn56", "bottleneck", "60M")])
def test_a_planned_step_has_autograds_bits(
    arch: str,
    block: str,
    budget: str,
    precision: Literal["fp32", "amp", "bf16"],
    memory_format: Literal["contiguous", "channels-last"],
    batch_norm: Literal["library", "native"],
) -> None:
    """Loss, gradients and buffers, with deterministic algorithms and the same kernels of batch norm on both sides."""
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the card has no bf16")
    model = skeleton(arch, block, width=16)
    plan = make_plan(
        model, batch=64, budget=budget, precision=precision, memory_format=memory_format, batch_norm=batch_norm
    )
    assert plan.predicted.extra_flops, "nothing is computed again: the budget is too large to tell anything"
    question = PlanQuestion(
        arch=arch,
        block=block,
        width=16,
        batch=64,
        plan=plan.to_json(),
        device="cuda",
    )
    outcome = run(GRADIENTS, asdict(question), timeout_seconds=300)
    assert outcome.refused is None, outcome
    found = outcome.answer
    assert found["batch_norm"] == batch_norm
    assert found.get("deterministic_refused") is None
    assert found["deterministic_noise_bitwise"], "the library itself does not compute the same twice"
    assert found["deterministic_bitwise"], found


def _events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_a_planned_run_stays_within_its_budget(tmp_path: Path) -> None:
    from lowmem.lifecycle import run_training

    settings = gather(
        flags={"model.arch": "res56", "model.block": "bottleneck", "data.source": "shapes", "memory.vram": "2G"},
        sets=["train.max_steps=4", "data.train_subset=1000", "data.test_subset=100", "train.precision=fp32"],
    )
    run_training(settings, tmp_path / "run")
    (measured,) = _events(tmp_path / "run", "measured")
    assert measured["measured_peak_bytes"] <= measured["budget_bytes"]


def test_a_resumed_run_has_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    """Two runs beside each other and one stopped in the middle of its epoch and resumed, in both precisions."""
    from lowmem.lifecycle import resume_training, run_training

    for precision in ("fp32", "amp"):
        sets = ["train.log_every_steps=1", "data.train_subset=1600", "data.test_subset=100"]
        settings = gather(
            flags={"model.arch": "res20", "data.source": "shapes", "train.precision": precision, "memory.vram": "1G"},
            sets=[*sets, "train.max_steps=9"],
        )
        whole, stopped = tmp_path / f"{precision}-whole", tmp_path / f"{precision}-stopped"
        run_training(settings, whole)
        run_training(settings.replace({"train.max_steps": 5}, "test"), stopped)
        resume_training(stopped, {"train.max_steps": 9})
        assert_same_run(whole, stopped)


def test_a_run_survives_another_taking_the_cards_memory(tmp_path: Path) -> None:
    """In the middle of a run a tensor fills what is left of the share of the card that this process may have."""
    from lowmem.data import TrainBatches
    from lowmem.lifecycle import run_training

    settings = gather(
        flags={"model.arch": "res56", "model.block": "bottleneck", "data.source": "shapes", "memory.vram": "3G"}
        | {"train.precision": "fp32"},
        sets=["train.max_steps=12", "train.log_every_steps=1", "data.train_subset=1600", "data.test_subset=100"],
    )
    run_training(settings, tmp_path / "whole")
    fetch = TrainBatches.batch
    taken: list[torch.Tensor] = []

    def batch(self: TrainBatches, epoch: int, step: int, **formats: object) -> object:
        if step == 6 and not taken:
            torch.cuda.empty_cache()
            # All but what two thirds of a step need.
            cap = json.loads((tmp_path / "run/plan.json").read_text(encoding="utf-8"))["allocator_bytes"]
            reserved, now = torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved()
            taken.append(torch.empty(cap - now - (reserved - now) * 2 // 3, dtype=torch.uint8, device="cuda"))
        return fetch(self, epoch, step, **formats)  # type: ignore[arg-type]

    TrainBatches.batch = batch  # type: ignore[assignment,method-assign]
    try:
        result = run_training(settings, tmp_path / "run")
    finally:
        TrainBatches.batch = fetch  # type: ignore[method-assign]
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.state.step == 12
    failed = _events(tmp_path / "run", "out-of-memory")
    assert failed
    assert all(event["new_budget_bytes"] < event["old_budget_bytes"] for event in failed)
    assert failed[0]["memory"]["allocated_bytes"] > 0
    # The same run: a smaller plan has the same gradients.
    assert_same_run(tmp_path / "whole", tmp_path / "run")
