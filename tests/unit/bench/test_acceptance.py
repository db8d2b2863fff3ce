"""The acceptance suite, small and on the CPU: the real work of every cell, here in one process."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from lowmem.bench import ENGINE, NO_TIME, PLAIN_DEFAULT, Cell
from lowmem.bench.acceptance import KINDS, AcceptanceSetup, acceptance_cells, account, targets
from lowmem.bench.results import Row
from lowmem.bench.run import Bench
from lowmem.calibrate.device import describe
from lowmem.cli.show_bench import _acceptance_picture
from lowmem.core.units import GIB, KIB, MIB
from lowmem.trial import TrialResult
from tests.isolated import call_here

NET: dict[str, Any] = {"arch": "res20", "block": "basic", "width": 4, "batch": 16, "tensors_bytes": 6 * MIB}


class Untimed(AcceptanceSetup):
    """Without the minute in which the processor is timed."""

    timed = False


HERE = describe("cpu")
SETUP = Untimed(**NET, device="cpu", steps=1, tries=4)


def _measure(setup: AcceptanceSetup, cells: list[Cell], seconds: float = 1e4, saved: list[int] | None = None) -> None:
    def save(cells: object, finished: bool) -> None:
        if saved is not None and not finished:
            saved.append(len(account(setup, HERE, bench.cells, finished=False).rows))

    bench = Bench(setup, cells, seconds=seconds, tell=lambda _: None, save=save, call=call_here)
    bench.run()


@pytest.fixture(scope="module")
def saved() -> list[int]:
    return []


@pytest.fixture(scope="module")
def cells(saved: list[int]) -> list[Cell]:
    """One mode of mixed precision is enough; its largest batches are predicted in `test_predict`."""
    cells = [cell for cell in acceptance_cells(SETUP) if "AMP" not in cell.title or "AMP, channels-last" in cell.title]
    _measure(SETUP, cells, saved=saved)
    return cells


@pytest.mark.slow
def test_time_is_predicted_of_the_processor_too() -> None:
    setup = AcceptanceSetup(**NET, device="cpu", steps=1)
    (cell, *_) = acceptance_cells(setup)
    _measure(setup, [cell])
    (row,) = account(setup, HERE, [cell], finished=True).rows
    assert row["predicted_step_seconds"] > 0
    assert row["predicted_overhead"] is not None


@pytest.fixture(scope="module")
def rows(cells: list[Cell]) -> list[Row]:
    return account(SETUP, HERE, cells, finished=True).rows


def _named(rows: list[Row], words: str) -> Row:
    return next(row for row in rows if words in row["name"])


@pytest.mark.slow  # like the others of these cells; the quick ones are in test_plan_checks.py and test_predict.py
def test_every_cell_is_run_and_saved_as_it_ends(rows: list[Row], saved: list[int]) -> None:
    (refused,) = (row for row in rows if row["refused"])
    assert refused["name"].startswith("fp32, channels-last"), "a net so thin"
    assert "corrupts memory" in (refused["refused"] or "")
    assert saved == list(range(1, len(rows) + 1))
    assert {row["kind"] for row in rows} == set(KINDS)


@pytest.mark.slow
def test_predicted_and_measured_memory(rows: list[Row]) -> None:
    for row in rows:
        if row["predicted_allocated_bytes"] is not None:
            assert row["allocated_error"] == pytest.approx(0, abs=0.01), row["name"]
    full, half = (row for row in rows if row["kind"] == "memory")
    plain = _named(rows, "save-all")
    assert half["allocated_bytes"] < full["allocated_bytes"]
    assert half["allocated_bytes"] < plain["allocated_bytes"]
    assert full["overhead"] is not None
    allocated = targets(rows)[0]
    assert allocated["met"] is True
    assert targets(rows)[1]["met"] is None  # nothing is reserved on the CPU


@pytest.mark.slow
def test_gradients_and_survival(rows: list[Row]) -> None:
    found = _named(rows, "gradients")["facts"]
    assert found["bitwise"]
    assert found["deterministic_bitwise"]
    assert found["difference"] == 0
    survived = _named(rows, "injected")["facts"]
    assert (survived["times_out_of_memory"], survived["weights_bitwise"]) == (2, True)
    assert survived["last_budget_bytes"] < survived["budget_bytes"]


@pytest.mark.slow
def test_the_largest_batch_is_verified_and_the_next_is_refused(rows: list[Row]) -> None:
    planned, plain = (_named(rows, f"fp32, {way}") for way in ("planned", "plain"))
    assert planned["batch"] is not None
    assert plain["batch"] is not None
    assert planned["batch"] > plain["batch"]
    assert planned["facts"]["tried"][-1] == (planned["batch"], "holds")
    for row, fails in ((planned, "refused_by_the_planner"), (plain, "fails")):
        assert row["batch"] is not None
        assert row["batch"] < row["facts"][fails] <= row["batch"] + row["facts"]["unit"], "found in at most four tries"
    assert (planned["allocated_bytes"] or 0) <= (SETUP.tensors_bytes or 0)


@pytest.mark.slow
def test_the_account_is_written_in_all_its_forms(cells: list[Cell]) -> None:
    told = account(SETUP, HERE, cells, finished=True)
    record = json.loads(told.json())
    assert (record["finished"], record["emulated"]) == (True, False)
    assert len(record["cells"]) == len(cells)
    assert len(list(csv.DictReader(io.StringIO(told.csv())))) == len(cells)
    text = told.markdown()
    for heading in ("Targets", "Memory", "Step time", "largest batch", "Mixed precision", "Out of memory", "Gradients"):
        assert heading in text
    assert "emulated" not in text
    assert "Not finished" in account(SETUP, HERE, cells[:1], finished=False).markdown()


def test_without_time_every_cell_says_so() -> None:
    cells = acceptance_cells(SETUP)
    _measure(SETUP, cells, seconds=0.0)
    assert {row["refused"] for row in account(SETUP, HERE, cells, finished=True).rows} == {NO_TIME}
    assert NO_TIME in account(SETUP, HERE, cells, finished=True).markdown()
    assert account(SETUP, HERE, cells, finished=False).rows == []


ON_CARD = replace(SETUP, device="cuda", card_bytes=16 * GIB, vram_bytes=6 * MIB, tensors_bytes=None)


def test_only_the_cells_that_are_asked_for() -> None:
    cells = acceptance_cells(replace(ON_CARD, cells=("time", "out of memory")))
    assert [cell.kind for cell in cells] == ["time", "time", "time", "out of memory", "out of memory", "time", "time"]
    assert [cell.title for cell in cells if "batch 64" in cell.title] == [
        "save-all (plain PyTorch), batch 64, no limit",
        "planned for 12 MiB, batch 64",
    ]


def _done(cell: Cell, **found: Any) -> Cell:
    cell.prepared, cell.seconds = True, 1.0
    cell.trials["1"] = asdict(TrialResult(finite=True, **found))
    return cell


def _larger(share: float | None) -> list[Cell]:
    """The two cells at four times the batch, real steps on the CPU; the card is said to compute so much of a step."""
    usual = _done(Cell(kind="time", family=PLAIN_DEFAULT, batch=16), step_seconds=1.0, busy_share=share)
    usual.refused = "measured before"
    larger = [cell for cell in acceptance_cells(ON_CARD) if cell.batch == 64]
    _measure(replace(SETUP, steps=1), [usual, *larger])
    return larger


@pytest.mark.slow
def test_a_card_that_waits_for_launches_is_timed_at_a_larger_batch() -> None:
    plain, planned = _larger(0.3)
    assert (plain.refusal, planned.refusal, plain.batch, planned.batch) == (None, None, 64, 64)
    first, second = account(SETUP, HERE, [plain, planned], finished=True).rows
    assert first["overhead"] is None
    assert second["overhead"] is not None
    assert second["tensors_bytes"] == 2 * (SETUP.tensors_bytes or 0)
    assert second["allocated_bytes"] < first["allocated_bytes"]


@pytest.mark.parametrize(
    ("share", "said"), [(0.97, "not needed: the card computes 97% of a plain step at batch 16"), (None, "is not known")]
)
def test_a_busy_card_is_not(share: float | None, said: str) -> None:
    plain, planned = _larger(share)
    assert said in (plain.refusal or "")
    assert "no plain step of batch 64" in (planned.refusal or "")
    assert plain.step_seconds is planned.step_seconds is None


def test_a_larger_card_is_called_emulated() -> None:
    setup = replace(ON_CARD, vram_bytes=6 * GIB)
    environment = {**HERE, "device": "cuda", "card": "a card"}
    text = account(setup, environment, acceptance_cells(setup)[:1], finished=True).markdown()
    assert "**emulated**" in text
    assert "6,144 MiB (emulated)" in text
    assert not replace(setup, card_bytes=6 * GIB - 80 * MIB).emulates(6 * GIB)


@pytest.mark.parametrize("card_bytes", [None, 16 * GIB])
def test_tensors_are_no_cards_memory(card_bytes: int | None) -> None:
    setup = replace(SETUP, device="cpu" if card_bytes is None else "cuda", card_bytes=card_bytes)
    told = account(setup, HERE, acceptance_cells(setup), finished=True)
    planned = next(row for row in told.rows if row["kind"] == "memory")
    assert (planned["vram_bytes"], planned["tensors_bytes"]) == (None, 6 * MIB)
    assert planned["name"] == "planned for 6 MiB of tensors"
    assert ("6 MiB of tensors (emulated)" in told.markdown()) == (card_bytes is not None)  # its allocator is capped
    assert planned["emulated"] == told.record["emulated"] == (card_bytes is not None)
    assert "a card of that memory" not in told.markdown()


def _judged(*cells: Cell) -> list[tuple[bool | None, str]]:
    return [(target["met"], target["found"]) for target in targets(account(ON_CARD, HERE, cells, finished=True).rows)]


def test_targets_are_judged_by_all_cells() -> None:
    def planned(allocated: int, overhead: float) -> Cell:
        cell = Cell(kind="memory", family=ENGINE, batch=16, predicted_overhead=0.10)
        cell.predicted_allocated_bytes = cell.predicted_reserved_bytes = 1000
        step = {"peak_allocated_bytes": allocated, "peak_reserved_bytes": 1049, "step_seconds": 1 + overhead}
        return _done(cell, **step)

    plain = _done(Cell(kind="time", family=PLAIN_DEFAULT, batch=16), step_seconds=1.0)
    assert [met for met, _ in _judged(plain, planned(1029, 0.14), planned(975, 0.06))] == [True, True, True]
    assert [met for met, _ in _judged(plain, planned(1031, 0.14), planned(975, 0.16))] == [False, True, False]


def _timed(kind: str, batch: int, busy_share: float, points: float) -> list[Cell]:
    """A save-all step, and a planned one whose overhead is so many points above the 10 % predicted."""
    plain = Cell(kind="time", family=PLAIN_DEFAULT, batch=batch)
    planned = Cell(kind=kind, family=ENGINE, batch=batch, predicted_overhead=0.10)
    return [_done(plain, step_seconds=1.0, busy_share=busy_share), _done(planned, step_seconds=1.10 + points / 100)]


def test_overheads_are_judged_where_the_card_is_busy() -> None:
    def judged(*cells: list[Cell]) -> tuple[bool | None, str]:
        return _judged(*(cell for some in cells for cell in some))[2]

    assert judged(_timed("memory", 128, 0.95, 3.0)) == (True, "+3.0 points")
    idle = _timed("memory", 128, 0.4, 30.0)
    assert judged(idle) == (None, "the card waits for its launches at every batch that was measured")
    assert judged(idle, _timed("time", 512, 0.9, -2.0)) == (True, "-2.0 points")
    assert judged(idle, _timed("time", 512, 0.9, 7.0)) == (False, "+7.0 points")
    assert judged(idle, _timed("time", 512, 0.7, 7.0))[0] is None
    assert judged(_timed("memory", 128, 0.95, 6.0), _timed("time", 512, 0.9, 1.0))[0] is False
    text = account(SETUP, HERE, idle, finished=True).markdown()
    assert "Bound by launches: the card computes 40% of a plain step at batch 128; compare at a larger --batch." in text
    assert "Bound by launches" not in account(SETUP, HERE, _timed("memory", 128, 0.95, 3.0), True).markdown()


@pytest.mark.slow
def test_the_picture(cells: list[Cell]) -> None:
    png = _acceptance_picture(SETUP, HERE, account(SETUP, HERE, cells, finished=True))
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20 * KIB
