"""Predictions of the library's ways, of plans and of largest batches, against real steps."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import pytest

from lowmem.bench import (
    CHECKPOINT_PER_BLOCK,
    CHECKPOINT_SELECTIVE,
    ENGINE,
    ENGINE_HOST,
    FAMILIES,
    LEAST,
    PLAIN_DEFAULT,
    Cell,
)
from lowmem.bench.predict import Predictor, largest
from lowmem.bench.tables import TableSetup
from lowmem.choose.request import Budget
from lowmem.core.errors import Infeasible
from lowmem.core.units import GIB
from lowmem.plan.policy import GRADS
from lowmem.trial import Trial
from lowmem.trial.worker import work

NET: dict[str, Any] = {"arch": "res20", "block": "basic", "width": 4, "batch": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(TableSetup(**NET, host="64M"), print)


def a_cell(family: str, budget: Any = None, precision: str = "fp32", kind: str = "step") -> Cell:
    return Cell(kind=kind, family=family, precision=precision, memory_format="contiguous", batch=16, budget=budget)


def tried(cell: Cell) -> dict[str, Any]:
    way, fused = FAMILIES[cell.family]
    mode = {"precision": cell.precision, "memory_format": cell.memory_format}
    trial = Trial(**NET, **mode, way=way, fused=fused, plan=cell.plan, steps=1, warmup=1, detailed=True)
    return work(asdict(trial))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("amp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "budget"),
    [
        (PLAIN_DEFAULT, None),
        (CHECKPOINT_SELECTIVE, None),
        (CHECKPOINT_PER_BLOCK, None),
        (ENGINE, 0.7),
        (ENGINE_HOST, 0.7),
        (ENGINE_HOST, LEAST),
        pytest.param(ENGINE, LEAST, marks=pytest.mark.slow),
    ],
)
def test_bytes_and_operations_are_as_predicted(predictor: Predictor, family: str, budget: Any, precision: str) -> None:
    cell = a_cell(family, budget, precision)
    predictor.prepare(cell)
    assert cell.refused is None
    assert bool(cell.host_bytes) == (family == ENGINE_HOST)
    found = tried(cell)
    # The real loop's sums of loss and errors, and what autocast leaves of them, are not in the simulated step.
    assert cell.predicted_allocated_bytes == pytest.approx(found["peak_allocated_bytes"], abs=2048)
    assert cell.predicted_flops == found["flops"]
    if cell.budget_bytes is not None:
        assert found["peak_allocated_bytes"] <= cell.budget_bytes


def test_a_plan_for_another_size_takes_what_was_predicted() -> None:
    setup = TableSetup(**NET, image_size=48)
    cell = a_cell(ENGINE, 0.7)
    Predictor(setup, print).prepare(cell)
    found = work(asdict(Trial(**setup.network, batch=16, way=FAMILIES[ENGINE][0], plan=cell.plan, steps=1, warmup=1)))
    assert cell.predicted_allocated_bytes == pytest.approx(found["peak_allocated_bytes"], abs=2048)


def test_gradients_that_wait_make_the_least_less(predictor: Predictor) -> None:
    alone, there = a_cell(ENGINE, LEAST), a_cell(ENGINE_HOST, LEAST)
    for cell in (alone, there):
        predictor.prepare(cell)
    assert alone.budget_bytes is not None
    assert there.budget_bytes is not None
    assert there.budget_bytes < alone.budget_bytes
    assert GRADS in str(there.plan)


def test_less_than_the_least_is_refused(predictor: Predictor) -> None:
    least = a_cell(ENGINE, LEAST)
    predictor.prepare(least)
    assert least.budget_bytes is not None
    below = a_cell(ENGINE, least.budget_bytes - 1024)
    with pytest.raises(Infeasible):
        predictor.prepare(below)
    assert below.plan is None


@pytest.mark.parametrize(
    "family",
    [PLAIN_DEFAULT, *(pytest.param(family, marks=pytest.mark.slow) for family in (CHECKPOINT_PER_BLOCK, ENGINE))],
)
def test_the_largest_batch_fits_and_the_next_does_not(predictor: Predictor, family: str) -> None:
    budget = predictor.budget(None)
    cell = a_cell(family, kind="largest")
    guess = predictor.guess(cell, budget)
    search = largest(lambda batch: predictor.fits(cell, batch, budget), guess, 1, 8)
    assert search.holds is not None
    assert search.fails == search.holds + 1
    assert len(search.tried) <= 4  # the first guess is near
    cell.batch = search.holds
    predictor.prepare(cell, budget)
    way, fused = FAMILIES[family]
    trial = Trial(**{**NET, "batch": search.holds}, way=way, fused=fused, plan=cell.plan, steps=1, warmup=1)
    assert work(asdict(trial))["peak_allocated_bytes"] <= budget.tensor_bytes


@pytest.mark.slow
def test_nothing_fits_into_next_to_nothing(predictor: Predictor) -> None:
    for family in (PLAIN_DEFAULT, ENGINE):
        fits = partial(predictor.fits, a_cell(family, kind="largest"), budget=Budget(total_bytes=1000))
        search = largest(fits, 1, 1, 8)
        assert (search.holds, search.fails) == (None, 1)


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


def test_memory_is_a_cards_or_tensors_alone(predictor: Predictor) -> None:
    card = predictor.budget(GIB)
    assert card.total_bytes == GIB
    assert "GTX 1060" in card.source
    alone = Predictor(TableSetup(**NET, tensors_bytes=GIB), print).budget(GIB)
    assert alone.tensor_bytes == alone.total_bytes == GIB
