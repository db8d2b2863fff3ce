"""The solver against brute force, against itself under other budgets, and against the clock."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.core.errors import Infeasible
from lowmem.core.units import MIB
from lowmem.plan.cost import ChainCost, OptionCost, StageCost
from lowmem.plan.evaluate import Solution, evaluate
from lowmem.plan.policy import FUSED, SAVE_ALL, keep
from lowmem.plan.solver import MAX_SLOTS, Solver, useful_bytes
from lowmem.plan.table import LONGEST_RUN, prune
from tests.unit.plan.chains import random_chain, scaled, tradeoffs
from tests.unit.plan.oracle import BASELINES, all_schedules, brute_force, solve


def _least_seconds(everything: list[tuple[int, float]], budget: int) -> float | None:
    return min((seconds for peak, seconds in everything if peak <= budget), default=None)


def _check(solver: Callable[[int], Solution], budget: int, expected: float | None, least: int) -> None:
    if expected is None:
        with pytest.raises(Infeasible) as caught:
            solver(budget)
        assert (caught.value.budget_bytes, caught.value.least_bytes) == (budget, least)
        return
    solution = solver(budget)
    assert solution.peak_bytes <= budget
    assert solution.seconds == expected


RUN = 4  # all the stages but the last of the longest chain here


def _compare_with_brute_force(rng: random.Random, count: int, options: int, dropping: bool) -> None:
    chain = random_chain(rng, count, options, dropping=dropping)
    results = [evaluate(schedule, chain) for schedule in all_schedules(chain)]
    everything = [(result.peak_bytes, result.seconds) for result in results]
    peaks = sorted({peak for peak, _ in everything})
    # slack; binding and one byte short of it; the least feasible, and impossible by one byte
    binding = rng.sample(peaks, min(3, len(peaks)))
    budgets = {peaks[-1] + 50, peaks[0], peaks[0] - 1, *binding, *(peak - 1 for peak in binding)}
    every_budget = Solver(chain, longest_run=RUN)
    for budget in budgets:
        expected = _least_seconds(everything, budget)
        if count <= LONGEST_RUN + 1:  # as the last stage of a chain never drops its output
            _check(partial(solve, chain), budget, expected, peaks[0])
        _check(every_budget.solve, budget, expected, peaks[0])
    curve = every_budget.curve(None)
    frontier = [(peak, _least_seconds(everything, peak)) for peak in peaks]
    assert {point.seconds for point in curve} == {seconds for _, seconds in frontier}
    assert [_least_seconds(everything, point.peak_bytes) for point in curve] == [p.seconds for p in curve]


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_brute_force_on_2000_random_chains(seed: int) -> None:
    rng = random.Random(seed)
    for index in range(100):
        count = 4 if index < 4 else rng.choice([1, 2, 3, 3, 3])
        _compare_with_brute_force(rng, count, 2 if count == 4 else rng.randint(1, 3), dropping=rng.random() < 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_equal_to_brute_force_on_longer_chains(seed: int) -> None:
    rng = random.Random(1000 + seed)
    _compare_with_brute_force(rng, 4, 3, dropping=True)
    _compare_with_brute_force(rng, 5, 2, dropping=bool(seed % 2))


def test_brute_force_has_the_solvers_signature() -> None:
    chain = random_chain(random.Random(5), 3, 2)
    least = min(evaluate(schedule, chain).peak_bytes for schedule in all_schedules(chain))
    assert brute_force(chain, 10**6).seconds == solve(chain, 10**6).seconds
    assert brute_force(chain, least).seconds == solve(chain, least).seconds
    with pytest.raises(Infeasible, match="no plan fits"):
        brute_force(chain, least - 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), fractions=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_more_budget_is_never_slower_and_peaks_are_kept(seed: int, fractions: list[float]) -> None:
    """With sizes that do not divide into slots, and a new table for each budget."""
    rng = random.Random(seed)
    chain = scaled(random_chain(rng, rng.randint(4, 9), 3, dropping=rng.random() < 0.5), rng)
    every_budget = Solver(chain)
    assert every_budget.table.slot_bytes > 1
    least, most = every_budget.least().peak_bytes, every_budget.curve(2)[-1].peak_bytes
    previous = float("inf")
    for fraction in sorted(fractions):
        budget = int(least + fraction * (most - least))
        solution = solve(chain, budget)
        assert evaluate(solution.schedule, chain).peak_bytes == solution.peak_bytes <= budget
        assert solution.seconds == every_budget.solve(budget).seconds
        assert solution.seconds <= previous * (1 + 1e-12)
        previous = solution.seconds


@pytest.mark.parametrize("seed", range(15))
def test_a_coarse_table_loses_little(seed: int) -> None:
    """Against the exact table (1-byte slots) of the same chain: rounding to the nearest slot costs a slot or
    two."""
    rng = random.Random(seed)
    chain = random_chain(rng, 7, 3, dropping=True)
    coarse, exact = Solver(chain, slot_bytes=4), Solver(chain, slot_bytes=1)
    for budget in range(coarse.least().peak_bytes, coarse.least().peak_bytes + 60, 7):
        assert exact.solve(budget).seconds <= coarse.solve(budget).seconds
        assert coarse.solve(budget + 8).seconds <= exact.solve(budget).seconds


def test_the_ladder_goes_down_to_the_least() -> None:
    solver = Solver(tradeoffs(12, 4))
    top, least = solver.curve(None)[-1], solver.least()
    rungs = solver.ladder(top.peak_bytes, ratio=0.9, near=50)
    peaks = [top.peak_bytes, *(rung.peak_bytes for rung in rungs)]
    assert len(rungs) > 3
    assert rungs[-1].peak_bytes == least.peak_bytes
    for higher, lower in pairwise(peaks[:-1]):
        assert lower <= 0.9 * higher
    assert [rung.seconds for rung in rungs] == sorted(rung.seconds for rung in rungs)
    first, second, between, last = solver.ladder(top.peak_bytes, ratio=0.9, near=2)
    assert [first, second] == rungs[:2]
    assert second.peak_bytes > between.peak_bytes > last.peak_bytes == least.peak_bytes
    assert solver.ladder(least.peak_bytes) == []


def test_never_worse_than_a_baseline() -> None:
    for seed in range(30):
        chain = random_chain(random.Random(seed), 8, 3)
        for strategy in BASELINES.values():
            try:
                baseline = strategy(chain, 120)
            except Infeasible:
                continue
            assert solve(chain, 120).seconds <= baseline.seconds


def test_infeasible_names_both_sides_and_what_takes_it() -> None:
    chain = dataclasses.replace(random_chain(random.Random(3), 5, 3), fixed_bytes=100 * MIB)
    with pytest.raises(Infeasible) as caught:
        solve(chain, 50 * MIB)
    least = caught.value.least_bytes
    assert least > 100 * MIB
    assert "50 MiB" in str(caught.value)
    assert "fixed 100 MiB" in caught.value.what
    assert solve(chain, least).peak_bytes == least
    with pytest.raises(Infeasible):
        solve(chain, least - 1)


def test_the_optimizers_step_bounds_the_budget_too() -> None:
    chain = dataclasses.replace(random_chain(random.Random(3), 5, 3), outside_peak_bytes=10_000)
    assert solve(chain, 10_000).peak_bytes == 10_000
    with pytest.raises(Infeasible) as caught:
        solve(chain, 9_999)
    assert "step of the optimizer" in caught.value.what


def test_a_limited_table_refuses_larger_budgets() -> None:
    solver = Solver(random_chain(random.Random(1), 3, 2), limit_bytes=100)
    with pytest.raises(ValueError, match="limit"):
        solver.solve(101)


def test_parameter_gradients_are_charged_only_once_they_exist() -> None:
    """Two equal stages, one option each. At the backward of the last only its own gradients exist."""
    stage = StageCost(
        name="a",
        input_bytes=10,
        input_grad_bytes=0,
        fast_seconds=1,
        fast_temp_bytes=0,
        param_grad_bytes=1000,
        options=(
            OptionCost(
                policy=SAVE_ALL,
                forward_seconds=1,
                backward_seconds=2,
                kept_bytes=500,
                forward_temp_bytes=0,
                backward_temp_bytes=1000,
            ),
        ),
    )
    chain = ChainCost(stages=(stage, dataclasses.replace(stage, name="b")), output_bytes=10)
    # kept 500 + 500 and 1000 new at the last backward; kept 500, 1000 old and 1000 new at the first
    assert solve(chain, 10**6).peak_bytes == 2500


def test_dominated_options_are_pruned() -> None:
    good = OptionCost(
        policy=SAVE_ALL,
        forward_seconds=1,
        backward_seconds=1,
        kept_bytes=10,
        forward_temp_bytes=0,
        backward_temp_bytes=5,
    )
    worse = dataclasses.replace(good, policy=keep("conv1"), backward_temp_bytes=6)
    smaller = dataclasses.replace(good, policy=keep(), kept_bytes=9, backward_seconds=2)
    fused = dataclasses.replace(good, policy=FUSED, forward_seconds=0, kept_bytes=0, backward_seconds=9)
    stage = StageCost(
        name="a",
        input_bytes=1,
        input_grad_bytes=1,
        fast_seconds=1,
        fast_temp_bytes=0,
        options=(worse, good, smaller, fused),
    )
    assert prune(stage.options) == (good, smaller, fused)


def test_slots_are_powers_of_two_and_no_more_than_asked() -> None:
    for chain in (tradeoffs(12, 4), scaled(random_chain(random.Random(1), 6, 3), random.Random(2))):
        slot, useful = Solver(chain).table.slot_bytes, useful_bytes(chain)
        assert slot & (slot - 1) == 0
        assert slot // 2 * MAX_SLOTS < useful <= slot * MAX_SLOTS


@pytest.mark.parametrize(("stages", "seconds"), [(39, 1.0), (56, 2.0)])
def test_fast_enough(stages: int, seconds: float) -> None:
    """8 options that do not dominate one another, 5,000 slots; time of this process, as others may use the
    cores."""
    chain = tradeoffs(stages, 8)
    start = time.process_time()
    solver = Solver(chain, slot_bytes=-(-useful_bytes(chain) // 5000))
    solution = solver.solve(useful_bytes(chain) // 3)
    assert time.process_time() - start < seconds
    assert len(prune(chain.stages[0].options)) == 8
    assert solution.peak_bytes <= useful_bytes(chain) // 3
