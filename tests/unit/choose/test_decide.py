"""A run under a plan: the same weights as without one, replayed on resume, planned again for another budget."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lowmem.choose.batch_split import BatchSplit, preferred
from lowmem.choose.decide import DataSize, RecordedRun, decide
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import Infeasible, UsageError
from lowmem.core.units import KIB, MIB
from lowmem.lifecycle.api import fork_run, recorded_settings, resume_training, run_training
from lowmem.runs import checkpoint as checkpoints
from lowmem.train.state import config_hash
from tests.conftest import assert_same_run

SETS = ["data.train_subset=100", "data.test_subset=50", "train.log_every_steps=1", "train.batch=50"]
BASE = {"model.arch": "res20", "model.width": 4, "data.source": "shapes", "train.epochs": 1}


FIXED = {"train__precision": "fp32", "train__memory_format": "contiguous", "train__device": "cpu"}


def _settings(sets: tuple[str, ...] = (), **flags: object) -> Settings:
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return gather(flags={**BASE, **named}, sets=[*SETS, *sets])


@pytest.fixture(scope="module")
def unplanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unplanned") / "run"
    run_training(_settings(train__precision="fp32"), path)
    assert not (path / "plan.json").exists()
    return path


def _events(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (path / "events.jsonl").read_text().splitlines()]


def test_a_planned_run_has_the_unplanned_ones_bits(unplanned: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run_training(_settings(train__precision="fp32", memory__vram="8M"), path)
    plan = json.loads((path / "plan.json").read_text())
    assert plan["budget_bytes"] == 8 * MIB
    assert set(plan["blocks"].values()) != {"SAVE_ALL"}
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    measured = next(event for event in events if event["event"] == "measured")
    predicted = plan["predicted"]["peak_allocated_bytes"]
    # Predicted as the caching allocator counts, which rounds every tensor of this tiny net up to 512 bytes.
    assert 0.98 * predicted < measured["measured_peak_bytes"] <= predicted
    assert measured["measured_peak_bytes"] <= 8 * MIB
    assert_same_run(path, unplanned)


def test_resume_replays_the_plan_and_another_budget_is_a_logged_event(unplanned: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run_training(_settings(("train.max_steps=1",), train__precision="fp32", memory__vram="8M"), path)
    before = (path / "plan.json").read_text()
    recorded = recorded_settings(path)
    resume_training(path, recorded)  # stops at once: max_steps is reached
    assert (path / "plan.json").read_text() == before
    assert "replan" not in _events(path)
    smaller = recorded.replace({"memory.vram": "6500K", "train.max_steps": None}, "resume")
    resume_training(path, smaller)
    assert json.loads((path / "plan.json").read_text())["budget_bytes"] == 6500 * KIB
    assert "replan" in _events(path)
    assert_same_run(path, unplanned)


def test_accumulation_is_said_and_recorded(tmp_path: Path) -> None:
    from lowmem.train.observer import Observer

    heard: list[str] = []

    class Listener(Observer):
        def warning(self, text: str) -> None:
            heard.append(text)

    path = tmp_path / "run"
    run_training(_settings(train__precision="fp32", memory__vram="4500K"), path, Listener())
    plan = json.loads((path / "plan.json").read_text())
    assert (plan["exact"], plan["accumulation"] > 1) == (False, True)
    assert len(heard) == 1
    assert "NOT the same computation" in heard[0]
    assert "warning" in _events(path)


def test_nothing_is_left_behind_when_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(Infeasible):
        run_training(_settings(memory__vram="500K"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_batch_with_the_most_pictures_per_second_and_its_learning_rate() -> None:
    asked = _settings(("train.batch=auto",), memory__vram="20M")
    decided = decide(asked, DataSize(train_pictures=5000), on_paper=True)
    settings, choice, batch = decided.settings, decided.choice, decided.settings.config.train.batch
    assert not settings.config.memory.auto_batch
    assert choice.plan.batch == batch
    assert choice.plan.exact
    assert settings.config.optim.lr == pytest.approx(0.1 * batch / 128)
    assert settings.sources["optim.lr"].startswith("linear rule") or batch == 128
    words = " ".join(one.what for one in choice.plan.candidates)
    assert "batch" in words


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({32: 100.0, 64: 101.0, 128: 101.9}, 128),
        ({32: 102.1, 64: 101.0, 128: 100.0}, 64),  # the recipe's is too far behind
        ({64: 100.0, 128: 100.0, 256: 101.9}, 128),
        ({32: 100.0, 64: 99.0}, 64),
        ({32: 100.0, 64: 90.0, 512: 120.0}, 512),
    ],
)
def test_of_batches_that_are_as_fast_the_recipes_own_or_the_largest(rates: dict[int, float], chosen: int) -> None:
    fitting = [BatchSplit((batch,), (batch / rate,)) for batch, rate in rates.items()]
    assert preferred(fitting, 128).batch == chosen


def test_what_is_kept_of_recorded_plans() -> None:
    """Of a run whose batch was chosen by an older version, which left it to be chosen: it never is again."""
    settings = _settings(("train.batch=64", "memory.auto_batch=true"), **FIXED, memory__vram="20M")
    plan = decide(_settings(("train.batch=64",), **FIXED, memory__vram="20M"), on_paper=True).plan
    assert plan is not None
    run = RecordedRun(settings.config, [plan])
    kept = decide(settings, recorded=run)
    assert (kept.plan, kept.settings, kept.changed) == (plan, settings, False)
    # The machine of a card that is planned for, which is none here.
    assert decide(settings.replace({"memory.platform": "linux"}, "resume"), recorded=run).plan == plan
    less = settings.replace({"memory.vram": "9M"}, "resume")
    again = decide(less, recorded=run)
    assert again.plan is not None
    assert (again.plan.batch, again.plan.micro_batch, again.plan.budget_bytes) == (64, 64, 9 * MIB)
    assert (again.settings, again.changed, again.split.shares) == (less, True, (64,))
    with pytest.raises(Infeasible):
        decide(settings.replace({"memory.vram": "4M"}, "resume"), recorded=run)
    half = replace(plan, batch=32, micro_batch=32, shares=(32, 32))
    alone = decide(settings, recorded=RecordedRun(settings.config, [half, half]))
    assert alone.plan is not None
    assert (alone.plan.batch, alone.settings, alone.changed) == (64, settings, True)
    fork = decide(less, recorded=replace(run, fork=True)).plan
    assert fork is not None
    assert (fork.batch, fork.budget_bytes) == (64, 9 * MIB)
    unplanned = settings.replace({"memory.vram": None}, "resume")
    assert decide(unplanned, recorded=run).plan == plan, "it goes on as it was planned"
    assert decide(unplanned, recorded=replace(run, fork=True)).plan is None
    other_kernels = settings.replace({"train.deterministic": False}, "fork")
    assert decide(other_kernels, recorded=replace(run, fork=True)).changed, "they have workspaces of their own"


def test_auto_batch_needs_something_to_fit_into(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--vram"):
        run_training(_settings(("train.batch=auto",)), tmp_path / "run")


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    from lowmem.core.errors import CorruptCheckpoint

    path = tmp_path / "run"
    run_training(_settings(("train.max_steps=1",), train__precision="fp32", memory__vram="8M"), path)
    (path / "plan.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match=r"plan\.json"):
        resume_training(path)


@pytest.mark.parametrize(
    ("flags", "sets", "says"),
    [
        ({"memory__vram": "8M"}, ("memory.platform=windows",), "give the card"),
        ({}, ("memory.confirm=always",), "give --vram"),
        ({}, ("memory.calibrate=always",), "give --vram"),
    ],
)
def test_what_would_be_ignored_is_refused(
    flags: dict[str, object], sets: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        run_training(_settings(sets, **flags), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _auto(path: Path) -> None:
    """A run of which the plan chose the batch, stopped after its first epoch."""
    sets = ("train.batch=auto", "data.train_subset=400", "checkpoint.keep_every=1", "train.epochs=2")
    run_training(_settings(sets, train__precision="fp32", memory__vram="12M"), path)


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


@pytest.mark.parametrize("older", [False, True])
def test_a_batch_that_was_chosen_is_not_chosen_again(older: bool, tmp_path: Path) -> None:
    source = tmp_path / "run"
    _auto(source)
    if older:
        _as_older_versions_recorded(source)
    decided = recorded_settings(source).config
    resume_training(source, {"memory.vram": "11M"})
    assert "replan" in _events(source)
    assert json.loads((source / "plan.json").read_text())["batch"] == decided.train.batch
    batch = 32 if decided.train.batch != 32 else 64
    fork = fork_run(source, at=1, changes={"train.batch": batch}, out=tmp_path / "fork").path
    assert json.loads((fork / "plan.json").read_text())["batch"] == batch
    settings = recorded_settings(fork).config
    assert (settings.train.batch, settings.memory.auto_batch, settings.optim.lr) == (batch, False, decided.optim.lr)
    with pytest.raises(UsageError, match="auto_batch"):
        fork_run(source, at=1, changes={"memory.auto_batch": True}, out=tmp_path / "another")
