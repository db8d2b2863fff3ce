"""How much of the effective batch each of several processes takes: as much as makes all of them end at the same time.

The step ends when the slowest process does. How long one takes for its share depends on its card's speed and on what
fits it: with a smaller share a small card computes less again. So shares and plans are found together: plan for a
share, take the predicted speed, share anew, until nothing is gained (like cards keep even shares after one round).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from lowmem.distributed.split import even_shares, weighted_shares

ROUNDS = 8
_MOST_LOOKS = 40
ALIKE = 1.02  # what differs by less than this, by prediction, is not known to differ

Predict = Callable[[tuple[int, ...]], Sequence[float | None]]


@dataclass(frozen=True)
class Shared:
    """Pictures and predicted seconds of a step, by process."""

    shares: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def step_seconds(self) -> float:
        """Without communication."""
        return max(self.seconds)


def balance(batch: int, size: int, predict: Predict) -> Shared | None:
    """The shares with the least predicted time. `predict`: seconds of every process for its share, None for one that it
    does not fit (0 pictures take 0 s). Looks up to `ROUNDS` times at shares that fit, and at others to find what
    fits. None: nothing does.
    """
    rooms = [_Room(batch) for _ in range(size)]
    shares: tuple[int, ...] | None = even_shares(batch, size)
    best: Shared | None = None
    seen: set[tuple[int, ...]] = set()
    rounds = 0
    while shares is not None and shares not in seen and len(seen) < _MOST_LOOKS:
        seen.add(shares)
        seconds = predict(shares)
        for room, share, taken in zip(rooms, shares, seconds, strict=True):
            room.learn(share, taken is not None)
        known = [taken for taken in seconds if taken is not None]
        if len(known) == size:
            rounds += 1
            found = Shared(shares, tuple(known))
            if best is not None and found.step_seconds * ALIKE >= best.step_seconds:
                return min(best, found, key=lambda one: one.step_seconds)
            best = found
            busy = [taken for share, taken in zip(shares, known, strict=True) if share]
            if max(busy) <= ALIKE * min(busy) or rounds >= ROUNDS:
                return best
        shares = _again(batch, shares, seconds, rooms)
    return best


def _again(
    batch: int, shares: tuple[int, ...], seconds: Sequence[float | None], rooms: Sequence[_Room]
) -> tuple[int, ...] | None:
    """The next shares to look at, by the speeds seen and the room there is; None if there is too little."""
    speeds = [share / taken if taken and share else None for share, taken in zip(shares, seconds, strict=True)]
    told = [speed for speed in speeds if speed is not None]
    usual = sum(told) / len(told) if told else 1.0
    wanted = [usual if speed is None else speed for speed in speeds]
    for hope in (0.5, 0.75, 0.875, 1.0):  # of what is not known to fit and not known not to
        limits = [room.limit(hope) for room in rooms]
        if sum(limits) >= batch:
            return _limited(batch, wanted, limits)
    return None


class _Room:
    """What is known of the pictures that fit one process."""

    def __init__(self, batch: int) -> None:
        self._fits = 0
        self._most, self._bounded = batch, False  # bounded: one more is known not to fit

    def learn(self, share: int, fits: bool) -> None:
        if fits:
            self._fits = max(self._fits, share)
        else:
            self._most = min(self._most, share - 1)
            self._bounded = True

    def limit(self, hope: float) -> int:
        """The largest share worth asking for."""
        return self._fits + ceil((self._most - self._fits) * hope) if self._bounded else self._most


def _limited(batch: int, speeds: Sequence[float], limits: Sequence[int]) -> tuple[int, ...]:
    """Shares in proportion to speeds, none above its limit; all limits together are enough."""
    fixed: dict[int, int] = {}
    while True:
        free = [rank for rank in range(len(speeds)) if rank not in fixed]
        left = batch - sum(fixed.values())
        shares = dict(zip(free, weighted_shares(left, tuple(speeds[rank] for rank in free)), strict=True))
        over = [rank for rank in free if shares[rank] > limits[rank]]
        if not over:
            return tuple({**fixed, **shares}[rank] for rank in range(len(speeds)))
        fixed |= {rank: limits[rank] for rank in over}
