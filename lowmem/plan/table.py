"""The dynamic programme: least time of every sub-chain for every amount of memory, in one table.

Stages a..e, memory m. T(a, e, m) is the least time to run a..e forward and backward when the input of a is
held by the caller, the gradient of the output of e is inside m, and m is what the budget leaves after
everything fixed and everything held by callers. Writing G(i) for g[i] + the parameter gradients of stages i,
i+1, … (all that exist between the backwards of i and i-1), it is the least of

- keep stage a under an option, if m >= max(G(e+1) + S + tf, G(a+1) + S + tb):  f + b + T(a+1, e, m - S);
- the same dropping its output:  f + b + r + T'(a+1, e, m - S);
- checkpoint a..j-1, if the fast forwards fit beside G(e+1):  Σ f0 + T(j, e, m - x[j]) + T(a, j-1, m);
- for a = e inside a segment, fused, if m >= G(e+1) + tb:  b. There S of the others is without the output.

T'(a, e, m) is the same with a transient input of a: held inside m, freed after the forward of a and restored
before the backward of what begins at a. There is one T' for each way of restoring it. Stage a may drop its
output too: then what begins at a + 1 restores the input of a first and holds it.

Beaumont et al. ("Optimal checkpointing for heterogeneous chains", 2019) have the first and the third line;
several options per block are Rockmate's (ICML 2023).

Why parameter gradients leave the table one-dimensional: backward goes through the stages in one global order
whatever is checkpointed, so those that exist at the backward of stage i are those of the later stages, at any
depth of nesting. They are a constant of the boundary, which only moves the thresholds; nothing about them has
to be remembered in m.

Known limitations: at most `longest_run` neighbours drop their outputs; a segment's output is never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowmem.plan.cost import ChainCost, OptionCost, StageCost
from lowmem.plan.policy import Item, Keep, PolicyKind, Schedule, Segment

Row = NDArray[np.float64]

LONGEST_RUN = 2


class Restore(NamedTuple):
    """What restoring a dropped output takes, in bytes: at its peak, and beside the output afterwards."""

    peak: int
    left: int

    def then(self, following: Restore, size: int) -> Restore:
        """Restoring first this output, of `size` bytes, and from it the next stage's."""
        left = size + self.left
        return Restore(max(self.peak, left + following.peak), left + following.left)


def restore_of(option: OptionCost) -> Restore:
    """Of an option that drops its output."""
    return Restore(option.restore_temp_bytes, option.restored_bytes)


@dataclass(frozen=True)
class StageOptions:
    """A stage's options after pruning, by how they can be used."""

    plain: tuple[OptionCost, ...]
    dropping: tuple[OptionCost, ...]
    last: tuple[OptionCost, ...]  # as the last stage of a segment, without FUSED
    fused: OptionCost | None
    restores: tuple[Restore, ...]  # the different ones of `dropping`


def _dominates(better: OptionCost, worse: OptionCost) -> bool:
    """Whether `worse` is never needed. An option that drops its output never replaces one that does not: what
    comes after it is restricted."""
    if better.policy.drop_output and not worse.policy.drop_output:
        return False
    mine, its = better.kept_bytes, worse.kept_bytes
    return (
        better.seconds <= worse.seconds
        and mine <= its
        and mine + better.forward_temp_bytes <= its + worse.forward_temp_bytes
        and mine + better.backward_temp_bytes <= its + worse.backward_temp_bytes
        and (
            not better.policy.drop_output
            or (
                mine + better.restore_temp_bytes <= its + worse.restore_temp_bytes
                and mine + better.restored_bytes <= its + worse.restored_bytes
            )
        )
    )


def prune(options: Iterable[OptionCost]) -> tuple[OptionCost, ...]:
    """The options that no other one beats or equals in time and in every peak."""
    kept: list[OptionCost] = []
    for option in options:
        if any(_dominates(other, option) for other in kept):
            continue
        kept = [other for other in kept if not _dominates(option, other)]
        kept.append(option)
    return tuple(kept)


def sort_out(stage: StageCost) -> StageOptions:
    """Pruned, by use."""
    usual = [option for option in stage.options if option.policy.kind is not PolicyKind.FUSED]
    pruned = prune(usual)
    dropping = tuple(option for option in pruned if option.policy.drop_output)
    return StageOptions(
        plain=tuple(option for option in pruned if not option.policy.drop_output),
        dropping=dropping,
        last=prune(map(stage.last_option, stage.last_policies())),
        fused=next((option for option in stage.options if option.policy.kind is PolicyKind.FUSED), None),
        restores=tuple(dict.fromkeys(restore_of(option) for option in dropping)),
    )


class _Part(NamedTuple):
    """A sub-problem: T of a..e with `shift` slots less, or T' for the given way of restoring the input of
    a."""

    a: int
    e: int
    shift: int
    restore: Restore | None = None


