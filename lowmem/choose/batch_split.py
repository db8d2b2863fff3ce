"""Plans for several processes, each on its own card, and the shares of the batch that go with them.

Every process plans for itself alone; predicted seconds, precision and memory format are told to all, and all come to
the same shares. For looking at it without any process (`lowmem plan --card A,B`) one plays all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request
from lowmem.choose.session import AS_FAST, AUTO_BATCHES, follow_batch, request_of, settle_modes
from lowmem.choose.shares import Shared, balance
from lowmem.config.schema import cards_of, for_process
from lowmem.config.settings import Settings
from lowmem.core.errors import Infeasible, UsageError
from lowmem.distributed.split import even_shares

Mode = tuple[str, str]  # precision, memory format
# Values (JSON) by rank, those that this process knows -> all of them, in the order of the ranks.
Gather = Callable[[Mapping[int, Any]], Sequence[Any]]


@dataclass(frozen=True)
class Divided:
    """The choices that this process has made, by rank, with the shares in their plans; the predicted step of all."""

    choices: Mapping[int, Choice]
    shared: Shared


class Planner:
    """Plans for the processes in `requests` (`joint` ones), by rank, of `size` in all; what was planned is kept."""

    def __init__(self, requests: Mapping[int, Request], size: int, gather: Gather) -> None:
        self.requests = dict(requests)
        self.size = size
        self._gather = gather
        self._known: dict[tuple[object, ...], Choice | Infeasible] = {}

    @property
    def may_accumulate(self) -> bool:
        return any(request.allow_accumulation for request in self.requests.values())

    def everyone(self, mine: Callable[[int], Any]) -> list[Any]:
        """`mine(rank)` of all processes."""
        return list(self._gather({rank: mine(rank) for rank in self.requests}))

    def plan(self, rank: int, share: int, mode: Mode | None, *, accumulate: bool) -> Choice | Infeasible:
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

    def chosen(self, rank: int, share: int, mode: Mode | None, *, accumulate: bool) -> Choice:
        """A plan that is known to fit."""
        choice = self.plan(rank, share, mode, accumulate=accumulate)
        assert isinstance(choice, Choice)
        return choice

    def balance(self, batch: int, mode: Mode | None, *, accumulate: bool) -> Shared | None:
        """See `shares.balance`."""

        def predict(shares: tuple[int, ...]) -> Sequence[float | None]:
            def seconds(rank: int) -> float | None:
                choice = self.plan(rank, shares[rank], mode, accumulate=accumulate)
                if isinstance(choice, Infeasible):
                    return None
                return choice.plan.predicted.step_seconds if shares[rank] else 0.0

            return self.everyone(seconds)

        return balance(batch, self.size, predict)

    def why_not(self, batch: int) -> Infeasible:
        """What the first process that could not met at an even share, where nothing fits."""
        even = even_shares(batch, self.size)

        def words(rank: int) -> list[Any] | None:
            request = self.requests[rank]
            error = self.plan(rank, even[rank], None, accumulate=request.allow_accumulation)
            return [error.budget_bytes, error.least_bytes, error.what] if isinstance(error, Infeasible) else None

        failed = [(rank, one) for rank, one in enumerate(self.everyone(words)) if one is not None]
        if not failed:
            budget = min(self.everyone(lambda rank: self.requests[rank].budget.tensor_bytes))
            what = "every card for itself, but none in a precision and memory format that all of them take"
            return Infeasible(budget, budget + 1, what, "give --precision and --memory-format")
        rank, (budget, least, what) = failed[0]
        return Infeasible(budget, least, f"process {rank} with {even[rank]} pictures: {what}", "lower --batch")


def divide(planner: Planner, batch: int) -> Divided:
    """Shares and plans for `batch` pictures: without accumulation if there is any such way.

    Precision and memory format are the same everywhere: as the slowest process wants them, if they are open and not all
    want the same. Raises Infeasible.
    """
    for accumulate in (False, True) if planner.may_accumulate else (False,):
        shared = planner.balance(batch, None, accumulate=accumulate)
        if shared is None:
            continue
        for mode in _modes(planner, shared, accumulate):
            found = shared if mode is None else planner.balance(batch, mode, accumulate=accumulate)
            if found is not None:
                return _divided(planner, found, mode, accumulate)
    raise planner.why_not(batch)


def _modes(planner: Planner, shared: Shared, accumulate: bool) -> Iterator[Mode | None]:
    """None if all processes want the same; else what the slowest wants, then what others do."""

    def wants(rank: int) -> list[str]:
        plan = planner.chosen(rank, shared.shares[rank], None, accumulate=accumulate).plan
        return [plan.precision, plan.memory_format]

    wanted: list[Mode] = [(precision, layout) for precision, layout in planner.everyone(wants)]
    if len(set(wanted)) == 1:
        yield None
        return
    slowest = sorted(range(planner.size), key=lambda rank: -shared.seconds[rank])
    yield from dict.fromkeys(wanted[rank] for rank in slowest)


def _divided(planner: Planner, shared: Shared, mode: Mode | None, accumulate: bool) -> Divided:
    choices = {}
    for rank in planner.requests:
        choice = planner.chosen(rank, shared.shares[rank], mode, accumulate=accumulate)
        choices[rank] = replace(choice, plan=replace(choice.plan, shares=shared.shares))
    return Divided(choices, shared)


def divide_auto(planner: Planner, recipe_batch: int, pictures: int | None) -> Divided:
    """The batch with the most pictures per second (`--batch auto`), as `session.preferred` has it, without
    accumulation. Raises Infeasible, UsageError."""
    exact = {rank: replace(request, allow_accumulation=False) for rank, request in planner.requests.items()}
    planner.requests = exact
    fitting: list[Divided] = []
    least: Infeasible | None = None
    for batch in AUTO_BATCHES:
        if batch < planner.size or (pictures is not None and batch > pictures):
            continue
        try:
            fitting.append(divide(planner, batch))
        except Infeasible as error:
            least = least or error
            break  # nothing larger fits either
    if not fitting:
        raise least or UsageError("there are too few pictures for --batch auto: give a batch")

    def speed(one: Divided) -> float:
        return sum(one.shared.shares) / one.shared.step_seconds

    most = max(map(speed, fitting))
    alike = [one for one in fitting if speed(one) * AS_FAST >= most]
    return max(alike, key=lambda one: (sum(one.shared.shares) == recipe_batch, sum(one.shared.shares)))


def plan_cards(settings: Settings, num_classes: int = 10, train_pictures: int = 0) -> tuple[Settings, Divided]:
    """Plans for one process on each of the cards named in `memory.card`, here, and the settings with what they decided.

    Raises Infeasible, UsageError."""
    config = settings.config
    size = len(cards_of(config))
    requests = {
        rank: request_of(for_process(config, rank, size), num_classes, train_pictures, joint=True)
        for rank in range(size)
    }
    planner = Planner(requests, size, lambda values: [values[rank] for rank in range(size)])
    if config.memory.auto_batch:
        divided = divide_auto(planner, config.train.batch, None)
        settings = follow_batch(settings, sum(divided.shared.shares))
    else:
        divided = divide(planner, config.train.batch)
    return settle_modes(settings, divided.choices[0].plan, requests[0].reasons), divided


def describe(shared: Shared, cards: Sequence[str]) -> list[str]:
    """The shares in words, a line for each process. `cards`: what each has, in words."""
    total, step = sum(shared.shares), shared.step_seconds
    lines = [
        f"batch {total} over {len(shared.shares)} processes, {step:.3f} s a step without communication (predicted):"
    ]
    for rank, (share, seconds) in enumerate(zip(shared.shares, shared.seconds, strict=True)):
        waits = f", waits {1 - seconds / step:.0%} of it" if seconds < 0.98 * step else ""
        lines.append(f"  process {rank}  {cards[rank]:<24} {share:>5} pictures  {seconds:.3f} s{waits}")
    return lines
