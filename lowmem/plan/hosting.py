"""What waits in host memory, and when it moves: a schedule of the solver's, with the tensors of its first items away.

The last tensors that a forward makes are the first that the backward needs, so those of the first items have the most
time to leave and to come back. For a schedule, and a number of items whose tensors leave, a timeline settles the
moments (`lowmem.plan.timeline`).

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
from lowmem.plan.evaluate import Solution, Walk, evaluate
from lowmem.plan.policy import GRADS, OUTPUT, Host, Item, Keep, Schedule, Segment
from lowmem.plan.solver import Solver
from lowmem.plan.table import Table
from lowmem.plan.timeline import Cargo, LinkRates, Timeline, timeline

_CURVE_POINTS = 40  # of the solver's schedules that are tried
_STEPS = 400  # of what a step takes at least, is the first one up from there to what fits
_NOTHING = 1e-9  # seconds by which nothing is faster
# Of memory, as shares of the seconds of the fastest step for each byte that it keeps.
_PRICES = (0.0, *(0.02 * 1.4**power for power in range(14)))


@dataclass(frozen=True)
class HostTerms:
    """What host memory there is for a step, and how to get there. `grads`: complete gradients of parameters may wait
    there too, until the backward is over: right where nobody looks at `.grad` before, and there was none."""

    rates: LinkRates
    limit_bytes: int
    grads: bool = False


def cargo_of(items: Sequence[Item], chain: ChainCost, count: int) -> Iterator[Cargo]:
    """What the first so many items can send."""
    for number, item in enumerate(items[:count]):
        sends = True
        if isinstance(item, Keep):
            option = chain.stages[item.stage].option(item.policy)
            if item.policy.drop_output:
                continue
            if option.host_tensors:
                names, sizes = zip(*option.host_tensors, strict=True)
                yield Cargo(frozenset(names), sum(sizes), number, number)
            sends = option.sends_output
        if sends and number + 1 < len(items) and _frees_input(items[number + 1], chain):
            yield Cargo(frozenset({OUTPUT}), chain.boundary_bytes[item.end + 1], number, number + 1)


def _frees_input(item: Item, chain: ChainCost) -> bool:
    if isinstance(item, Segment):
        return True
    return not item.policy.drop_output and chain.stages[item.stage].option(item.policy).frees_input


def grads_of(items: Sequence[Item], chain: ChainCost, budget_bytes: int) -> Iterator[Cargo]:
    """The gradients that may wait, in the order in which the backward completes them; none if there is no room for all
    of them at its end."""
    at_the_end = chain.fixed_bytes + chain.boundary_grad_bytes[0] + chain.later_param_grad_bytes[0]
    for number in reversed(range(1, len(items) if budget_bytes >= at_the_end else 1)):
        item = items[number]
        if nbytes := sum(stage.host_grad_bytes for stage in chain.stages[item.start : item.end + 1]):
            yield Cargo(frozenset({GRADS}), nbytes, number, -1)


def with_host(schedule: Schedule, line: Timeline) -> Schedule:
    """The schedule, with the timeline's moments."""
    hosts: dict[int, list[Host]] = {}
    ends = [*(item.end for item in schedule.items), -1]  # the last: of gradients that come back at the end
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
    """A solver that may let tensors wait in host memory; the curve is that without. `limit_bytes` bounds nothing: what
    needs more than a budget is what host memory is for."""

    def __init__(self, chain: ChainCost, terms: HostTerms) -> None:
        super().__init__(chain)
        self.terms = terms

    @cached_property
    def _usual(self) -> list[Solution]:
        return self.curve(_CURVE_POINTS)

    def _priced(self, most_bytes: int, later: Sequence[int]) -> list[list[OptionCost]]:
        """For each price every stage's cheapest option of those whose backward fits into so many bytes if everything
        else is away but `later` bytes of parameters' gradients."""
        chain = self.chain
        stages = [stage.anywhere for stage in chain.stages]
        fast = [min(options, key=lambda one: (one.seconds, one.kept_bytes)) for options in stages]
        unit = sum(one.seconds for one in fast) / max(1, sum(one.kept_bytes for one in fast))
        x, g = chain.boundary_bytes, chain.boundary_grad_bytes[1:]
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
        found = super()._fastest(budget_bytes)
        if found is None:
            raise Infeasible(budget_bytes, self._table_least.peak_bytes, "without host memory", "allow it")
        return found

    def _fastest(self, budget_bytes: int) -> Solution | None:
        """With host memory or without."""
        alone = super()._fastest(budget_bytes)
        if budget_bytes < self.chain.outside_peak_bytes:
            return alone
        most = inf if alone is None else alone.seconds
        return fastest(self._ways(budget_bytes), self.chain, budget_bytes, self.terms, most) or alone

    def least(self) -> Solution:
        """With gradients away it may be less than the table's; in the bytes of that host memory may save time."""
        return self._least

    @cached_property
    def _least(self) -> Solution:
        high = self._table_least.peak_bytes
        if self.terms.grads:
            step = (bound := self._bound()) // _STEPS
            while bound + step < high:
                if (found := self._fastest(bound + step)) is not None:
                    return found
                step *= 2
        return self._fastest(high) or self._table_least

    def _bound(self) -> int:
        """Bytes that a step takes at least, if everything waits in host memory that may."""
        chain, stay = self.chain, 0
        most = chain.outside_peak_bytes
        for stage, output_grad in zip(reversed(chain.stages), chain.boundary_grad_bytes[:0:-1], strict=True):
            own = min(one.kept_bytes + one.backward_temp_bytes for one in (*stage.options, *stage.last_options))
            most = max(most, chain.fixed_bytes + stage.input_bytes + output_grad + stay + own)
            stay += stage.param_grad_bytes - stage.host_grad_bytes
        return most

    def _ways(self, budget_bytes: int) -> Iterator[Way]:
        """Candidates, some of which may fit."""
        for one in self._usual:
            if one.peak_bytes > budget_bytes:
                items = one.schedule.items
                yield Way(one.seconds, partial(tuple, items), range(1, len(items)))
        table = self.table
        most, later = budget_bytes - self.chain.fixed_bytes, self.chain.later_param_grad_bytes[1:]
        priced = self._priced(most, later)
        if self.terms.grads:
            priced += self._priced(most, [0] * len(later))
        for options in priced:
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
        movable = list(cargo_of(items, chain, len(items)))
        for count in way.counts:
            cargo = (replace(one) for one in movable if one.item < count)
            grads = grads_of(items, chain, budget_bytes) if terms.grads else ()
            line = timeline(walk.spans, cargo, budget_bytes, terms.rates, grads)
            if line is None or line.host_bytes > terms.limit_bytes:
                continue
            if line.seconds + chain.outside_seconds < seconds - _NOTHING:
                seconds, best = line.seconds + chain.outside_seconds, (items, line)
    if best is None:
        return None
    items, line = best
    found = evaluate(with_host(Schedule(tuple(items)), line), chain)
    assert found.peak_bytes <= budget_bytes, "the timeline and the cost model count alike"
    plain, moving = chain.plain_seconds, terms.rates.seconds(line.host_bytes)
    return replace(
        found,
        seconds=seconds,
        overhead=None if plain is None else (line.seconds - plain) / (plain + chain.outside_seconds),
        waiting_seconds=line.waiting_seconds,
        host_bytes=line.host_bytes,
        hidden_share=max(0.0, 1 - line.waiting_seconds / moving) if moving else None,
    )
