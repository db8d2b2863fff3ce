"""Trials, confirmation and survival on the card. Run with `python -m pytest -m gpu`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lowmem.bench.plan_checks import SURVIVAL, PlanQuestion
from lowmem.choose.execution import request_of
from lowmem.choose.planning import choose, with_ladder
from lowmem.choose.request import Choice
from lowmem.config.settings import gather
from lowmem.core.units import GIB, MIB
from lowmem.isolate import run
from lowmem.trial import BUSY_SHARE, PER_BLOCK, PLANNED, Trial, run_trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NETWORK = {"arch": "res56", "block": "bottleneck", "batch": 128}
FLAGS = {"model.arch": "res56", "model.block": "bottleneck", "train.batch": 128, "memory.vram": 2 * GIB}


def _choice() -> Choice:
    flags = {**FLAGS, "train.precision": "fp32", "train.memory_format": "contiguous", "train.device": "cuda"}
    return choose(request_of(gather(flags=flags).config))


def test_a_capped_trial_of_a_plan() -> None:
    choice = _choice()
    cap = choice.budget.allocator_bytes
    trial = Trial(
        **NETWORK,  # type: ignore[arg-type]
        device="cuda",
        way=PLANNED,
        plan=choice.plan.to_json(),
        cap_bytes=cap,
        eval_batch=128,
        pictures=5000,
    )
    found = run_trial(trial)
    assert found.refused is None
    assert cap is not None
    assert (found.finite, found.capped) == (True, True)
    assert 0 < (found.blas_workspace_bytes or 0) <= 64 * MIB
    # The convolution library's workspace is in what is measured; here it was not measured for the prediction.
    predicted = choice.plan.predicted.peak_allocated_bytes or 0
    assert 0.97 * predicted < (found.peak_allocated_bytes or 0) < 1.03 * predicted + choice.budget.workspace_bytes
    assert (found.peak_reserved_bytes or 0) <= cap
    assert found.eval_peak_allocated_bytes is not None


def test_a_cap_that_is_too_small_is_a_refusal() -> None:
    found = run_trial(Trial(**NETWORK, device="cuda", cap_bytes=500 * MIB))  # type: ignore[arg-type]
    assert found.out_of_memory


def test_the_librarys_checkpointing() -> None:
    assert run_trial(Trial(**NETWORK, device="cuda", way=PER_BLOCK)).refused is None  # type: ignore[arg-type]


@pytest.mark.parametrize("real", [False, True])
def test_out_of_memory_is_survived(real: bool) -> None:
    choice = with_ladder(_choice())
    question = PlanQuestion(
        **NETWORK,  # type: ignore[arg-type]
        width=64,
        plan=choice.plan.to_json(),
        device="cuda",
        cap_bytes=choice.budget.allocator_bytes,
        real=real,
    )
    outcome = run(SURVIVAL, asdict(question), timeout_seconds=300)
    assert outcome.refused is None, outcome
    found = outcome.answer
    assert found["survived"]
    assert found["last_budget_bytes"] < found["budget_bytes"]
    # The steps are the same ones under other plans, on deterministic kernels.
    assert found["weights_bitwise"], found


def test_a_run_on_the_card_is_confirmed(tmp_path: Path) -> None:
    from lowmem.lifecycle import run_training

    sets = ["train.max_steps=2", "data.train_subset=1000", "data.test_subset=100", "train.precision=fp32"]
    run_training(gather(flags={**FLAGS, "data.source": "shapes"}, sets=sets), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    confirmed = next(event for event in events if event["event"] == "confirmed")
    assert confirmed["trials"][0]["measured_reserved_bytes"] > 0


def test_how_much_of_a_step_the_card_computes() -> None:
    """A step of small kernels waits for its launches, whatever the card."""
    small = Trial(arch="res20", block="basic", width=16, batch=4, device="cuda", detailed=True)
    found = run_trial(small)
    assert found.refused is None
    if found.busy_share is None:
        pytest.skip("the profiler does not see the card (built without, or not permitted)")
    assert 0 < found.busy_share < BUSY_SHARE
    large = run_trial(replace(small, width=64, batch=1024))
    assert large.busy_share is not None
    assert found.busy_share < large.busy_share <= 1
