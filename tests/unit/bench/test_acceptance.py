"""The acceptance suite, small and on the CPU: the real work of every cell, here in one process."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from lowmem.bench import acceptance_plans
from lowmem.bench.acceptance import KINDS, NO_TIME, Row, Setup, set_overheads, targets
from lowmem.bench.acceptance_suite import Suite
from lowmem.bench.acceptance_text import to_csv, to_json, to_markdown
from lowmem.bench.largest import largest
from lowmem.calibrate.environment import describe
from lowmem.core.units import GIB, KIB, MIB
from tests.isolated import call_here

SETUP = Setup(
    arch="res20", block="basic", width=8, batch=16, vram_bytes=14 * MIB, device="cpu", minutes=600, steps=1, tries=3
)


@pytest.fixture(scope="module")
def saved() -> list[int]:
    return []


@pytest.fixture(scope="module")
def rows(saved: list[int]) -> list[Row]:
    suite = Suite(SETUP, save=lambda rows: saved.append(len(rows)), tell=lambda _: None, call=call_here)
    return suite.run()


def _named(rows: list[Row], words: str) -> Row:
    return next(row for row in rows if words in row.name)


def test_every_cell_is_run_and_saved_as_it_ends(rows: list[Row], saved: list[int]) -> None:
    (refused,) = (row for row in rows if row.refused)
    assert refused.name.startswith("fp32, channels-last"), "a net so thin"
    assert "corrupts memory" in (refused.refused or "")
    assert saved == list(range(1, len(rows) + 1))
    assert {row.kind for row in rows} == set(KINDS)


def test_predicted_and_measured_memory(rows: list[Row]) -> None:
    for row in rows:
        if row.predicted_allocated_bytes is not None:
            # Predicted as an allocator counts that rounds each tensor of this tiny net up to 512 bytes.
            assert row.allocated_error == pytest.approx(0, abs=0.03), row.name
    full, half = (row for row in rows if row.kind == "memory")
    plain = _named(rows, "save-all")
    assert half.allocated_bytes < full.allocated_bytes  # type: ignore[operator]
    assert half.allocated_bytes < plain.allocated_bytes  # type: ignore[operator]
    allocated = targets(rows)[0]
    assert allocated.met is True
    assert targets(rows)[1].met is None  # nothing is reserved on the CPU


def test_gradients_and_survival(rows: list[Row]) -> None:
    found = _named(rows, "gradients").facts
    assert found["bitwise"]
    assert found["deterministic_bitwise"]
    assert found["difference"] == 0
    survived = _named(rows, "injected").facts
    assert (survived["times_out_of_memory"], survived["weights_bitwise"]) == (2, True)
    assert survived["last_budget_bytes"] < survived["budget_bytes"]


@pytest.mark.parametrize("precision", ["fp32", "AMP"])
def test_the_largest_batch_is_verified_and_the_next_is_refused(rows: list[Row], precision: str) -> None:
    planned, plain = (_named(rows, f"{precision}, {way}") for way in ("planned", "plain"))
    assert planned.batch is not None
    assert plain.batch is not None
    assert planned.batch > plain.batch
    assert planned.facts["tried"][-1] == (planned.batch, "holds")
    for row, fails in ((planned, "refused_by_the_planner"), (plain, "fails")):
        assert row.batch is not None
        assert row.batch < row.facts[fails] <= row.batch + row.facts["unit"], "found in at most three tries"
    assert (planned.allocated_bytes or 0) <= SETUP.vram_bytes


def test_the_account_is_written_in_all_its_forms(rows: list[Row]) -> None:
    environment = describe("cpu")
    record = json.loads(to_json(SETUP, environment, rows, finished=True))
    assert (record["finished"], record["emulated"]) == (True, False)
    assert len(record["cells"]) == len(rows)
    assert len(list(csv.DictReader(io.StringIO(to_csv(rows))))) == len(rows)
    text = to_markdown(SETUP, environment, rows, finished=True)
    for heading in ("Targets", "Memory", "Step time", "largest batch", "Mixed precision", "Out of memory", "Gradients"):
        assert heading in text
    assert "emulated" not in text
    assert "Not finished" in to_markdown(SETUP, environment, rows[:1], finished=False)


def test_without_time_every_cell_says_so() -> None:
    hurried = Setup(**{**vars(SETUP), "minutes": 0.0})
    rows = Suite(hurried, save=lambda _: None, tell=lambda _: None, call=call_here).run()
    assert {row.refused for row in rows} == {NO_TIME}
    assert NO_TIME in to_markdown(hurried, describe("cpu"), rows, finished=True)


def test_only_the_cells_that_are_asked_for() -> None:
    setup = Setup(**{**vars(SETUP), "device": "cuda", "cells": ("time", "out of memory")})
    cells = Suite(setup, save=lambda _: None, tell=lambda _: None).cells()
    assert [cell.kind for cell in cells] == ["time", "time", "time", "out of memory", "out of memory", "time", "time"]
    assert [cell.name for cell in cells if "batch 64" in cell.name] == [
        "save-all (plain PyTorch), batch 64, no limit",
        "planned for 28 MiB, batch 64",
    ]


def _larger(share: float | None) -> list[Row]:
    """The two cells at four times the batch, real steps on the CPU; the card is said to compute so much of a step."""
    suite = Suite(SETUP, save=lambda _: None, tell=lambda _: None, call=call_here)
    usual = Row(kind="time", name="plain", batch=16, precision="fp32", memory_format="contiguous", step_seconds=1.0)
    usual.facts["save_all"], usual.busy_share = True, share
    suite.rows = [usual]
    for cell in suite._larger_cells():
        suite.rows.append(Row(kind=cell.kind, name=cell.name))
        cell.run(suite.rows[-1])
    return suite.rows[1:]


def test_a_card_that_waits_for_launches_is_timed_at_a_larger_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance_plans, "calibrator_of", lambda config, tell: None)  # seconds by a datasheet, quickly
    plain, planned = _larger(0.3)
    assert (plain.refused, planned.refused, plain.batch, planned.batch) == (None, None, 64, 64)
    set_overheads([plain, planned])
    assert planned.overhead is not None
    assert planned.vram_bytes == 2 * SETUP.vram_bytes
    assert (planned.allocated_bytes or 0) < (plain.allocated_bytes or 0)


@pytest.mark.parametrize(
    ("share", "said"), [(0.97, "not needed: the card computes 97% of a plain step at batch 16"), (None, "is not known")]
)
def test_a_busy_card_is_not(share: float | None, said: str) -> None:
    plain, planned = _larger(share)
    assert said in (plain.refused or "")
    assert "no plain step of batch 64" in (planned.refused or "")
    assert plain.step_seconds is planned.step_seconds is None


def test_a_larger_card_is_called_emulated() -> None:
    setup = Setup(**{**vars(SETUP), "device": "cuda", "card_bytes": 16 * GIB, "vram_bytes": 6 * GIB})
    environment = {**describe("cpu"), "device": "cuda", "card": "a card"}
    row = Row(kind="memory", name="planned", vram_bytes=6 * GIB, emulated=setup.emulates(6 * GIB))
    text = to_markdown(setup, environment, [row], finished=True)
    assert "**emulated**" in text
    assert "6,144 MiB (emulated)" in text
    assert not Setup(**{**vars(setup), "card_bytes": 6 * GIB - 80 * MIB}).emulates(6 * GIB)


def test_targets_are_judged_by_all_cells() -> None:
    def row(allocated: int, overhead: float) -> Row:
        return Row(
            kind="memory",
            name="",
            predicted_allocated_bytes=1000,
            allocated_bytes=allocated,
            predicted_reserved_bytes=1000,
            reserved_bytes=1049,
            predicted_overhead=0.10,
            overhead=overhead,
        )

    assert [target.met for target in targets([row(1029, 0.14), row(975, 0.06)])] == [True, True, True]
    assert [target.met for target in targets([row(1031, 0.14), row(975, 0.16)])] == [False, True, False]


def _timed(kind: str, batch: int, busy_share: float, points: float) -> list[Row]:
    """A save-all step, and a planned one whose overhead is so many points above the 10 % predicted."""
    plain = Row(kind="time", name="plain", batch=batch, precision="fp32", memory_format="contiguous", step_seconds=1.0)
    plain.facts["save_all"], plain.busy_share = True, busy_share
    planned = Row(kind=kind, name="planned", batch=batch, precision="fp32", memory_format="contiguous")
    planned.predicted_overhead, planned.step_seconds = 0.10, 1.10 + points / 100
    return [plain, planned]


def test_overheads_are_judged_where_the_card_is_busy() -> None:
    def judged(*rows: list[Row]) -> tuple[bool | None, str]:
        together = [row for some in rows for row in some]
        set_overheads(together)
        target = targets(together)[2]
        return target.met, target.found

    assert judged(_timed("memory", 128, 0.95, 3.0)) == (True, "+3.0 points")
    idle = _timed("memory", 128, 0.4, 30.0)
    assert judged(idle) == (None, "the card waits for its launches at every batch that was measured")
    assert judged(idle, _timed("time", 512, 0.9, -2.0)) == (True, "-2.0 points")
    assert judged(idle, _timed("time", 512, 0.9, 7.0)) == (False, "+7.0 points")
    assert judged(idle, _timed("time", 512, 0.7, 7.0))[0] is None
    assert judged(_timed("memory", 128, 0.95, 6.0), _timed("time", 512, 0.9, 1.0))[0] is False
    text = to_markdown(SETUP, describe("cpu"), idle, finished=True)
    assert "Bound by launches: the card computes 40% of a plain step at batch 128; compare at a larger --batch." in text
    assert "Bound by launches" not in to_markdown(SETUP, describe("cpu"), _timed("memory", 128, 0.95, 3.0), True)


@pytest.mark.parametrize(("most_that_holds", "guess"), [(37, 30), (37, 37), (37, 80), (1000, 900), (5, 90)])
def test_the_search_finds_the_largest(most_that_holds: int, guess: int) -> None:
    found = largest(lambda batch: batch <= most_that_holds, guess, 1, 20)
    assert (found.holds, found.fails) == (most_that_holds, most_that_holds + 1)


def test_the_search_is_bounded() -> None:
    asked: list[int] = []
    found = largest(lambda batch: bool(asked.append(batch)) or batch <= 999, 100, 8, 4)
    assert len(asked) == 4
    assert found.holds == max(asked)
    assert largest(lambda _: False, 100, 8, 50).holds is None
    assert largest(lambda _: None, 100, 8, 50).tried == []


def test_the_picture(rows: list[Row], tmp_path: Path) -> None:
    from lowmem.cli.show_acceptance import _picture

    png = _picture(SETUP, describe("cpu"), rows)
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20 * KIB
