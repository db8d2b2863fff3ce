"""The dynamic programme: least time of every sub-chain for every amount of memory, in one table.

Stages a..e, memory m. T(a, e, m) is the least time to run a..e forward and backward when the input of a is held by the
caller, the gradient of the output of e is inside m, and m is what the budget leaves after everything fixed and
everything held by callers. Writing G(i) for g[i] + the parameter gradients of stages i, i+1, … (all that exist between
the backwards of i and i-1), it is the least of

- keep stage a under an option, if m >= max(G(e+1) + S + tf, G(a+1) + S + tb):  f + b + T(a+1, e, m - S);
- the same dropping its output:  f + b + r + T'(a+1, e, m - S);
- checkpoint a..j-1, if the fast forwards fit beside G(e+1):  Σ f0 + T(j, e, m - x[j]) + T(a, j-1, m);
- for a = e inside a segment, fused, if m >= G(e+1) + tb:  b. There S of the others is without the output.

T'(a, e, m) is the same with a transient input of a: held inside m, freed after the forward of a and restored before the
backward of what begins at a. There is one T' for each way of restoring it. Stage a may drop its output too: then what
begins at a + 1 restores the input of a first and holds it, if it needs it to restore that of a + 1.

Beaumont et al. ("Optimal checkpointing for heterogeneous chains", 2019) have the first and the third line; several
options per block are Rockmate's (ICML 2023).

Why parameter gradients leave the table one-dimensional: backward goes through the stages in one global order whatever
is checkpointed, so those that exist at the backward of stage i are those of the later stages, at any depth of nesting:
a constant of the boundary, which only moves the thresholds.

Known limitations: at most `longest_run` neighbours drop outputs that are restored from their inputs; a segment's output
is never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowmem.plan.cost import ChainCost, OptionCost, StageCost
from lowmem.plan.policy import Item, Keep, Schedule, Segment

Row = NDArray[np.float64]

LONGEST_RUN = 2


class Restore(NamedTuple):
    """What restoring a dropped output takes, in bytes: at its peak, and beside the output afterwards; and whether it
    needs the stage's input."""

    peak: int
    left: int
    reads_input: bool = True

    def then(self, following: Restore, size: int) -> Restore:
        """Restoring first this output, of `size` bytes, and from it the next stage's."""
        left = size + self.left
        return Restore(max(self.peak, left + following.peak), left + following.left, self.reads_input)


def restore_of(option: OptionCost) -> Restore:
    """Of an option that drops its output."""
    return Restore(option.restore_temp_bytes, option.restored_bytes, option.restore_reads_input)


