"""Measured workspaces, times and predictions on a card. Run with `python -m pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem.calibrate.measuring import BUSY_BATCHES
from lowmem.choose.execution import calibrator_of, request_of, resolve_execution
from lowmem.choose.planning import choose
from lowmem.config.settings import gather
from lowmem.models import skeleton
from lowmem.trial import run_trial
from lowmem.trial.plan_trial import trial_of
from tests.step_shapes import shape_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_a_calibrated_plan_predicts_what_a_clean_process_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Allocated within 1 %, reserved within 5 % of the prediction."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {"model.arch": "res56", "model.block": "bottleneck", "memory.vram": "3G", "train.precision": precision}
    settings = resolve_execution(gather(flags=flags, sets=["train.device=cuda"]), planned=True)
    calibrator = calibrator_of(settings.config)
    assert calibrator is not None
    assert calibrator.facts is not None
    request = request_of(settings.config, 10, 0, calibrator)
    choice = choose(request)
    assert choice.timed
    result = run_trial(trial_of(settings.config, choice.plan, request.budget, 10, 0))
    assert result.refused is None, result.refused
    predicted = choice.plan.predicted
    assert result.peak_allocated_bytes == pytest.approx(predicted.peak_allocated_bytes, rel=0.01)
    assert result.peak_reserved_bytes is not None
    assert predicted.peak_reserved_bytes is not None
    assert result.peak_reserved_bytes <= 1.05 * predicted.peak_reserved_bytes


def test_how_many_pictures_keep_the_card_busy_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {"model.arch": "res20", "train.device": "cuda"}
    told: list[str] = []
    calibrator = calibrator_of(gather(flags=flags).config, told.append)
    assert calibrator is not None
    model = skeleton("res20", "basic")
    found = calibrator.timed_batch(shape_of(model, 4096))
    assert found in BUSY_BATCHES
    assert any("keep it busy" in line for line in told)
    told.clear()
    assert calibrator.timed_batch(shape_of(model, 200)) == min(200, found)
    assert told == []


def test_planning_leaves_no_context_in_this_process() -> None:
    """In a process of its own: the others of this file have used CUDA here."""
    import subprocess
    import sys

    probe = (
        "import torch\n"
        "from lowmem.calibrate.device import ask_device\n"
        "from lowmem.remat.libraries import Numerics\n"
        "facts = ask_device(Numerics())\n"
        "assert 0 < facts.blas_workspace_bytes <= 64 << 20\n"
        "assert facts.total_bytes >= facts.free_bytes > 0\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
