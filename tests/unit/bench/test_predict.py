"""Predictions of the library's ways, of plans and of largest batches, against real steps."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem.bench.cells import (
    CHECKPOINT_PER_BLOCK,
    CHECKPOINT_SELECTIVE,
    ENGINE,
    FAMILIES,
    LEAST,
    PLAIN_DEFAULT,
    Cell,
    Setup,
)
from lowmem.bench.predict import Predictor
from lowmem.choose.budget import tensors_only
from lowmem.trial.trial import Trial
from lowmem.trial.worker import work

NET: dict[str, Any] = {"arch": "res20", "block": "basic", "width": 4, "batch": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Setup(**NET), print)


def a_cell(family: str, budget: Any = None, precision: str = "fp32", kind: str = "step") -> Cell:
    return Cell(kind=kind, family=family, precision=precision, memory_format="contiguous", batch=16, budget=budget)


def tried(cell: Cell) -> dict[str, Any]:
    way, optimizer = FAMILIES[cell.family]
    mode = {"precision": cell.precision, "memory_format": cell.memory_format}
    trial = Trial(**NET, **mode, way=way, optimizer=optimizer, plan=cell.plan, steps=1, warmup=1, detailed=True)
    return work(trial)


@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize(
    ("family", "budget"),
    [
        (PLAIN_DEFAULT, None),
        (CHECKPOINT_SELECTIVE, None),
        (CHECKPOINT_PER_BLOCK, None),
        (ENGINE, 0.7),
        (ENGINE, LEAST),
    ],
)
def test_bytes_and_operations_are_as_predicted(predictor: Predictor, family: str, budget: Any, precision: str) -> None:
    cell = a_cell(family, budget, precision)
    predictor.prepare(cell)
    assert cell.refused is None
    found = tried(cell)
    # The real loop's sums of loss and errors, and what autocast leaves of them, are not in the simulated step.
    assert cell.predicted_allocated_bytes == pytest.approx(found["peak_allocated_bytes"], abs=2048)
    assert cell.predicted_flops == found["flops"]
    if cell.budget_bytes is not None:
        assert found["peak_allocated_bytes"] <= cell.budget_bytes


def test_less_than_the_least_is_refused(predictor: Predictor) -> None:
    least = a_cell(ENGINE, LEAST)
    predictor.prepare(least)
    assert least.budget_bytes is not None
    below = a_cell(ENGINE, least.budget_bytes - 1024)
    predictor.prepare(below)
    assert below.prepared
    assert "no plan fits: the least takes" in (below.refused or "")
    assert below.plan is None


@pytest.mark.parametrize("family", [PLAIN_DEFAULT, CHECKPOINT_PER_BLOCK, ENGINE])
def test_the_largest_batch_fits_and_the_next_does_not(predictor: Predictor, family: str) -> None:
    budget = predictor.memory()
    search, choice = predictor.largest_batch(a_cell(family, kind="largest"), budget, 1)
    assert search.holds is not None
    assert search.fails == search.holds + 1
    assert len(search.tried) <= 4  # the first guess is near
    cell = a_cell(family, kind="largest")
    cell.batch = search.holds
    if choice is not None:
        predictor.note_choice(cell, choice)
    way, optimizer = FAMILIES[family]
    trial = Trial(**{**NET, "batch": search.holds}, way=way, optimizer=optimizer, plan=cell.plan, steps=1, warmup=1)
    assert work(trial)["peak_allocated_bytes"] <= budget.tensor_bytes


def test_nothing_fits_into_next_to_nothing(predictor: Predictor) -> None:
    for family in (PLAIN_DEFAULT, ENGINE):
        search, choice = predictor.largest_batch(a_cell(family, kind="largest"), tensors_only(1000), 1)
        assert (search.holds, search.fails, choice) == (None, 1, None)
