"""Plans for the processes of a run, each on its own card, and the shares of the batch that go with them.

Every process plans for itself alone; predicted seconds, precision and memory format are told to all, and all come to
the same shares. One process is a group of one (invariant 12).

The step ends when the slowest process does. How long one takes for its share depends on its card's speed and on what
fits it: with a smaller share a small card computes less again. So shares and plans are found together: plan for a
share, take the predicted speed, share anew, until nothing is gained (like cards keep even shares after one round).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request
from lowmem.core.errors import Infeasible, UsageError
from lowmem.distributed.group import even_shares, weighted_shares
from lowmem.plan.record import Candidate

Mode = tuple[str, str]  # precision, memory format
# A function of the rank, called for those that this process plans for -> the values (JSON) of all ranks, in order. What
# it raises in one process is raised in all.
Everyone = Callable[[Callable[[int], Any]], Sequence[Any]]
Predict = Callable[[tuple[int, ...]], Sequence[float | None]]

AUTO_BATCHES = (32, 64, 128, 256, 512, 1024)
ROUNDS = 8
_MOST_LOOKS = 40
# What differs by less than this, by prediction or by a few real steps, is not known to differ.
ALIKE = 1.02


@dataclass(frozen=True)
class BatchSplit:
    """Pictures and predicted seconds of a step, by process; the choices that this process has made, by rank, with the
    shares in their plans."""

    shares: tuple[int, ...]
    seconds: tuple[float, ...]
    choices: Mapping[int, Choice] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return sum(self.shares)

    @property
    def step_seconds(self) -> float:
        """Without communication."""
        return max(self.seconds)

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step_seconds


class Planner:
    """Plans for the processes in `requests`, by rank, of `size` in all; what was planned is kept."""

    def __init__(self, requests: Mapping[int, Request], size: int, everyone: Everyone) -> None:
        self.requests = dict(requests)
        self.size = size
        self._everyone = everyone
        self._known: dict[tuple[object, ...], Choice | Infeasible] = {}

    def divide(self, batch: int, *, may_accumulate: bool) -> BatchSplit:
        """Shares and plans for `batch` pictures: without accumulation if there is any such way.

        Precision and memory format are the same everywhere: as the slowest process wants them, if they are open and
        not all want the same. Raises Infeasible.
        """
        # Of one process a plan without accumulation comes first anyway (see `choose`).
        for accumulate in (False, True) if may_accumulate and self.size > 1 else (may_accumulate,):
            split = self._balance(batch, None, accumulate)
            if split is None:
                continue
            for mode in self._modes(split, accumulate):
                agreed = split if mode is None else self._balance(batch, mode, accumulate)
                if agreed is not None:
                    choices = {rank: self._chosen(rank, agreed, mode, accumulate) for rank in self.requests}
                    return replace(agreed, choices=choices)
        raise self._why_not(batch, may_accumulate)

    def divide_auto(self, recipe_batch: int, pictures: int | None) -> list[BatchSplit]:
        """The batches that fit without accumulation: the preferred one, with why the others were not chosen, then those
        with more pictures per second first. Raises Infeasible, UsageError."""
        fitting: list[BatchSplit] = []
        refused: list[Candidate] = []
        least: Infeasible | None = None
        for batch in AUTO_BATCHES:
            if batch < self.size or (pictures is not None and batch > pictures):
                continue
            try:
                fitting.append(self.divide(batch, may_accumulate=False))
            except Infeasible as error:
                least = error
                reason = "does not fit"
                refused.append(Candidate(what=f"batch {batch}", refused_because=reason, peak_bytes=error.least_bytes))
                break  # nothing larger fits either
        if not fitting:
            raise least or UsageError("there are too few pictures for --batch auto: give a batch")
        best = preferred(fitting, recipe_batch)
        others = sorted((split for split in fitting if split is not best), key=lambda split: -split.images_per_second)
        choices = {
            rank: _with_candidates(choice, (*(_slower(rank, other, best) for other in others), *refused))
            for rank, choice in best.choices.items()
        }
        return [replace(best, choices=choices), *others]

    def _plan(self, rank: int, share: int, mode: Mode | None, accumulate: bool) -> Choice | Infeasible:
        """For `share` pictures (a process without any has a plan for one), in a precision and memory format if they are
        settled."""
        share = max(1, share)
        key = (rank, share, mode, accumulate)
        if key not in self._known:
            request = self.requests[rank]
            micro = None if request.micro_batch is None else min(request.micro_batch, share)
            request = replace(request, batch=share, micro_batch=micro, allow_accumulation=accumulate)
            if mode is not None:
                request = replace(request, precisions=(mode[0],), formats={mode[0]: mode[1]})
            try:
                self._known[key] = choose(request)
            except Infeasible as error:
                self._known[key] = error
        return self._known[key]

    def _chosen(self, rank: int, split: BatchSplit, mode: Mode | None, accumulate: bool) -> Choice:
        """Of a split that is known to fit."""
        choice = self._plan(rank, split.shares[rank], mode, accumulate)
        assert isinstance(choice, Choice)
        return replace(choice, plan=replace(choice.plan, shares=split.shares))

    def _balance(self, batch: int, mode: Mode | None, accumulate: bool) -> BatchSplit | None:
        """See `balance`."""

        def predict(shares: tuple[int, ...]) -> Sequence[float | None]:
            def seconds(rank: int) -> float | None:
                choice = self._plan(rank, shares[rank], mode, accumulate)
                if isinstance(choice, Infeasible):
                    return None
                return choice.plan.predicted.step_seconds if shares[rank] else 0.0

            return self._everyone(seconds)

        return balance(batch, self.size, predict)

    def _modes(self, split: BatchSplit, accumulate: bool) -> Iterator[Mode | None]:
        """None if all processes want the same; else what the slowest wants, then what others do."""

        def wants(rank: int) -> list[str]:
            plan = self._chosen(rank, split, None, accumulate).plan
            return [plan.precision, plan.memory_format]

        wanted: list[Mode] = [(precision, layout) for precision, layout in self._everyone(wants)]
        if len(set(wanted)) == 1:
            yield None
            return
        slowest = sorted(range(self.size), key=lambda rank: -split.seconds[rank])
        yield from dict.fromkeys(wanted[rank] for rank in slowest)

    def _why_not(self, batch: int, may_accumulate: bool) -> Infeasible:
        """What the first process that could not met at an even share, where nothing fits."""
        even = even_shares(batch, self.size)

        def refusal(rank: int) -> list[Any] | None:
            error = self._plan(rank, even[rank], None, may_accumulate)
            return [error.budget_bytes, error.least_bytes, error.what] if isinstance(error, Infeasible) else None

        failed = [(rank, reason) for rank, reason in enumerate(self._everyone(refusal)) if reason is not None]
        if not failed:
            budget = min(self._everyone(lambda rank: self.requests[rank].budget.tensor_bytes))
            what = "every card for itself, but none in a precision and memory format that all of them take"
            return Infeasible(budget, budget + 1, what, "give --precision and --memory-format")
        own = self._plan(0, batch, None, may_accumulate) if self.size == 1 else None
        if isinstance(own, Infeasible):
            return own
        rank, (budget, least, what) = failed[0]
        return Infeasible(budget, least, f"process {rank} with {even[rank]} pictures: {what}", "lower --batch")


def preferred(fitting: Sequence[BatchSplit], recipe_batch: int) -> BatchSplit:
    """The one with the most pictures per second. Of those that are as fast, within what predictions can tell apart, the
    recipe's own batch, for which its learning rate was meant; else the largest."""
    most = max(split.images_per_second for split in fitting)
    alike = [split for split in fitting if split.images_per_second * ALIKE >= most]
    return max(alike, key=lambda split: (split.batch == recipe_batch, split.batch))


