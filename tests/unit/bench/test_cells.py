"""The cells: which there are, and what their figures say."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from lowmem.bench import (
    ENGINE,
    ENGINE_HOST,
    FAMILIES,
    LEAST,
    NO_TIME,
    PLAIN_DEFAULT,
    PLAIN_FREE,
    PLAIN_FUSED,
    Cell,
    plain_of,
    same_as_plain,
)
from lowmem.bench.tables import MODES, TableSetup, largest_cells, mode_ways, step_cells
from lowmem.trial import TrialResult

SETUP = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cpu")


def a_cell(family: str = PLAIN_DEFAULT, budget: Any = None, **trials: dict[str, Any]) -> Cell:
    """`_1={...}`: what is known of its first round."""
    cell = Cell(kind="step", family=family, precision="fp32", memory_format="contiguous", batch=32, budget=budget)
    cell.trials = {name.removeprefix("_"): asdict(TrialResult(**found)) for name, found in trials.items()}
    return cell


def test_each_cell_is_there_once() -> None:
    cells = [*step_cells(SETUP, MODES), *largest_cells(SETUP)]
    assert len({cell.key for cell in cells}) == len(cells)
    first = [cell for cell in cells if cell.kind == "step" and cell.mode == ("fp32", "contiguous")]
    assert {cell.family for cell in first} == set(FAMILIES) - {PLAIN_FREE, ENGINE_HOST}
    there = step_cells(TableSetup(**{**asdict(SETUP), "host": "auto"}), MODES[:1])
    assert [cell.budget for cell in there if cell.family == ENGINE_HOST] == list(SETUP.budgets)
    assert [cell.key for cell in there if cell.family != ENGINE_HOST] == [cell.key for cell in first]
    on_card = step_cells(TableSetup(**{**asdict(SETUP), "device": "cuda"}), MODES[:1])
    assert [cell.mode for cell in on_card if cell.family == PLAIN_FREE] == [("fp32", "contiguous")]
    assert [cell.budget for cell in first if cell.family == ENGINE] == list(SETUP.budgets)
    for mode in (("fp32", "channels-last"), ("amp", "contiguous"), ("amp", "channels-last")):
        others = [cell for cell in cells if cell.kind == "step" and cell.mode == mode]
        assert PLAIN_FUSED not in {cell.family for cell in others}
        assert [cell.budget for cell in others if cell.family == ENGINE] == [0.5]
        assert plain_of(cells, others[-1]) is others[0]


@pytest.mark.parametrize(
    ("budgets", "middle"), [((0.9, 0.4, LEAST), 0.4), ((300, 200, 100), 200), ((LEAST,), LEAST), ((0.9, 7), 0.9)]
)
def test_the_modes_are_compared_in_about_half_of_plains_memory(budgets: tuple[Any, ...], middle: Any) -> None:
    assert mode_ways(TableSetup(**{**asdict(SETUP), "budgets": budgets}))[-1] == (ENGINE, middle)


def test_labels() -> None:
    assert a_cell(ENGINE, 0.5).label == "lowmem, 50% of plain"
    assert a_cell(ENGINE, LEAST).label == "lowmem, the least"
    assert a_cell(ENGINE, 300 << 20).label == "lowmem, 300 MiB"


def test_ratios_are_of_the_same_round() -> None:
    plain = a_cell(_1={"step_seconds": 1.0}, _2={"step_seconds": 4.0}, _3={"refused": "out of memory"})
    slow = a_cell(ENGINE, 0.5, _1={"step_seconds": 1.5}, _2={"step_seconds": 4.0}, _3={"step_seconds": 9.0})
    assert slow.ratios(plain) == [1.5, 1.0]
    assert slow.step_seconds == 4.0
    assert slow.ratios(None) == []


def test_a_refusal_is_shown_unless_a_round_ran_through() -> None:
    assert a_cell().refusal == NO_TIME
    assert a_cell(_1={"refused": "out of memory"}).refusal == "out of memory"
    assert a_cell(_1={"refused": "out of memory"}, _2={"step_seconds": 1.0}).refusal is None


def test_a_round_that_did_not_hold_gives_no_figures() -> None:
    over = {"refused": "OVER: takes 90 MiB", "peak_allocated_bytes": 90 << 20, "step_seconds": 1.0, **seen("other")}
    held = {"peak_allocated_bytes": 69 << 20, "step_seconds": 1.3, **seen("g")}
    both, only = a_cell(_1=over, _2=held), a_cell(_1=over)
    assert (both.most("peak_allocated_bytes"), both.step_seconds) == (69 << 20, 1.3)
    assert (only.most("peak_allocated_bytes"), only.step_seconds) == (None, None)
    assert same_as_plain(both, a_cell(_1=held)) == "same bits"


def seen(gradients: str, buffers: str = "b", loss: float = 2.0, updates: int = 1) -> dict[str, Any]:
    return {"gradients": gradients, "buffers": buffers, "losses": (loss,), "norm_updates": updates}


@pytest.mark.parametrize(
    ("plain", "other", "said"),
    [
        ([seen("g")], [seen("g")], "same bits"),
        ([seen("g")], [seen("g", "c", updates=2)], "gradients only"),
        ([seen("g")], [seen("h")], "no"),
        ([seen("g")], [seen("g", loss=2.1)], "no"),
        ([seen("g"), seen("h")], [seen("g"), seen("i")], "as plain's own runs"),
        ([seen("g")], [{}], None),
    ],
)
def test_what_the_digests_say(plain: list[dict[str, Any]], other: list[dict[str, Any]], said: str | None) -> None:
    cells = [a_cell(**{f"_{n}": one for n, one in enumerate(which)}) for which in (plain, other)]
    assert same_as_plain(cells[1], cells[0]) == said


def test_a_cell_survives_its_file() -> None:
    cell = a_cell(ENGINE, 0.5, _1={"step_seconds": 1.0, "losses": (1.5,)})
    again = Cell.from_record(json.loads(json.dumps(cell.record())))
    assert again.key == cell.key
    assert again.step_seconds == 1.0


def test_a_cell_that_could_not_be_prepared_is_tried_again() -> None:
    cell = a_cell()
    cell.refused = "the device does not answer"
    assert Cell.from_record(cell.record()).refusal == NO_TIME
    cell.prepared = True
    assert Cell.from_record(cell.record()).refusal == "the device does not answer"


@pytest.mark.parametrize("change", [{"surprise": 1}, {"trials": []}, {"trials": {"1": {"what": 2}}}, {"plan": {}}])
def test_something_else_is_no_cell(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Cell.from_record({**a_cell().record(), **change})
