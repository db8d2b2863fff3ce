"""When what waits in host memory moves: three channels (computing; each way of the link) under a budget for the device.

A tensor leaves as soon as it is there, one after the other, and is freed at the first end of an item's forward at which
its copy is over, earlier only where memory runs out: then the computing waits. It comes back, in the order of use, as
early as the budget leaves room from then on. Gradients of parameters leave only where the backward does not fit
otherwise, as many as have to, behind the items that complete them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowmem.plan.evaluate import Span


@dataclass(frozen=True)
class LinkRates:
    """Of a link to host memory, in bytes per second, each way while the other is busy too."""

    out: float
    back: float

    def __post_init__(self) -> None:
        if not (self.out > 0 and self.back > 0):
            raise ValueError("rates are positive")

    def seconds(self, nbytes: int) -> float:
        """Out and back."""
        return nbytes / self.out + nbytes / self.back

    def __str__(self) -> str:
        out, back = (f"{rate / 1e9:.3g} GB/s" for rate in (self.out, self.back))
        return f"at {out} each way" if out == back else f"at {out} out and {back} back"


@dataclass(eq=False)
class Cargo:
    """Tensors of an item that travel together. Numbers are of items: the one that makes them, the first after whose
    forward (of gradients: before whose backward) they are freed, and the one before whose backward they are needed
    (-1: at its end)."""

    names: frozenset[str]
    nbytes: int
    item: int
    needed: int  # also the least after which it may be freed: whoever reads it in the backward does so in the forward
    gone: int = -1
    back: int = -1


@dataclass(frozen=True)
class Timeline:
    """A step with tensors away: `seconds` of forward and backward, `waiting_seconds` of it for the link."""

    cargo: Sequence[Cargo]
    seconds: float
    waiting_seconds: float

    @property
    def host_bytes(self) -> int:
        return sum(one.nbytes for one in self.cargo)


def timeline(
    spans: Sequence[Span],
    cargo: Iterable[Cargo],
    budget_bytes: int,
    rates: LinkRates,
    grads: Iterable[Cargo] = (),
) -> Timeline | None:
    """Settles when the cargo moves, under a budget for all that is on the device; None if that is too little.
    `spans`: of the items' forwards and then backwards (`Walk.spans`). `grads`: that leave too where it does not do
    without."""
    count = len(spans) // 2
    forward, backward = spans[:count], spans[count:][::-1]
    left = _leave(forward, backward[-1], cargo, budget_bytes, rates.out)
    if left is None:
        return None
    away, ends = left
    waited = ends - sum(span.seconds for span in forward)
    if not _come_back(backward, away, budget_bytes, rates.out, grads):
        return None
    seconds = _return(backward, away, rates)
    waited += seconds - sum(span.seconds for span in backward)
    return Timeline(away, ends + seconds, max(0.0, waited))  # sums round


def _leave(
    forward: Sequence[Span], turn: Span, cargo: Iterable[Cargo], budget_bytes: int, rate: float
) -> tuple[list[Cargo], float] | None:
    """The cargo that has left by the end of the forward, and when that is. `turn`: the first backward."""
    waiting = list(cargo)
    moving: list[tuple[Cargo, float]] = []  # with when its copy is over
    away: list[Cargo] = []
    now = free_at = 0.0
    missing = 0  # bytes that are away

    def make_room(span: Span, after: int) -> bool:
        """Waits for copies until the span fits."""
        nonlocal now, missing
        while span.most_bytes - missing > budget_bytes:
            first = next((pair for pair in moving if pair[0].needed <= after), None)
            if first is None:
                return False
            moving.remove(first)
            now = max(now, first[1])
            go(first[0], after)
        return True

    def go(one: Cargo, after: int) -> None:
        nonlocal missing
        one.gone = after
        missing += one.nbytes
        away.append(one)

    for number, span in enumerate(forward):
        if not make_room(span, number - 1):
            return None
        now += span.seconds
        while waiting and waiting[0].item == number:
            free_at = max(free_at, now) + waiting[0].nbytes / rate
            moving.append((waiting.pop(0), free_at))
        for pair in [pair for pair in moving if pair[1] <= now and pair[0].needed <= number]:
            moving.remove(pair)
            go(pair[0], number)
    last = len(forward) - 1
    return (away, now) if make_room(turn, last) else None


def _come_back(
    backward: Sequence[Span], away: list[Cargo], budget_bytes: int, rate: float, grads: Iterable[Cargo]
) -> bool:
    """Settles before whose backward each comes back: as early as there is room from then on. False if there is none
    when it is needed, even if gradients leave; those that do are added to what is away. `rate`: at which they do."""
    away.sort(key=lambda one: (-one.needed, -one.item))
    missing = [0] * len(backward)
    for one in away:
        for number in range(one.needed + 1, len(backward)):
            missing[number] += one.nbytes
    room = [budget_bytes - span.most_bytes + less for span, less in zip(backward, missing, strict=True)]
    if min(room) < 0:
        away += _leave_behind(backward, room, grads, rate)
        if min(room) < 0:
            return False
    latest = len(backward) - 1
    for one in away:
        one.back = one.needed
        if one.needed < 0:
            latest = min(latest, one.gone - 1)
        while one.back < latest and room[one.back + 1] >= one.nbytes:
            one.back += 1
            room[one.back] -= one.nbytes
        latest = one.back
    return True


def _leave_behind(backward: Sequence[Span], room: list[int], grads: Iterable[Cargo], rate: float) -> list[Cargo]:
    """The first of the gradients, as many as have to leave, and their room; those are freed as soon as their copies are
    over, sooner only where there is no room left: then the computing waits."""
    still, wanted = list(grads), -min(room)
    moving, gone = list[tuple[Cargo, float]](), list[Cargo]()
    now = free_at = 0.0
    for number in reversed(range(len(backward))):
        while moving and (moving[0][1] <= now or room[number] < 0):
            one, over = moving.pop(0)
            now, one.gone = max(now, over), number
            room[: number + 1] = [left + one.nbytes for left in room[: number + 1]]
            gone.append(one)
        now += backward[number].seconds
        if still and still[0].item == number and wanted > 0:
            free_at = max(free_at, now) + still[0].nbytes / rate
            wanted -= still[0].nbytes
            moving.append((still.pop(0), free_at))
    return gone


def _return(backward: Sequence[Span], away: Sequence[Cargo], rates: LinkRates) -> float:
    """Seconds of the backward; nothing begins to come back sooner than the link is free for it."""
    now = free_at = out_at = 0.0
    left, coming = list(away), list[tuple[Cargo, float]]()
    leaving = [one for one in away if one.needed < 0]
    over: dict[int, float] = {}  # by the number of the item whose gradients leave
    for number in reversed(range(len(backward))):
        now = max([now, *(over[one.item] for one in leaving if one.gone == number)])
        ends = now + backward[number].seconds
        while left and left[0].back >= number and (free_at <= ends or left[0].needed == number):
            left[0].back = number
            free_at = max(free_at, now) + left[0].nbytes / rates.back
            coming.append((left.pop(0), free_at))
        for pair in [pair for pair in coming if pair[0].needed == number]:
            coming.remove(pair)
            now = max(now, pair[1])
        now += backward[number].seconds
        for one in leaving:
            if one.item == number:
                over[number] = out_at = max(out_at, now) + one.nbytes / rates.out
    for one in left:
        one.back = -1
        free_at = max(free_at, now) + one.nbytes / rates.back
    return max(now, free_at) if leaving else now
