"""What waits in host memory: the timeline against a simulation of its events, the choice against brute force."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import inf

import pytest

from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost, OptionCost
from lowmem.plan.evaluate import Walk, evaluate
from lowmem.plan.hosting import HostSolver, HostTerms, cargo_of, grads_of, with_host
from lowmem.plan.policy import GRADS, OUTPUT, Keep, Schedule
from lowmem.plan.solver import Solver
from lowmem.plan.timeline import LinkRates, Timeline, timeline
from tests.unit.plan.chains import random_chain, scaled, tradeoffs
from tests.unit.plan.oracle import all_schedules

NO_LIMIT = 1 << 60
NOTHING = 1e-7  # seconds, for sums in another order
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)  # bytes per second, beside steps of some dozen seconds and bytes


def movable(rng: random.Random, chain: ChainCost) -> ChainCost:
    """The same, but much of what is kept may wait in host memory."""

    def of(option: OptionCost, output: int) -> OptionCost:
        if option.policy.drop_output or option.policy.fused:
            return option
        inside = option.kept_bytes - output
        first = rng.randint(0, inside)
        sizes = {"conv1": first, "bn1": rng.randint(0, inside - first)}
        return dataclasses.replace(
            option,
            host_tensors=tuple((name, size) for name, size in sizes.items() if size),
            sends_output=rng.random() < 0.8,
            frees_input=rng.random() < 0.8,
        )

    stages = [
        dataclasses.replace(
            stage,
            options=tuple(of(option, output) for option in stage.options),
            host_grad_bytes=rng.randint(0, stage.param_grad_bytes),
        )
        for stage, output in zip(chain.stages, chain.boundary_bytes[1:], strict=True)
    ]
    return dataclasses.replace(chain, stages=tuple(stages))


def drawn_chain(rng: random.Random, least: int, most: int, options: int = 3) -> ChainCost:
    return movable(rng, random_chain(rng, rng.randint(least, most), options, dropping=rng.random() < 0.5))


def drawn_schedules(rng: random.Random, chain: ChainCost) -> list[Schedule]:
    return [solution.schedule for solution in rng.choices(Solver(chain).curve(None), k=3)]


def drawn_rates(rng: random.Random) -> LinkRates:
    return LinkRates(rng.choice(RATES), rng.choice(RATES))


def terms(rate: float, limit_bytes: int = NO_LIMIT, *, grads: bool = False) -> HostTerms:
    return HostTerms(LinkRates(rate, rate), limit_bytes, grads)


def lines_of(
    rng: random.Random, chain: ChainCost, schedule: Schedule, rates: LinkRates
) -> Iterator[tuple[int, Timeline]]:
    """Timelines under a few budgets below the schedule's peak, for each number of items away."""
    walk = Walk(chain)
    walk.items(schedule.items)
    peak = evaluate(schedule, chain).peak_bytes
    for budget in sorted({peak, peak - 1, *(rng.randint(peak // 2, peak) for _ in range(4))}):
        for count in range(1, len(schedule.items)):
            for grads in ((), grads_of(schedule.items, chain, budget)):
                line = timeline(walk.spans, cargo_of(schedule.items, chain, count), budget, rates, grads)
                if line is not None:
                    yield budget, line


@dataclasses.dataclass
class Load:
    """Bytes that move together, by numbers of items; `needed` -1: gradients; `over`: when the copy that is under way
    ends."""

    nbytes: int
    item: int
    needed: int
    gone: int
    back: int
    over: float = inf


def loads_of(schedule: Schedule, chain: ChainCost) -> Iterator[Load]:
    numbers = {item.end: number for number, item in enumerate(schedule.items)}
    for number, item in enumerate(schedule.items):
        sizes = {OUTPUT: chain.boundary_bytes[item.end + 1]}
        if isinstance(item, Keep):
            sizes.update(chain.stages[item.stage].option(item.policy).host_tensors)
        for host in item.host:
            if host.names == {GRADS}:
                nbytes = sum(stage.host_grad_bytes for stage in chain.stages[item.start : item.end + 1])
                yield Load(nbytes, number, -1, numbers[host.gone], -1 if host.back == -1 else numbers[host.back])
                continue
            nbytes = sum(sizes[name] for name in host.names)
            needed = number + (OUTPUT in host.names)
            yield Load(nbytes, number, needed, numbers[host.gone], numbers[host.back])


def seconds_by_events(schedule: Schedule, chain: ChainCost, rates: LinkRates) -> float:
    """Of forward and backward, with the schedule's moments: three clocks, one event after the other."""
    walk, loads = Walk(chain), list(loads_of(schedule, chain))
    walk.items(schedule.items)
    count, lasting = len(schedule.items), [span.seconds for span in walk.spans]
    grads, loads = [load for load in loads if load.needed < 0], [load for load in loads if load.needed >= 0]
    now = free = 0.0
    for number in range(count):
        now += lasting[number]
        for load in loads:
            if load.item == number:
                free = load.over = max(free, now) + load.nbytes / rates.out
        now = max([now, *(load.over for load in loads if load.gone == number)])
    free = leaving = 0.0
    loads += grads
    for number in reversed(range(count)):
        now = max([now, *(load.over for load in grads if load.gone == number)])
        for load in sorted(loads, key=lambda load: (-load.needed, -load.item)):
            if load.back == number:
                free = load.over = max(free, now) + load.nbytes / rates.back
        now = max([now, *(load.over for load in loads if load.needed == number)])
        now += lasting[2 * count - 1 - number]
        for load in grads:
            if load.item == number:
                leaving = load.over = max(leaving, now) + load.nbytes / rates.out
    for load in sorted(grads, key=lambda load: -load.item):
        if load.back == -1:
            free = load.over = max(free, now) + load.nbytes / rates.back
    return max([now, *(load.over for load in grads)])


@pytest.mark.parametrize("seed", range(60))
def test_the_timeline_keeps_the_budget_and_has_the_seconds_of_its_events(seed: int) -> None:
    rng = random.Random(seed)
    chain, rates = drawn_chain(rng, 3, 5), drawn_rates(rng)
    for schedule in drawn_schedules(rng, chain):
        alone = evaluate(schedule, chain)
        for budget, line in lines_of(rng, chain, schedule, rates):
            hosted = with_host(schedule, line)
            assert evaluate(hosted, chain).peak_bytes <= budget
            assert line.waiting_seconds >= 0
            assert line.seconds == pytest.approx(seconds_by_events(hosted, chain, rates), abs=NOTHING)
            assert line.seconds == pytest.approx(alone.seconds + line.waiting_seconds, abs=NOTHING)
            assert line.host_bytes == sum(load.nbytes for load in loads_of(hosted, chain))
            assert Schedule.from_json(hosted.to_json()) == hosted


def test_the_timeline_saves_memory_and_waits_now_and_then() -> None:
    """So that the test above has something to test."""
    saved = waited = grads = 0
    for seed in range(60):
        rng = random.Random(seed)
        chain, rates = drawn_chain(rng, 3, 5), drawn_rates(rng)
        for schedule in drawn_schedules(rng, chain):
            for budget, line in lines_of(rng, chain, schedule, rates):
                saved += budget < evaluate(schedule, chain).peak_bytes
                waited += line.waiting_seconds > NOTHING
                grads += any(one.needed < 0 for one in line.cargo)
    assert min(saved, waited, grads) > 100


def budgets_of(chain: ChainCost) -> list[int]:
    """From the least that the solver knows without host memory to just below what changes nothing."""
    solver = Solver(chain)
    least, most = solver.least().peak_bytes, solver.curve(None)[-1].peak_bytes
    return [int(least + share * (most - least)) for share in (0, 0.2, 0.5, 0.8)]


def least_seconds(chain: ChainCost, budget: int, rates: LinkRates, grads: bool) -> float:
    """Of all schedules with any of their items away, in the timeline's order, and of `grads` those that it lets go."""
    best = inf
    for schedule in all_schedules(chain):
        walk, everything = Walk(chain), range(len(schedule.items))
        walk.items(schedule.items)
        if walk.seconds >= best:
            continue
        for away in (some for count in range(len(everything) + 1) for some in combinations(everything, count)):
            cargo = [one for one in cargo_of(schedule.items, chain, len(schedule.items)) if one.item in away]
            leaving = grads_of(schedule.items, chain, budget) if grads else ()
            line = timeline(walk.spans, cargo, budget, rates, leaving)
            best = min(best, inf if line is None else line.seconds)
    return best


@pytest.mark.parametrize("grads", [False, True])
def test_near_the_least_of_all_schedules_and_all_subsets_away(grads: bool) -> None:
    """What is known not to be optimal: the items that leave are always the first n, each as a whole, and their policies
    are the solver's or go by one price of memory. Of a thousand chains at four budgets 4 % were slower than the
    optimum, one by 28 %; of these ones as few, by at most 15 % (where gradients leave too 7 %, by at most 19 %). The
    timeline's own order is not searched."""
    exact = helped = 0
    for seed in range(50):
        rng = random.Random(seed)
        chain = movable(rng, random_chain(rng, 3, 2, dropping=rng.random() < 0.5))
        rates = drawn_rates(rng)
        solver, alone = HostSolver(chain, HostTerms(rates, NO_LIMIT, grads)), Solver(chain)
        for budget in budgets_of(chain):
            best, found = least_seconds(chain, budget, rates, grads), solver.solve(budget).seconds
            assert best - NOTHING <= found <= (1.19 if grads else 1.15) * best + NOTHING
            exact += found <= best + NOTHING
            helped += found < alone.solve(budget).seconds - NOTHING
    assert exact >= (0.93 if grads else 0.95) * 200
    assert helped >= 30


@pytest.mark.parametrize("seed", range(30))
def test_never_slower_than_without_and_a_link_that_is_no_good_is_not_used(seed: int) -> None:
    chain = drawn_chain(random.Random(seed), 4, 7)
    alone = Solver(chain)
    solvers = [HostSolver(chain, terms(rate, grads=seed % 2 == 1)) for rate in (1e-6, *RATES, 1e6)]
    links = [solver.terms.rates for solver in solvers]
    for budget in budgets_of(chain):
        without = alone.solve(budget)
        found = [solver.solve(budget) for solver in solvers]
        assert found[0] == without
        for solution, rates in zip(found, links, strict=True):
            assert solution.peak_bytes <= budget
            assert solution.seconds <= without.seconds
            assert solution.seconds == pytest.approx(seconds_by_events(solution.schedule, chain, rates), abs=NOTHING)
            assert solution.schedule.hosts == (solution.host_bytes > 0)
        # More rate is not slower here. It may be: what has left in time need not have had to, and comes back.
        assert seed % 2 or all(faster.seconds <= slower.seconds + NOTHING for slower, faster in pairwise(found))


def test_a_slow_link_gives_the_plan_without_host_memory() -> None:
    """Of realistic sizes, at 1 MB/s."""
    rng = random.Random(1)
    chain = movable(rng, scaled(random_chain(rng, 8, 3, dropping=True), rng))
    for budget in budgets_of(chain):
        slow, without = HostSolver(chain, terms(1e6)).solve(budget), Solver(chain).solve(budget)
        assert (slow.seconds, slow.host_bytes) == (without.seconds, 0)


@pytest.mark.parametrize("seed", range(10))
def test_the_limit_of_host_memory_is_kept(seed: int) -> None:
    chain = drawn_chain(random.Random(seed), 4, 7)
    for budget in budgets_of(chain):
        free = HostSolver(chain, terms(8.0)).solve(budget)
        for limit in (free.host_bytes, free.host_bytes // 2, 1, 0):
            assert HostSolver(chain, terms(8.0, limit)).solve(budget).host_bytes <= limit
        assert HostSolver(chain, terms(8.0, free.host_bytes)).solve(budget).seconds == free.seconds
        assert HostSolver(chain, terms(8.0, 0)).solve(budget) == Solver(chain).solve(budget)


def with_gradients(nbytes: int) -> ChainCost:
    """A chain whose tensors may all wait, with so many bytes of gradients a stage."""
    chain = tradeoffs(12, 4)
    options = tuple(
        dataclasses.replace(
            option,
            host_tensors=(("conv1", option.kept_bytes - chain.boundary_bytes[1]),),
            sends_output=True,
            frees_input=True,
        )
        for option in chain.stages[0].options
    )
    more = {"options": options, "param_grad_bytes": nbytes, "host_grad_bytes": nbytes}
    stages = tuple(dataclasses.replace(stage, **more) for stage in chain.stages)
    return dataclasses.replace(chain, stages=stages)


def test_the_ladder_goes_down() -> None:
    solver = HostSolver(with_gradients(0), terms(1e8))
    top = solver.solve(solver.curve(None)[-1].peak_bytes)
    rungs = solver.ladder(top.peak_bytes)
    assert len(rungs) > 4
    assert any(rung.schedule.hosts for rung in rungs)
    for higher, lower in pairwise([top, *rungs]):
        assert lower.peak_bytes < higher.peak_bytes
        assert lower.seconds >= higher.seconds
    assert rungs[-1].peak_bytes <= solver.least().peak_bytes
    assert rungs[-1].seconds <= solver.least().seconds


def test_with_gradients_away_the_least_is_less() -> None:
    chain = with_gradients(1 << 24)
    alone, there = Solver(chain), HostSolver(chain, terms(1e9, grads=True))
    least = there.least()
    assert least.peak_bytes < 0.8 * alone.least().peak_bytes
    assert evaluate(least.schedule, chain).peak_bytes == least.peak_bytes
    assert there.ladder(alone.least().peak_bytes)[-1] == least
    with pytest.raises(Infeasible) as caught:
        there.solve(least.peak_bytes // 2)
    assert caught.value.least_bytes == least.peak_bytes
    # Where the end of the backward has no room for them, or the limit is too low, they stay.
    outside = dataclasses.replace(chain, outside_peak_bytes=alone.least().peak_bytes)
    assert HostSolver(outside, terms(1e9, grads=True)).least().peak_bytes == alone.least().peak_bytes
    assert HostSolver(chain, terms(1e9, 1 << 20, grads=True)).least().peak_bytes == alone.least().peak_bytes


def test_the_optimizers_step_bounds_the_budget_too() -> None:
    """Nothing that waits on the host makes that smaller."""
    rng = random.Random(3)
    chain = dataclasses.replace(movable(rng, random_chain(rng, 5, 3)), outside_peak_bytes=10_000)
    solver = HostSolver(chain, terms(1e6))
    assert solver.solve(10_000).peak_bytes == 10_000
    with pytest.raises(Infeasible) as caught:
        solver.solve(9_999)
    assert "step of the optimizer" in caught.value.what


def test_a_schedule_that_moves_nothing_has_no_transfer_to_hide() -> None:
    """Nothing of the chain may wait, and by exact bytes a candidate fits where the table, in slots, has none."""
    rng = random.Random(139)
    chain = random_chain(rng, rng.randint(2, 6), 3, dropping=rng.random() < 0.5)
    chain = scaled(chain, rng)
    least = Solver(chain).least().peak_bytes
    found = HostSolver(chain, terms(1.0)).solve(least - 1)
    assert (found.host_bytes, found.hidden_share) == (0, None)
    assert found.waiting_seconds == 0
