"""On a card, too, evaluation gives the figures that training wrote; on the CPU it is said that they are others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import _run
from lowmem.lifecycle import run_training
from tests.tiny import Heard, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_evaluation_gives_the_figures_of_training(precision: str, tmp_path: Path) -> None:
    changes = ("train.device=cuda", f"train.precision={precision}", "model.width=16", "data.test_subset=75")
    run_training(tiny(*changes, "memory.tensors=200M"), tmp_path / "run", Heard())
    found = {}
    for device in ("cuda", "cpu"):
        words = ["--weights", "last", "--device", device, "--out", str(tmp_path / device)]
        assert _run(["evaluate", str(tmp_path / "run"), *words]) == 0
        found[device] = json.loads((tmp_path / device / "evaluation.json").read_text())
    assert found["cuda"]["as_in_metrics_csv"] is True
    assert found["cpu"]["precision"] == "fp32"
    assert found["cpu"]["loss"] == pytest.approx(found["cuda"]["loss"], rel=0.02)
