"""What waits in host memory, and when it moves: a schedule of the solver's, with the tensors of its first items away.

The last tensors that a forward makes are the first that the backward needs, so those of the first items have the most
time to leave and to come back. For a schedule, and a number of items whose tensors leave, a timeline of three channels
(computing; each way of the link) settles the moments: a tensor leaves as soon as it is there, one after the other, and
is freed at the first end of an item's forward at which its copy is over, earlier only where memory runs out: then the
computing waits. It comes back, in the order of use, as early as the budget leaves room from then on.

Candidates are the schedules of the solver's table that need more than the budget, each with the first n items away; and
the first n stages under the policies that are cheapest at a price of memory, all of it away, with the solver's schedule
of the others in what memory is left, for a few prices (recomputation and transfers share what is missing between them:
POFO, Beaumont et al., NeurIPS 2021, plans the same trade by a dynamic programme). Known not to be optimal: items leave
as a whole, and the solver knows nothing of the link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf
from typing import NamedTuple

from lowmem.core.errors import Infeasible
from lowmem.plan.cost import ChainCost, OptionCost
from lowmem.plan.evaluate import Solution, Span, Walk, evaluate
from lowmem.plan.policy import OUTPUT, Host, Item, Keep, Schedule, Segment
from lowmem.plan.solver import NEAR_RATIO, NEAR_RUNGS, Solver
from lowmem.plan.table import Table

_CURVE_POINTS = 40  # of the solver's schedules that are tried
_NOTHING = 1e-9  # seconds by which nothing is faster
# Of memory, as shares of the seconds of the fastest step for each byte that it keeps.
_PRICES = (0.0, *(0.02 * 1.4**power for power in range(14)))


@dataclass(frozen=True)
class LinkRates:
    """Of a link to host memory, in bytes per second, each way while the other is busy too."""

    out: float
    back: float

    def __post_init__(self) -> None:
        if not (self.out > 0 and self.back > 0):
            raise ValueError("rates are positive")

    def seconds(self, nbytes: int) -> float:
        """Out and back."""
        return nbytes / self.out + nbytes / self.back

    def __str__(self) -> str:
        out, back = (f"{rate / 1e9:.3g} GB/s" for rate in (self.out, self.back))
        return f"at {out} each way" if out == back else f"at {out} out and {back} back"


@dataclass(frozen=True)
class HostTerms:
    """What host memory there is for a step, and how to get there."""

    rates: LinkRates
    limit_bytes: int


@dataclass(eq=False)
class _Cargo:
    """Tensors of an item that travel together. Numbers are of items: the one that makes them, the first after whose
    forward, and the one before whose backward they are needed."""

    names: frozenset[str]
    nbytes: int
    item: int
    needed: int  # also the least after which it may be freed: whoever reads it in the backward does so in the forward
    gone: int = -1
    back: int = -1


@dataclass(frozen=True)
class Timeline:
    """A step with tensors away: `seconds` of forward and backward, `waiting_seconds` of it for the link."""

    cargo: Sequence[_Cargo]
    seconds: float
    waiting_seconds: float

    @property
    def host_bytes(self) -> int:
        return sum(one.nbytes for one in self.cargo)


def cargo_of(items: Sequence[Item], chain: ChainCost, count: int) -> Iterator[_Cargo]:
    """What the first so many items can send."""
    for number, item in enumerate(items[:count]):
        sends = True
        if isinstance(item, Keep):
            option = chain.stages[item.stage].option(item.policy)
            if item.policy.drop_output:
                continue
            if option.host_tensors:
                names, sizes = zip(*option.host_tensors, strict=True)
                yield _Cargo(frozenset(names), sum(sizes), number, number)
            sends = option.sends_output
        if sends and number + 1 < len(items) and _frees_input(items[number + 1], chain):
            yield _Cargo(frozenset({OUTPUT}), chain.boundary_bytes[item.end + 1], number, number + 1)


def _frees_input(item: Item, chain: ChainCost) -> bool:
    if isinstance(item, Segment):
        return True
    return not item.policy.drop_output and chain.stages[item.stage].option(item.policy).frees_input


def timeline(spans: Sequence[Span], cargo: Iterable[_Cargo], budget_bytes: int, rates: LinkRates) -> Timeline | None:
    """Settles when the cargo moves, under a budget for all that is on the device; None if that is too little.
    `spans`: of the items' forwards and then backwards (`Walk.spans`)."""
    count = len(spans) // 2
    forward, backward = spans[:count], spans[count:][::-1]
    left = _leave(forward, backward[-1], cargo, budget_bytes, rates.out)
    if left is None:
        return None
    away, ends = left
    waited = ends - sum(span.seconds for span in forward)
    if not _come_back(backward, away, budget_bytes):
        return None
    seconds = _return(backward, away, rates.back)
    waited += seconds - sum(span.seconds for span in backward)
    return Timeline(away, ends + seconds, max(0.0, waited))  # sums round