class _Choice(NamedTuple):
    """A line of the recurrence: allowed from `least` slots on, `seconds` plus its parts. `what`: the option
    of the first stage, or j if a..j-1 is checkpointed."""

    seconds: float
    least: int
    parts: tuple[_Part, ...]
    what: OptionCost | int


class Table:
    """All of T for one chain, from which the schedule for any budget is read.

    `slot_bytes` is the unit of m: sizes are rounded to the nearest slot, so a schedule that is read from the
    table is off by up to half a slot per stage either way, and has to be evaluated before it is used.
    `slots`: the largest m. `longest_run`: the most neighbours that drop their outputs; each more about
    doubles the work for chains that have such options.
    """

    def __init__(self, chain: ChainCost, slot_bytes: int, slots: int, longest_run: int = LONGEST_RUN) -> None:
        self.chain = chain
        self.slot_bytes = slot_bytes
        self.slots = slots
        self._stages = [sort_out(stage) for stage in chain.stages]
        self._restores = self._all_restores(longest_run)
        self.longest_run = longest_run
        count = len(chain)
        self._x = [self._round(size) for size in chain.boundary_bytes]
        # bytes, not slots: thresholds are rounded as a whole
        self._gradients = [
            g + later for g, later in zip(chain.boundary_grad_bytes, chain.later_param_grad_bytes, strict=True)
        ]
        fast = [stage.fast_seconds for stage in chain.stages]
        self._fast = [0.0, *np.cumsum(fast).tolist()]
        self._rows: list[list[Row]] = [[] for _ in range(count)]  # [a][e - a]
        self._first: list[list[int]] = [[] for _ in range(count)]  # the least m that is finite
        self._known: dict[tuple[int, int, Restore | None, int], float] = {}  # values of T' that were read
        following: dict[Restore, list[Row]] = {}  # T' of a + 1
        for a in reversed(range(count)):
            following = self._fill(a, following)

    def _all_restores(self, longest_run: int) -> list[dict[Restore, int]]:
        """For each stage the ways of restoring its input, each with the least length of a run that has it."""
        found: list[dict[Restore, int]] = [{}]
        for stage, size in zip(self._stages[:-1], self.chain.boundary_bytes, strict=False):
            ways = dict.fromkeys(stage.restores, 1)
            for earlier, length in found[-1].items():
                if length < longest_run:
                    for restore in stage.restores:
                        ways.setdefault(earlier.then(restore, size), length + 1)
            found.append(ways)
        return found

    def _round(self, size: int) -> int:
        return (size + self.slot_bytes // 2) // self.slot_bytes

    def row(self, a: int, e: int) -> Row:
        """T(a, e, ·), seconds; inf where it does not fit."""
        return self._rows[a][e - a]

    @property
    def times(self) -> Row:
        """The least time of the whole chain for m = 0 … slots."""
        return self.row(0, len(self.chain) - 1)

    def _choices(self, a: int, e: int) -> Iterator[_Choice]:
        """The lines of the recurrence for T(a, e, ·)."""
        stage, ahead, behind = self._stages[a], self._gradients[e + 1], self._gradients[a + 1]
        if a == e < len(self.chain) - 1 and stage.fused is not None:
            yield self._keep(a, e, stage.fused, self._round(ahead + stage.fused.backward_temp_bytes))
        options = (*stage.plain, *stage.dropping) if a < e else self._at_end(a)
        for option in options:
            kept = option.kept_bytes
            least = self._round(max(ahead + option.forward_temp_bytes, behind + option.backward_temp_bytes) + kept)
            yield self._keep(a, e, option, least)
        peak = 0
        for j in range(a + 1, e + 1):
            peak = max(peak, self._fast_peak(j - 1, j - 1 > a))
            parts = (_Part(j, e, self._x[j]), _Part(a, j - 1, 0))
            yield _Choice(self._fast[j] - self._fast[a], self._round(ahead + peak), parts, j)

    def _transient_choices(self, a: int, e: int, restore: Restore) -> Iterator[_Choice]:
        """The lines of the recurrence for T'(a, e, ·): stage a - 1 drops its output, the input of a."""
        ahead, behind = self._gradients[e + 1], self._gradients[a + 1]
        held = self.chain.boundary_bytes[a]
        again = held + restore.left  # with what restoring leaves
        for option in self._stages[a].plain if a < e else self._at_end(a):
            forward = ahead + held + option.forward_temp_bytes
            backward = behind + max(restore.peak, again + option.backward_temp_bytes)
            yield self._keep(a, e, option, self._round(max(forward, backward) + option.kept_bytes))
        if a < e and self._restores[a][restore] < self.longest_run:
            for option in self._stages[a].dropping:
                forward = ahead + held + option.forward_temp_bytes
                backward = behind + again + option.backward_temp_bytes
                least = self._round(max(forward, backward) + option.kept_bytes)
                yield self._keep(a, e, option, least, restore.then(restore_of(option), held))
        peak, shift = 0, self._round(again)
        for j in range(a + 1, e + 1):
            peak = max(peak, self._fast_peak(j - 1, True))
            least = self._round(max(ahead + peak, self._gradients[j] + restore.peak))
            parts = (_Part(j, e, self._x[j]), _Part(a, j - 1, shift))
            yield _Choice(self._fast[j] - self._fast[a], least, parts, j)

    def _at_end(self, a: int) -> tuple[OptionCost, ...]:
        """Options of the last stage of a sub-chain; only the whole chain needs that stage's output."""
        return self._stages[a].last if a < len(self.chain) - 1 else self._stages[a].plain

    def _keep(self, a: int, e: int, option: OptionCost, least: int, restore: Restore | None = None) -> _Choice:
        """`restore`: of the output, if that takes more than the option itself."""
        kept = self._round(option.kept_bytes)
        if restore is None and option.policy.drop_output:
            restore = restore_of(option)
        parts = (_Part(a + 1, e, kept, restore),) if a < e else ()
        return _Choice(option.seconds, max(least, kept), parts, option)

    def _fast_peak(self, index: int, with_input: bool) -> int:
        x = self.chain.boundary_bytes
        here = x[index] if with_input else 0
        return here + x[index + 1] + self.chain.stages[index].fast_temp_bytes

    def _fill(self, a: int, following: dict[Restore, list[Row]]) -> dict[Restore, list[Row]]:
        """T(a, ·, ·), from T'(a + 1, ·, ·); returns T'(a, ·, ·)."""
        transient: dict[Restore, list[Row]] = {restore: [] for restore in self._restores[a]}
        for e in range(a, len(self.chain)):
            row = self._least(self._choices(a, e), following, a + 1)
            self._rows[a].append(row)
            self._first[a].append(_first_finite(row))
            for restore, rows in transient.items():
                rows.append(self._least(self._transient_choices(a, e, restore), following, a + 1))
        return transient

    def _least(self, choices: Iterator[_Choice], transient: dict[Restore, list[Row]], transient_a: int) -> Row:
        """The least of the choices for every m. `transient`: T' of stage `transient_a`."""
        size = self.slots + 1
        best, total = np.full(size, np.inf), np.empty(size)
        for choice in choices:
            start, rows = choice.least, []
            for part in choice.parts:
                if part.restore is not None:
                    row = transient[part.restore][part.e - transient_a]
                else:
                    row = self.row(part.a, part.e)
                    start = max(start, self._first[part.a][part.e - part.a] + part.shift)
                rows.append((row, part.shift))
            if start >= size:
                continue
            out = total[start:]
            if not rows:
                out.fill(choice.seconds)
            else:
                views = [row[start - shift : size - shift] for row, shift in rows]
                np.add(views[0], choice.seconds, out=out)
                if len(views) == 2:
                    np.add(out, views[1], out=out)
            np.minimum(best[start:], out, out=best[start:])
        return best

    # reading

    def schedule(self, m: int) -> Schedule:
        """The schedule behind `times[m]`, which has to be finite."""
        return Schedule(tuple(self._items(0, len(self.chain) - 1, m)))

    def _items(self, a: int, e: int, m: int) -> Iterator[Item]:
        part = _Part(a, e, 0)
        while part.a <= e:
            choice = self._best(part, m)
            if isinstance(choice.what, int):
                rest, inside = choice.parts
                inner = Schedule(tuple(self._items(inside.a, inside.e, m - inside.shift)))
                yield Segment(part.a, choice.what - 1, inner)
            else:
                yield Keep(part.a, choice.what.policy)
                if not choice.parts:
                    return
                rest = choice.parts[0]
            part, m = rest, m - rest.shift

    def _of(self, part: _Part) -> Iterator[_Choice]:
        if part.restore is None:
            return self._choices(part.a, part.e)
        return self._transient_choices(part.a, part.e, part.restore)

    def _best(self, part: _Part, m: int) -> _Choice:
        best, found = np.inf, None
        for choice in self._of(part):
            value = self._value(choice, m, best)
            if found is None or value < best:
                best, found = value, choice
        assert found is not None
        return found

    def _value(self, choice: _Choice, m: int, enough: float) -> float:
        """Seconds of the choice with m slots, or something at least `enough`, if it takes that long."""
        if m < choice.least:
            return np.inf
        total = choice.seconds
        for part in choice.parts:
            left = m - part.shift
            if left < 0:
                return np.inf
            known = float(self.row(part.a, part.e)[left])
            if part.restore is not None and total + known < enough:  # T' is not stored, and never below T
                known = self._transient_value(part, left)
            total += known
        return total

    def _transient_value(self, part: _Part, m: int) -> float:
        key = (part.a, part.e, part.restore, m)
        if key not in self._known:
            best = np.inf
            for choice in self._of(part):
                best = min(best, self._value(choice, m, best))
            self._known[key] = best
        return self._known[key]


def _first_finite(row: Row) -> int:
    """Index of the first finite value; the length if there is none. Rows never rise, so the rest is finite
    too."""
    return int(np.searchsorted(-row, -np.inf, side="right"))
