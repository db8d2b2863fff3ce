"""How much of the effective batch each of several processes takes: as much as makes all of them end at the same time.

The step ends when the slowest process does. How long one takes for its share depends on its card's speed and on what
fits it: with a smaller share a small card computes less again. So shares and plans are found together: plan for a
share, take the predicted speed, share anew, until nothing is gained (like cards keep even shares after one round).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowmem.distributed.split import even_shares, weighted_shares

ROUNDS = 5
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
    does not fit (0 pictures take 0 s); costs up to `ROUNDS` calls and some to find what fits. None: nothing does.
    """
    shares, limits = even_shares(batch, size), [batch] * size
    best: Shared | None = None
    seen: set[tuple[int, ...]] = set()
    while shares not in seen and len(seen) < ROUNDS + size * batch.bit_length():
        seen.add(shares)
        seconds = predict(shares)
        for rank, (share, taken) in enumerate(zip(shares, seconds, strict=True)):
            if taken is None:
                limits[rank] = min(limits[rank], share // 2)
        known = [taken for taken in seconds if taken is not None]
        if len(known) == size:
            found = Shared(shares, tuple(known))
            if best is not None and found.step_seconds * ALIKE >= best.step_seconds:
                return min(best, found, key=lambda one: one.step_seconds)
            best = found
            busy = [taken for share, taken in zip(shares, known, strict=True) if share]
            if max(busy) <= ALIKE * min(busy) or len(seen) >= ROUNDS:
                return best
        speeds = [share / taken if taken and share else None for share, taken in zip(shares, seconds, strict=True)]
        told = [speed for speed in speeds if speed is not None]
        usual = sum(told) / len(told) if told else 1.0
        again = _limited(batch, [usual if speed is None else speed for speed in speeds], limits)
        if again is None:
            return best
        shares = again
    return best


def _limited(batch: int, speeds: Sequence[float], limits: Sequence[int]) -> tuple[int, ...] | None:
    """Shares in proportion to speeds, none above its limit; None if all limits together are too little."""
    if sum(limits) < batch:
        return None
    fixed: dict[int, int] = {}
    while True:
        free = [rank for rank in range(len(speeds)) if rank not in fixed]
        left = batch - sum(fixed.values())
        shares = dict(zip(free, weighted_shares(left, tuple(speeds[rank] for rank in free)), strict=True))
        over = [rank for rank in free if shares[rank] > limits[rank]]
        if not over:
            return tuple({**fixed, **shares}[rank] for rank in range(len(speeds)))
        fixed |= {rank: limits[rank] for rank in over}