def _leave(
    forward: Sequence[Span], turn: Span, cargo: Iterable[_Cargo], budget_bytes: int, rate: float
) -> tuple[list[_Cargo], float] | None:
    """The cargo that has left by the end of the forward, and when that is. `turn`: the first backward."""
    waiting = list(cargo)
    moving: list[tuple[_Cargo, float]] = []  # with when its copy is over
    away: list[_Cargo] = []
    now = free_at = 0.0
    missing = 0  # bytes that are away

    def make_room(span: Span, after: int) -> bool:
        """Waits for copies until the span fits."""
        nonlocal now, missing
        while span.most_bytes - missing > budget_bytes:
            first = next((pair for pair in moving if pair[0].needed <= after), None)
            if first is None:
                return False
            moving.remove(first)
            now = max(now, first[1])
            go(first[0], after)
        return True

    def go(one: _Cargo, after: int) -> None:
        nonlocal missing
        one.gone = after
        missing += one.nbytes
        away.append(one)

    for number, span in enumerate(forward):
        if not make_room(span, number - 1):
            return None
        now += span.seconds
        while waiting and waiting[0].item == number:
            free_at = max(free_at, now) + waiting[0].nbytes / rate
            moving.append((waiting.pop(0), free_at))
        for pair in [pair for pair in moving if pair[1] <= now and pair[0].needed <= number]:
            moving.remove(pair)
            go(pair[0], number)
    last = len(forward) - 1
    return (away, now) if make_room(turn, last) else None


def _come_back(backward: Sequence[Span], away: list[_Cargo], budget_bytes: int) -> bool:
    """Settles before whose backward each comes back: as early as there is room from then on. False if there is none
    when it is needed."""
    away.sort(key=lambda one: (-one.needed, -one.item))
    missing = [0] * len(backward)
    for one in away:
        for number in range(one.needed + 1, len(backward)):
            missing[number] += one.nbytes
    room = [budget_bytes - span.most_bytes + less for span, less in zip(backward, missing, strict=True)]
    if min(room) < 0:
        return False
    latest = len(backward) - 1
    for one in away:
        one.back = one.needed
        while one.back < latest and room[one.back + 1] >= one.nbytes:
            one.back += 1
            room[one.back] -= one.nbytes
        latest = one.back
    return True


def _return(backward: Sequence[Span], away: Sequence[_Cargo], rate: float) -> float:
    """Seconds of the backward; nothing begins to come back sooner than the link is free for it."""
    now = free_at = 0.0
    left, coming = list(away), list[tuple[_Cargo, float]]()
    for number in reversed(range(len(backward))):
        ends = now + backward[number].seconds
        while left and left[0].back >= number and (free_at <= ends or left[0].needed == number):
            left[0].back = number
            free_at = max(free_at, now) + left[0].nbytes / rate
            coming.append((left.pop(0), free_at))
        for pair in [pair for pair in coming if pair[0].needed == number]:
            coming.remove(pair)
            now = max(now, pair[1])
        now += backward[number].seconds
    return now


def with_host(schedule: Schedule, line: Timeline) -> Schedule:
    """The schedule, with the timeline's moments."""
    hosts: dict[int, list[Host]] = {}
    ends = [item.end for item in schedule.items]
    for one in sorted(line.cargo, key=lambda one: (one.item, one.needed)):
        hosts.setdefault(one.item, []).append(Host(one.names, ends[one.gone], ends[one.back]))
    return Schedule(
        tuple(replace(item, host=tuple(hosts.get(number, ()))) for number, item in enumerate(schedule.items))
    )


class Way(NamedTuple):
    """A schedule's items, and how many of the first may be away. `seconds`: of a step, if nothing waits."""

    seconds: float
    items: Callable[[], Sequence[Item]]
    counts: Iterable[int]


