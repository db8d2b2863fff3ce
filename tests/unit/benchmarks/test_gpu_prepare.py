"""A prepared job: every question can be asked as it stands; and what a machine lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import questions, wheels
from benchmarks.gpu.job import PARTS, questions_file, read_job
from benchmarks.gpu.parts.__main__ import MODULES
from benchmarks.gpu.plans import CARD, ON_CARD, QUICK, Network, Plans
from benchmarks.gpu.prepare import prepare
from lowmem.bench.plan_checks import PlanQuestion
from lowmem.choose.request import Budget
from lowmem.core.units import GIB, MIB
from lowmem.plan.record import Plan
from lowmem.trial import Trial


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a card, with a network that is planned in a moment; a rehearsal's job is made in every rehearsal."""
    folder = tmp_path_factory.mktemp("prepared")
    small = replace(ON_CARD, networks=(Network("small", "res20", "basic"),), width=8, budgets=(1.0 * GIB, 900.0 * MIB))
    prepare(folder, replace(small, pictures=1000))
    return folder


def _asked(job: Path, part: str) -> Any:
    return json.loads(questions_file(job, part).read_text())


@pytest.mark.slow
def test_every_part_has_questions_and_a_module(job: Path) -> None:
    assert set(MODULES) == {part.name for part in PARTS}
    found = read_job(job)
    for part in PARTS:
        assert _asked(job, part.name)
    assert found.device == "cuda"
    assert dict(found.limits) == {part.name: part.seconds for part in PARTS}
    assert found.conditions["torch"]


@pytest.mark.slow
def test_plans_and_trials_are_whole(job: Path) -> None:
    for one in _asked(job, "memory"):
        trial = Trial(**one["trial"])
        assert trial.device == "cuda"
        if one["budget"]:
            budget = Budget(**one["budget"])
            plan = Plan.from_json(trial.plan)
            assert (plan.predicted.peak_allocated_bytes or 0) <= budget.tensor_bytes
            assert plan.batch == plan.micro_batch == trial.batch
            assert trial.cap_bytes is not None
    untouched, alone, there, unpinned = _asked(job, "host")
    assert untouched["trial"]["plan"] is None
    assert alone["budget"] == there["budget"] == unpinned["budget"]
    assert alone["predicted"]["host_bytes"] == 0
    assert unpinned["trial"] == there["trial"]
    for one in _asked(job, "gradients"):
        if one["kind"] == "scarce":
            assert Trial(**one["planned"]).detailed
            assert Trial(**one["untouched"]).plan is None
        else:
            assert Plan.from_json(PlanQuestion(**one["question"]).plan).ladder == ()
    for one in _asked(job, "out-of-memory"):
        assert Plan.from_json(PlanQuestion(**one["question"]).plan).stages


@pytest.mark.slow
def test_in_the_part_of_host_memory_something_waits_there() -> None:
    *_, there, _ = questions.host(QUICK, Plans(QUICK))
    assert there["predicted"]["host_bytes"] > 0
    assert Plan.from_json(there["trial"]["plan"]).schedule.hosts


def test_the_first_minutes_tell_the_most_and_all_fit_into_nine() -> None:
    seconds = [part.seconds for part in PARTS if part.seconds is not None]
    assert sum(seconds) < 9 * 60
    assert [part.name for part in PARTS[:3]] == ["facts", "gradients", "memory"]
    assert CARD == "gtx1060-6g"


def test_what_the_machine_lacks() -> None:
    found = wheels.missing(wheels.names_of(wheels.PRESENT))
    names = [one.split("==")[0] for one in found]
    assert names == ["annotated-types", "pydantic", "pydantic-core", "typing-inspection"]
    command = wheels.download_command(found, "wheels")
    assert "--python-version 3.12" in command
    assert command.endswith(" ".join(found))
    everything = wheels.missing(set())
    assert len(everything) > len(found)
    assert any(one.startswith("torch==") for one in everything)


def test_a_list_of_packages_as_pip_prints_it() -> None:
    assert wheels.names_of("PyYAML==6.0\ntyping_extensions 4.1\n") == {"pyyaml", "typing-extensions"}
