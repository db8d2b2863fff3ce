"""Which pictures of the effective batch a process takes: its slice, in the order of the ranks (invariant 3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


def even_shares(batch: int, size: int) -> tuple[int, ...]:
    """`batch` pictures for `size` like processes; what does not divide goes to the first."""
    return tuple(batch // size + (rank < batch % size) for rank in range(size))


def weighted_shares(batch: int, speeds: tuple[float, ...]) -> tuple[int, ...]:
    """In proportion to `speeds` (pictures per second, or any weights; not all 0), by largest remainders; exactly
    even where all are equal."""
    total = sum(speeds)
    exact = [batch * speed / total for speed in speeds]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(speeds)), key=lambda rank: (shares[rank] - exact[rank], rank))
    for rank in by_remainder[: batch - sum(shares)]:
        shares[rank] += 1
    return tuple(shares)


@dataclass(frozen=True)
class Split:
    """The effective batch is the sum of `shares`, one for each process; a share may be 0. `micro_batches`: how many
    pictures each takes at a time."""

    shares: tuple[int, ...]
    rank: int = 0
    micro_batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.micro_batches:
            object.__setattr__(self, "micro_batches", self.shares)
        if len(self.micro_batches) != len(self.shares) or not 0 <= self.rank < len(self.shares) or self.batch < 1:
            raise ValueError(f"shares {self.shares}, micro-batches {self.micro_batches}, rank {self.rank}: no split")

    @property
    def batch(self) -> int:
        return sum(self.shares)

    def part(self, size: int, rank: int | None = None) -> tuple[int, int]:
        """The slice [first, past) of `size` pictures that a process takes, this one by default: its share of a whole
        batch, and of a smaller one (the last of an epoch, the test pictures) as nearly as can be."""
        rank = self.rank if rank is None else rank
        ends = (0, *accumulate(self.shares))
        first, past = ((2 * size * end + self.batch) // (2 * self.batch) for end in ends[rank : rank + 2])  # rounded
        return first, past

    def pieces(self, size: int) -> int:
        """Micro-batches that the process with the most of them makes of its part of `size` pictures."""
        parts = (self.part(size, rank) for rank in range(len(self.shares)))
        return max(-(-(past - first) // max(1, m)) for (first, past), m in zip(parts, self.micro_batches, strict=True))
