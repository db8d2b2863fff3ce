"""A trial in a process of its own: it measures what was predicted, and whatever goes wrong is a refusal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.choose.planning import make_plan
from lowmem.config.schema import ModelConfig
from lowmem.isolate import OUT_OF_MEMORY, CallResult, Forks, run
from lowmem.models import make_network, skeleton
from lowmem.step.train_step import TrainStep
from lowmem.trial import PER_BLOCK, PLANNED, PREPARE, Trial, TrialResult, blocks_of, run_trial
from lowmem.trial.worker import work
from tests.isolated import call_here

TINY: dict[str, Any] = {"arch": "res20", "block": "basic", "width": 8, "batch": 32, "steps": 1, "warmup": 1}


@pytest.fixture(scope="module")
def plain() -> TrialResult:
    return run_trial(Trial(**TINY, eval_batch=40))


def test_what_a_trial_tells(plain: TrialResult) -> None:
    assert plain.refused is None
    assert plain.finite
    assert plain.step_seconds is not None
    assert plain.peak_allocated_bytes is not None
    assert plain.eval_peak_allocated_bytes is not None
    assert plain.eval_peak_allocated_bytes < plain.peak_allocated_bytes
    assert plain.peak_reserved_bytes is None
    assert len(plain.losses) == 2


def test_a_plan_takes_what_was_predicted_and_computes_the_same(plain: TrialResult) -> None:
    plan = make_plan(skeleton("res20", width=8), batch=32, budget="10M")
    assert "KEEP{}" in plan.blocks().values()
    result = run_trial(Trial(**TINY, way=PLANNED, plan=plan.to_json(), eval_batch=32), call=call_here)
    assert result.peak_allocated_bytes == pytest.approx(plan.predicted.peak_allocated_bytes, rel=0.02)
    assert result.losses == plain.losses


def test_the_librarys_checkpointing_is_tried_likewise(plain: TrialResult) -> None:
    found = work({**TINY, "way": PER_BLOCK})  # in this process: what it does, not where
    assert tuple(found["losses"]) == plain.losses
    assert plain.peak_allocated_bytes is not None
    assert found["peak_allocated_bytes"] < plain.peak_allocated_bytes


def _refused(trial: Trial, outcome: CallResult) -> TrialResult:
    """What a trial is said to have come to whose process ended so."""
    return run_trial(trial, call=lambda *_, **__: outcome)


def test_what_is_checkpointed_of_any_network() -> None:
    family = skeleton("res20", width=2)
    assert blocks_of(family) == [block for stage in family.stages() for block in stage.children()]
    assert len(blocks_of(make_network(ModelConfig(spec="torchvision:resnet18")))) == 8
    convnext = blocks_of(make_network(ModelConfig(spec="torchvision:convnext_tiny")))  # blocks in stages in a row
    assert [type(block).__name__ for block in convnext].count("CNBlock") == 18
    convolution, head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
    assert blocks_of(nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), head)) == [convolution, head]


def test_a_trial_makes_a_network_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "thin.py").write_text(
        "from torch import nn\ndef thin(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes))\n"
    )
    trial = Trial(spec=f"{tmp_path / 'thin.py'}:thin", batch=4, num_classes=3, steps=1, warmup=1, way=PER_BLOCK)
    found = run_trial(trial, call=call_here)
    assert (found.refused, found.finite) == (None, True)


def test_a_process_that_goes_wrong_is_a_refusal() -> None:
    trial = Trial(**TINY)
    crashed = _refused(trial, CallResult(ended="crashed", words="ValueError: no such kernel", code=1))
    assert (crashed.refused, crashed.out_of_memory) == ("crashed: ValueError: no such kernel", False)
    full = _refused(trial, CallResult(ended="out of memory", code=-9))
    assert (full.refused, full.out_of_memory) == (OUT_OF_MEMORY, True)
    strange = _refused(trial, CallResult(ended="answered", answer={"surprise": 1}))
    assert strange.refused == "answered with unknown keys: surprise"


def test_out_of_memory_in_a_trial_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainStep, "__call__", full)
    result = run_trial(Trial(**TINY), call=call_here)
    assert (result.refused, result.out_of_memory) == (OUT_OF_MEMORY, True)


def test_a_wrong_trial_is_a_refusal() -> None:
    assert "no way of doing a step" in (run_trial(Trial(**TINY, way="by hand")).refused or "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_a_forked_trial_finds_what_one_in_a_process_of_its_own_finds() -> None:
    """And one leaves nothing to the next."""
    tiny = {**TINY, "width": 4, "batch": 16}
    with Forks(PREPARE) as call:
        forked, apart = (run_trial(Trial(**tiny, detailed=True), call=one) for one in (call, run))
        large = run_trial(Trial(**{**tiny, "batch": 256}), call=call)
        again = run_trial(Trial(**tiny), call=call)
    assert forked.refused is None
    for name in ("losses", "peak_allocated_bytes", "gradients", "buffers", "flops", "norm_updates"):
        assert getattr(forked, name) == getattr(apart, name) is not None
    assert (again.losses, again.peak_allocated_bytes) == (forked.losses, forked.peak_allocated_bytes)
    assert (forked.resident_growth_bytes or 0) > 0
    assert (again.resident_growth_bytes or 0) < (large.resident_growth_bytes or 0) / 2
