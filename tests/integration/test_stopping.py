"""Runs that end before their last epoch: by patience, by the clock. Each goes on from there, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem.config.schema import Config
from lowmem.config.settings import from_yaml
from lowmem.core.errors import PreflightError, UsageError
from lowmem.lifecycle import fork_run, resume_training, run_training
from lowmem.lifecycle.verify import verify
from lowmem.report import write_report
from lowmem.runs.checkpoint_state import Best, RunState
from lowmem.runs.view import RunView, summarize
from lowmem.runs.watch import Live
from lowmem.train.watchers import is_finished
from tests.conftest import assert_same_run, exact_rows
from tests.tiny import Heard, copy_run, tiny

EPOCHS, PATIENCE = 9, 2
PATIENT = (f"train.epochs={EPOCHS}", f"train.patience={PATIENCE}", "data.val_split=10", "optim.lr=0.5")


def told(run: Path, kind: str) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in lines if event["event"] == kind]


def last_epoch(run: Path) -> int:
    """By patience, of the rows: after the epoch that is so many later than the best before it."""
    best, best_error = 0, float("inf")
    for row in RunView(run).epochs:
        assert row.val_error_pct is not None
        if row.val_error_pct < best_error:
            best, best_error = row.epoch, row.val_error_pct
        if row.epoch - best >= PATIENCE:
            return row.epoch
    return EPOCHS


# -- patience ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that ends by patience, and what it said."""
    run, heard = tmp_path_factory.mktemp("early") / "run", Heard()
    outcome = run_training(tiny(*PATIENT), run, heard)
    assert outcome.finished
    assert outcome.why == "train.patience"
    return run, heard.notes


def test_it_ends_after_so_many_epochs_without_a_better_error(early: tuple[Path, list[str]]) -> None:
    run, notes = early
    end = last_epoch(run)
    assert len(RunView(run).epochs) == end < EPOCHS, "the rows go no further, and the run was to be longer"
    (done,) = told(run, "done")
    assert (done["reason"], done["epoch"], done["best_epoch"]) == ("train.patience", end, end - PATIENCE)
    words, then = notes[-2:]
    assert words.startswith(
        f"{run} is finished early, of {EPOCHS} epochs: {PATIENCE} epochs without a better error (train.patience = 2): "
    )
    assert f"best {min(row.val_error_pct or 0 for row in RunView(run).epochs):.2f} % in epoch {end - PATIENCE}" in words
    assert f"`lowmem resume {run} --set train.patience=null` goes on to the last epoch" in then


