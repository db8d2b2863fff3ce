"""A run under a plan: the same weights as without one, replayed on resume, planned again for another budget, tried by
real steps when that is asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.choose import host
from lowmem.config.settings import Settings
from lowmem.core.errors import CorruptCheckpoint, Infeasible, UsageError
from lowmem.core.units import KIB, MIB
from lowmem.lifecycle import execute, fork_run, recorded_settings, resume_training, run_training
from lowmem.plan.policy import GRADS
from lowmem.plan.record import Plan
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.store import RunFolder
from lowmem.train.replica import config_hash
from tests.conftest import assert_same_run
from tests.faults.injection import events
from tests.tiny import Heard, copy_run, tiny


def _settings(*sets: str) -> Settings:
    return tiny(
        "model.width=4", "data.train_subset=100", "data.test_subset=50", "train.batch=50", "train.epochs=1",
        "train.memory_format=contiguous", *sets,
    )  # fmt: skip


def _plan(path: Path) -> dict[str, Any]:
    return json.loads((path / "plan.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def unplanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unplanned") / "run"
    run_training(_settings(), path)
    assert not (path / "plan.json").exists()
    return path


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of two steps under a plan; to be copied."""
    path = tmp_path_factory.mktemp("begun") / "run"
    run_training(_settings("train.max_steps=1", "memory.tensors=8M"), path)
    return path


@pytest.fixture(scope="module")
def replanned(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It went on to its end within less."""
    path = copy_run(begun, tmp_path_factory.mktemp("replanned") / "run")
    smaller = recorded_settings(path).replace({"memory.tensors": "6500K", "train.max_steps": None}, "resume")
    resume_training(path, smaller)
    return path


def test_a_planned_run_has_the_unplanned_ones_bits(unplanned: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run_training(_settings("memory.tensors=8M"), path)
    plan = _plan(path)
    assert plan["budget_bytes"] == 8 * MIB
    assert set(plan["blocks"].values()) != {"SAVE_ALL"}
    (measured,) = events(path, "measured")
    predicted = plan["predicted"]["peak_allocated_bytes"]
    # Predicted as the caching allocator counts, which rounds every tensor of this tiny net up to 512 bytes.
    assert 0.98 * predicted < measured["measured_peak_bytes"] <= predicted
    assert measured["measured_peak_bytes"] <= 8 * MIB
    assert_same_run(path, unplanned)


def test_a_resume_that_dies_before_it_goes_on_leaves_the_plan_with_its_settings(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of another budget under the settings of the old one would be replayed as if nothing had changed."""
    path = copy_run(begun, tmp_path / "run")
    files = [path / name for name in ("plan.json", "config.yaml")]
    before = [file.read_text() for file in files]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "tidy", killed)
    with pytest.raises(KeyboardInterrupt):
        resume_training(path, {"memory.tensors": "6500K"})
    assert [file.read_text() for file in files] == before


def test_resume_replays_the_plan_and_another_budget_is_a_logged_event(
    unplanned: Path, begun: Path, replanned: Path, tmp_path: Path
) -> None:
    path = copy_run(begun, tmp_path / "run")
    before = (path / "plan.json").read_text()
    resume_training(path, recorded_settings(path))  # stops at once: max_steps is reached
    assert (path / "plan.json").read_text() == before
    assert not events(path, "replan")
    assert _plan(replanned)["budget_bytes"] == 6500 * KIB
    assert events(replanned, "replan")
    assert_same_run(replanned, unplanned)


def test_gradients_wait_where_nothing_fits_without_and_the_run_has_the_same_bits(tmp_path: Path) -> None:
    wide = ("model.width=16", "train.batch=20", "memory.allow_accumulation=false", "data.train_subset=40")
    unplanned, there = tmp_path / "unplanned", tmp_path / "there"
    run_training(_settings(*wide), unplanned)
    with pytest.raises(Infeasible):
        run_training(_settings(*wide, "memory.tensors=15M"), there)
    run_training(_settings(*wide, "memory.tensors=15M", "memory.host=64M", "memory.link=12"), there)
    assert GRADS in (there / "plan.json").read_text()
    assert_same_run(there, unplanned)


