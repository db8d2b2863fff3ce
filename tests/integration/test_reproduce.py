"""A job of `lowmem reproduce` from one call to the next."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lowmem.report
from lowmem import lifecycle
from lowmem.cli.terminal import say
from lowmem.config.settings import gather
from lowmem.core.errors import Interrupted, LowmemError
from lowmem.reproduce.check import work
from lowmem.reproduce.conduct import Conductor, conduct, last_words, reproduce_job
from lowmem.reproduce.job import Job, ask, select
from lowmem.reproduce.progress import standing_of
from lowmem.train.observer import Observer
from tests.tiny import sets

RES20 = select("res20", None)
# Two epochs of two steps; which network is the job's to say.
JOB = [text for text in sets("data.train_subset=40", "train.epochs=2") if not text.startswith("model.arch")]


class Here(Conductor):
    """Does in this process what is requested."""

    interrupts = False  # before the run gets anywhere

    def run(self, request: Mapping[str, Any]) -> int:
        if self.interrupts and "name" in request:
            self.requested = "SIGINT"
            return 130
        return work(json.loads(json.dumps(request)), Observer(), lifecycle.run_training, lifecycle.resume_training)


def call(out: Path, *settings: str, interrupts: bool = False) -> Job:
    out.mkdir(exist_ok=True)
    asked, conductor = ask(out, gather(sets=settings), RES20), Here()
    conductor.interrupts = interrupts
    assert conduct(asked, conductor, lambda text: None) == 0
    return asked.job


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A job whose only run was stopped after two of its four steps, as asked."""
    job = call(tmp_path / "job", *JOB, "train.max_steps=2")
    assert standing_of(job, RES20[0]).step == 2
    return job.path


def test_a_trial_goes_on_to_its_end_with_the_plain_command(trial: Path) -> None:
    again = f"`lowmem reproduce --out {trial} --only res20` goes on to the end"
    stopped = last_words(ask(trial, gather(sets=["train.max_steps=2"]), RES20))
    assert stopped == f"1 of 1 run stopped at step 2 as asked (train.max_steps, for this call): {again}"
    job = call(trial)
    assert standing_of(job, RES20[0]).state == "finished"
    assert last_words(ask(trial, gather(), RES20)) == f"{trial} is finished: 1 run of 2 epochs"


def test_what_an_interrupted_call_asked_for_holds(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        call(trial, "train.max_steps=null", "train.on_stuck=stop", interrupts=True)
    resumed: list[Mapping[str, object]] = []
    real = lifecycle.resume_training

    def resume(path: Path, changes: Mapping[str, object], observer: Observer) -> object:
        resumed.append(changes)
        return real(path, changes, observer)

    monkeypatch.setattr(lifecycle, "resume_training", resume)
    job = call(trial)
    assert [changes["train.on_stuck"] for changes in resumed] == ["stop"]
    assert standing_of(job, RES20[0]).state == "finished"


def test_a_run_that_leaves_unfinished_is_a_failure(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "resume_training", lambda *given: None)
    with pytest.raises(LowmemError, match="was left at step 2, epoch 1 of 2"):
        call(trial)


def test_ctrl_c_in_the_report(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(trial)
    monkeypatch.setattr(lowmem.report, "write_report", lambda *given, **named: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped in the report, all runs are saved; go on with") as caught:
        reproduce_job(trial, gather(), RES20, say, lambda result: None, dry_run=False)
    assert caught.value.exit_code == 130
    assert not (trial / "job.owner.json").exists()
