"""The order of measuring, its limit of time, what is kept of failures; with real steps in this process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.bench import ENGINE, FIRST_MODE, NO_TIME, PLAIN_DEFAULT
from lowmem.bench.results import Results
from lowmem.bench.run import Bench
from lowmem.bench.tables import MODES, TableSetup, account, table_cells
from lowmem.isolate import OUT_OF_MEMORY, Call, CallResult
from lowmem.trial import Trial, TrialResult
from tests.isolated import call_here

SETUP = TableSetup(
    arch="res20",
    block="basic",
    width=2,
    batch=8,
    device="cpu",
    budgets=(0.75,),
    rounds=3,
    steps=1,
    warmup=1,
    quick=True,
)
HERE: dict[str, Any] = {"lowmem": "1", "torch": "2", "python": "3", "device": "cpu", "cpu_threads": 1}


def run_as(trial_of: Callable[[Trial, float], TrialResult]) -> Call:
    """In place of a process."""

    def call(_: str, values: dict[str, Any], timeout_seconds: float, **__: object) -> CallResult:
        return CallResult(ended="answered", answer=asdict(trial_of(Trial(**values), timeout_seconds)))

    return call


class Told(Bench):
    """With what it said; only of the first table, unless others are wanted."""

    def __init__(
        self,
        folder: Path,
        run: Callable[[Trial, float], TrialResult] | None = None,
        seconds: float = 1e4,
        setup: TableSetup = SETUP,
    ) -> None:
        self.told: list[str] = []
        # Not under a lock: that is tested with the folder.
        results = Results(folder, setup, HERE, account)
        super().__init__(
            setup,
            table_cells(setup, results.load()),
            seconds=seconds,
            tell=self.told.append,
            save=results.save,
            call=run_as(run) if run else call_here,
        )

    def only_the_first_table(self) -> Told:
        self.cells = [cell for cell in self.cells if cell.kind == "step" and cell.mode == FIRST_MODE]
        return self


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with the plans of the first table and no measurement."""
    folder = tmp_path_factory.mktemp("planned")
    bench = Told(folder, fast).only_the_first_table()
    bench.run()
    for cell in bench.cells:
        cell.trials = {}
    Results(folder, SETUP, HERE, account).save(bench.cells, finished=False)
    return folder


@pytest.fixture
def folder(planned: Path, tmp_path: Path) -> Path:
    shutil.copy(planned / "bench.json", tmp_path)
    return tmp_path


def fast(trial: Trial, timeout_seconds: float) -> TrialResult:
    return TrialResult(step_seconds=1.0, least_seconds=1.0, most_seconds=1.0, peak_allocated_bytes=1, finite=True)


def test_every_cell_once_before_any_twice_and_plain_first_in_each_round(tmp_path: Path) -> None:
    tasks = Told(tmp_path).tasks()
    rounds = [number for _, number in tasks]
    assert rounds == sorted(rounds)
    for number in (2, 3):
        families = [cell.family for cell, at in tasks if at == number]
        plains = families.count(PLAIN_DEFAULT)
        assert families[:plains] == [PLAIN_DEFAULT] * plains
    assert sum(cell.kind == "largest" for cell, _ in tasks) == 4
    assert {cell.mode for cell, number in tasks if number == 3} == {FIRST_MODE}


def test_what_corrupts_memory_has_no_cells(tmp_path: Path) -> None:
    thin, wide = Told(tmp_path / "thin"), Told(tmp_path / "wide", setup=replace(SETUP, width=16))
    assert {cell.mode for cell in wide.cells} == set(MODES)
    assert {cell.mode for cell in thin.cells} == set(MODES) - {("fp32", "channels-last")}


def test_it_measures_everything_and_then_nothing(folder: Path) -> None:
    bench = Told(folder).only_the_first_table()
    assert bench.run()
    for cell in bench.cells:
        assert cell.refusal is None
        assert sorted(cell.trials) == ["1", "2", "3"]
        assert cell.most("peak_allocated_bytes") == pytest.approx(cell.predicted_allocated_bytes, abs=2048)
    again = Told(folder, lambda trial, seconds: pytest.fail("measured again")).only_the_first_table()
    assert again.run()
    assert all(len(cell.trials) == 3 for cell in again.cells)


def test_time_left_falls_to_nothing(folder: Path) -> None:
    bench = Told(folder, fast).only_the_first_table()
    assert bench.run()
    count = 3 * len(bench.cells)
    assert [text.split("]")[0] for text in bench.told] == [f"[{one}/{count}" for one in range(1, count + 1)]
    assert bench.told[-1].endswith("(0:00 left)")


def test_what_does_not_fit_into_the_time_is_left_for_the_next_time(folder: Path) -> None:
    assert not Told(folder, seconds=0.0).run()
    assert {cell.refusal for cell in Told(folder).cells} == {NO_TIME}
    assert Told(folder, fast).only_the_first_table().run()


@pytest.mark.slow
def test_a_trial_that_the_limit_ended_says_nothing_of_its_cell(folder: Path) -> None:
    def late(trial: Trial, timeout_seconds: float) -> TrialResult:
        time.sleep(timeout_seconds)
        return TrialResult(refused="took longer")

    bench = Told(folder, late, seconds=6.5)
    assert not bench.run()
    assert not any(cell.trials for cell in bench.cells)


def test_a_crash_is_a_row_and_stops_no_other(folder: Path) -> None:
    def broken(trial: Trial, timeout_seconds: float) -> TrialResult:
        if trial.plan is None:
            return TrialResult(refused=OUT_OF_MEMORY, out_of_memory=True)
        return fast(trial, timeout_seconds)

    bench = Told(folder, broken)
    largest = next(cell for cell in bench.cells if cell.kind == "largest")
    bench.only_the_first_table().cells.append(largest)
    assert bench.run()
    for cell in bench.cells:
        assert cell.refusal == (None if cell.family == ENGINE else OUT_OF_MEMORY)
    batches = [batch for batch, _ in largest.facts["tried"]]
    assert len(batches) > 1  # less and less, as it was for memory
    assert batches == sorted(batches, reverse=True)


def test_a_plan_that_takes_more_than_its_budget_is_said_to(folder: Path) -> None:
    def large(trial: Trial, timeout_seconds: float) -> TrialResult:
        return replace(fast(trial, timeout_seconds), peak_allocated_bytes=1 << 30)

    bench = Told(folder, large).only_the_first_table()
    bench.run()
    planned = next(cell for cell in bench.cells if cell.family == ENGINE)
    assert (planned.refusal or "").startswith("OVER: takes 1,024 MiB, the budget is")
