"""The batch size (`--batch auto`), and its shares over the processes of a run, each on its own card, with their plans.

Every process plans for itself alone; predicted seconds, precision and memory format are told to all, and all come to
the same shares (one process is a group of one: invariant 12). A step ends with its slowest process, and a smaller share
lets a small card compute less again. So shares and plans are found together: plan for a share, take the predicted
speed, share anew, until nothing is gained (like cards keep even shares after one round).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request
from lowmem.core.errors import Infeasible, UsageError
from lowmem.core.units import counted
from lowmem.distributed.group import Group, even_shares, weighted_shares
from lowmem.plan.record import Candidate

Mode = tuple[str, str]  # precision, memory format

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


@dataclass(frozen=True)
class Planner:
    """Plans for the processes in `requests`, by rank: this one's of a group, or on paper all of them."""

    requests: Mapping[int, Request]
    group: Group

    @property
    def size(self) -> int:
        return len(self.requests) * self.group.size

    def everyone(self, value: Callable[[int], Any]) -> list[Any]:
        """`value` of a rank, asked of those that this process plans for -> those of all ranks (JSON), in order. What it
        raises in one process is raised in all."""
        own = self.group.together(lambda: [value(rank) for rank in self.requests])
        return [one for each in self.group.gather(own) for one in each]

    def divide(self, batch: int, *, may_accumulate: bool) -> BatchSplit:
        """Shares and plans for `batch` pictures, without accumulation if there is any such way; with one precision and
        memory format everywhere, that of the slowest process if not all want the same. Raises Infeasible."""
        # Of one process a plan without accumulation comes first anyway (see `choose`).
        for accumulate in (False, True) if may_accumulate and self.size > 1 else (may_accumulate,):
            split = self._balance(batch, None, accumulate)
            if split is None:
                continue
            wanted = self._wanted(split)
            if len(set(wanted)) == 1:
                return split
            slowest = sorted(range(self.size), key=lambda rank: -split.seconds[rank])
            for mode in dict.fromkeys(wanted[rank] for rank in slowest):
                agreed = self._balance(batch, mode, accumulate)
                if agreed is not None:
                    return agreed
        raise self._why_not(batch, may_accumulate)

    def divide_auto(self, recipe_batch: int, pictures: int | None) -> list[BatchSplit]:
        """The batches that fit without accumulation: the preferred one, with why the others were not chosen, then those
        with more pictures per second first. Raises Infeasible, UsageError."""
        fitting: list[BatchSplit] = []
        refused: list[Candidate] = []
        for batch in AUTO_BATCHES:
            if batch < self.size or (pictures is not None and batch > pictures):
                continue
            try:
                fitting.append(self.divide(batch, may_accumulate=False))
            except Infeasible as error:
                if not fitting:
                    raise
                why = "does not fit"
                refused.append(Candidate(what=f"batch {batch}", refused_because=why, peak_bytes=error.least_bytes))
                break  # nothing larger fits either
        if not fitting:
            raise UsageError("there are too few pictures for --batch auto: give a batch")
        best = preferred(fitting, recipe_batch)
        others = sorted((split for split in fitting if split is not best), key=lambda split: -split.images_per_second)
        choices = {}
        for rank, choice in best.choices.items():
            slower = [_slower(rank, other, best) for other in others]
            plan = replace(choice.plan, candidates=(*slower, *refused, *choice.plan.candidates))
            choices[rank] = replace(choice, plan=plan)
        return [replace(best, choices=choices), *others]

    def _plan(self, rank: int, share: int, mode: Mode | None, accumulate: bool) -> Choice:
        """For `share` pictures (a process without any has a plan for one), in a precision and memory format if they are
        settled. Raises Infeasible."""
        share, request = max(1, share), self.requests[rank]
        micro = None if request.micro_batch is None else min(request.micro_batch, share)
        modes = request.modes if mode is None else dict([mode])
        return choose(replace(request, batch=share, micro_batch=micro, modes=modes, allow_accumulation=accumulate))

    def _wanted(self, split: BatchSplit) -> list[Mode]:
        """By rank."""
        plans = {rank: choice.plan for rank, choice in split.choices.items()}
        return [tuple(mode) for mode in self.everyone(lambda rank: [plans[rank].precision, plans[rank].memory_format])]

    def _balance(self, batch: int, mode: Mode | None, accumulate: bool) -> BatchSplit | None:

        def seconds(rank: int, share: int) -> float | None:
            try:
                choice = self._plan(rank, share, mode, accumulate)
            except Infeasible:
                return None
            return choice.plan.predicted.step_seconds if share else 0.0

        split = balance(batch, self.size, lambda shares: self.everyone(lambda rank: seconds(rank, shares[rank])))
        if split is None:
            return None
        choices = {}
        for rank in self.requests:
            choice = self._plan(rank, split.shares[rank], mode, accumulate)
            choices[rank] = replace(choice, plan=replace(choice.plan, shares=split.shares))
        return replace(split, choices=choices)

    def _why_not(self, batch: int, may_accumulate: bool) -> Infeasible:
        """What the first process that could not met at an even share, where nothing fits; one alone raises it."""
        even = even_shares(batch, self.size)

        def refusal(rank: int) -> list[Any] | None:
            try:
                self._plan(rank, even[rank], None, may_accumulate)
            except Infeasible as error:
                if self.size == 1:
                    raise
                return [error.budget_bytes, error.least_bytes, error.what, error.way_out]
            return None

        failed = [(rank, reason) for rank, reason in enumerate(self.everyone(refusal)) if reason is not None]
        if not failed:
            budget = min(self.everyone(lambda rank: self.requests[rank].budget.tensor_bytes))
            sides = "every card for itself, but none in a precision and memory format that all of them take"
            return Infeasible(budget, budget + 1, sides, "give --precision and --memory-format", sides)
        rank, (budget, least, what, way_out) = failed[0]
        return Infeasible(budget, least, what, way_out, who=f"process {rank} with {counted(even[rank], 'picture')}")


