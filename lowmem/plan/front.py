"""Which of many results of a stage are worth keeping, where all sets of them are too many to look at.

A result that is not kept is made again, with whatever of its operands is not there, when the backward wants it. Sets
are grown from nothing by the most seconds a byte, and shrunk from everything by the least; those that no other beats in
bytes and in seconds are the front. Beside these come sets for the least memory: what is alive at evenly spaced places,
so that the backward makes one part after the other again (Chen et al., 2016).

Where the backward wants every result, in a chain, time is a sum and the sets are on the true front (its convex hull).
Known not to be optimal elsewhere: one result is taken at a time, so that two that only pay together are found late.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST = 10  # sets by bytes for seconds
PARTS = (2, 4, 8)  # that the backward makes again one after the other


class Result(NamedTuple):
    """What an operation of a stage makes. `operands`: of what; 0 is the stage's input, k + 1 the k-th result. `wanted`:
    by the backward, which otherwise has it made again only on the way to another one."""

    name: str
    operands: tuple[int, ...]
    size_bytes: int  # that keeping it takes
    seconds: float  # that making it again takes, of its operands
    keepable: bool
    wanted: bool


def front(results: Sequence[Result], most: int = MOST) -> list[frozenset[str]]:
    """At most `most` sets of names, from nothing to everything, and those for the least memory."""
    stage = _Stage(results)
    found = {kept: (stage.size(kept), stage.seconds(kept)) for kept in (*stage.grown(), *stage.shrunk())}
    best: list[int] = []
    for kept, (_, seconds) in sorted(found.items(), key=lambda item: item[1]):
        if not best or seconds < found[best[-1]][1]:
            best.append(kept)
    return [stage.names(kept) for kept in dict.fromkeys((*_spread(best, found, most), *stage.spaced()))]


def _spread(front: list[int], cost: dict[int, tuple[int, float]], most: int) -> list[int]:
    """Some of the front, its ends included, evenly in bytes."""
    if len(front) <= most:
        return front
    first, last = cost[front[0]][0], cost[front[-1]][0]
    chosen, at = [front[0]], 1
    for part in range(1, most - 1):
        wanted = first + (last - first) * part / (most - 1)
        while at < len(front) - 1 and cost[front[at]][0] < wanted:
            at += 1
        if at < len(front) - 1:
            chosen.append(front[at])
            at += 1
    return [*chosen, front[-1]]


class _Stage:
    """Sets are whole numbers with a bit for every result."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results
        self._operands = [sum({1 << value - 1 for value in one.operands if value}) for one in results]
        self._wanted = sum(1 << k for k, one in enumerate(results) if one.wanted)
        self._items = [k for k, one in enumerate(results) if one.keepable]
        self._order = [(1 << k, one.seconds, self._operands[k]) for k, one in enumerate(results)][::-1]

    def names(self, kept: int) -> frozenset[str]:
        return frozenset(self._results[k].name for k in self._items if kept >> k & 1)

    def size(self, kept: int) -> int:
        return sum(self._results[k].size_bytes for k in self._items if kept >> k & 1)

    def seconds(self, kept: int) -> float:
        """That making again takes what is wanted and not kept."""
        need, total = self._wanted & ~kept, 0.0
        for bit, seconds, operands in self._order:
            if need & bit:
                total += seconds
                need |= operands & ~kept
        return total

    def grown(self) -> Iterator[int]:
        kept, left, now = 0, list(self._items), self.seconds(0)
        yield kept
        while left and now > 0:
            saved = {k: (now - self.seconds(kept | 1 << k)) / max(1, self._results[k].size_bytes) for k in left}
            best = max(left, key=lambda k: saved[k])
            left.remove(best)
            kept |= 1 << best
            now = self.seconds(kept)
            yield kept

    def shrunk(self) -> Iterator[int]:
        kept = sum(1 << k for k in self._items)
        left, now = list(self._items), self.seconds(kept)
        yield kept
        while left:
            more = {k: (self.seconds(kept & ~(1 << k)) - now) / max(1, self._results[k].size_bytes) for k in left}
            best = min(left, key=lambda k: more[k])
            left.remove(best)
            kept &= ~(1 << best)
            now = self.seconds(kept)
            yield kept

    def spaced(self) -> Iterator[int]:
        """What is alive between parts of about equal bytes; where that cannot be kept, what it is made of."""
        total = self.size(sum(1 << k for k in self._items))
        for parts in PARTS:
            kept, passed, cut = 0, 0, 1
            for k, one in enumerate(self._results):
                passed += one.size_bytes if one.keepable else 0
                if cut < parts and passed >= total * cut / parts:
                    kept |= self._alive(k)
                    cut += 1
            yield kept

    def _alive(self, k: int) -> int:
        """Results up to the k-th that a later one is made of."""
        before, later = (1 << k + 1) - 1, 0
        for operands in self._operands[k + 1 :]:
            later |= operands
        return self._kept_instead(later & before)

    def _kept_instead(self, values: int) -> int:
        kept = 0
        for k in range(len(self._results) - 1, -1, -1):
            if values >> k & 1:
                if self._results[k].keepable:
                    kept |= 1 << k
                else:
                    values |= self._operands[k]
        return kept