def test_everybody_takes_it_for_finished(early: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, end = early[0], last_epoch(early[0])
    assert RunView(run).state == Live(run).look().state == "finished early"
    assert summarize(run).state == "finished"
    verified = verify(run)
    assert (verified.finished, verified.can_resume, verified.epoch) == (True, True, end)
    write_report([run], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert f"finished early, {end} of {EPOCHS} epochs: no better error (train.patience)" in text


def test_it_ends_at_the_same_epoch_when_it_was_resumed_in_the_middle_of_one(
    early: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, (last,) = tmp_path / "run", RunView(early[0]).epochs[-1:]
    assert last.step is not None
    for stop in (2, last.step - 1, last.step, None):  # the last but one: right where it is to be judged
        settings = {"train.max_steps": stop}
        if not run.exists():
            run_training(tiny(*PATIENT, f"train.max_steps={stop}"), run)
        else:
            assert resume_training(run, settings).finished == (stop is None or stop == last.step)
    assert_same_run(run, early[0])


def test_a_resume_says_that_it_is_finished_and_goes_on_if_it_is_to(
    early: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, again, further = copy_run(early[0], tmp_path / "run"), Heard(), Heard()
    assert resume_training(run, observer=again).finished
    assert [text.replace(str(run), "RUN") for text in again.notes[-2:]] == [
        text.replace(str(early[0]), "RUN") for text in early[1][-2:]
    ]
    assert not [text for text in again.notes if "resuming" in text]
    outcome = resume_training(run, {"train.patience": None}, further)
    assert (outcome.finished, outcome.why, outcome.state.epoch) == (True, "", EPOCHS)
    assert RunView(run).state == "finished"
    whole = tmp_path / "whole"
    run_training(tiny(*PATIENT, "train.patience=null"), whole)
    assert_same_run(run, whole)


def test_a_fork_counts_anew(early: tuple[Path, list[str]], tmp_path: Path) -> None:
    end = last_epoch(early[0])
    outcome = fork_run(early[0], at="last", changes={"optim.lr": 0.01}, out=tmp_path / "fork")
    assert outcome.state.epoch >= min(EPOCHS, end + 1 + PATIENCE)


def test_the_last_epoch_is_no_early_end() -> None:
    config = Config.model_validate({"train": {"epochs": 4, "patience": 2}}).train
    state = RunState(epoch=3, best=Best(2, 6, 50.0, "test"))
    assert not is_finished(config, state)
    state.epoch, state.step_in_epoch = 4, 0
    assert is_finished(config, state)
    state = RunState(epoch=3, best=Best(1, 3, 50.0, "test"))
    assert is_finished(config, state)
    state.step_in_epoch = 1  # after a resume with less patience: at the end of the epoch
    assert not is_finished(config, state)


# -- the clock ---------------------------------------------------------------------------------------------------------

SECONDS = 6.0
HOURS = f"train.hours={SECONDS / 3600}"
TIMED = ("data.train_subset=400", "model.width=4")  # twenty steps an epoch


def test_as_many_epochs_as_fit_and_the_schedule_is_scaled_to_them(tmp_path: Path) -> None:
    run, heard = tmp_path / "run", Heard()
    outcome = run_training(tiny(HOURS, "train.epochs=5000", *TIMED), run, heard)
    recorded = from_yaml(run / "config.yaml")
    epochs = recorded.config.train.epochs
    assert recorded.sources["train.epochs"].startswith("what fits into train.hours = 0.0016")
    (event,) = told(run, "hours")
    assert (event["epochs"], event["asked_epochs"]) == (epochs, 5000)
    each = event["epoch_seconds"]
    assert isinstance(each, float)
    assert epochs == int(0.95 * SECONDS / each) < 5000
    assert f"{epochs} epoch" in next(text for text in heard.notes if "train.hours" in text)
    # Done in time; or, on a machine that became slower, left when it was over: the step under way comes on top.
    spent = outcome.state.elapsed_seconds
    assert spent < SECONDS + 2 * each + 1.5
    if outcome.finished:
        assert outcome.state.epoch == epochs
        assert "of 0:06 (train.hours" in heard.notes[-2]
    else:
        assert spent >= SECONDS
        assert RunView(run).state == "out of time"
    assert resume_training(run, {"train.hours": None}).state.epoch == epochs


@pytest.mark.parametrize("more", [(), ("optim.kind=adamw", "optim.ema=0.9", "optim.clip_norm=1", "data.mixup=0.3")])
def test_all_of_a_short_run_fit(tmp_path: Path, more: tuple[str, ...]) -> None:
    run, heard = tmp_path / "run", Heard()
    assert run_training(tiny("train.hours=1", "train.epochs=2", *more), run, heard).finished
    assert from_yaml(run / "config.yaml").config.train.epochs == 2
    assert any("train.hours = 1: all 2 epochs fit, about 0:0" in text for text in heard.notes)
    plain = tmp_path / "plain"
    run_training(tiny("train.epochs=2", *more), plain)
    assert_same_run(run, plain)  # what was measured before the first step left no trace


def test_the_same_epochs_by_hand_are_the_same_run(tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert not run_training(tiny("train.hours=0.002", "train.epochs=5000", "train.max_steps=4"), run).finished
    epochs = from_yaml(run / "config.yaml").config.train.epochs
    assert epochs < 5000
    run_training(tiny(f"train.epochs={epochs}", "train.max_steps=5"), plain)
    resume_training(run, {"train.max_steps": 5})
    assert exact_rows(run) == exact_rows(plain)
    assert (run / "steps.csv").read_text() == (plain / "steps.csv").read_text()


def test_when_the_time_is_over_it_is_left_saved_and_goes_on(tmp_path: Path) -> None:
    """Limits that are given later, so that the run is longer than they are."""
    run, plain, heard, again = tmp_path / "run", tmp_path / "plain", Heard(), Heard()
    run_training(tiny("train.epochs=5", "train.max_steps=4"), run)
    spent = RunView(run).checkpoints[0].step
    outcome = resume_training(run, {"train.max_steps": None, "train.hours": 1e-6}, heard)  # is over as it begins
    assert (outcome.finished, outcome.why, outcome.state.step) == (False, "train.hours", spent)
    assert any(text.startswith("train.hours = 1e-06, of which 0:0") for text in heard.notes)
    words, then = heard.notes[-2:]
    assert "of training as asked (train.hours = 1e-06)" in words
    assert "is saved at epoch 2, step 4 of 15, best " in words
    assert f"`lowmem resume {run} --hours H` goes on until it was trained for H hours in all" in then
    assert RunView(run).state == Live(run).look().state == "out of time"
    assert summarize(run).state == "stopped"
    outcome = resume_training(run, {"train.hours": (outcome.state.elapsed_seconds + 0.05) / 3600}, again)
    assert not outcome.finished
    assert outcome.state.step > spent
    assert resume_training(run, {"train.hours": None}).finished
    run_training(tiny("train.epochs=5"), plain)
    assert_same_run(run, plain)


def test_not_even_an_epoch_fits(tmp_path: Path) -> None:
    with pytest.raises(
        PreflightError, match=r"not one epoch fits into train.hours = 1e-06: .* give --hours [0-9.e-]+ or more"
    ):
        run_training(tiny("train.hours=1e-6"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_warm_up_that_is_longer_than_the_time(tmp_path: Path) -> None:
    longer = ("train.hours=0.002", "train.epochs=5000", "schedule.warmup_epochs=4900")
    with pytest.raises(UsageError, match=r"of 5000 epochs \d+ fit into train.hours = 0.002: .*warmup_epochs 4900"):
        run_training(tiny(*longer), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fork_has_the_time_that_it_is_given(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(tiny("train.hours=1", "train.max_steps=3"), run)
    out, changes = tmp_path / "fork", {"optim.lr": 0.01, "train.max_steps": None}
    with pytest.raises(UsageError, match=r"would stop at train.hours = 1e-06, which count from the old run"):
        fork_run(run, at="last", changes={**changes, "train.hours": 1e-6}, out=out)
    heard = Heard()
    assert fork_run(run, at="last", changes=changes, out=out, observer=heard).finished
    assert "train.hours: 1.0 -> None" in heard.notes
    assert from_yaml(out / "config.yaml").config.train.hours is None
