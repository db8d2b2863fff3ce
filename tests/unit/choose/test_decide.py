"""What a plan is decided to be: for new settings, and of what a run has recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem.choose.batch_size import BatchSplit, preferred
from lowmem.choose.decide import DataSize, RecordedRun, decide
from lowmem.config.settings import Settings
from lowmem.core.errors import Infeasible
from lowmem.core.units import MIB
from lowmem.plan.record import Plan
from tests.tiny import tiny

FIXED = ("train.memory_format=contiguous", "memory.tensors=20M")


def _settings(*sets: str) -> Settings:
    return tiny(
        "model.width=4", "data.train_subset=100", "data.test_subset=50", "train.batch=50", "train.epochs=1", *sets
    )


@pytest.mark.slow
def test_the_batch_with_the_most_pictures_per_second_and_its_learning_rate() -> None:
    asked = _settings("train.batch=auto", "memory.tensors=20M")
    decided = decide(asked, DataSize(train_pictures=5000), on_paper=True)
    settings, split, batch = decided.settings, decided.planned, decided.settings.config.train.batch
    assert split is not None
    choice = split.choices[0]
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


@pytest.fixture(scope="module")
def recorded() -> tuple[Settings, Plan, RecordedRun]:
    """Of a run whose batch was chosen by an older version, which left it to be chosen: it never is again."""
    settings = _settings("train.batch=64", "memory.auto_batch=true", *FIXED)
    plan = decide(_settings("train.batch=64", *FIXED), on_paper=True).plan
    assert plan is not None
    return settings, plan, RecordedRun(settings.config, [plan])


def test_what_is_kept_of_recorded_plans(recorded: tuple[Settings, Plan, RecordedRun]) -> None:
    settings, plan, run = recorded
    kept = decide(settings, recorded=run)
    assert (kept.plan, kept.settings, kept.changed) == (plan, settings, False)
    # The machine of a card that is planned for, which is none here.
    assert decide(settings.replace({"memory.platform": "linux"}, "resume"), recorded=run).plan == plan
    less = settings.replace({"memory.tensors": "9M"}, "resume")
    again = decide(less, recorded=run)
    assert again.plan is not None
    assert (again.plan.batch, again.plan.micro_batch, again.plan.budget_bytes) == (64, 64, 9 * MIB)
    assert (again.settings, again.changed, again.split.shares) == (less, True, (64,))
    unplanned = settings.replace({"memory.tensors": None}, "resume")
    assert decide(unplanned, recorded=run).plan == plan, "it goes on as it was planned"
    assert decide(unplanned, recorded=replace(run, fork=True)).plan is None


@pytest.mark.slow
def test_recorded_plans_for_less_for_fewer_processes_and_for_forks(
    recorded: tuple[Settings, Plan, RecordedRun],
) -> None:
    settings, plan, run = recorded
    less = settings.replace({"memory.tensors": "9M"}, "resume")
    with pytest.raises(Infeasible):
        decide(settings.replace({"memory.tensors": "4M"}, "resume"), recorded=run)
    half = replace(plan, batch=32, micro_batch=32, shares=(32, 32))
    alone = decide(settings, recorded=RecordedRun(settings.config, [half, half]))
    assert alone.plan is not None
    assert (alone.plan.batch, alone.settings, alone.changed) == (64, settings, True)
    fork = decide(less, recorded=replace(run, fork=True)).plan
    assert fork is not None
    assert (fork.batch, fork.budget_bytes) == (64, 9 * MIB)
    other_kernels = settings.replace({"train.deterministic": False}, "fork")
    assert decide(other_kernels, recorded=replace(run, fork=True)).changed, "they have workspaces of their own"
    joint_norms = settings.replace({"train.sync_bn": True}, "fork")
    assert decide(joint_norms, recorded=replace(run, fork=True)).changed, (
        "they have sums and a communicator of their own"
    )