def preferred(fitting: Sequence[BatchSplit], recipe_batch: int) -> BatchSplit:
    """The one with the most pictures per second. Of those that are as fast, within what predictions can tell apart, the
    recipe's own batch, for which its learning rate was meant; else the largest."""
    most = max(split.images_per_second for split in fitting)
    alike = [split for split in fitting if split.images_per_second * ALIKE >= most]
    return max(alike, key=lambda split: (split.batch == recipe_batch, split.batch))


def _slower(rank: int, split: BatchSplit, best: BatchSplit) -> Candidate:
    why = "hardly more" if split.images_per_second >= best.images_per_second else "fewer"
    predicted = split.choices[rank].plan.predicted
    return Candidate(
        what=f"batch {split.batch}",
        refused_because=f"{why} pictures per second ({split.images_per_second:.0f})",
        peak_bytes=predicted.peak_allocated_bytes,
        step_seconds=predicted.step_seconds,
    )


def balance(batch: int, size: int, predict: Callable[[tuple[int, ...]], Sequence[float | None]]) -> BatchSplit | None:
    """The shares with the least predicted time; None: nothing fits. `predict`: seconds of every process for its share,
    None for one that does not fit it (0 pictures take 0 s). Looks up to `ROUNDS` times at shares that fit, and at
    others to find what fits."""
    fits, most = [0] * size, [batch] * size  # by process: pictures that are known to fit, and the most that may
    shares: tuple[int, ...] | None = even_shares(batch, size)
    best: BatchSplit | None = None
    seen: set[tuple[int, ...]] = set()
    rounds = 0
    while shares is not None and shares not in seen and len(seen) < _MOST_LOOKS:
        seen.add(shares)
        seconds = predict(shares)
        for rank, (share, taken) in enumerate(zip(shares, seconds, strict=True)):
            if taken is None:
                most[rank] = min(most[rank], share - 1)
            else:
                fits[rank] = max(fits[rank], share)
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
        speeds = [share / taken if taken and share else None for share, taken in zip(shares, seconds, strict=True)]
        shares = _next_shares(batch, speeds, fits, most)
    return best


def _next_shares(
    batch: int, speeds: Sequence[float | None], fits: Sequence[int], most: Sequence[int]
) -> tuple[int, ...] | None:
    """By the speeds seen (None: not known) and the room there is; None if there is too little."""
    known = [speed for speed in speeds if speed is not None]
    usual = sum(known) / len(known) if known else 1.0
    wanted = [usual if speed is None else speed for speed in speeds]
    for hope in (0.5, 0.75, 0.875, 1.0):  # of what is not known to fit and known to end below the whole batch
        limits = [fit + ceil((top - fit) * hope) if top < batch else batch for fit, top in zip(fits, most, strict=True)]
        if sum(limits) >= batch:
            return _limited(batch, wanted, limits)
    return None


def _limited(batch: int, speeds: Sequence[float], limits: Sequence[int]) -> tuple[int, ...]:
    """Shares in proportion to speeds, none above its limit; all limits together are enough."""
    full: set[int] = set()
    while True:
        left = batch - sum(limits[rank] for rank in full)
        weighted = weighted_shares(left, tuple(0.0 if rank in full else speed for rank, speed in enumerate(speeds)))
        shares = tuple(limits[rank] if rank in full else share for rank, share in enumerate(weighted))
        over = {rank for rank, share in enumerate(shares) if share > limits[rank]}
        if not over:
            return shares
        full |= over


def describe_split(split: BatchSplit, cards: Sequence[str]) -> list[str]:
    """The shares in words, a line for each process. `cards`: what each has, in words."""
    step = split.step_seconds
    head = f"batch {split.batch} over {len(split.shares)} processes, {step:.3f} s a step without communication"
    lines = [f"{head} (predicted):"]
    for rank, (share, seconds) in enumerate(zip(split.shares, split.seconds, strict=True)):
        waits = f", waits {1 - seconds / step:.0%} of it" if seconds < 0.98 * step else ""
        lines.append(f"  process {rank}  {cards[rank]:<24} {share:>5} pictures  {seconds:.3f} s{waits}")
    return lines
