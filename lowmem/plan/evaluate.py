"""A schedule's time and peak under the cost model: the judge of every solver. It knows nothing of recurrences: it walks
the schedule as the executor does, event by event, and counts what exists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from lowmem.core.units import format_size
from lowmem.plan.cost import ChainCost, OptionCost
from lowmem.plan.policy import GRADS, OUTPUT, Item, Keep, Schedule, Segment


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What exists at one moment of the step, in bytes."""

    what: str  # "backward of layer1.0 under LEAN"
    fixed_bytes: int
    param_grad_bytes: int  # complete ones; those of the running stage are in temporary_bytes
    kept_bytes: int  # between forward and backward, with checkpoints and the gradient that is handed down
    temporary_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.param_grad_bytes + self.kept_bytes + self.temporary_bytes

    def __str__(self) -> str:
        sizes = (self.fixed_bytes, self.param_grad_bytes, self.kept_bytes, self.temporary_bytes)
        parts = zip(("fixed", "parameter gradients", "kept", "temporary"), sizes, strict=True)
        return f"{self.what}: " + ", ".join(f"{name} {format_size(size)}" for name, size in parts if size)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A schedule and what a step takes with it under the cost model: the one result of every solver and baseline."""

    schedule: Schedule
    peak: Moment
    seconds: float
    overhead: float | None  # over plain autograd, as a share; None if that was not measured
    waiting_seconds: float = 0.0  # of these, for what comes from the host or leaves for it (`lowmem.plan.hosting`)
    host_bytes: int = 0  # that wait there
    hidden_share: float | None = None  # of their transfer's seconds: those that nothing waits for; None: nothing moves

    @property
    def peak_bytes(self) -> int:
        return self.peak.total_bytes


def evaluate(schedule: Schedule, chain: ChainCost) -> Solution:
    """Runs the schedule on the cost model. Raises ValueError if it is not one of this chain, KeyError if a stage has no
    such policy."""
    schedule.check_covers(len(chain))
    run = Walk(chain)
    run.items(schedule.items)
    assert run.held == chain.boundary_grad_bytes[0], "everything kept is freed again"
    peak, plain, outside = run.peak, chain.plain_seconds, chain.outside_seconds
    if chain.outside_peak_bytes > peak.total_bytes:
        peak = run.moment("step of the optimizer", chain.outside_peak_bytes - chain.fixed_bytes - run.param_grads)
        peak = replace(peak, kept_bytes=0)
    return Solution(
        schedule=schedule,
        peak=peak,
        seconds=run.seconds + outside,
        overhead=None if plain is None else (run.seconds - plain) / (plain + outside),
    )


class Span(NamedTuple):
    """An item's forward, or its backward: the most that exists while it runs, in bytes, and how long it takes."""

    most_bytes: int
    seconds: float