def test_host_memory_is_replayed_and_where_less_is_free_planned_again(
    unplanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    waiting = ("memory.tensors=8M", "memory.host=64M", "memory.link=12")
    run_training(_settings("train.max_steps=1", *waiting), here)
    copy_run(here, there)
    before = (here / "plan.json").read_text()
    planned = Plan.from_json(json.loads(before))
    assert planned.schedule.hosts
    assert planned.predicted.host_bytes is not None
    resume_training(here, {"train.max_steps": None})
    assert (here / "plan.json").read_text() == before
    assert not events(here, "replan")
    assert_same_run(here, unplanned)

    heard, free = Heard(), planned.predicted.host_bytes - 1
    monkeypatch.setattr(host, "free_host_bytes", lambda: free)
    resume_training(there, {"train.max_steps": None}, heard)
    (event,) = events(there, "replan")
    assert event["why"] in heard.notes
    assert event["why"].endswith("of host memory are free: the same computation is planned again")
    again = Plan.from_json(_plan(there))
    assert (again.budget_bytes, again.batch, again.micro_batch) == (planned.budget_bytes, 50, 50)
    assert 0 <= (again.predicted.host_bytes or 0) <= free // 2
    assert recorded_settings(there).config.memory.host == 64 * MIB
    assert_same_run(there, unplanned)


def test_accumulation_is_said_and_recorded(tmp_path: Path) -> None:
    path, heard = tmp_path / "run", Heard()
    run_training(_settings("memory.tensors=4500K"), path, heard)
    plan = _plan(path)
    assert (plan["exact"], plan["accumulation"] > 1) == (False, True)
    (warning,) = heard.warnings
    assert "NOT the same computation" in warning
    assert events(path, "warning")


def test_nothing_is_left_behind_when_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(Infeasible):
        run_training(_settings("memory.tensors=500K", "memory.allow_accumulation=false"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_auto_batch_needs_something_to_fit_into(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--vram"):
        run_training(_settings("train.batch=auto"), tmp_path / "run")


def test_a_damaged_plan_is_refused(begun: Path, tmp_path: Path) -> None:
    path = copy_run(begun, tmp_path / "run")
    (path / "plan.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match=r"plan\.json"):
        resume_training(path)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("memory.tensors=8M", "memory.platform=windows"), "give the card"),
        (("memory.confirm=always",), "give --vram"),
        (("memory.calibrate=always",), "give --vram"),
    ],
)
def test_what_would_be_ignored_is_refused(sets: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        run_training(_settings(*sets), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _auto(path: Path) -> None:
    """A run of which the plan chose the batch, stopped after its first epoch."""
    sets = ("train.batch=auto", "data.train_subset=400", "checkpoint.keep_every=1", "train.epochs=2")
    run_training(_settings(*sets, "memory.tensors=12M"), path)


def _as_older_versions_recorded(run: Path) -> None:
    """As they left `auto_batch` in config.yaml, with which the checkpoints' identity was made."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("auto_batch: false", "auto_batch: true"))
    identity = {"settings": config_hash(recorded_settings(run).config)}
    for found in checkpoints.checkpoint_folders(run / "checkpoints"):
        saved = checkpoints.load(found)
        state = {**saved.state, "identity": {**saved.state["identity"], **identity}}
        shutil.rmtree(found)
        checkpoints.save(run / "checkpoints", replace(saved, state=state), keep=9)


@pytest.mark.slow  # the quick ones are in tests/unit/choose/test_decide.py and test_fork.py
@pytest.mark.parametrize("older", [False, True])
def test_a_batch_that_was_chosen_is_not_chosen_again(older: bool, tmp_path: Path) -> None:
    source = tmp_path / "run"
    _auto(source)
    if older:
        _as_older_versions_recorded(source)
    decided = recorded_settings(source).config
    resume_training(source, {"memory.tensors": "11M"})
    assert events(source, "replan")
    assert _plan(source)["batch"] == decided.train.batch
    batch = 32 if decided.train.batch != 32 else 64
    fork = fork_run(source, at=1, changes={"train.batch": batch}, out=tmp_path / "fork").path
    assert _plan(fork)["batch"] == batch
    settings = recorded_settings(fork).config
    assert (settings.train.batch, settings.memory.auto_batch, settings.optim.lr) == (batch, False, decided.optim.lr)
    with pytest.raises(UsageError, match="auto_batch"):
        fork_run(source, at=1, changes={"memory.auto_batch": True}, out=tmp_path / "another")


def test_runs_are_planned_with_their_ladder(begun: Path, replanned: Path) -> None:
    first = _plan(begun)
    assert len(first["ladder"]) > 1
    second = _plan(replanned)
    assert second["ladder"]
    assert second["ladder"][0]["budget_bytes"] < second["budget_bytes"] < first["budget_bytes"]


def test_a_confirmed_run_records_it_and_has_the_same_bits(unplanned: Path, tmp_path: Path) -> None:
    path, heard = tmp_path / "run", Heard()
    run_training(_settings("memory.confirm=always", "memory.tensors=8M"), path, heard)
    (event,) = events(path, "confirmed")
    assert len(event["trials"]) == 1
    assert abs(event["trials"][0]["peak_error"]) < 0.03
    (chosen,) = (one for one in _plan(path)["candidates"] if one["refused_because"] is None)
    assert chosen["measured_peak_bytes"] == event["trials"][0]["measured_peak_bytes"]
    assert chosen["measured_step_seconds"] > 0
    assert sum(line.startswith("tried ") for line in heard.notes) == 1
    assert_same_run(path, unplanned)


@pytest.mark.slow  # the quick ones, by scripted measurements, are in tests/unit/trial/test_plan_trial.py
def test_auto_batch_goes_by_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "run"
    result = run_training(_settings("memory.confirm=always", "train.batch=auto", "memory.tensors=8M"), path)
    (event,) = events(path, "confirmed")
    trials = event["trials"]
    assert len(trials) > 1
    assert all(one["measured_step_seconds"] for one in trials)
    assert f"batch: {_plan(path)['batch']}  # auto" in (path / "config.yaml").read_text()
    assert result.finished


def test_nothing_is_left_behind_when_no_trial_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise Infeasible(1, 2, "measured", "less")

    monkeypatch.setattr(execute, "confirm_run", refuse)
    with pytest.raises(Infeasible):
        run_training(_settings("memory.confirm=always", "memory.tensors=8M"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