class HostSolver(Solver):
    """A solver that may let tensors wait in host memory; `solve` and `ladder` do, the curve and the least are those
    without. `limit_bytes` bounds nothing: what needs more than a budget is what host memory is for."""

    def __init__(self, chain: ChainCost, terms: HostTerms) -> None:
        super().__init__(chain)
        self.terms = terms

    @cached_property
    def _usual(self) -> list[Solution]:
        return self.curve(_CURVE_POINTS)

    def _priced(self, most_bytes: int) -> list[list[OptionCost]]:
        """For each price every stage's cheapest option of those whose backward fits into so many bytes if everything
        else is away."""
        chain = self.chain
        stages = [stage.anywhere for stage in chain.stages]
        fast = [min(options, key=lambda one: (one.seconds, one.kept_bytes)) for options in stages]
        unit = sum(one.seconds for one in fast) / max(1, sum(one.kept_bytes for one in fast))
        x, g, later = chain.boundary_bytes, chain.boundary_grad_bytes[1:], chain.later_param_grad_bytes[1:]
        left = [most_bytes - sum(beside) for beside in zip(x, g, later, strict=False)]
        fitting = [
            [one for one in options if one.kept_bytes + one.backward_temp_bytes <= most] or options
            for options, most in zip(stages, left, strict=True)
        ]

        def at(price: float) -> list[OptionCost]:
            return [min(options, key=lambda one: one.seconds + price * unit * one.kept_bytes) for options in fitting]

        found = {tuple(one.policy for one in options): options for options in map(at, _PRICES)}
        return list(found.values())

    def solve_alone(self, budget_bytes: int) -> Solution:
        """Without host memory. Raises Infeasible."""
        return super().solve(budget_bytes)

    def solve(self, budget_bytes: int) -> Solution:
        """The fastest that fits, with host memory or without. Raises Infeasible with the least budget of those
        without."""
        alone, refused = None, None
        try:
            alone = self.solve_alone(budget_bytes)
        except Infeasible as error:
            refused = error
        if budget_bytes >= self.chain.outside_peak_bytes:
            most = inf if alone is None else alone.seconds
            found = fastest(self._ways(budget_bytes), self.chain, budget_bytes, self.terms, most)
            if found is not None:
                return found
        if alone is None:
            assert refused is not None
            raise refused
        return alone

    def ladder(self, below_bytes: int, ratio: float = NEAR_RATIO, near: int = NEAR_RUNGS) -> list[Solution]:
        rungs = super().ladder(below_bytes, ratio, near)
        # The least is that without host memory; with it the same bytes may take less time.
        return [*rungs[:-1], *(self.solve(least.peak_bytes) for least in rungs[-1:])]

    def _ways(self, budget_bytes: int) -> Iterator[Way]:
        """Candidates, some of which may fit."""
        for one in self._usual:
            if one.peak_bytes > budget_bytes:
                items = one.schedule.items
                yield Way(one.seconds, partial(tuple, items), range(1, len(items)))
        table = self.table
        for options in self._priced(budget_bytes - self.chain.fixed_bytes):
            items = tuple(Keep(stage, option.policy) for stage, option in enumerate(options))
            left, seconds = budget_bytes - self.chain.fixed_bytes, self.chain.outside_seconds
            away = [0] * len(items)
            for cargo in cargo_of(items, self.chain, len(items)):
                away[cargo.item] += cargo.nbytes
            for count, (option, nbytes) in enumerate(zip(options[:-1], away, strict=False), 1):
                left -= option.kept_bytes - nbytes
                seconds += option.seconds
                m = min(left // table.slot_bytes, table.slots)
                if m >= 0 and (rest := float(table.times_from(count)[m])) < inf:
                    yield Way(seconds + rest, partial(_joined, items[:count], table, m), (count,))


def _joined(first: tuple[Item, ...], table: Table, m: int) -> tuple[Item, ...]:
    return (*first, *table.items_from(len(first), m))


def fastest(
    ways: Iterable[Way], chain: ChainCost, budget_bytes: int, terms: HostTerms, below_seconds: float = inf
) -> Solution | None:
    """The fastest of the ways to run a step with tensors away so that the budget holds; None if there is none that
    takes less than so many seconds."""
    seconds, best = below_seconds, None
    # In the same time the first takes: what moves less.
    for way in sorted(ways, key=lambda way: round(way.seconds / _NOTHING)):
        if way.seconds >= seconds - _NOTHING:
            break  # the others are slower even without waiting
        items, walk = way.items(), Walk(chain)
        walk.items(tuple(items))
        for count in way.counts:
            line = timeline(walk.spans, cargo_of(items, chain, count), budget_bytes, terms.rates)
            if line is None or line.host_bytes > terms.limit_bytes:
                continue
            if line.seconds + chain.outside_seconds < seconds - _NOTHING:
                seconds, best = line.seconds + chain.outside_seconds, (items, line)
    if best is None:
        return None
    items, line = best
    found = evaluate(with_host(Schedule(tuple(items)), line), chain)
    assert found.peak_bytes <= budget_bytes, "the timeline and the cost model count alike"
    plain = chain.plain_seconds
    return replace(
        found,
        seconds=seconds,
        overhead=None if plain is None else (line.seconds - plain) / (plain + chain.outside_seconds),
        waiting_seconds=line.waiting_seconds,
        host_bytes=line.host_bytes,
        hidden_share=max(0.0, 1 - line.waiting_seconds / terms.rates.seconds(line.host_bytes)),
    )
