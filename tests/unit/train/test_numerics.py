"""Which kernels a run lets the libraries take: settings that belong to the run, and the thread of its backward pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem.calibrate.device import describe, elsewhere
from lowmem.config.optimization import OptimConfig
from lowmem.config.schema import BEFORE, Config, flatten, nest
from lowmem.core.errors import UsageError
from lowmem.lifecycle import resume_training, run_training
from lowmem.models import build
from lowmem.runs.view import RunView
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.train.replica import config_hash
from tests.tiny import Heard, tiny


def test_runs_from_before_these_settings_stay_the_same_runs() -> None:
    """The default settings' hash as it was in version 0.1.0 before them."""
    before = Config.model_validate(nest({**flatten(Config()), **BEFORE}))
    assert config_hash(before) == "dd8a04dc452eb4dbaf87e61aef5f81214d349993f524ea334ddf7d82fa83c0f8"
    for change in ({"deterministic": False}, {"tf32": "never"}, {"batch_norm": "native"}):
        assert config_hash(Config.model_validate({"train": change})) != config_hash(Config())


def test_the_backward_pass_is_in_the_callers_thread() -> None:
    """cuDNN's choice of engines is a thread's own; on the CPU autograd would stay in it anyway."""
    model, execution = build("res20", width=4), Execution("cpu", "fp32", "contiguous")
    step = TrainStep(model, make_optimizer(model, OptimConfig(), "cpu"), make_scaler(execution), execution, None)
    seen: list[bool] = []

    def note(grad: Tensor) -> None:
        seen.append(torch._C._is_multithreading_enabled())

    model.register_forward_hook(lambda module, inputs, logits: logits.register_hook(note) and None)
    step(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64), 0.1)
    assert seen == [False]
    assert torch._C._is_multithreading_enabled()


def test_a_resume_keeps_the_kernels_and_says_what_else_is_not_as_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(tiny("train.max_steps=2"), run)
    with pytest.raises(UsageError, match=r"train\.deterministic"):
        resume_training(run, {"train.deterministic": False})
    same, other = Heard(), Heard()
    resume_training(run, {"train.max_steps": 3}, same)
    assert not [note for note in same.notes if "last bits" in note]
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    (run / "env.json").write_text(json.dumps({**environment, "torch": "2.6.0"}), encoding="utf-8")
    resume_training(run, {"train.max_steps": 4}, other)
    (told,) = [note for note in other.notes if "last bits" in note]
    assert f"torch 2.6.0 -> {torch.__version__}" in told


@pytest.mark.parametrize("text", ["", "5", "[1]", '{"torch": ', '{"card": "\\u0007"}'])
def test_an_account_that_tells_nothing_stops_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "env.json").write_text(text, encoding="utf-8")
    told = elsewhere(RunView(tmp_path).env, describe("cpu"))
    assert told is None or (told.isprintable() and "card ? -> None" in told)
    assert elsewhere(RunView(tmp_path / "nowhere").env, describe("cpu")) is None
