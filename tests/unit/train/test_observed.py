"""What a run tells while it goes on: every phase in its turn, and where it is before every step."""

from __future__ import annotations

from pathlib import Path

from lowmem.lifecycle import resume_training, run_training
from tests.tiny import Heard, tiny


def test_a_run_and_its_resume(tmp_path: Path) -> None:
    heard, run = Heard(), tmp_path / "run"
    run_training(tiny("train.epochs=2", "train.max_steps=5", "train.log_every_steps=2"), run, heard)
    assert [(at.epoch, at.step_in_epoch) for at in heard.steps] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert [at.step_loss is not None for at in heard.steps] == [False, False, True, True, True], "fetched every 2 steps"
    assert heard.steps[2].step_loss == heard.progresses[0].step_loss
    assert heard.steps[3].loss is None, "the mean was another epoch's"
    said = list(dict.fromkeys(what.partition(":")[0] for what, *_ in heard.phases))
    assert said == [
        "reading pictures",
        "computing the pictures' mean, deviation and fingerprint",
        "building the network",
        "trying a step and an evaluation",
        "writing every output and reading it back",
        "saving the first checkpoint",
        "evaluating",
        "saving",
    ]
    assert ("evaluating", 0, 20) in heard.phases
    again = Heard()
    resume_training(run, {"train.max_steps": None}, again)
    assert [(at.epoch, at.step_in_epoch) for at in again.steps] == [(2, 2)]
    assert "reading the newest checkpoint and verifying it" in [what for what, *_ in again.phases]