def _dominates(better: OptionCost, worse: OptionCost) -> bool:
    """Whether `worse` is never needed. An option that drops its output never replaces one that does not: what
    comes after it is restricted."""
    if better.policy.drop_output and (
        not worse.policy.drop_output or better.restore_reads_input > worse.restore_reads_input
    ):
        return False
    temporaries = ["forward_temp_bytes", "backward_temp_bytes"]
    if better.policy.drop_output:
        temporaries += ["restore_temp_bytes", "restored_bytes"]
    mine, its = better.kept_bytes, worse.kept_bytes
    return (
        better.seconds <= worse.seconds
        and mine <= its
        and all(mine + getattr(better, name) <= its + getattr(worse, name) for name in temporaries)
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


class _Options:
    """A stage's options after pruning, by how they can be used."""

    def __init__(self, stage: StageCost) -> None:
        usual = prune(option for option in stage.options if not option.policy.fused)
        self.plain = [option for option in usual if option.policy.anywhere]
        self.dropping = [option for option in usual if option.policy.drop_output]
        self.last = prune(stage.last_options or stage.anywhere)  # as the last stage of a segment, without FUSED
        self.fused = [option for option in stage.options if option.policy.fused]
        self.restores = dict.fromkeys(map(restore_of, self.dropping))  # the different ones


class _Part(NamedTuple):
    """A sub-problem: T of a..e with `shift` slots less, or T' for the given way of restoring the input of a."""

    a: int
    e: int
    shift: int
    restore: Restore | None = None


class _Choice(NamedTuple):
    """A line of the recurrence: `seconds` plus its parts."""

    seconds: float
    least: int  # slots from which on it is allowed
    parts: tuple[_Part, ...]
    what: OptionCost | int  # the option of the first stage, or j if a..j-1 is checkpointed


class _Kept(NamedTuple):
    """A line of the recurrence that keeps the first stage: its forward's bytes beside the gradients ahead, all of its
    backward's, slots of what is kept, and how its output is restored, if it is dropped."""

    seconds: float
    forward: int
    backward: int
    kept: int
    following: Restore | None
    option: OptionCost


class _Segments(NamedTuple):
    """Lines of the recurrence that checkpoint a..j-1, for j = a + 1 …: seconds of the forwards, their bytes beside the
    gradients ahead, the bytes at the beginning of the backward; and the slots that are held meanwhile."""

    seconds: Row
    forward: NDArray[np.int64]
    backward: NDArray[np.int64]
    shift: int


class Table:
    """All of T for one chain, from which the schedule for any budget is read.

    `slot_bytes` is the unit of m: sizes are rounded to the nearest slot, so a schedule that is read is off by up to
    half a slot per stage either way. `slots`: the largest m. `longest_run`: the most neighbours that drop their
    outputs; each more about doubles the work for chains that have such options.
    """

    def __init__(self, chain: ChainCost, slot_bytes: int, slots: int, longest_run: int = LONGEST_RUN) -> None:
        self.chain = chain
        self.slot_bytes = slot_bytes
        self.slots = slots
        self._stages = [_Options(stage) for stage in chain.stages]
        self._restores = self._all_restores(longest_run)
        self.longest_run = longest_run
        count = len(chain)
        self._x = np.array([self._round(size) for size in chain.boundary_bytes])
        # bytes, not slots: thresholds are rounded as a whole
        self._gradients = [
            g + later for g, later in zip(chain.boundary_grad_bytes, chain.later_param_grad_bytes, strict=True)
        ]
        self._fast = list(accumulate((stage.fast_seconds for stage in chain.stages), initial=0.0))
        # [e][a]: T(a, e, ·), seconds, from the place x[a] on: columns are what segments that end before some a leave;
        # inf: does not fit
        width = slots + 1 + max(self._x)
        self._rows: list[Row] = [np.full((e + 1, width), np.inf) for e in range(count)]
        self._first = np.zeros((count, count), np.int64)  # [a, e]: the least m that is finite
        self._sums = np.empty((count, slots + 1))  # where those of segments are made
        self._keeps: dict[tuple[int, str, Restore | None], list[_Kept]] = {}
        self._segments: dict[tuple[int, Restore | None], _Segments] = {}
        self._known: dict[tuple[_Part, int], tuple[float, _Choice]] = {}  # what was read, see `_best`
        transient: dict[Restore, list[Row]] = {}  # T' of a + 1, [e - a - 1]
        for a in reversed(range(count)):
            transient = self._fill(a, transient)

    def _all_restores(self, longest_run: int) -> list[dict[Restore, int]]:
        """For each stage the ways of restoring its input, each with the least length of a run that has it."""
        found: list[dict[Restore, int]] = [{}]
        for stage, size in zip(self._stages[:-1], self.chain.boundary_bytes, strict=False):
            ways = dict.fromkeys(stage.restores, 1)
            for earlier, length in found[-1].items():
                if length < longest_run:
                    for restore in stage.restores:
                        if restore.reads_input:
                            ways.setdefault(earlier.then(restore, size), length + 1)
            found.append(ways)
        return found

    def _round(self, size: int) -> int:
        return (size + self.slot_bytes // 2) // self.slot_bytes

    @property
    def times(self) -> Row:
        """The least time of the whole chain for m = 0 … slots."""
        return self.times_from(0)

    def times_from(self, a: int) -> Row:
        """The least time of all stages from a on, whose input somebody else holds, for m = 0 … slots."""
        return self._row(a, len(self.chain) - 1)

    def _row(self, a: int, e: int) -> Row:
        """T(a, e, ·)."""
        begin = self._x[a]
        return self._rows[e][a, begin : begin + self.slots + 1]

    def _kept(self, a: int, e: int, restore: Restore | None) -> list[_Kept]:
        """The lines that keep stage a, for T(a, e, ·), or for T'(a, e, ·) with that way of restoring the input of a."""
        place = "whole" if a == e == len(self.chain) - 1 else "end" if a == e else "inside"
        if (a, place, restore) in self._keeps:
            return self._keeps[a, place, restore]
        stage, size = self._stages[a], self.chain.boundary_bytes[a]
        held, way = (0, Restore(0, 0)) if restore is None else (size, restore)
        options: Iterable[OptionCost] = stage.plain
        if place == "end":  # only the whole chain needs its last stage's output
            options = (*(stage.fused if restore is None else ()), *stage.last)
        elif place == "inside":
            longest = restore is not None and self._restores[a][restore] >= self.longest_run
            options = (*stage.plain, *(o for o in stage.dropping if not (longest and o.restore_reads_input)))
        lines = self._keeps[a, place, restore] = []
        for option in options:
            backward, following = held + way.left + option.backward_temp_bytes, None
            if option.policy.drop_output and option.restore_reads_input:
                following = restore_of(option) if restore is None else way.then(restore_of(option), held)
            else:
                following = restore_of(option) if option.policy.drop_output else None
                backward = max(backward, option.restored_bytes + way.peak)
            backward += self._gradients[a + 1] + option.kept_bytes
            forward = held + option.forward_temp_bytes + option.kept_bytes
            lines.append(_Kept(option.seconds, forward, backward, self._round(option.kept_bytes), following, option))
        return lines

    def _segments_from(self, a: int, restore: Restore | None) -> _Segments:
        if (a, restore) not in self._segments:
            x, count = self.chain.boundary_bytes, len(self.chain)
            held, way = (0, Restore(0, 0)) if restore is None else (x[a], restore)
            here = [0 if restore is None and j - 1 == a else x[j - 1] for j in range(a + 1, count)]
            beside = [x[j] + self.chain.stages[j - 1].fast_temp_bytes for j in range(a + 1, count)]
            # Nobody holds an input before the first stage that the backward comes to, but the chain's own.
            held_by_none = 0 < a < self.chain.unreached
            self._segments[a, restore] = _Segments(
                np.array([np.inf if held_by_none else self._fast[j] - self._fast[a] for j in range(a + 1, count)]),
                np.maximum.accumulate(np.array(here, np.int64) + np.array(beside, np.int64)),
                np.array([self._gradients[j] + way.peak for j in range(a + 1, count)], np.int64),
                self._round(held + way.left),
            )
        return self._segments[a, restore]

    def _segment_slots(self, segments: _Segments, a: int, e: int) -> NDArray[np.int64]:
        """Slots from which on the segments that leave something of a..e are allowed."""
        forward = self._gradients[e + 1] + segments.forward[: e - a]
        return (np.maximum(forward, segments.backward[: e - a]) + self.slot_bytes // 2) // self.slot_bytes

    def _choices(self, a: int, e: int, restore: Restore | None) -> Iterator[_Choice]:
        """All lines of the recurrence."""
        for line in self._kept(a, e, restore):
            least = max(line.kept, self._round(max(self._gradients[e + 1] + line.forward, line.backward)))
            parts = (_Part(a + 1, e, line.kept, line.following),) if a < e else ()
            yield _Choice(line.seconds, least, parts, line.option)
        segments = self._segments_from(a, restore)
        for j, least in enumerate(self._segment_slots(segments, a, e).tolist(), a + 1):
            rest = _Part(j, e, int(self._x[j]))
            seconds = float(segments.seconds[j - a - 1])
            yield _Choice(seconds, least, (rest, _Part(a, j - 1, segments.shift)), j)

    def _fill(self, a: int, following: dict[Restore, list[Row]]) -> dict[Restore, list[Row]]:
        """T(a, ·, ·), from T'(a + 1, ·, ·); returns T'(a, ·, ·)."""
        transient: dict[Restore, list[Row]] = {restore: [] for restore in self._restores[a]}
        inside = np.empty((len(self.chain) - a, self.slots + 1))  # T(a, j - 1, ·) and the segment's forwards
        for e in range(a, len(self.chain)):
            row = self._row(a, e)
            row[:] = self._least(a, e, None, inside, following)
            # Rows never rise, so that the rest is finite too.
            self._first[a, e] = np.searchsorted(-row, -np.inf, side="right")
            for restore, rows in transient.items():
                rows.append(self._least(a, e, restore, inside, following))
            if e + 1 < len(self.chain):
                np.add(row, self._segments_from(a, None).seconds[e - a], out=inside[e - a])
        return transient

    def _least(self, a: int, e: int, restore: Restore | None, inside: Row, transient: dict[Restore, list[Row]]) -> Row:
        """The least of all lines for every m. `transient`: T' of a + 1."""
        size, ahead, ends = self.slots + 1, self._gradients[e + 1], a == e
        best = self._least_of_segments(a, e, restore, inside)
        for seconds, forward, backward, kept, following, _ in self._kept(a, e, restore):
            start = max(kept, self._round(max(ahead + forward, backward)))
            if ends:
                np.minimum(best[start:], seconds, out=best[start:])
                continue
            if following is not None:
                row = transient[following][e - a - 1]
            else:
                row = self._row(a + 1, e)
                start = max(start, self._first[a + 1][e] + kept)
            if start < size:
                sum_ = np.add(row[start - kept : size - kept], seconds, out=self._sums[0, start:])
                np.minimum(best[start:], sum_, out=best[start:])
        return best

    def _least_of_segments(self, a: int, e: int, restore: Restore | None, inside: Row) -> Row:
        """All j at once."""
        size, count, best = self.slots + 1, e - a, np.full(self.slots + 1, np.inf)
        if not count:
            return best
        segments = self._segments_from(a, restore)
        least, shift = self._segment_slots(segments, a, e), segments.shift
        finite = np.maximum(self._first[a + 1 : e + 1, e] + self._x[a + 1 : e + 1], self._first[a, a:e] + shift)
        begin = int(np.maximum(least, finite).min())
        if begin >= size:
            return best
        sums = self._sums[:count, begin:]
        np.add(inside[:count, begin - shift : size - shift], self._rows[e][a + 1 : e + 1, begin:size], out=sums)
        for j, slots in enumerate(least.tolist()):
            if slots > begin:
                sums[j, : slots - begin] = np.inf
        np.minimum.reduce(sums, axis=0, out=best[begin:])
        return best

    # reading

    def schedule(self, m: int) -> Schedule:
        """The schedule behind `times[m]`, which has to be finite."""
        return Schedule(self.items_from(0, m))

    def items_from(self, a: int, m: int) -> tuple[Item, ...]:
        """The items behind `times_from(a)[m]`, which has to be finite."""
        return tuple(self._items(_Part(a, len(self.chain) - 1, 0), m))

    def _items(self, part: _Part, m: int) -> Iterator[Item]:
        while part.a <= part.e:
            _, choice = self._best(part, m)
            if isinstance(choice.what, int):
                rest, inside = choice.parts
                yield Segment(part.a, choice.what - 1, Schedule(tuple(self._items(inside, m - inside.shift))))
            else:
                yield Keep(part.a, choice.what.policy)
                if not choice.parts:
                    return
                rest = choice.parts[0]
            part, m = rest, m - rest.shift

    def _best(self, part: _Part, m: int) -> tuple[float, _Choice]:
        """The first of the fastest choices, and its seconds. T' is not stored: what was read of it is remembered."""
        key = part._replace(shift=0), m
        if key not in self._known:
            best: tuple[float, _Choice] | None = None
            for choice in self._choices(part.a, part.e, part.restore):
                value = self._value(choice, m, best[0] if best else np.inf)
                if best is None or value < best[0]:
                    best = value, choice
            assert best is not None
            self._known[key] = best
        return self._known[key]

    def _value(self, choice: _Choice, m: int, enough: float) -> float:
        """Seconds of the choice with m slots, or something at least `enough`, if it takes that long."""
        if m < choice.least:
            return np.inf
        total = choice.seconds
        for part in choice.parts:
            left = m - part.shift
            if left < 0:
                return np.inf
            known = float(self._rows[part.e][part.a, self._x[part.a] + left])
            if part.restore is not None and total + known < enough:  # T' is never below T
                known, _ = self._best(part, left)
            total += known
        return total
