"""Runs with another optimizer than the report's: what is evaluated and exported, and forks that change it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem.cli.main import main
from lowmem.core.errors import PreflightError, UsageError
from lowmem.data import eval_batches, load
from lowmem.lifecycle import fork_run, resume_training, run_training
from lowmem.models import build
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.view import RunView
from lowmem.step.train_step import Execution, evaluate
from tests.conftest import assert_same_run
from tests.faults.injection import events
from tests.tiny import Heard, tiny

SHAPE = ("train.epochs=2", "checkpoint.keep=4", "train.memory_format=contiguous")
ADAMW = {"optim.kind": "adamw", "optim.lr": 0.002}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a mean of its weights that is far from them."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    run_training(tiny(*SHAPE, "optim.ema=0.7"), run)
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    run_training(tiny(*SHAPE), run)
    return run


def test_the_mean_weights_are_what_is_exported_and_tested(averaged: Path) -> None:
    """With the network's own buffers: whoever loads the file has the error of the last row, to the last digit."""
    exported, told = load_file(averaged / "weights/last.safetensors"), RunView(averaged).best
    assert told is not None
    assert told.ema == 0.7
    saved = checkpoints.load(averaged / "checkpoints/step-00000006")
    model = build("res20", width=2)
    names = {name for name, _ in model.named_parameters()}
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved.optimizer[f"ema/{name}"] if name in names else saved.model[name]), name
    assert not torch.equal(exported["conv1.weight"], saved.model["conv1.weight"])
    model.load_state_dict(exported)
    data = load(tiny(*SHAPE).config.data, 0)
    batches = eval_batches(data.test, 20, data.mean, data.std, "cpu", torch.contiguous_format)
    score = evaluate(model, batches, Execution("cpu", "fp32", "contiguous"))
    row = RunView(averaged).epochs[-1]
    assert score is not None
    assert (score.loss, score.error_pct) == (row.test_loss, row.test_error_pct)


def test_training_is_as_without_it(averaged: Path, plain: Path) -> None:
    assert (averaged / "steps.csv").read_text() == (plain / "steps.csv").read_text()
    assert RunView(averaged).epochs[-1].test_loss != RunView(plain).epochs[-1].test_loss


def test_it_verifies(averaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", str(averaged)])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out.count("equal to its checkpoint, bit for bit") == 2


def test_a_fork_to_another_optimizer_begins_its_state(plain: Path, tmp_path: Path) -> None:
    """Said, and the same whether or not it is stopped before its first step of its own is saved."""
    heard, changes = Heard(), {**ADAMW, "optim.ema": 0.7}
    fork_run(plain, at=1, changes=changes, out=tmp_path / "whole", observer=heard)
    assert "adamw begins with a state of its own, what sgd kept is left behind" in heard.notes
    assert "the running mean of the weights begins with the weights of the fork" in heard.notes
    first = checkpoints.load(tmp_path / "whole/checkpoints/step-00000003")
    assert {key.partition("/")[0] for key in first.optimizer} == {"step", "exp_avg", "exp_avg_sq", "ema"}
    assert not any(tensor.any() for key, tensor in first.optimizer.items() if not key.startswith("ema/"))
    assert torch.equal(first.optimizer["ema/conv1.weight"], first.model["conv1.weight"])
    fork_run(plain, at=1, changes={**changes, "train.max_steps": 4}, out=tmp_path / "run")
    resume_training(tmp_path / "run", {"train.max_steps": None})
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_fork_without_the_mean_goes_on_with_the_weights(averaged: Path, plain: Path, tmp_path: Path) -> None:
    heard = Heard()
    fork_run(averaged, at=1, changes={"optim.ema": None}, out=tmp_path / "run", observer=heard)
    assert "the running mean of the weights is left behind" in heard.notes
    ends = [load_file(run / "checkpoints/step-00000006/optimizer.safetensors") for run in (tmp_path / "run", plain)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_resume_keeps_the_optimizer(plain: Path) -> None:
    with pytest.raises(UsageError, match=r"optim\.kind"):
        resume_training(plain, ADAMW)


def test_under_a_plan_it_is_the_same_run_in_what_was_predicted(tmp_path: Path) -> None:
    settings = (*SHAPE, "model.width=8", "optim.kind=adamw", "optim.lr=0.002", "optim.ema=0.7", "optim.clip_norm=0.5")
    run_training(tiny(*settings), tmp_path / "plain")
    run_training(tiny(*settings, "memory.tensors=8M"), tmp_path / "planned")
    assert_same_run(tmp_path / "planned", tmp_path / "plain")
    (measured,) = events(tmp_path / "planned", "measured")
    # Predicted as the caching allocator counts, in units of 512 bytes: AdamW's counts take one each.
    assert 0.9 * measured["predicted_peak_bytes"] < measured["measured_peak_bytes"] <= 8 << 20


def test_bf16_is_refused_for_a_card_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"GTX 1060 6G has compute capability 6\.1, and bf16 begins with 8\.0"):
        run_training(tiny("memory.card=gtx1060-6g", "train.precision=bf16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