def _slower(rank: int, split: BatchSplit, best: BatchSplit) -> Candidate:
    faster = split.images_per_second >= best.images_per_second
    why = "hardly more pictures per second" if faster else "fewer pictures per second"
    predicted = split.choices[rank].plan.predicted
    return Candidate(
        what=f"batch {split.batch}",
        refused_because=f"{why} ({split.images_per_second:.0f})",
        peak_bytes=predicted.peak_allocated_bytes,
        step_seconds=predicted.step_seconds,
    )


def _with_candidates(choice: Choice, before: Sequence[Candidate]) -> Choice:
    return replace(choice, plan=replace(choice.plan, candidates=(*before, *choice.plan.candidates)))


# -- shares by speed ---------------------------------------------------------------------------------------------------


def balance(batch: int, size: int, predict: Predict) -> BatchSplit | None:
    """The shares with the least predicted time. `predict`: seconds of every process for its share, None for one that it
    does not fit (0 pictures take 0 s). Looks up to `ROUNDS` times at shares that fit, and at others to find what
    fits. None: nothing does.
    """
    rooms = [_Room(batch) for _ in range(size)]
    shares: tuple[int, ...] | None = even_shares(batch, size)
    best: BatchSplit | None = None
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
            split = BatchSplit(shares, tuple(known))
            if best is not None and split.step_seconds * ALIKE >= best.step_seconds:
                return min(best, split, key=lambda one: one.step_seconds)
            best = split
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
    known = [speed for speed in speeds if speed is not None]
    usual = sum(known) / len(known) if known else 1.0
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


def describe_split(split: BatchSplit, cards: Sequence[str]) -> list[str]:
    """The shares in words, a line for each process. `cards`: what each has, in words."""
    step = split.step_seconds
    head = f"batch {split.batch} over {len(split.shares)} processes, {step:.3f} s a step without communication"
    lines = [f"{head} (predicted):"]
    for rank, (share, seconds) in enumerate(zip(split.shares, split.seconds, strict=True)):
        waits = f", waits {1 - seconds / step:.0%} of it" if seconds < 0.98 * step else ""
        lines.append(f"  process {rank}  {cards[rank]:<24} {share:>5} pictures  {seconds:.3f} s{waits}")
    return lines