class Walk:
    def __init__(self, chain: ChainCost) -> None:
        self.chain = chain
        self.held = chain.boundary_grad_bytes[len(chain)]  # the gradient of the output is charged from the beginning
        self.param_grads = 0
        self.seconds = 0.0
        self._most = self._span_most = -1
        self._span_seconds = 0.0
        self.spans: list[Span] = []  # of the items, forward and then backward
        self.peak = self.moment("", 0)

    def moment(self, what: str, temporary: int) -> Moment:
        """Now, with `temporary` bytes beside what is held."""
        return Moment(
            what=what,
            fixed_bytes=self.chain.fixed_bytes,
            param_grad_bytes=self.param_grads,
            kept_bytes=self.held,
            temporary_bytes=temporary,
        )

    def touch(self, what: str, stage: int, temporary: int, policy: str = "") -> None:
        total = self.held + self.param_grads + temporary
        self._span_most = max(self._span_most, total)
        if total > self._most:
            self._most = total
            self.peak = self.moment(f"{what} of {self.chain.stages[stage].name}{policy}", temporary)

    def _close(self, inside: bool) -> None:
        """Ends the forward or the backward of an item of the whole schedule."""
        if not inside:
            self.spans.append(Span(self.chain.fixed_bytes + self._span_most, self.seconds - self._span_seconds))
            self._span_most, self._span_seconds = -1, self.seconds

    def items(self, items: tuple[Item, ...], inside: bool = False) -> None:
        """Forward, then backward; the gradient of the last one's output is held on entry, that of the first one's input
        on return. `inside` a segment the last one's output is not made: nobody needs it."""
        moves = self._moves(items)
        before: list[OptionCost | None] = [None]  # per item: the option of the item before, if that drops its output
        last = items[-1] if inside else None
        for item in items:
            before.append(self.forward(item, before[-1] is not None, item is last))
            self.held -= moves.get(("gone", item.end), 0)
            self._close(inside)
        there = [option is None for option in before]  # per item: is its input held
        x = self.chain.boundary_bytes
        for index in reversed(range(len(items))):
            item, dropped = items[index], before[index]
            self.held += moves.get(("back", item.end), 0)
            self.param_grads += moves.get(("grads", item.end), 0)
            if isinstance(item, Segment) and item is not last:
                self.held -= x[item.end + 1]
            own = before[index + 1]  # what restoring its output has left is there beside its own input
            left = 0 if own is None else own.restored_bytes
            for at in self.missing(index, there, before):
                self.restore(items[at].start, before[at], left)
                there[at] = True
            self.backward(item, item is last)
            if dropped is not None:
                # what restoring left is part of the temporaries of the backward that comes next
                self.held -= x[item.start] + dropped.restored_bytes
            if index == 0 and ("grads", -1) in moves:
                self.param_grads += moves["grads", -1]
                self.touch("gradients back from the host, end", item.start, 0)
            self._close(inside)

    def _moves(self, items: tuple[Item, ...]) -> dict[tuple[str, int], int]:
        """Bytes that are gone after, and back before, an item with that last stage; of gradients those that are more
        before its backward, or (-1) after all."""
        moves: dict[tuple[str, int], int] = {}
        for item in items:
            for host in item.host:
                grads = sum(stage.host_grad_bytes for stage in self.chain.stages[item.start : item.end + 1])
                sizes = {OUTPUT: self.chain.boundary_bytes[item.end + 1], GRADS: grads}
                if isinstance(item, Keep):
                    sizes.update(self.chain.stages[item.stage].option(item.policy).host_tensors)
                nbytes = sum(sizes[name] for name in host.names)
                gone, back, sign = ("grads", "grads", -1) if GRADS in host.names else ("gone", "back", 1)
                for key, change in (((gone, host.gone), sign * nbytes), ((back, host.back), nbytes)):
                    moves[key] = moves.get(key, 0) + change
        return moves

    @staticmethod
    def missing(index: int, there: list[bool], before: list[OptionCost | None]) -> list[int]:
        """Items whose inputs have to be made again for the backward of `index`, in the order in which they are."""
        found: list[int] = []
        for at in range(index, -1, -1):
            option = before[at]
            if there[at] or option is None:
                break
            found.append(at)
            if not option.restore_reads_input:
                break
        return found[::-1]

    def restore(self, start: int, option: OptionCost | None, left: int) -> None:
        """Makes the input of a stage again, which the stage before dropped. `left`: by the restoring of the output of
        the stage whose backward it is for."""
        assert option is not None
        self.touch("restoring the input", start, option.restore_temp_bytes + left)
        self.seconds += option.restore_seconds
        self.held += self.chain.boundary_bytes[start] + option.restored_bytes

    def forward(self, item: Item, free_input: bool, last: bool) -> OptionCost | None:
        """Returns the option if it drops its output, which is then still held."""
        x = self.chain.boundary_bytes
        if isinstance(item, Keep):
            option = self.chain.stages[item.stage].option(item.policy, last)
            if not item.policy.fused:
                temporary = option.kept_bytes + option.forward_temp_bytes
                self.touch("forward", item.stage, temporary, f" under {item.policy}")
            self.seconds += option.forward_seconds
            drops = item.policy.drop_output
            self.held += option.kept_bytes + (x[item.end + 1] if drops else 0) - (x[item.start] if free_input else 0)
            return option if drops else None
        if last:  # its forward runs in its backward only
            self.held -= x[item.start] if free_input else 0
            return None
        for index in range(item.start, item.end + 1):
            stage = self.chain.stages[index]
            self.touch("fast forward", index, x[index + 1] + stage.fast_temp_bytes)
            self.seconds += stage.fast_seconds
            self.held += x[index + 1] - (x[index] if index > item.start or free_input else 0)
        return None

    def backward(self, item: Item, last: bool) -> None:
        g = self.chain.boundary_grad_bytes
        if isinstance(item, Segment):
            self.items(item.inner.items, inside=True)
            return
        stage = self.chain.stages[item.stage]
        option = stage.option(item.policy, last)
        self.touch("backward", item.stage, option.backward_temp_bytes, f" under {item.policy}")
        self.seconds += option.backward_seconds
        self.held += g[item.stage] - g[item.stage + 1] - option.kept_bytes
        self.param_grads += stage.param_grad_bytes
